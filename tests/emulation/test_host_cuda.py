"""The emulation of CUDA C++ on fibers: right results, and planted faults that it must find."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Sequence

import pytest
import torch
from tolerance import assert_within, dot_bound

from emulation import cuda_library
from emulation.cuda_library import Device, EmulationError, Library
from emulation.host_cuda_examples import (
    EXAMPLES,
    PATH,
    Answer,
    Bug,
    Case,
    Doubling,
    Product,
    Query,
    Sizes,
    Swap,
    case,
    poisoned,
    product_case,
    together,
)

pytestmark = pytest.mark.skipif(
    cuda_library.skip_reason() is not None, reason=str(cuda_library.skip_reason())
)

SCHEDULES = [("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)]
NAMES = ["reverse", "row_sums", "product", "doubling", "doubling_there", "swap"]

BUGS = [
    Bug(
        "missing barrier",
        "reverse",
        "  __syncthreads();\n  if (mine < length) p.y",
        "  if (mine < length) p.y",
    ),
    Bug(
        "uninitialised shared memory",
        "reverse",
        "if (mine < length) tile[mine]",
        "if (mine < length && mine != 5) tile[mine]",
    ),
    Bug(
        "barrier that a warp does not reach",
        "reverse",
        "  __syncthreads();\n  if (mine < length) p.y",
        "  if (mine < 64) __syncthreads();\n  if (mine < length) p.y",
        r"kernel examples::reverse_kernel\(examples::Reverse\), block \(\d, 0\), thread \d+, "
        r"examples\.cu:\d+: .*(exited|__syncthreads)",
    ),
    Bug(
        "barrier that a lane does not reach",
        "reverse",
        "  __syncthreads();\n  if (mine < length) p.y",
        "  if (mine != 17) __syncthreads();\n  if (mine < length) p.y",
        "exited",
    ),
    Bug(
        "different barriers",
        "reverse",
        "  __syncthreads();\n  if (mine < length) p.y",
        "  if (mine < 64)\n    __syncthreads();\n  else\n    __syncthreads();\n"
        "  if (mine < length) p.y",
        r"wait at another one, examples\.cu:\d+",
    ),
    Bug(
        "write behind shared memory",
        "reverse",
        "if (mine < length) tile[mine]",
        "if (mine == 0) tile[blockDim.x] = 0.0f;\n  if (mine < length) tile[mine]",
        r"block \(\d, 0\): byte 384 of shared memory is written, the launch asked for 384",
    ),
    Bug(
        "more shared memory than a device has",
        "reverse",
        "kReverseThreads * static_cast<int>(sizeof(float))",
        "300 * 1024",
        "307200 bytes of shared memory, expected at most 232448",
    ),
    Bug(
        "shuffle from a lane that is not in the mask",
        "row_sums",
        "__shfl_sync(kFirstLanes, sum, 0)",
        "__shfl_sync(kFirstLanes, sum, 4)",
        r"thread \d, examples\.cu:\d+: a shuffle reads lane 4, which is not in its mask",
    ),
    Bug(
        "shuffle with lanes that have exited",
        "row_sums",
        "__shfl_down_sync(kFirstLanes",
        "__shfl_down_sync(kAllLanes",
        "exited",
    ),
    Bug(
        "shuffle that a lane does not reach",
        "row_sums",
        "sum += __shfl_xor_sync",
        "if (lane != 7) sum += __shfl_xor_sync",
        r"threads wait for each other for ever.*a shuffle, examples\.cu:\d+, for threads 7",
    ),
    Bug(
        "wrong lane in a shuffle",
        "row_sums",
        "__shfl_xor_sync(kAllLanes, sum, step)",
        "__shfl_xor_sync(kAllLanes, sum, step - 1)",
    ),
    Bug(
        "missing wait",
        "product",
        "    copy_async_wait<kStages - 2>();\n",
        "",
    ),
    Bug(
        "wait for too few groups",
        "product",
        "copy_async_wait<kStages - 2>",
        "copy_async_wait<kStages - 1>",
    ),
    Bug(
        "wait behind the barrier",
        "product",
        "    copy_async_wait<kStages - 2>();\n    __syncthreads();\n",
        "    __syncthreads();\n    copy_async_wait<kStages - 2>();\n",
    ),
    Bug(
        "missing barrier of the pipeline",
        "product",
        "    copy_async_wait<kStages - 2>();\n    __syncthreads();\n",
        "    copy_async_wait<kStages - 2>();\n",
    ),
    Bug(
        "group that is not committed",
        "product",
        "begin + step * kTile, end);\n    copy_async_commit();",
        "begin + step * kTile, end);",
    ),
    Bug(
        "swizzles that do not match",
        "product",
        "load_matrices(a, a_tile + place(warp * 16 + lane % 16, k / kChunk + lane / 16))",
        "load_matrices(a, a_tile + (warp * 16 + lane % 16) * kTile + k + lane / 16 * kChunk)",
    ),
    Bug(
        "matrices that are not transposed",
        "product",
        "load_matrices_transposed",
        "load_matrices",
    ),
    Bug(
        "lane missing in a product",
        "product",
        "multiply_add<T>(sums[n / 8], a, b[0], b[1])",
        "if (lane != 3) multiply_add<T>(sums[n / 8], a, b[0], b[1])",
        r"multiply_add, while threads [\d, -]+ are at multiply_add, examples\.cu:\d+",
    ),
    Bug(
        "misaligned matrix",
        "product",
        "load_matrices(a, a_tile + place(",
        "load_matrices(a, a_tile + 1 + place(",
        r"a row of load_matrices is misaligned: byte \d+ of shared memory",
    ),
    Bug(
        "misaligned copy",
        "product",
        "copy_async_16(stage + place(",
        "copy_async_16(stage + 4 + place(",
        "the target of copy_async_16 is misaligned",
    ),
    Bug(
        "less shared memory than is used",
        "product",
        "shared_bytes = kStages * 2 * kTileElements * 2",
        "shared_bytes = kStages * 2 * kTileElements",
        r"is outside of shared memory: byte \d+ of 6144",
    ),
    Bug(
        "missing __syncwarp",
        "swap",
        "  __syncwarp();\n",
        "",
    ),
    Bug(
        "mask that lacks the thread's own lane",
        "swap",
        "__syncwarp();",
        "__syncwarp(0xFFFFFFFEu);",
        "__syncwarp, whose mask lacks the thread's own lane",
    ),
]


@functools.cache
def library() -> Library:
    loaded = cuda_library.load(sources=EXAMPLES)
    assert isinstance(loaded, Library)
    return loaded


def assert_right(result: torch.Tensor, expected: Case) -> None:
    bound = dot_bound(expected.magnitude, expected.length, torch.float32)
    assert_within(result, expected.expected, bound)


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_examples_are_right_in_every_schedule(name: str, order: str, seed: int) -> None:
    example = case(name)
    with library().schedule(order, seed):
        assert_right(example.run(library()), example)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "parts"),
    [(1, 8, 8, 1), (32, 32, 32, 1), (70, 200, 40, 3), (33, 96, 104, 7)],
)
def test_products(rows: int, depth: int, columns: int, parts: int, dtype: torch.dtype) -> None:
    example = product_case(rows, depth, columns, parts, dtype)
    assert_right(example.run(library()), example)


def test_products_of_all_float16_values() -> None:
    """The emulated tensor core takes every float16 as what it is: denormal, infinite, NaN."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = values.view(torch.float16)
    values = values[values != 0]  # of a zero's sign a sum knows nothing
    values = torch.cat([values, values.new_ones(2)]).view(-1, 32)
    example = product_case(len(values), 32, 32, 1)
    assert isinstance(example.operands, Product)
    # Each row's product with a unit vector; the others are 0, which infinity makes NaN.
    for column in (0, 9, 22, 31):
        finite = torch.where(values.isfinite(), values, 0)
        finite[:, column] = values[:, column]
        unit = torch.zeros(32, 32, dtype=torch.float16)
        unit[column, column] = 1
        example.operands.a, example.operands.b = finite, unit
        result = example.run(library())[:, column]
        torch.testing.assert_close(
            result, values[:, column].float(), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_planted_bugs_are_found(bug: Bug) -> None:
    mutated = cuda_library.load(sources=EXAMPLES, mutations=together(BUGS)[bug])
    example = case(bug.example)
    found = []
    for order, seed in SCHEDULES:
        with mutated.schedule(order, seed):
            if bug.message is not None:
                with pytest.raises(EmulationError, match=bug.message):
                    example.run(mutated)
                continue
            bound = dot_bound(example.magnitude, example.length, torch.float32)
            error = (example.run(mutated) - example.expected).abs()
            found.append(not (error <= bound).all())
    assert bug.message is not None or any(found), f"{bug} goes unnoticed in every schedule"


@pytest.mark.parametrize("threads", [-1, 0, 1025])
def test_number_of_threads(threads: int) -> None:
    with pytest.raises(EmulationError, match="threads in a block, expected 1 to 1024"):
        library().call("example_empty", Sizes(threads=threads, shared_bytes=0))


def test_device_limits_shared_memory() -> None:
    sizes = Sizes(threads=1024, shared_bytes=100 * 1024)
    library().call("example_empty", sizes)
    small = Device(architecture=86, multiprocessors=84, shared_bytes=99 * 1024)
    with (
        library().device(small),
        pytest.raises(EmulationError, match="102400 bytes of shared memory, expected at most 1013"),
    ):
        library().call("example_empty", sizes)
    library().call("example_empty", sizes)


def test_devices() -> None:
    small = Device(architecture=86, multiprocessors=84, shared_bytes=99 * 1024)
    with library().device(small):
        answer = library().call("example_query", Query(device=1), result=Answer)
    properties = answer.architecture, answer.multiprocessors, answer.shared_bytes
    assert properties == (86, 84, 99 * 1024)
    assert (answer.devices, answer.selected) == (2, 1)
    with pytest.raises(RuntimeError, match="no such device: invalid device ordinal"):
        library().call("example_query", Query(device=2), result=Answer)


def test_misaligned_vector() -> None:
    x, y = torch.randn(9), poisoned(8)
    with pytest.raises(
        EmulationError, match=r"thread 0, primitives\.cuh:\d+|thread 0, examples\.cu:\d+"
    ) as raised:
        library().call("example_doubling", Doubling(x=x[1:], y=y, vectors=2))
    assert "is not aligned to 16 bytes" in str(raised.value)
    assert y.isnan().all()


def test_misaligned_source_of_a_copy() -> None:
    example = product_case()
    assert isinstance(example.operands, Product)
    example.operands.a = torch.zeros(37 * 136 + 4, dtype=torch.float16)[4:]
    with pytest.raises(EmulationError, match="the source of copy_async_16 is misaligned"):
        example.run(library())


def test_exception_of_a_kernel_comes_out_and_leaves_nothing_behind() -> None:
    x, y = torch.randn(64), poisoned(64)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"^thrown by a thread$"):
            library().call("example_throwing", Swap(x=x, y=y))
    assert y.isnan().all()
    example = case("product")
    assert_right(example.run(library()), example)


