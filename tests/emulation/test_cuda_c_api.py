"""The C interface: saved plans, run by a C++ program without Python on the emulated library."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from alone import run_alone

import threshnet_fast as tf
from emulation import cuda_library
from emulation.cuda_cases import available, library

pytestmark = [available, pytest.mark.usefixtures("one_thread")]

SHAPE = (2, 3, 32, 40)
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
DTYPES = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
INVALID_ARGUMENT, FAILURE = 1, 2
HEADER = cuda_library.CSRC / "threshnet_fast.h"
# Of a description: magic, version, then the shape.
BATCH_PLACE = 24 + 8 * 2


@pytest.fixture(scope="module")
def model(randomised: Callable[[torch.nn.Module], torch.nn.Module]) -> tf.ThreshNet:
    torch.manual_seed(0)
    return randomised(tf.ThreshNet79(num_classes=10)).eval()


@pytest.fixture(scope="module")
def plan(model: tf.ThreshNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "network.plan"
    tf.save_plan(model, SHAPE, path)
    return path


class Interface:
    """The C functions of the emulated library."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(library().path))
        self._library.threshnet_fast_version.restype = ctypes.c_char_p
        self._library.threshnet_fast_last_error.restype = ctypes.c_char_p

    @property
    def version(self) -> str:
        return self._library.threshnet_fast_version().decode()

    @property
    def last_error(self) -> str:
        return self._library.threshnet_fast_last_error().decode()

    def load(
        self, path: Path | None, dtype: int = FLOAT32, device: int = 0
    ) -> tuple[int, ctypes.c_void_p]:
        network = ctypes.c_void_p(1)
        name = None if path is None else bytes(path)
        return self._library.threshnet_fast_load(
            name, dtype, device, ctypes.byref(network)
        ), network

    def call(self, name: str, *arguments: object) -> int:
        return getattr(self._library, f"threshnet_fast_{name}")(*arguments)


@pytest.fixture(scope="module")
def interface() -> Interface:
    return Interface()


@pytest.fixture(scope="module")
def classify(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., subprocess.CompletedProcess]:
    """Compiles the example and returns what runs it."""
    target = tmp_path_factory.mktemp("example") / "classify"
    path = library().path
    command = [
        *(str(cuda_library.compiler()), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"),
        *(f"-I{HEADER.parent}", "-isystem", str(cuda_library.cuda_include())),
        *(str(cuda_library.ROOT / "examples/cpp/classify.cpp"), str(path), "-o", str(target)),
        f"-Wl,-rpath,{path.parent}",
    ]
    subprocess.run(command, check=True)

    def run(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [target, *map(str, arguments)], capture_output=True, text=True, check=False
        )

    return run


def test_example(model: tf.ThreshNet, plan: Path, classify, tmp_path: Path) -> None:
    x = torch.randn(SHAPE)
    images = tmp_path / "images.bin"
    x.numpy().tofile(images)
    done = classify(plan, images)
    assert done.returncode == 0, done.stderr
    y = torch.tensor([[float(word) for word in line.split()] for line in done.stdout.splitlines()])
    with torch.no_grad():
        own = model(x).double()
        exact = model.double()(x.double())
        model.float()
    assert y.shape == exact.shape
    assert (y - exact).abs().max() <= 2 * max((own - exact).abs().max(), 1e-6 * exact.abs().max())


def test_example_says_what_is_wrong(plan: Path, classify, tmp_path: Path) -> None:
    short = tmp_path / "short.bin"
    short.write_bytes(bytes(100))
    for arguments, code, text in (
        ((), 2, "usage: "),
        ((tmp_path / "nothing.plan", short), 1, "cannot open"),
        ((short, short), 1, "the file is not a saved plan"),
        ((plan, short), 1, "does not hold 7680 float32 numbers"),
    ):
        done = classify(*arguments)
        assert done.returncode == code
        assert text in done.stderr


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_run(model: tf.ThreshNet, plan: Path, interface: Interface, dtype: torch.dtype) -> None:
    status, network = interface.load(plan, DTYPES[dtype])
    assert status == 0, interface.last_error
    shapes = [(ctypes.c_int64 * 4)() for _ in range(2)]
    assert interface.call("shapes", network, *shapes) == 0
    assert [tuple(shape) for shape in shapes] == [SHAPE, (2, 10, 1, 1)]
    x = torch.randn(SHAPE).to(dtype)
    y = torch.full((2, 10), torch.nan, dtype=dtype)
    for _ in range(2):
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y))
        assert interface.call("run", network, *pointers, None) == 0
    interface.call("free", network)
    with torch.no_grad():
        exact = model.double()(x.double())
        model.float()
        error = (y - exact).abs().max()
        own = torch.finfo(dtype).eps * exact.abs().max()
    # The network is as deep as 79 roundings, which add up as squares do.
    assert error <= 79**0.5 * 4 * own


