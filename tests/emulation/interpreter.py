"""Triton's interpreter, made honest: bfloat16, TF32, NaN and the bounds of memory.

As it comes, the interpreter of Triton 3.7 multiplies the bits of bfloat16 as if they were integers,
truncates where hardware rounds, does not round for TF32, propagates NaN where hardware does not,
fills what a masked load leaves undefined with zeros, and lets accesses out of bounds pass.
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
        (InterpreterBuilder, "create_minnumf", _minimum_of_numbers),
        (InterpreterBuilder, "create_maxnumf", _maximum_of_numbers),
        (InterpreterBuilder, "get_bf16", _bfloat16_constant),
        (InterpreterBuilder, "create_masked_load", _masked_load),
        (InterpreterBuilder, "create_masked_store", _masked_store),
        (InterpreterBuilder, "create_atomic_rmw", _atomic_update),
        (InterpreterBuilder, "create_atomic_cas", _atomic_exchange),
        (interpreter.ReduceOps, "apply_impl", _reduce),
        (interpreter.ScanOps, "apply_impl", _scan),
        (interpreter.GridExecutor, "_init_args_hst", _arguments),
    ]
    saved = [(owner, name, vars(owner).get(name)) for owner, name, _ in patches]
    for owner, name, replacement in patches:
        setattr(owner, name, replacement)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        for owner, name, original in saved:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        language.restore()


_original_cast = InterpreterBuilder.cast_impl
_original_convert = InterpreterBuilder.create_fp_to_fp
_original_dot = InterpreterBuilder.create_dot
_original_binary = InterpreterBuilder.binary_op
_original_unary = InterpreterBuilder.unary_op
_original_load = InterpreterBuilder.create_masked_load
_original_store = InterpreterBuilder.create_masked_store
_original_update = InterpreterBuilder.create_atomic_rmw
_original_exchange = InterpreterBuilder.create_atomic_cas
_original_reduce = interpreter.ReduceOps.apply_impl
_original_scan = interpreter.ScanOps.apply_impl
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
    # Rounded once; float64 has no wider type.
    exact = _widen(x).data.astype(np.float64) * _widen(y).data + _widen(z).data
    if _is_bfloat16(z):
        return _narrow(exact.astype(np.float32))
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _minimum_of_numbers(
    self: InterpreterBuilder, left: TensorHandle, right: TensorHandle
) -> TensorHandle:
    # As it comes, the interpreter propagates NaN where a GPU does not.
    return self.binary_op(left, right, np.fmin)


def _maximum_of_numbers(
    self: InterpreterBuilder, left: TensorHandle, right: TensorHandle
) -> TensorHandle:
    return self.binary_op(left, right, np.fmax)


def _bfloat16_constant(self: InterpreterBuilder, value: float) -> TensorHandle:
    return _narrow(np.array([value]))


def _in_float32(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a reduction or a scan compute with the values of bfloat16."""

    def apply(self: Any, inputs: Any) -> Any:
        if not any(_is_bfloat16(each.handle) for each in inputs):
            return original(self, inputs)
        results = original(self, tuple(_retyped(each, _widen(each.handle)) for each in inputs))
        several = isinstance(results, tuple | list)
        narrowed = [
            _retyped(each, _narrow(each.handle.data)) if each.dtype == tl.float32 else each
            for each in (results if several else [results])
        ]
        return narrowed if several else narrowed[0]

    return apply


def _retyped(tensor: tl.tensor, handle: TensorHandle) -> tl.tensor:
    shape = [int(size) for size in tensor.shape]
    return tl.tensor(handle, tl.block_type(handle.dtype, shape) if shape else handle.dtype)


_reduce = _in_float32(_original_reduce)
_scan = _in_float32(_original_scan)


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
    limits = np.array(sorted(ranges) or [(0, 0)], np.uint64)
    _bounds.starts, _bounds.ends = limits[:, 0], limits[:, 1]
    return on_host


class _Bounds:
    """Memory of the tensors of the launch that is being interpreted."""

    starts = np.zeros(0, np.uint64)
    ends = np.zeros(0, np.uint64)

    def check(self, pointers: TensorHandle, mask: TensorHandle) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
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
    self: InterpreterBuilder,
    pointers: TensorHandle,
    mask: TensorHandle,
    other: TensorHandle | None,
    *rest: Any,
) -> TensorHandle:
    _bounds.check(pointers, mask)
    if other is None:
        # A GPU leaves there what happens to be in its registers. All bits set are NaN.
        kind = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        undefined = np.full((*np.shape(pointers.data), dtype.itemsize), 0xFF, np.uint8)
        if dtype == np.bool_:
            undefined[:] = 1
        other = TensorHandle(undefined.view(dtype)[..., 0], kind)
    return _original_load(self, pointers, mask, other, *rest)


def _atomic_update(
    self: InterpreterBuilder,
    operation: Any,
    pointers: TensorHandle,
    value: TensorHandle,
    mask: TensorHandle,
    *rest: Any,
) -> TensorHandle:
    _bounds.check(pointers, mask)
    return _original_update(self, operation, pointers, value, mask, *rest)


def _atomic_exchange(self: InterpreterBuilder, pointers: TensorHandle, *rest: Any) -> TensorHandle:
    _bounds.check(pointers, TensorHandle(np.ones_like(pointers.data, bool), tl.int1))
    return _original_exchange(self, pointers, *rest)


def _masked_store(
    self: InterpreterBuilder,
    pointers: TensorHandle,
    value: TensorHandle,
    mask: TensorHandle,
    *rest: Any,
) -> Any:
    _bounds.check(pointers, mask)
    return _original_store(self, pointers, value, mask, *rest)
