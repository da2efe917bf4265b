"""Triton's interpreter, made honest: bfloat16, TF32 and the bounds of memory.

As it comes, the interpreter of Triton 3.7 multiplies the bits of bfloat16 as if they were integers,
truncates where hardware rounds, does not round for TF32, and lets accesses out of bounds pass.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    InterpreterOptions,
    TensorHandle,
)
from triton.runtime.jit import JITFunction

from .ptx_types import bfloat16_to_float32, float32_to_bfloat16

__all__ = ["interpreted"]

_PACKAGE = "threshnet_fast.kernels"


@contextlib.contextmanager
def interpreted(*modules: ModuleType) -> Iterator[None]:
    """Runs the kernels of modules in the interpreter, on tensors in the CPU's memory.

    Args:
        modules: Whose ``@triton.jit`` functions to interpret, wherever they are imported from; none
            means all modules of this project's kernels.

    Raises:
        InterpreterError: From within the block: a kernel failed, or left the memory of its tensors.
    """
    loaded = list(sys.modules.items())
    if not modules:
        modules = tuple(module for name, module in loaded if name.startswith(_PACKAGE))
    # Some functions of the language are kernels too, tl.cdiv and tl.sum for example.
    language = tuple(module for name, module in loaded if name.startswith("triton.language"))
    before = triton.knobs.runtime.interpret
    replaced = [
        (module, name, value)
        for module in (*modules, *language)
        for name, value in list(vars(module).items())
        if isinstance(value, JITFunction)
    ]
    for module, name, value in replaced:
        setattr(module, name, _interpreted_function(value))
    triton.knobs.runtime.interpret = True
    try:
        with _patched():
            yield
    finally:
        triton.knobs.runtime.interpret = before
        for module, name, value in replaced:
            setattr(module, name, value)


_functions: dict[Callable[..., Any], InterpretedFunction] = {}


def _interpreted_function(function: JITFunction) -> InterpretedFunction:
    # Not by the JITFunction: its hash is that of its source and of all that it calls.
    if function.fn not in _functions:
        _functions[function.fn] = InterpretedFunction(function.fn)
    return _functions[function.fn]


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    # Once for the whole block: doing so for every call of a device function takes longer than most
    # of these functions, and what a call replaces in triton.language would never be put back.
    everywhere = FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    language = interpreter._patch_lang(everywhere)
    patches: list[tuple[Any, str, Any]] = [
        (interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope()),
        # As it comes, the interpreter computes for every integer operation whether it overflows,
        # and does not look at the result.
        (interpreter.interpreter_builder, "options", InterpreterOptions(sanitize_overflow=False)),
        (InterpreterBuilder, "cast_impl", _cast),
        (InterpreterBuilder, "create_fp_to_fp", _convert),
        (InterpreterBuilder, "create_dot", _dot),
        (InterpreterBuilder, "binary_op", _binary),
        (InterpreterBuilder, "unary_op", _unary),
        (InterpreterBuilder, "create_fma", _fused_multiply_add),
        (InterpreterBuilder, "create_masked_load", _masked_load),
        (InterpreterBuilder, "create_masked_store", _masked_store),
        (interpreter.GridExecutor, "_init_args_hst", _arguments),
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, replacement in patches:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)
        language.restore()


_original_cast = InterpreterBuilder.cast_impl
_original_convert = InterpreterBuilder.create_fp_to_fp
_original_dot = InterpreterBuilder.create_dot
_original_binary = InterpreterBuilder.binary_op
_original_unary = InterpreterBuilder.unary_op
_original_fma = InterpreterBuilder.create_fma
_original_load = InterpreterBuilder.create_masked_load
_original_store = InterpreterBuilder.create_masked_store
_original_arguments = interpreter.GridExecutor._init_args_hst


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle(bfloat16_to_float32(np.asarray(handle.data, np.uint16)), tl.float32)


def _narrow(values: np.ndarray) -> TensorHandle:
    return TensorHandle(float32_to_bfloat16(np.asarray(values, np.float32)), tl.bfloat16)


def _cast(self: InterpreterBuilder, source: TensorHandle, to: tl.dtype) -> TensorHandle:
    if _is_bfloat16(source) and to.scalar == tl.bfloat16:
        return source
    if _is_bfloat16(source):
        return _original_cast(self, _widen(source), to)
    if to.scalar == tl.bfloat16:
        return _narrow(source.data)
    return _original_cast(self, source, to)


def _convert(
    self: InterpreterBuilder, source: TensorHandle, to: tl.dtype, rounding: Any
) -> TensorHandle:
    if _is_bfloat16(source) or to.scalar == tl.bfloat16:
        return _cast(self, source, to)
    return _original_convert(self, source, to, rounding)


def _round_to_tf32(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _dot(
    self: InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    sums: TensorHandle,
    precision: Any,
    max_imprecise: Any,
) -> TensorHandle:
    a, b = _widen(a), _widen(b)
    if precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
        a, b = (TensorHandle(_round_to_tf32(each.data), tl.float32) for each in (a, b))
    return _original_dot(self, a, b, sums, precision, max_imprecise)


def _binary(
    self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, function: Any
) -> TensorHandle:
    if not _is_bfloat16(left):
        return _original_binary(self, left, right, function)
    result = function(_widen(left).data, _widen(right).data)
    return TensorHandle(result, tl.bfloat16) if result.dtype == bool else _narrow(result)


def _unary(self: InterpreterBuilder, argument: TensorHandle, function: Any) -> TensorHandle:
    if not _is_bfloat16(argument):
        return _original_unary(self, argument, function)
    return _narrow(function(_widen(argument).data))


def _fused_multiply_add(
    self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle
) -> TensorHandle:
    if not _is_bfloat16(z):
        return _original_fma(self, x, y, z)
    return _narrow(_widen(x).data * _widen(y).data + _widen(z).data)


def _arguments(self: Any, positional: Any, keywords: Any) -> Any:
    on_host = _original_arguments(self, positional, keywords)
    ranges: set[tuple[int, int]] = set()

    def collect(value: Any) -> None:
        if isinstance(value, tuple | list):
            for each in value:
                collect(each)
        elif isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            ranges.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))

    collect(list(on_host[0]))
    collect(list(on_host[1].values()))
    _bounds.starts, _bounds.ends = (
        np.array(column, np.uint64) for column in zip(*sorted(ranges), strict=True)
    )
    return on_host


class _Bounds:
    """Memory of the tensors of the launch that is being interpreted."""

    starts = np.zeros(0, np.uint64)
    ends = np.zeros(0, np.uint64)

    def check(self, pointers: TensorHandle, mask: TensorHandle) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, np.shape(mask.data))[mask.data.astype(bool)]
        if addresses.size == 0:
            return
        place = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        inside = (place >= 0) & (addresses + np.uint64(size) <= self.ends[np.maximum(place, 0)])
        if not inside.all():
            raise IndexError(f"{(~inside).sum()} accesses out of the bounds of every tensor")
        if (addresses % np.uint64(size)).any():
            raise IndexError(f"misaligned accesses of {size} bytes")


_bounds = _Bounds()


def _masked_load(
    self: InterpreterBuilder, pointers: TensorHandle, mask: TensorHandle, *rest: Any
) -> TensorHandle:
    _bounds.check(pointers, mask)
    return _original_load(self, pointers, mask, *rest)


def _masked_store(
    self: InterpreterBuilder,
    pointers: TensorHandle,
    value: TensorHandle,
    mask: TensorHandle,
    *rest: Any,
) -> Any:
    _bounds.check(pointers, mask)
    return _original_store(self, pointers, value, mask, *rest)
