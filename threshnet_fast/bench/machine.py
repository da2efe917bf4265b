"""What a measurement depends on besides the code: processor, GPU, versions, commit."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

__all__ = [
    "OtherLoad",
    "accelerator",
    "accelerator_libraries",
    "available_memory",
    "clocks",
    "commit",
    "distribution_version",
    "driver",
    "instruction_sets",
    "l2_bytes",
    "processor",
    "usable_processors",
]

_CPUINFO = Path("/proc/cpuinfo")
_STAT = Path("/proc/stat")
_MEMINFO = Path("/proc/meminfo")
# What limits a container, and what of it is in use: of both versions of control groups.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
_RELEVANT = ("amx", "avx", "asimd", "bf16", "f16c", "fma", "fphp", "sse4", "sve")


def _cpuinfo(*names: str) -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def processor() -> str:
    """The processor's model name, and its architecture where it has no name."""
    name = _cpuinfo("model name", "Model", "Hardware") or platform.processor()
    return " ".join(name.split()) or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """The flags of the processor that matter to numerical kernels, sorted."""
    flags = _cpuinfo("flags", "Features").split()
    return tuple(sorted({flag for flag in flags if flag.startswith(_RELEVANT)}))


def usable_processors() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes that this process may still take, without swapping; None where that is not known."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _MEMINFO.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    for limit, usage in _CGROUPS:
        # Without a limit, the newer version says "max".
        with contextlib.suppress(OSError, ValueError):
            found.append(int(limit.read_text()) - int(usage.read_text()))
    return max(0, min(found)) if found else None


class OtherLoad:
    """What other processes take of the processors between its creation and a call of ``stop``."""

    def __init__(self) -> None:
        self._before = _processor_seconds()
        self._start = time.perf_counter()

    def stop(self) -> float | None:
        """Processors that others kept busy on average; None where that cannot be known.

        The system counts all processors together: nothing can be said of a part of them.
        """
        if usable_processors() != os.cpu_count():
            return None
        now = _processor_seconds()
        seconds = time.perf_counter() - self._start
        if now is None or self._before is None or seconds <= 0:
            return None
        return max(0.0, (now - self._before) / seconds)


def _processor_seconds() -> float | None:
    """Seconds that all processors have been busy, less those of this process."""
    try:
        line = _STAT.read_text(encoding="ascii", errors="replace").splitlines()[0]
        user, nice, system, _, _, irq, softirq, steal = map(int, line.split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    own = os.times()
    return busy - own.user - own.system


def accelerator(device: torch.device) -> str:
    """The name of a GPU."""
    return str(torch.cuda.get_device_name(device))


def l2_bytes(device: torch.device) -> int:
    """The size of a GPU's second level cache; 0 where torch does not tell."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def accelerator_libraries() -> str:
    """The versions of what torch calls on a GPU, for example ``"CUDA 13.0, cuDNN 9.20.0"``."""
    versions = []
    if torch.version.hip is not None:
        versions.append(f"HIP {torch.version.hip}")
    elif torch.version.cuda is not None:
        versions.append(f"CUDA {torch.version.cuda}")
        cudnn = torch.backends.cudnn.version()
        if cudnn is not None:
            # 90100 is 9.1.0, and 8907 was 8.9.7.
            major, rest = divmod(cudnn, 10000 if cudnn >= 90000 else 1000)
            versions.append(f"cuDNN {major}.{rest // 100}.{rest % 100}")
    triton = distribution_version("triton") or distribution_version("pytorch-triton-rocm")
    if triton is not None:
        versions.append(f"Triton {triton}")
    return ", ".join(versions)


def driver(device: torch.device) -> str:
    """The version of a GPU's driver; empty where ``nvidia-smi`` does not tell."""
    (version,) = _ask_nvidia_smi(device, "driver_version") or ("",)
    return version


def clocks(device: torch.device) -> str:
    """Clocks that a GPU runs at now, of its highest, and its power limit.

    For example ``"SM 1980 of 1980 MHz, memory 2619 of 2619 MHz, 700.00 W"``; empty where
    ``nvidia-smi`` does not tell.
    """
    found = _ask_nvidia_smi(
        device,
        *("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit"),
    )
    if found is None:
        return ""
    sm, most_sm, memory, most_memory, power = found
    return f"SM {sm} of {most_sm} MHz, memory {memory} of {most_memory} MHz, {power} W"


def _ask_nvidia_smi(device: torch.device, *names: str) -> tuple[str, ...] | None:
    # The index counts visible devices only, and nvidia-smi counts all.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:
        return None
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(names)}"]
    try:
        result = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            check=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    values = tuple(value.strip() for value in result.stdout.strip().split(","))
    return values if len(values) == len(names) else None


def commit() -> str:
    """The commit of the source tree that runs, ``+`` where it was edited; empty outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if not head:
        return ""
    return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            check=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def distribution_version(name: str) -> str | None:
    """The version of an installed distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
