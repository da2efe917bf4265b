"""Tensor-core instructions of the PTX interpreter against the layouts that the PTX manual draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from emulation.programs import assemble, kernel, module
from emulation.ptx import PTXError, run_ptx

WARPS = 2
THREADS = 32 * WARPS

# Fragments as the manual gives them: row and column of element `i` of the lane with `group` =
# lane // 4 and `quarter` = lane % 4. Of B, row is along the depth.
A_16 = lambda g, q, i: (g + 8 * (i // 2 % 2), 2 * q + i % 2 + 8 * (i // 4))  # noqa: E731
B_16 = lambda g, q, i: (2 * q + i % 2 + 8 * (i // 2), g)  # noqa: E731
A_32 = lambda g, q, i: (g + 8 * (i % 2), q + 4 * (i // 2))  # noqa: E731
B_32 = lambda g, q, i: (q + 4 * i, g)  # noqa: E731
SUMS = lambda g, q, i: (g + 8 * (i // 2), 2 * q + i % 2)  # noqa: E731

Layout = Callable[[int, int, int], tuple[int, int]]


def fragments(matrices: Tensor, layout: Layout, count: int) -> Tensor:
    """Distributes ``[warps, rows, columns]`` to ``[threads, count]``."""
    result = torch.empty(len(matrices) * 32, count, dtype=matrices.dtype)
    for warp, lane, i in itertools.product(range(len(matrices)), range(32), range(count)):
        row, column = layout(lane // 4, lane % 4, i)
        result[32 * warp + lane, i] = matrices[warp, row, column]
    return result


def collected(values: Tensor, layout: Layout, rows: int, columns: int) -> Tensor:
    """The reverse of :func:`fragments`."""
    result = torch.full((len(values) // 32, rows, columns), torch.nan, dtype=values.dtype)
    for thread, i in itertools.product(range(len(values)), range(values.shape[1])):
        row, column = layout(thread % 32 // 4, thread % 4, i)
        result[thread // 32, row, column] = values[thread, i]
    return result


def registers(letter: str, first: int, count: int) -> str:
    return "{" + ", ".join(f"%{letter}{first + number}" for number in range(count)) + "}"


def load(letter: str, first: int, count: int, pointer: int) -> str:
    """Loads ``count`` words of each thread's, one after the other."""
    lines = [f"mad.wide.u32 %d1, %t, {4 * count}, %q{pointer};"]
    lines += [f"ld.global.b32 %{letter}{first + n}, [%d1+{4 * n}];" for n in range(count)]
    return "\n".join(lines)


def store(letter: str, first: int, count: int, pointer: int) -> str:
    lines = [f"mad.wide.u32 %d1, %t, {4 * count}, %q{pointer};"]
    lines += [f"st.global.b32 [%d1+{4 * n}], %{letter}{first + n};" for n in range(count)]
    return "\n".join(lines)


MMA = {
    # Type, depth, layouts, elements of A and B in a thread, shape of the sums' registers.
    "m16n8k8.row.col.f32.f16.f16.f32": (torch.float16, 8, A_16, B_16, 4, 2),
    "m16n8k16.row.col.f32.f16.f16.f32": (torch.float16, 16, A_16, B_16, 8, 4),
    "m16n8k8.row.col.f32.bf16.bf16.f32": (torch.bfloat16, 8, A_16, B_16, 4, 2),
    "m16n8k16.row.col.f32.bf16.bf16.f32": (torch.bfloat16, 16, A_16, B_16, 8, 4),
    "m16n8k4.row.col.f32.tf32.tf32.f32": (torch.float32, 4, A_32, B_32, 2, 1),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (torch.float32, 8, A_32, B_32, 4, 2),
    "m16n8k16.row.col.f16.f16.f16.f16": (torch.float16, 16, A_16, B_16, 8, 4),
}


