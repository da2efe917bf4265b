"""Tensors whose storage was freed or shrunk: an error that names the tensor, never a read.

Sizes and strides outlive the storage. A crash would be the end of all tests, so that they run in a
process of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from alone import run_alone
from torch import Tensor

import threshnet_fast as tf
from threshnet_fast.autograd import Chain
from threshnet_fast.engines import cpu
from threshnet_fast.plan import lower, plan_memory, serialize
from threshnet_fast.plan.serialize_raw import serialize_raw

pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)


def free(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def shrink(tensor: Tensor) -> None:
    """All but the last element."""
    bytes_ = (tensor.storage_offset() + tensor.numel() - 1) * tensor.element_size()
    tensor.untyped_storage().resize_(bytes_)


def operators() -> tuple[list[Callable[[], list[object]]], list[Callable[..., object]]]:
    """Functions that return the arguments of a call anew, and the operators that take them."""
    ops = torch.ops.threshnet_fast_cpu
    isa = cpu.isa_code()
    arguments: list[Callable[[], list[object]]] = []
    called: list[Callable[..., object]] = []

    def add(operator: Callable[..., object], given: Callable[[], list[object]]) -> None:
        called.append(operator)
        arguments.append(given)

    add(tf.ops.cat_bn_relu_conv, lambda: [[r(2, 4, 5, 5)], r(4), r(4), r(3, 4, 3, 3)])
    add(tf.ops.cat_conv_bn_relu, lambda: [[r(2, 4, 5, 5)], r(3, 4, 3, 3), r(3), r(3)])
    # In a layout that is copied first.
    weight = (3, 3, 4, 3)
    add(
        tf.ops.cat_conv_bn_relu,
        lambda: [[r(2, 5, 4, 5).transpose(1, 2)], r(*weight).transpose(1, 2), r(3), r(3)],
    )

    model = tf.create_model("hardnet39ds").eval()
    plan = lower(model, (1, 3, 64, 64))
    description = serialize(plan, plan_memory(plan))
    program = ops.compile_plan(description, isa, 1, -1)
    packed = ops.pack_weights(program, plan.weights())
    workspace = ops.create_workspace(program, 1)
    add(lambda d: ops.compile_plan(d, isa, 1, -1), lambda: [description.clone()])
    add(ops.program_layout, lambda: [program.clone()])
    add(ops.create_workspace, lambda: [program.clone(), 1])
    add(
        lambda first, program, *weights: ops.pack_weights(program, [first, *weights]),
        lambda: [plan.weights()[0].clone(), program.clone(), *plan.weights()[1:]],
    )
    add(
        ops.run_plan, lambda: [r(1, 3, 64, 64), program.clone(), packed.clone(), aligned(workspace)]
    )

    window = [1, 4, 4, 3, 3, 1, 1]
    none = torch.empty(0)

    def given(operator: str) -> list[object]:
        rows, segment, prologue = r(16, 4), [0, 4], r(3, 4)
        maps = [rows] if operator == "convolution" else rows
        weight = {"convolution": [r(4, 4, 3, 3)], "depthwise": [r(4, 1, 3, 3)], "pool": []}
        return [maps, segment, prologue, 0, *weight[operator], window]

    for operator in ("convolution", "depthwise", "pool"):
        extra = [0, isa] if operator == "convolution" else [isa]
        of_weight = {"convolution": [4, 4, True, 0, isa], "depthwise": [4, isa], "pool": [4, isa]}
        floats = getattr(ops, f"training_{operator}_workspace")(window, *of_weight[operator])

        def forward(operator=operator, extra=extra, floats=floats) -> list[object]:
            written = [r(16, 4), 0, r(2, 4), aligned(torch.empty(floats))]
            return [*given(operator), *written, *extra]

        def backward(operator=operator, extra=extra, floats=floats) -> list[object]:
            listed = operator == "convolution"
            to = [[r(16, 4)], [0]] if listed else [r(16, 4), 0]
            shapes = {"convolution": [(4, 4, 3, 3)], "depthwise": [(4, 1, 3, 3)], "pool": []}
            gradient = [r(*shape) for shape in shapes[operator]]
            read = [*given(operator), r(16, 4), r(16, 4), 0, r(2, 4)]
            return [*read, *to, r(2, 4), *gradient, aligned(torch.empty(floats)), *extra]

        add(getattr(ops, f"training_{operator}_forward"), forward)
        add(getattr(ops, f"training_{operator}_backward"), backward)
    add(ops.normalization_prologue, lambda: [r(2, 4), 0, 4, r(4), r(4), 1e-5, r(3, 4), 0])
    add(
        ops.normalization_backward,
        lambda: [r(2, 4), 0, 4, r(4), 1e-5, r(2, 4), 0, 2, r(4), r(4), r(2, 4)],
    )
    add(ops.normalization_prologue, lambda: [r(2, 4), 0, 4, none, none, 1e-5, r(3, 4), 0])

    chain = Chain([("conv", torch.nn.Conv2d(4, 4, 1, bias=False))], 4)
    raw_description = serialize_raw(chain.plan)
    compiled_for = [1, 4, 4, True, False, True, True, 1, 0, isa]
    training = ops.training_compile(raw_description, *compiled_for)
    kept, scratch, floats, *_ = ops.training_layout(training).tolist()
    settings = torch.empty(0, 3, dtype=torch.float64)
    add(lambda d: ops.training_compile(d, *compiled_for), lambda: [raw_description.clone()])
    add(ops.training_layout, lambda: [training.clone()])
    add(
        ops.training_forward,
        lambda: [
            *(training.clone(), r(16, 4), [r(4, 4, 1, 1)], [], settings, r(kept), r(16, 4)),
            aligned(torch.empty(floats)),
        ],
    )
    add(
        ops.training_backward,
        lambda: [
            *(training.clone(), r(16, 4), r(16, 4), r(16, 4), [r(4, 4, 1, 1)], settings),
            *(torch.ones(1, dtype=torch.bool), r(kept), r(scratch)),
            aligned(torch.empty(floats)),
        ],
    )
    return arguments, called


def r(*shape: int) -> Tensor:
    return torch.rand(shape)


def aligned(like: Tensor) -> Tensor:
    memory = torch.zeros(like.numel() + 16)
    return memory[-(memory.data_ptr() // 4) % 16 :][: like.numel()]


def tensors_of(arguments: list[object]) -> list[Tensor]:
    flat = [x for item in arguments for x in (item if isinstance(item, list) else [item])]
    return [x for x in flat if isinstance(x, Tensor) and x.numel() > 0]


def check_all() -> None:
    torch.set_num_threads(1)
    calls = 0
    for given, operator in zip(*operators(), strict=True):
        operator(*given())
        for index in range(min(len(tensors_of(given())), 12)):
            for change in (free, shrink):
                arguments = given()
                change(tensors_of(arguments)[index])
                with pytest.raises(RuntimeError, match="elements, but its storage of"):
                    operator(*arguments)
                calls += 1
    assert calls > 100


def test_every_operator() -> None:
    run_alone(check_all)


def test_message() -> None:
    x, weight, vector = r(1, 4, 5, 5), r(3, 4, 3, 3), r(3)
    free(weight)
    with pytest.raises(
        RuntimeError,
        match="weight has 108 elements, but its storage of 0 bytes does not hold them: it was "
        "freed or resized",
    ):
        tf.ops.cat_conv_bn_relu([x], weight, vector, vector)
