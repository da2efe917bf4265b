"""Functions that run in a process of their own, so that a crash is a failed test, not their end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parent


def run_alone(function: Callable[..., None], *arguments: str) -> None:
    """Calls a function of a test module with strings; asserts that it returns."""
    module, name = function.__module__, function.__name__
    code = f"import {module} as module; module.{name}(*{list(arguments)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout}{done.stderr}"