def mma_program(name: str, *, swap: bool = False) -> str:
    dtype, _, _, _, in_a, in_b = MMA[name]
    per_word = 4 // dtype.itemsize
    a, b = in_a // per_word, in_b // per_word
    sums = 2 if name.endswith("f16.f16.f16.f16") else 4
    left = registers("r", 0, a)
    if swap:
        left = left.replace("%r0,", "%r99,").replace("%r1", "%r0").replace("%r99,", "%r1,")
    return module(
        kernel(
            f"""
            {load("r", 0, a, 0)} {load("r", 8, b, 1)} {load("f", 0, sums, 2)}
            mma.sync.aligned.{name} {registers("f", 0, sums)}, {left}, {registers("r", 8, b)},
              {registers("f", 0, sums)};
            {store("f", 0, sums, 3)}
            """,
            pointers=4,
        )
    )


def truncated(x: Tensor) -> Tensor:
    """As tensor cores read TF32 operands that nothing rounded."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def multiply(name: str, *, swap: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one product of every warp: the sums, the exact ones, and the size of the products."""
    dtype, depth, layout_a, layout_b, in_a, in_b = MMA[name]
    half_sums = name.endswith("f16.f16.f16.f16")
    a = torch.randn(WARPS, 16, depth).to(dtype)
    b = torch.randn(WARPS, depth, 8).to(dtype)
    c = torch.randn(WARPS, 16, 8).to(torch.float16 if half_sums else torch.float32)
    result = torch.full((THREADS, 4), torch.nan, dtype=c.dtype)
    memory = [fragments(a, layout_a, in_a), fragments(b, layout_b, in_b), fragments(c, SUMS, 4)]
    text = mma_program(name, swap=swap)
    assemble(text)
    run_ptx(text, "kernel", (1,), (THREADS,), [*memory, result])
    if dtype == torch.float32:
        a, b = truncated(a), truncated(b)
    exact = a.double() @ b.double() + c.double()
    size = a.double().abs() @ b.double().abs() + c.double().abs()
    return collected(result, SUMS, 16, 8).double(), exact, size


@pytest.mark.parametrize("name", MMA)
def test_mma(name: str) -> None:
    actual, exact, size = multiply(name)
    roundoff = 2.0**-11 if name.endswith("f16.f16.f16.f16") else 2.0**-22
    assert ((actual - exact).abs() <= roundoff * size).all()


@pytest.mark.parametrize("name", [name for name in MMA if "k16" in name])
def test_mma_with_swapped_registers(name: str) -> None:
    actual, exact, size = multiply(name, swap=True)
    assert ((actual - exact).abs() > 0.01 * size).any()


# Matrices in shared memory: lane 8i + r has the address of row r of matrix i.

ROWS = """
mov.u32 %r20, buffer; shr.u32 %r21, %t, 5; mad.lo.u32 %r20, %r21, 640, %r20;
mov.u32 %r22, %laneid; mad.lo.u32 %r23, %r22, 20, %r20; mad.lo.u32 %r24, %r22, 16, %r20;
"""
BUFFER = ".shared .align 16 .b8 buffer[2048];"


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count: int, transposed: bool) -> None:
    """Each thread stores its row of eight, and gets two elements of every matrix."""
    text = module(
        kernel(
            f"""
            {ROWS} {load("r", 0, 4, 0)}
            st.shared.v4.b32 [%r24], {{%r0, %r1, %r2, %r3}};
            ldmatrix.sync.aligned.m8n8.x{count}{".trans" * transposed}.shared.b16
              {registers("r", 8, count)}, [%r24];
            {store("r", 8, count, 1)}
            """,
            declarations=BUFFER,
        )
    )
    assemble(text)
    x = torch.randint(-30000, 30000, (WARPS, 4, 8, 8), dtype=torch.int16)
    y = torch.zeros(WARPS, 32, count, 2, dtype=torch.int16)
    run_ptx(text, "kernel", (1,), (THREADS,), [x, y])
    for warp, lane, matrix, half in itertools.product(
        range(WARPS), range(32), range(count), (0, 1)
    ):
        row, column = lane // 4, 2 * (lane % 4) + half
        if transposed:
            row, column = column, row
        assert y[warp, lane, matrix, half] == x[warp, matrix, row, column]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(count: int, transposed: bool) -> None:
    text = module(
        kernel(
            f"""
            {ROWS} {load("r", 8, count, 0)}
            stmatrix.sync.aligned.m8n8.x{count}{".trans" * transposed}.shared.b16
              [%r24], {registers("r", 8, count)};
            setp.lt.u32 %p1, %r22, {8 * count}; @!%p1 ret;
            ld.shared.v4.b32 {{%r0, %r1, %r2, %r3}}, [%r24];
            {store("r", 0, 4, 1)}
            """,
            declarations=BUFFER,
        )
    )
    assemble(text)
    x = torch.randint(-30000, 30000, (WARPS, 32, count, 2), dtype=torch.int16)
    y = torch.zeros(WARPS, 4, 8, 8, dtype=torch.int16)
    run_ptx(text, "kernel", (1,), (THREADS,), [x, y])
    for warp, lane, matrix, half in itertools.product(
        range(WARPS), range(32), range(count), (0, 1)
    ):
        row, column = lane // 4, 2 * (lane % 4) + half
        if transposed:
            row, column = column, row
        assert y[warp, matrix, row, column] == x[warp, lane, matrix, half]