def broken(plan: Path, tmp_path: Path, edit: Callable[[bytearray], bytes]) -> Path:
    path = tmp_path / "broken.plan"
    path.write_bytes(edit(bytearray(plan.read_bytes())))
    return path


def written(place: int, number: int) -> Callable[[bytearray], bytes]:
    def edit(data: bytearray) -> bytes:
        data[place : place + 8] = struct.pack("<q", number)
        return bytes(data)

    return edit


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda data: data[:5], "the file ends too early"),
        (lambda data: data[:30], "the file ends too early"),
        (lambda data: data[:-4], "the file ends too early"),
        (lambda data: data + b"\0\0\0\0", "the file is longer than its weights"),
        (lambda data: b"X" + data[1:], "the file is not a saved plan"),
        (written(8, -1), "the file ends too early"),
        (written(8, 2**62), "the file ends too early"),
        (written(16, 2**61), "the file ends too early"),
        (written(24, 7), "this is not a plan's description"),
        (written(BATCH_PLACE, 0), "a dimension is not between 1 and 2^31 - 1"),
        (written(BATCH_PLACE, 2**31 - 1), "a buffer"),
    ],
)
def test_broken_files(
    plan: Path, interface: Interface, tmp_path: Path, edit: Callable[[bytearray], bytes], text: str
) -> None:
    status, network = interface.load(broken(plan, tmp_path, edit))
    assert status == INVALID_ARGUMENT
    assert network.value is None
    assert text in interface.last_error


def test_weights_of_other_sizes(plan: Path, interface: Interface, tmp_path: Path) -> None:
    entries, count = struct.unpack_from("<qq", plan.read_bytes(), 8)
    place = 24 + 8 * entries
    sizes = struct.unpack_from(f"<{count}q", plan.read_bytes(), place)

    def edit(data: bytearray) -> bytes:
        moved = (sizes[0] - 1, sizes[1] + 1)
        data[place : place + 16] = struct.pack("<qq", *moved)
        return bytes(data)

    status, _ = interface.load(broken(plan, tmp_path, edit))
    assert status == INVALID_ARGUMENT
    assert f"weights[0] has {sizes[0] - 1} elements, expected {sizes[0]}" in interface.last_error
    status, _ = interface.load(broken(plan, tmp_path, written(place, -1)))
    assert status == INVALID_ARGUMENT
    assert "sizes of weights are wrong" in interface.last_error


def plan_file(description: list[int], sizes: list[int]) -> bytes:
    """A file of such a description and of weights of zeros."""
    numbers = [len(description), len(sizes), *description, *sizes]
    return b"TNFPLAN1" + struct.pack(f"<{len(numbers)}q", *numbers) + bytes(4 * sum(sizes))


def one_convolution(channels: int, out: int, kernel: int, size: int) -> list[int]:
    """A description of one convolution of the network's input, without padding."""
    after = size - kernel + 1
    header = [0x4E4C5046544E54, 3, 1, channels, size, size, out, after, after, 0, 0, 1, 0, 2, 1]
    buffers = [size, size, channels, channels, -1, after, after, out, out, -2]
    step = [1, 0, 0, channels, 1, 0, out, 1, 1, 0, 0, kernel, kernel, 1, 1, 0, 0, 1, 1]
    step += [0, 0, -1, -1, -1, 0]
    return [*header, *buffers, 0, len(step) + 2, *step]


