"""What a measurement depends on besides the code: processor, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

__all__ = [
    "OtherLoad",
    "commit",
    "distribution_version",
    "instruction_sets",
    "processor",
    "usable_processors",
]

_CPUINFO = Path("/proc/cpuinfo")
_STAT = Path("/proc/stat")
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
