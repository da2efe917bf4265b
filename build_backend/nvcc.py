"""The CUDA half of the build: which nvcc, for which GPUs, and the shared library that it makes.

torch's CUDAExtension refuses a torch without CUDA. What is here needs neither torch nor a GPU: the
library has no word of torch in it, and runs beside any.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

OLDEST_NVCC = (12, 0)
# ldmatrix, which the kernels are built on.
OLDEST_ARCHITECTURE = 75
# One of each generation; within a generation, the older one's code runs on the newer.
DEFAULT_ARCHITECTURES = (75, 80, 86, 90, 100, 120)

FLAGS = (
    "-std=c++17",
    "-O3",
    # Registers that spill are slow. Every version of nvcc gives them out in its own way.
    "-Xptxas=-warn-spills,-warn-lmem-usage",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra",
)
LINK_FLAGS = (
    "-shared",
    "-cudart=static",
    # A missing definition is an error here, and the static runtime stays inside.
    "-Xlinker=-z,defs",
    "-Xlinker=--exclude-libs,ALL",
)
LAUNCHERS = {"ccache", "distcc", "sccache"}


@dataclass(frozen=True)
class Architecture:
    """Machine code for one compute capability, as 90 for 9.0, and perhaps its PTX.

    ``suffix`` is ``a`` or ``f`` for the instructions of that architecture or family alone.
    """

    number: int
    suffix: str = ""
    ptx: bool = False

    @property
    def flag(self):
        """The option of nvcc."""
        name = f"{self.number}{self.suffix}"
        code = f"[compute_{name},sm_{name}]" if self.ptx else f"sm_{name}"
        return f"-gencode=arch=compute_{name},code={code}"

    def __str__(self):
        number = f"{self.number // 10}.{self.number % 10}{self.suffix}"
        return f"{number}+PTX" if self.ptx else number


def find_nvcc():
    """Returns the path of nvcc by CUDA_HOME, CUDA_PATH or PATH, in this order, or None."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        folder = os.environ.get(variable)
        if folder and (path := Path(folder, "bin", "nvcc")).is_file():
            return str(path)
    return shutil.which("nvcc")


@functools.cache
def output_of(nvcc, option):
    """Returns what nvcc prints, or None where it does not run."""
    try:
        run = subprocess.run([nvcc, option], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout if run.returncode == 0 else None


def version_of(nvcc):
    """Returns nvcc's version as (major, minor), or None where it does not tell one."""
    found = re.search(r"\brelease (\d+)\.(\d+)", output_of(nvcc, "--version") or "")
    return found and tuple(map(int, found.groups()))


def known_architectures(nvcc):
    """Returns the numbers of the architectures that nvcc compiles for, ascending."""
    text = output_of(nvcc, "--list-gpu-arch") or ""
    return sorted({int(number) for number in re.findall(r"\bcompute_(\d+)\b", text)})


def choose_architectures(text, known):
    """Returns the architectures to compile for, without repetition.

    Args:
        text: As of TORCH_CUDA_ARCH_LIST: compute capabilities such as ``8.0`` or ``9.0a``, apart
            by semicolons, commas or spaces, ``+PTX`` behind those whose PTX newer GPUs shall
            compile. Empty: the default, with PTX of the newest. Those older than the kernels
            allow are left out.
        known: Numbers of the architectures that nvcc knows.

    Raises:
        ValueError: If an entry is not understood, or nothing is left.
    """
    if not text.strip(" ;,"):
        numbers = [number for number in DEFAULT_ARCHITECTURES if number in known]
        if not numbers:
            raise ValueError(f"nvcc compiles for none of {DEFAULT_ARCHITECTURES}, only for {known}")
        return [Architecture(number, ptx=number == numbers[-1]) for number in numbers]
    chosen = {}
    for entry in re.split(r"[;,\s]+", text.strip(" ;,")):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if parts is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST={text!r}: {entry!r} is not understood, expected a compute "
                "capability such as 8.0, 9.0a or 9.0+PTX"
            )
        number, suffix, ptx = int(parts[1] + parts[2]), parts[3], parts[4] is not None
        if number < OLDEST_ARCHITECTURE:
            continue
        if number not in known:
            names = " ".join(str(Architecture(item)) for item in known)
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST={text!r}: nvcc does not compile for {entry!r}, only for "
                f"{names}"
            )
        before = chosen.get((number, suffix))
        chosen[number, suffix] = Architecture(number, suffix, ptx or bool(before and before.ptx))
    if not chosen:
        raise ValueError(
            f"TORCH_CUDA_ARCH_LIST={text!r} names no architecture of "
            f"{Architecture(OLDEST_ARCHITECTURE)} or newer, which the CUDA kernels need"
        )
    return list(chosen.values())


