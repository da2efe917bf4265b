"""Planted bugs: a kernel's source or PTX with one change, to see that the tests would notice."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType

from triton.runtime.jit import JITFunction

__all__ = ["mutated", "without_instruction"]

_PACKAGE = "threshnet_fast.kernels"


@contextlib.contextmanager
def mutated(module: ModuleType, old: str, new: str) -> Iterator[None]:
    """Replaces the functions of a module of kernels by those of a changed copy of its source.

    Use it outside of :func:`.interpreter.interpreted`, inside or outside of
    :func:`.driver.emulated`.

    Args:
        module: A module of this project's kernels.
        old: Text that its source has exactly once.
        new: What to write instead.

    Raises:
        ValueError: ``old`` is not there, or more than once: the test has to follow the kernel.
    """
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    if source.count(old) != 1:
        raise ValueError(f"{module.__name__} has {source.count(old)} times {old!r}: expected 1")
    name = f"{module.__name__}__mutated"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(source.replace(old, new), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        sys.modules[name] = copy
        replaced = []
        try:
            spec.loader.exec_module(copy)
            for user_name, user in list(sys.modules.items()):
                if not user_name.startswith(_PACKAGE) or user is copy:
                    continue
                for attribute, value in list(vars(user).items()):
                    ours = isinstance(value, JITFunction | FunctionType)
                    if ours and value is vars(module).get(attribute) and hasattr(copy, attribute):
                        replaced.append((user, attribute, value))
            for user, attribute, _ in replaced:
                setattr(user, attribute, getattr(copy, attribute))
            yield
        finally:
            for user, attribute, value in replaced:
                setattr(user, attribute, value)
            del sys.modules[name]


def without_instruction(pattern: str, number: int = 0) -> Callable[[str, str], str]:
    """Returns a rewriting of PTX that drops one instruction.

    Args:
        pattern: Regular expression of an instruction, from its opcode to before the semicolon.
        number: Which of those that match, in the order of the text.

    Returns:
        For the argument ``rewrite`` of :func:`.driver.emulated`; it raises a ValueError where there
        are fewer.
    """

    def rewrite(text: str, name: str) -> str:
        matches = list(
            re.finditer(rf"^[ \t]*(@!?%p\d+[ \t]+)?{pattern}[ \t]*;", text, re.MULTILINE)
        )
        if len(matches) <= number:
            raise ValueError(f"{name} has {len(matches)} instructions {pattern!r}: no {number}")
        match = matches[number]
        return text[: match.start()] + text[match.end() :]

    return rewrite