def test_recorded_launches_do_not_run() -> None:
    example = product_case(70, 200, 40, 3, torch.bfloat16)
    with library().recorded() as launches:
        result = example.run(library())
    assert result.isnan().all()
    product, sums = launches
    assert product.kernel == "_ZN8examples14product_kernelI13__nv_bfloat16EEvNS_7ProductE"
    assert sums.kernel == "_ZN8examples16sum_parts_kernelENS_7ProductE"
    assert (product.grid, product.threads, product.shared_bytes) == ((6, 3), 64, 12288)
    assert (sums.grid, sums.threads, sums.shared_bytes) == ((44, 1), 64, 0)
    assert product.parameters == sums.parameters == bytes(example.operands)
    assert_right(example.run(library()), example)


def test_what_is_thrown_or_not_there() -> None:
    with pytest.raises(LookupError, match="this library has no example_nothing"):
        library().call("example_nothing")
    with pytest.raises(LookupError, match="example_swap takes arguments of 16 bytes and returns 0"):
        library().call("example_swap", Sizes())
    with pytest.raises(ValueError, match="order is 'backward': expected one of forward"):
        library().schedule("backward").__enter__()


def test_operands() -> None:
    x = torch.randn(4)
    window = cuda_library.Window(batch=2, stride=1)
    pool = cuda_library.Pool(
        dtype=torch.bfloat16,
        window=window,
        input=cuda_library.Segment(data=x, pitch=16, channels=16),
        output=x[1:],
    )
    assert pool.dtype == 2
    assert pool.window.batch == 2
    assert pool.input.data == x.data_ptr()
    assert pool.output == x.data_ptr() + 4
    assert len(pool.tensors) == 2
    pool.output = None
    assert pool.output is None
    assert len(pool.tensors) == 1
    with pytest.raises(AttributeError, match="Pool has no field bias"):
        pool.bias = x
    with pytest.raises(TypeError, match="output is 7: expected a tensor on the CPU, or None"):
        pool.output = 7
    with pytest.raises(TypeError, match="set data before this Segment becomes a part"):
        pool.input.data = x