def test_ldmatrix_is_checked() -> None:
    body = ROWS + "{} ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r8, %r9, %r10, %r11}}, [{}];"
    write = "st.shared.v4.b32 [%r24], {%r0, %r0, %r0, %r0};"

    def run(before: str, address: str) -> None:
        text = module(kernel(body.format(before, address), declarations=BUFFER))
        assemble(text)
        x = torch.zeros(4)
        run_ptx(text, "kernel", (1,), (THREADS,), [x, x])

    run(write, "%r24")
    with pytest.raises(PTXError, match="shared memory is read that nothing wrote"):
        run("", "%r24")
    with pytest.raises(PTXError, match="misaligned 16-byte access"):
        run(write, "%r24+8")
    with pytest.raises(PTXError, match="shared access out of bounds"):
        run(write, "%r24+1024")
    other = "xor.b32 %r30, %r21, 1; mov.u32 %r31, buffer; mad.lo.u32 %r31, %r30, 640, %r31;"
    other += "mad.lo.u32 %r31, %r22, 16, %r31;"
    run(write + "bar.sync 0;" + other, "%r31")
    with pytest.raises(PTXError, match="shared-memory race"):
        run(write + other, "%r31")


# Products of warp groups. Without swizzle, matrices in shared memory consist of 8x8 blocks, 128
# contiguous bytes each; here blocks along the depth are neighbours.

GROUP = f"""
mov.u32 %r20, buffer; mad.lo.u32 %r21, %t, 16, %r20;
{load("r", 0, 4, 0)} st.shared.v4.b32 [%r21], {{%r0, %r1, %r2, %r3}};
setp.lt.u32 %p1, %t, 16; @!%p1 bra B_DONE;
{load("r", 4, 4, 1)} st.shared.v4.b32 [%r21+2048], {{%r4, %r5, %r6, %r7}};
B_DONE: fence.proxy.async; bar.sync 0;
cvt.u64.u32 %d2, %r20; shr.u64 %d2, %d2, 4; or.b64 %d2, %d2, {(128 >> 4) << 16 | (256 >> 4) << 32};
add.u64 %d3, %d2, {2048 >> 4};
mov.f32 %f0, 0f3F800000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
setp.ne.u32 %p2, %t, 1000;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%f0, %f1, %f2, %f3}}, %d2, %d3, %p2, 1, 1, 0, 0;
"""
COMMIT = "wgmma.commit_group.sync.aligned;"
WAIT = "wgmma.wait_group.sync.aligned 0;"


def in_blocks(x: Tensor) -> Tensor:
    """Reorders ``[rows, 16]`` to blocks of 8x8."""
    return x.view(-1, 8, 2, 8).transpose(1, 2).contiguous()


def group_multiply(end: str, *, keep: bool = True) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(64, 16).half(), torch.randn(8, 16).half()
    y = torch.full((128, 4), 7.0)
    text = module(
        kernel(
            GROUP + end + store("f", 0, 4, 2),
            pointers=3,
            declarations=".shared .align 128 .b8 buffer[2304];",
        )
    )
    if not keep:
        text = text.replace("setp.ne.u32 %p2", "setp.eq.u32 %p2")
    assemble(text)
    run_ptx(text, "kernel", (1,), (128,), [in_blocks(a), in_blocks(b), y])
    exact = a.double() @ b.double().T + keep
    return collected(y, SUMS, 16, 8).reshape(64, 8).double(), exact