def left_out_reason():
    """Returns why the CUDA half is left out, or None where it is going to be built.

    Raises:
        RuntimeError: If THRESHNET_FAST_CUDA asks for it and it cannot be built.
    """
    requested = os.environ.get("THRESHNET_FAST_CUDA", "")
    if requested not in ("", "0", "1"):
        raise RuntimeError(f"THRESHNET_FAST_CUDA={requested} is not understood, expected 0 or 1")
    if requested == "0":
        return "THRESHNET_FAST_CUDA=0 is set"
    reason = _objection_to_nvcc()
    if reason is not None and requested == "1":
        raise RuntimeError(f"THRESHNET_FAST_CUDA=1 asks for the CUDA kernels, but {reason}")
    return reason


def _objection_to_nvcc():
    if sys.platform != "linux":
        return "they are built on Linux only"
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc was found (by CUDA_HOME, CUDA_PATH and PATH)"
    version = version_of(nvcc)
    if version is None:
        return f"{nvcc} does not run"
    if version < OLDEST_NVCC:
        oldest, found = (".".join(map(str, numbers)) for numbers in (OLDEST_NVCC, version))
        return f"{nvcc} is of CUDA {found}, and {oldest} or newer is needed"
    return None


def host_compiler_options(command):
    """Returns nvcc's options for the C++ compiler's ``command``, unless NVCC_CCBIN names one."""
    if os.environ.get("NVCC_CCBIN"):
        return []
    words = command.split()
    if len(words) > 1 and Path(words[0]).name in LAUNCHERS:
        del words[0]
    return [f"-ccbin={words[0]}", *(f"-Xcompiler={word}" for word in words[1:])]


class Builder:
    """Compiles sources with nvcc, several at a time, and links them; what did not change stays.

    Args:
        root: Folder in which nvcc runs; sources are relative to it.
        folder: Where the objects and the library go; kept, it makes the next build short.
        options: All of nvcc's options for compiling.
        link_options: Those for linking.
        jobs: How many compilers run at once.
    """

    def __init__(self, nvcc, root, folder, options, link_options, jobs):
        self.nvcc, self.root, self.folder = nvcc, Path(root), Path(folder)
        self.options, self.link_options, self.jobs = list(options), list(link_options), jobs

    def build(self, sources, name):
        """Returns the path of the shared library ``name`` made of ``sources``.

        Raises:
            RuntimeError: If nvcc fails, with its output.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # Two compilers a file: none waits alone for the one that takes longest.
        threads = 1 if self.jobs == 1 else max(2, self.jobs // len(sources))
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self._compile, source, threads) for source in sources]
            try:
                objects = [str(future.result()) for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        library = self.folder / name
        self._make(library, [*self.link_options, *objects], objects)
        return library

    def _compile(self, source, threads):
        target = self.folder / f"{source.replace('/', '.')}.o"
        listing = target.with_suffix(".d")
        try:
            text = listing.read_text(encoding="utf-8")
        except OSError:
            dependencies = None
        else:
            dependencies = dependencies_of(text)
        arguments = [*self.options, "-c", source, "-MMD", "-MF", str(listing)]
        self._make(target, arguments, dependencies, [f"--threads={threads}"])
        return target

    def _make(self, target, arguments, dependencies, hints=()):
        """Runs nvcc for ``target`` unless that is newer than its dependencies (None: unknown).

        Different ``arguments`` make it anew; ``hints`` are options that change nothing in it.
        """
        record = target.with_suffix(f"{target.suffix}.json")
        text = json.dumps([self.nvcc, output_of(self.nvcc, "--version"), arguments])
        if dependencies is not None and self._is_fresh(target, record, text, dependencies):
            return
        # Other processes may use the file that is there: it is replaced, not overwritten.
        scratch = target.with_name(f"{target.name}.{os.getpid()}")
        command = [self.nvcc, *arguments, *hints, "-o", str(scratch)]
        started = time.time_ns()
        print(shlex.join(command), flush=True)
        run = subprocess.run(
            command,
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if run.returncode != 0:
            scratch.unlink(missing_ok=True)
            raise RuntimeError(
                f"{shlex.join(command)}\n{run.stdout}\n{self.nvcc} failed, see above: the CUDA "
                "kernels cannot be built here. THRESHNET_FAST_CUDA=0 leaves them out"
            )
        if run.stdout.strip():
            print(run.stdout, flush=True)
        # As old as what was read: a source that changed meanwhile is compiled again.
        os.utime(scratch, ns=(started, started))
        scratch.replace(target)
        record.write_text(text, encoding="utf-8")

    def _is_fresh(self, target, record, text, dependencies):
        try:
            if record.read_text(encoding="utf-8") != text:
                return False
            made = target.stat().st_mtime_ns
            return all((self.root / path).stat().st_mtime_ns <= made for path in dependencies)
        except OSError:
            return False


def dependencies_of(listing):
    """Returns the files that a compiler's rule for make names behind the colon."""
    _, _, text = listing.replace("\\\n", " ").partition(": ")
    return [path.replace("\\ ", " ") for path in re.split(r"(?<!\\)\s+", text.strip()) if path]