def test_mutations_name_what_is_there() -> None:
    with pytest.raises(ValueError, match=r"examples\.cu has 0 times 'no such text': expected 1"):
        cuda_library.mutation(PATH, "no such text", "")
    with pytest.raises(ValueError, match="there is no csrc/cuda/nothing to mutate"):
        cuda_library.build(sources=EXAMPLES, mutations={"csrc/cuda/nothing": ""})


def test_only_what_is_mutated_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    unmutated = cuda_library.build(sources=EXAMPLES)
    commands: list[Sequence[str]] = []
    run = cuda_library._run

    def spy(arguments: Sequence[str]) -> None:
        commands.append(arguments)
        run(arguments)

    monkeypatch.setattr(cuda_library, "_run", spy)
    text = EXAMPLES[0].read_text(encoding="utf-8")
    mutations = {PATH: f"{text}// Never compiled before: {uuid.uuid4()}\n"}
    assert cuda_library.build(sources=EXAMPLES, mutations=mutations) != unmutated
    compile_examples, link = commands
    assert any(argument.endswith("examples.cu") for argument in compile_examples)
    assert "-shared" in link
    assert cuda_library.build(sources=EXAMPLES) == unmutated
    assert len(commands) == 2


def test_error_of_the_compiler_is_told() -> None:
    mutations = cuda_library.mutation(
        PATH,
        "DYNAMIC_SHARED(memory);\n  float* tile = reinterpret_cast<float*>(memory);\n"
        "  const int first",
        "__shared__ float tile[96];\n  const int first",
    )
    with pytest.raises(RuntimeError, match="only DYNAMIC_SHARED memory is emulated"):
        cuda_library.build(sources=EXAMPLES, mutations=mutations)
