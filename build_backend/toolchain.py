"""Whether the C++ extension is going to be built, with which compiler, and against what."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

OLDEST_TORCH = (2, 10)


def compiles(command):
    """Tells whether a compiler's ``command`` makes a shared library of a C++17 file."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <string_view>\nstd::string_view::size_type size = 0;\n")
        arguments = ["-std=c++17", "-fPIC", "-shared", str(source), "-o", f"{source}.so"]
        try:
            run = subprocess.run([*command.split(), *arguments], capture_output=True, check=False)
        except OSError:
            return False
        return run.returncode == 0


@functools.cache
def find_compiler():
    """Returns the C++ compiler's command, or None where there is none that works.

    Raises:
        RuntimeError: If the environment variable CXX names one that does not work.
    """
    chosen = os.environ.get("CXX")
    if chosen:
        if not compiles(chosen):
            raise RuntimeError(f"CXX={chosen} does not compile C++17 into a shared library")
        return chosen
    found = (name for name in ("c++", "g++", "clang++") if shutil.which(name))
    return next((name for name in found if compiles(name)), None)


def pure_python_reason():
    """Returns why the extension is left out, or None where it is going to be built."""
    if os.environ.get("THRESHNET_FAST_NO_EXT", "0") not in ("", "0"):
        return "THRESHNET_FAST_NO_EXT is set"
    if find_compiler() is None:
        return "no C++17 compiler was found (tried c++, g++ and clang++; CXX names another)"
    return None


def jobs():
    """Returns how many compilers run at once: MAX_JOBS, or as many as there are processors.

    Raises:
        RuntimeError: If MAX_JOBS is no positive integer.
    """
    text = os.environ.get("MAX_JOBS")
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not text.isdecimal() or int(text) < 1:
        raise RuntimeError(f"MAX_JOBS={text} is not understood, expected a positive integer")
    return int(text)


def warnings_are_errors():
    """Tells whether a compiler's warning ends the build: never where a user installs."""
    return os.environ.get("THRESHNET_FAST_WERROR", "0") not in ("", "0")


def relative(root, paths):
    """Returns the paths relative to the source tree's folder, sorted, as setuptools wants them."""
    return sorted(path.relative_to(root).as_posix() for path in paths)