@pytest.mark.parametrize(
    ("description", "text"),
    [
        # Rounded up to whole groups, the output's channels are -2^31 in 32 bits.
        (one_convolution(1, 2**31 - 1, 1, 1), "step 0 writes over 2^24 channels"),
        (one_convolution(2**24, 2**24, 1, 1), "has over 2^31 - 1024 elements"),
        (one_convolution(2**24, 2**24, 8, 8), "the weight of step 0 has over 2^48 elements"),
        (one_convolution(2**17, 16, 2**15, 2**15), "the weight of step 0 has over 2^48 elements"),
    ],
)
def test_sizes_beyond_any_memory(
    interface: Interface, tmp_path: Path, description: list[int], text: str
) -> None:
    path = tmp_path / "large.plan"
    path.write_bytes(plan_file(description, [1000]))
    status, network = interface.load(path)
    assert status == INVALID_ARGUMENT
    assert network.value is None
    assert text in interface.last_error


def test_a_description_of_one_convolution_is_taken(interface: Interface, tmp_path: Path) -> None:
    path = tmp_path / "one.plan"
    path.write_bytes(plan_file(one_convolution(3, 16, 3, 8), [3 * 16 * 9]))
    status, network = interface.load(path)
    assert status == 0, interface.last_error
    interface.call("free", network)


HOSTILE = (0, -1, 2**31 - 1, 2**31, 2**62, 2**63 - 1)


def test_no_file_crashes(tmp_path: Path) -> None:
    run_alone(load_hostile_files, str(tmp_path))


def load_hostile_files(folder: str) -> None:
    """Loads files of which a number before the weights' elements is another."""
    random = Random(0)
    torch.manual_seed(0)
    path = Path(folder) / "network.plan"
    network = tf.ThreshNet(
        blocks=(2, 2),
        transitions=(32, 48),
        downsample=(True, False),
        growth_rates=(16, 16),
        threshold=1,
        num_classes=10,
    )
    tf.save_plan(network.eval(), (1, 3, 32, 32), path)
    data = path.read_bytes()
    entries, count = struct.unpack_from("<qq", data, 8)
    interface = Interface()
    statuses = set()
    for place in range(8, 24 + 8 * (entries + count), 8):
        for value in (*HOSTILE, random.getrandbits(63)):
            path.write_bytes(written(place, value)(bytearray(data)))
            status, network = interface.load(path)
            statuses.add(status)
            if status == 0:
                interface.call("free", network)
            else:
                assert interface.last_error
                assert network.value is None
    assert statuses >= {0, INVALID_ARGUMENT}


def test_bad_arguments(plan: Path, interface: Interface, tmp_path: Path) -> None:
    for arguments, status, text in (
        ((None,), INVALID_ARGUMENT, "path is NULL"),
        ((plan, 3), INVALID_ARGUMENT, "dtype is unknown"),
        ((plan, -1), INVALID_ARGUMENT, "dtype is unknown"),
        ((tmp_path / "none",), FAILURE, f"cannot open {tmp_path / 'none'}"),
        ((plan, FLOAT32, 9), FAILURE, "a CUDA device cannot be selected"),
    ):
        assert interface.load(*arguments)[0] == status
        assert text in interface.last_error
    assert interface.call("load", bytes(plan), 0, 0, None) == INVALID_ARGUMENT
    assert "network is NULL" in interface.last_error
    shape = (ctypes.c_int64 * 4)()
    assert interface.call("shapes", None, shape, shape) == INVALID_ARGUMENT
    assert interface.call("run", None, shape, shape, None) == INVALID_ARGUMENT
    interface.call("free", None)


@pytest.fixture
def old_device() -> Iterator[None]:
    device = cuda_library.Device(architecture=75, multiprocessors=40, shared_bytes=64 * 1024)
    with library().device(device):
        yield


@pytest.mark.usefixtures("old_device")
def test_device_without_bfloat16(plan: Path, interface: Interface) -> None:
    assert interface.load(plan, BFLOAT16)[0] == INVALID_ARGUMENT
    assert "bfloat16 needs tensor cores of compute capability 8.0" in interface.last_error
    status, network = interface.load(plan, FLOAT16)
    assert status == 0
    interface.call("free", network)


def test_version(interface: Interface) -> None:
    (written_there,) = re.findall(r'#define THRESHNET_FAST_VERSION "(.*)"', HEADER.read_text())
    assert interface.version == written_there == tf.__version__
