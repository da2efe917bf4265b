"""Shapes, memory layouts and backends that the tests of the operators share."""

import contextlib
import itertools
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from threshnet_fast.engines import cpu

BACKENDS = (
    "reference",
    "cpu-scalar",
    *(("cpu-neon",) if platform.machine() in ("aarch64", "arm64") else ("cpu-avx2", "cpu-avx512")),
    "triton-interpreter",
    "cuda-emulated",
)


@contextlib.contextmanager
def activated(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Sets up one of BACKENDS and yields the backend's name; skips where it cannot run."""
    backend, _, variant = name.partition("-")
    if backend == "triton":
        pytest.importorskip("triton")
        from emulation.interpreter import interpreted
        from threshnet_fast.kernels import cat_bn_relu_conv, cat_conv_bn_relu  # noqa: F401

        with interpreted():
            yield backend
        return
    if backend == "cuda":
        from emulation.cuda_operators import emulated_cuda, skip_reason

        if (reason := skip_reason()) is not None:
            pytest.skip(reason)
        with emulated_cuda():
            yield backend
        return
    if backend == "cpu":
        reason = cpu.unavailable_reason()
        if reason is not None:
            pytest.skip(reason)
        monkeypatch.setenv("THRESHNET_FAST_CPU_ISA", variant)
        try:
            assert cpu.isa() == variant
        except ValueError as error:
            pytest.skip(str(error))
    yield backend


@dataclass(frozen=True)
class Case:
    """A convolution over segments."""

    channels: tuple[int, ...]
    batch: int
    size: tuple[int, int]
    out: int
    kernel: tuple[int, int]
    stride: int
    padding: int

    def __str__(self) -> str:
        return (
            f"{'+'.join(map(str, self.channels))}to{self.out}-{self.batch}x{self.size[0]}x"
            f"{self.size[1]}-k{self.kernel[0]}x{self.kernel[1]}s{self.stride}p{self.padding}"
        )

    @property
    def length(self) -> int:
        return sum(self.channels) * self.kernel[0] * self.kernel[1]

    def segments(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(self.batch, c, *self.size, dtype=dtype) for c in self.channels]

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.out, sum(self.channels), *self.kernel, dtype=dtype)