@pytest.mark.parametrize("keep", [False, True])
def test_wgmma(keep: bool) -> None:
    actual, exact = group_multiply(COMMIT + WAIT, keep=keep)
    torch.testing.assert_close(actual, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("end", ["", COMMIT, WAIT, COMMIT + WAIT.replace(" 0;", " 1;")])
def test_wgmma_results_that_are_not_waited_for(end: str) -> None:
    """They are undefined: not even what was there before."""
    actual, _ = group_multiply(end)
    assert actual.isnan().all()


def test_wgmma_operands_must_stay() -> None:
    overwrite = "st.shared.b32 [%r21], 0;"
    group_multiply(COMMIT + WAIT + "bar.sync 0;" + overwrite)
    with pytest.raises(PTXError, match="an operand changes before the product was waited for"):
        group_multiply(COMMIT + "bar.sync 0;" + overwrite + WAIT)
    # Each warp waits for its own part of the product.
    with pytest.raises(PTXError, match="shared-memory race"):
        group_multiply(COMMIT + WAIT + overwrite)


def test_wgmma_reads_are_checked() -> None:
    def run(text: str, old: str, new: str) -> None:
        assert old in text
        a = torch.zeros(64, 16).half()
        program = module(
            kernel(
                text.replace(old, new) + COMMIT + WAIT,
                pointers=3,
                declarations=".shared .align 128 .b8 buffer[2304];",
            )
        )
        assemble(program)
        run_ptx(program, "kernel", (1,), (128,), [a, a, a])

    with pytest.raises(PTXError, match="shared-memory race"):
        run(GROUP, "bar.sync 0;", "")
    with pytest.raises(PTXError, match="shared memory is read that nothing wrote"):
        run(GROUP, "@!%p1 bra B_DONE;", "bra B_DONE;")
    with pytest.raises(PTXError, match="read by another proxy without a fence"):
        run(GROUP, "fence.proxy.async;", "")
    with pytest.raises(PTXError, match="matrix descriptor out of shared memory"):
        run(GROUP, f"add.u64 %d3, %d2, {2048 >> 4};", f"add.u64 %d3, %d2, {2064 >> 4};")


def test_swizzles() -> None:
    """The four layouts of a descriptor, by the formula of the manual.

    Of 16-byte vectors numbered by the bits of their address, the swizzle of 32, 64 or 128 bytes
    adds (xor) the lowest one, two or three bits of the number of their 128-byte line to their own.
    """
    from emulation.ptx_matrix import _SharedMatrix

    rows, depth = 16, 16
    for mode, width in ((0, 16), (3, 32), (2, 64), (1, 128)):
        stride = 8 * max(width, 16) * (2 if mode == 0 else 1)
        descriptor = (1024 >> 4) | (128 >> 4) << 16 | (stride >> 4) << 32 | mode << 62
        matrix = _SharedMatrix(rows, depth, "f16", False, "")
        addresses = matrix._addresses(descriptor, 2)
        for row, column in itertools.product(range(rows), range(depth)):
            if mode == 0:
                offset = row // 8 * stride + column // 8 * 128 + row % 8 * 16 + column % 8 * 2
            elif 2 * column >= width:
                continue
            else:
                line = row // 8 * stride + row % 8 * width + 2 * column
                offset = line ^ ((line >> 7) % (width // 16)) << 4
            assert addresses[row, column] == 1024 + offset, (mode, row, column)


def test_f16_rounding_of_operands_is_exact() -> None:
    """Every float16 survives the way through a product with the identity."""
    values = np.arange(0, 0x7C00, 61, dtype=np.uint16)[:256].view(np.float16)
    a = torch.from_numpy(np.resize(values, WARPS * 256).reshape(WARPS, 16, 16).copy())
    b = torch.eye(16, 8).half().expand(WARPS, 16, 8)
    zero = torch.zeros(WARPS, 16, 8)
    result = torch.full((THREADS, 4), torch.nan)
    memory = [fragments(a, A_16, 8), fragments(b, B_16, 4), fragments(zero, SUMS, 4)]
    text = mma_program("m16n8k16.row.col.f32.f16.f16.f32")
    run_ptx(text, "kernel", (1,), (THREADS,), [*memory, result])
    assert torch.equal(collected(result, SUMS, 16, 8), a[:, :, :8].float())