def vectors(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns a scale, some of it negative, and a shift."""
    return torch.randn(length, dtype=dtype), torch.randn(length, dtype=dtype)


# The first ones are layers of ThreshNet, cut down; the rest, every option at odd sizes.
CASES = [
    Case((32, 32, 32), 1, (14, 14), 128, (1, 1), 1, 0),
    Case((128,), 1, (7, 7), 32, (3, 3), 1, 1),
    Case((68, 40), 2, (7, 7), 68, (3, 3), 1, 1),
    Case((3,), 2, (13, 17), 32, (3, 3), 2, 1),
    Case((16, 1, 40, 3, 68), 1, (5, 3), 40, (3, 3), 1, 1),
    Case((1,), 1, (1, 1), 1, (1, 1), 1, 0),
    Case((1, 1), 3, (1, 1), 3, (3, 3), 1, 1),
    Case((16,), 3, (1, 1), 16, (3, 3), 2, 2),
    Case((40, 3), 1, (13, 17), 16, (1, 1), 2, 0),
    Case((3, 1, 16), 2, (7, 7), 68, (1, 1), 3, 2),
    Case((3, 5), 1, (5, 3), 1, (3, 3), 1, 0),
    Case((16, 16), 2, (13, 17), 40, (3, 3), 3, 2),
    Case((7,), 1, (13, 17), 16, (5, 5), 1, 2),
    Case((3, 4), 2, (7, 7), 3, (5, 5), 2, 1),
    Case((16,), 1, (7, 7), 17, (5, 5), 1, 0),
    Case((5, 6), 1, (5, 3), 16, (3, 1), 1, 1),
    Case((40,), 1, (2, 29), 33, (3, 3), 1, 1),
    Case((4,), 1, (3, 4), 8, (1, 1), 1, 3),
    Case((8, 9), 2, (16, 16), 31, (7, 7), 2, 3),
]

SMALL = Case((3, 4), 2, (5, 7), 6, (3, 3), 1, 1)


def _narrowed(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    wide = torch.full((n, c + 5, h, w), torch.nan, dtype=x.dtype)
    wide[:, 3 : 3 + c] = x
    return wide[:, 3 : 3 + c]


def _pitched(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    wide = torch.full((n, c + 5, h, w), torch.nan, dtype=x.dtype)
    wide = wide.to(memory_format=torch.channels_last)
    wide[:, 3 : 3 + c] = x
    return wide[:, 3 : 3 + c]


def _every_second(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    wide = torch.full((n, c, h, 2 * w), torch.nan, dtype=x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def _cropped(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    large = torch.full((n, c, h + 2, w + 1), torch.nan, dtype=x.dtype)
    large = large.to(memory_format=torch.channels_last)
    large[:, :, 1:-1, 1:] = x
    return large[:, :, 1:-1, 1:]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "narrowed": _narrowed,
    "narrowed_channels_last": _pitched,
    "cropped_channels_last": _cropped,
    "every_second_column": _every_second,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels_between": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_channels": lambda x: x[:, :1].expand_as(x),
    "expanded_rows": lambda x: x[:, :, :1].contiguous().expand_as(x),
    "expanded_columns": lambda x: _pitched(x[..., :1]).expand_as(x),
    "expanded_pixels": lambda x: x[:, :, :1, :1].contiguous().expand_as(x),
    "expanded_all_but_channels": lambda x: x[:1, :, :1, :1].contiguous().expand_as(x),
    "constant": lambda x: x[:1, :1, :1, :1].expand_as(x),
}
"""Functions that give a tensor of the same shape in another layout. Gaps hold NaN."""

# Sizes at which a dimension of 1 makes a layout two things at once.
LAYOUT_SHAPES = [
    (2, 3, 5, 7),
    (1, 4, 5, 7),
    (2, 1, 4, 4),
    (3, 4, 1, 1),
    (1, 1, 1, 1),
    (2, 3, 1, 6),
    (2, 3, 6, 1),
]

MIXED_LAYOUTS = [
    *((name, name) for name in LAYOUTS),
    *itertools.permutations(("contiguous", "narrowed_channels_last", "expanded_pixels"), 2),
]


def dense_strides(shape: torch.Size, channels_last: bool) -> tuple[int, int, int, int]:
    """Returns the strides of a packed tensor."""
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


class ConvolutionGradients(TorchDispatchMode):
    """Records which gradients are asked of each ``convolution_backward``: (input, weight)."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.asked.append((args[-1][0], args[-1][1]))
        return func(*args, **(kwargs or {}))


def bad_inputs(affine_of: str) -> list:
    """Returns (changed arguments, error, words of its message) for SMALL."""
    xs = [torch.randn(2, 3, 5, 7), torch.randn(2, 4, 5, 7)]
    n = 7 if affine_of == "input" else 6
    vector = torch.randn(n)
    weight = torch.randn(6, 7, 3, 3)
    half = [x.half() for x in xs]
    table = {
        "no segments": ({"xs": []}, ValueError, "xs is empty"),
        "rank 3": ({"xs": [xs[0][0], xs[1]]}, ValueError, r"xs\[0\] has 3 dimensions.*expected 4"),
        "rank 5": ({"xs": [xs[0], xs[1][None]]}, ValueError, r"xs\[1\] has 5 dimensions"),
        "batch": ({"xs": [xs[0], xs[1][:1]]}, ValueError, r"xs\[1\] has shape \[1, 4, 5, 7\]"),
        "height": ({"xs": [xs[0], xs[1][:, :, :3]]}, ValueError, r"xs\[1\].*expected \[2, C, 5, 7"),
        "width": ({"xs": [xs[0], xs[1][..., :3]]}, ValueError, r"xs\[1\].*expected \[2, C, 5, 7"),
        "device": ({"xs": [xs[0], xs[1].to("meta")]}, ValueError, r"xs\[1\] is on meta"),
        "dtypes": ({"xs": [xs[0], xs[1].double()]}, TypeError, r"xs\[1\] is torch.float64"),
        "integer": ({"xs": [x.int() for x in xs]}, TypeError, r"xs\[0\] is torch.int32"),
        "bool": ({"xs": [x > 0 for x in xs]}, TypeError, r"xs\[0\] is torch.bool"),
        "complex": ({"xs": [x + 1j for x in xs]}, TypeError, r"xs\[0\] is torch.complex64"),
        "float8": ({"xs": [x.to(torch.float8_e5m2) for x in xs]}, TypeError, "float8_e5m2"),
        "sparse": ({"xs": [x.to_sparse() for x in xs]}, TypeError, "torch.sparse_coo.*strided"),
        "no images": ({"xs": [x[:0] for x in xs]}, ValueError, r"xs\[0\] has shape \[0, 3, 5, 7\]"),
        "no rows": ({"xs": [x[:, :, :0] for x in xs]}, ValueError, r"xs\[0\] has shape.*no zero"),
        "no columns": ({"xs": [x[..., :0] for x in xs]}, ValueError, r"xs\[0\] has shape.*no zero"),
        "no channels": ({"xs": [xs[0], xs[1][:, :0]]}, ValueError, r"xs\[1\] has shape.*no zero"),
        "weight rank": ({"weight": weight[0]}, ValueError, r"weight has shape \[7, 3, 3\]"),
        "weight channels": ({"weight": weight[:, :6]}, ValueError, r"weight.*expected \[C_out, 7,"),
        "weight outputs": ({"weight": weight[:0]}, ValueError, r"weight has shape \[0, 7, 3, 3\]"),
        "weight kernel": ({"weight": weight[..., :0]}, ValueError, r"weight has shape"),
        "weight dtype": ({"weight": weight.double()}, TypeError, "weight is torch.float64"),
        "weight device": ({"weight": weight.to("meta")}, ValueError, "weight is on meta"),
        "weight layout": ({"weight": weight.to_sparse()}, TypeError, "weight is torch.sparse_coo"),
        "scale length": ({"scale": vector[1:]}, ValueError, rf"scale has shape \[{n - 1}\]"),
        "scale rank": ({"scale": vector[:, None]}, ValueError, rf"scale.*expected \[{n}\]"),
        "scale dtype": ({"scale": vector.double()}, TypeError, "scale is torch.float64"),
        "scale integer": ({"scale": vector.int()}, TypeError, "scale is torch.int32"),
        "scale device": ({"scale": vector.to("meta")}, ValueError, "scale is on meta"),
        "shift length": ({"shift": vector.repeat(2)}, ValueError, rf"shift has shape \[{2 * n}\]"),
        "shift rank": ({"shift": vector[0]}, ValueError, r"shift has shape \[\]"),
        "shift dtype": ({"shift": vector.half()}, TypeError, "shift is torch.float16"),
        "shift unlike scale": (
            {"xs": half, "weight": weight.half(), "scale": vector.half(), "shift": vector},
            TypeError,
            "shift is torch.float32: expected torch.float16, as scale",
        ),
        "stride 0": ({"stride": 0}, ValueError, "stride is 0"),
        "stride negative": ({"stride": -1}, ValueError, "stride is -1"),
        "stride huge": ({"stride": 2**40}, ValueError, "stride is 1099511627776"),
        "padding negative": ({"padding": -1}, ValueError, "padding is -1"),
        "padding huge": ({"padding": 2**40}, ValueError, "padding is 1099511627776"),
        "kernel too high": (
            {"weight": torch.randn(6, 7, 6, 3), "padding": 0},
            ValueError,
            "6x3 kernel: expected one that fits the 5x7 images of xs padded by 0",
        ),
        "kernel too wide": (
            {"weight": torch.randn(6, 7, 3, 11), "padding": 1, "stride": 2},
            ValueError,
            "3x11 kernel: expected one that fits the 5x7 images of xs padded by 1",
        ),
        "backend": ({"backend": "refrence"}, ValueError, "did you mean 'reference'"),
        "backend triton": (
            {"backend": "triton"},
            (RuntimeError, ValueError),
            "backend 'triton' (is unavailable: triton|needs tensors on cuda)",
        ),
        "backend cuda": (
            {"backend": "cuda"},
            (RuntimeError, ValueError),
            "backend 'cuda' (is unavailable: |needs tensors on cuda)",
        ),
        "cpu in half": (
            {"xs": half, "weight": weight.half(), "backend": "cpu"},
            TypeError,
            "backend 'cpu' needs torch.float32 tensors, these are torch.float16",
        ),
        "cpu in bfloat16": (
            {"xs": [x.bfloat16() for x in xs], "weight": weight.bfloat16(), "backend": "cpu"},
            TypeError,
            "backend 'cpu' needs torch.float32 tensors, these are torch.bfloat16",
        ),
        "cpu in double": (
            {"xs": [x.double() for x in xs], "weight": weight.double(), "backend": "cpu"},
            TypeError,
            "backend 'cpu' needs torch.float32 tensors, these are torch.float64",
        ),
        "triton in double": (
            {"xs": [x.double() for x in xs], "weight": weight.double(), "backend": "triton"},
            TypeError,
            "backend 'triton' needs one of torch.float16, torch.bfloat16, torch.float32",
        ),
        "cuda in double": (
            {"xs": [x.double() for x in xs], "weight": weight.double(), "backend": "cuda"},
            TypeError,
            "backend 'cuda' needs one of torch.float16, torch.bfloat16, torch.float32",
        ),
    }
    return [pytest.param(*row, id=name) for name, row in table.items()]


def bad_types() -> list:
    """Returns (changed arguments, words of the TypeError's message) that only Python can pass."""
    x = torch.randn(2, 7, 5, 7)
    table = {
        "xs a tensor": ({"xs": x}, "xs is a Tensor: expected a list or tuple"),
        "xs None": ({"xs": None}, "xs is a NoneType"),
        "xs of arrays": ({"xs": [x.numpy()]}, r"xs\[0\] is a ndarray: expected a torch.Tensor"),
        "xs with None": ({"xs": [x, None]}, r"xs\[1\] is a NoneType"),
        "scale a number": ({"scale": 1.0}, "scale is a float: expected a torch.Tensor"),
        "shift a list": ({"shift": [1.0]}, "shift is a list: expected a torch.Tensor"),
        "weight None": ({"weight": None}, "weight is a NoneType: expected a torch.Tensor"),
        "stride a pair": ({"stride": (1, 1)}, "stride is a tuple: expected an int"),
        "stride a float": ({"stride": 1.0}, "stride is a float: expected an int"),
        "stride a bool": ({"stride": True}, "stride is a bool: expected an int"),
        "padding a word": ({"padding": "same"}, "padding is a str: expected an int"),
        "backend a number": ({"backend": 1}, "backend is a int: expected one of 'auto'"),
    }
    return [pytest.param(*row, id=name) for name, row in table.items()]
