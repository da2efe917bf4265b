"""What the PTX interpreter reports: each check on a planted fault, and on the same without it."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

pytest.importorskip("triton")

import numpy as np
import torch

from emulation import ptx_machine, ptx_memory
from emulation.programs import assemble, kernel, module
from emulation.ptx import PTXError, UndefinedBytes, run_ptx

SHARED = ".shared .align 16 .b8 buffer[1024]; .reg .b32 %s; .reg .b32 %u;"
"""``%s`` is to hold the address of the thread's word, ``%u`` of the word of a later warp."""

PLACES = """
mov.u32 %s, buffer; mad.lo.u32 %s, %t, 4, %s;
xor.b32 %u, %t, 32; mov.u32 %r60, buffer; mad.lo.u32 %u, %u, 4, %r60;
mad.wide.u32 %d1, %t, 4, %q0;
"""


def run(
    body: str,
    *tensors: torch.Tensor,
    blocks: int = 1,
    threads: int = 64,
    races: bool = True,
    undefined: UndefinedBytes | None = None,
    **options: str,
) -> int:
    """Runs a body that ``%q0``, ... name tensors in; there are two if none are given."""
    tensors = tensors or (torch.zeros(64, dtype=torch.int32),) * 2
    text = module(kernel(body, pointers=len(tensors), declarations=SHARED, **options))
    assemble(text)
    return run_ptx(text, "kernel", (blocks,), (threads,), tensors, races=races, undefined=undefined)


# Global memory.


def words(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


@pytest.mark.parametrize(("count", "offset"), [(63, 0), (64, 4), (64, -4)])
@pytest.mark.parametrize("operation", ["ld.global.b32 %r1, [%d1]", "st.global.b32 [%d1], %r1"])
def test_out_of_bounds_by_one_element(operation: str, count: int, offset: int) -> None:
    body = "mov.b32 %r1, 0; mad.wide.s32 %d1, %t, 4, %q1; add.s64 %d1, %d1, {}; " + operation + ";"
    # Between two others: what lies beside it is not what happens to be there.
    tensors = words(64), words(count), words(64)
    message = r"out of bounds \(byte -?\d+ of the \d+ of the storage of argument 1"
    with pytest.raises(PTXError, match=message):
        run(body.format(offset), *tensors)
    run(body.format(0), words(64), words(64), words(64))


def test_out_of_bounds_by_one_byte() -> None:
    body = "cvt.u64.u32 %d1, %t; add.u64 %d1, %d1, %q0; ld.global.u8 %h1, [%d1];"
    run(body, torch.zeros(64, dtype=torch.uint8))
    with pytest.raises(PTXError, match="byte 63 of the 63 of the storage of argument 0"):
        run(body, torch.zeros(63, dtype=torch.uint8))


def test_last_vector_out_of_bounds() -> None:
    body = "mad.wide.u32 %d1, %t, 16, %q0; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];"
    run(body, words(256))
    with pytest.raises(PTXError, match="out of bounds"):
        run(body, words(255))


def test_guarded_threads_access_nothing() -> None:
    body = """
    mad.wide.u32 %d1, %t, 4, %q0; setp.lt.u32 %p1, %t, 5;
    @%p1 st.global.b32 [%d1], %t; @!%p1 mov.b32 %r1, 0; @%p1 ld.global.b32 %r1, [%d1];
    """
    y = words(5)
    run(body, y)
    assert y.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(PTXError, match="out of bounds"):
        run(body, words(4))


def test_wild_addresses() -> None:
    with pytest.raises(PTXError, match="wild address"):
        run("mov.u64 %d1, 0; ld.global.b32 %r1, [%d1];")
    with pytest.raises(PTXError, match="wild address"):
        # Never written, so whatever is in it is no address.
        run("ld.global.b32 %r1, [%d9];")


def test_every_view_of_a_storage_is_in_bounds() -> None:
    storage = words(128)
    body = "mad.wide.u32 %d1, %t, 4, %q0; ld.global.b32 %r1, [%d1+-256]; st.global.b32 [%d1], %r1;"
    storage[:64] = torch.arange(64)
    run(body, storage[64:])
    assert torch.equal(storage[:64], storage[64:])


@pytest.mark.parametrize("offset", [0, 4, 8, 12])
def test_misaligned_vector(offset: int) -> None:
    storage = words(400)
    start = -(storage.data_ptr() // 4) % 4
    view = storage[start + offset // 4 :]
    body = "mad.wide.u32 %d1, %t, 16, %q0; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];"
    if offset == 0:
        run(body, view)
    else:
        with pytest.raises(PTXError, match="misaligned 16-byte access"):
            run(body, view)


def test_uninitialised_global_memory() -> None:
    y = words(64)
    undefined = UndefinedBytes()
    undefined.add(y[10:12])
    body = "mad.wide.u32 %d1, %t, 4, %q0; ld.global.b32 %r1, [%d1];"
    run(body, y)
    with pytest.raises(PTXError, match="uninitialised global memory"):
        run(body, y, undefined=undefined)
    # What a kernel writes is initialised, also for the next kernel.
    run("setp.lt.u32 %p1, %t, 11; @!%p1 ret; " + WRITE, y, undefined=undefined)
    with pytest.raises(PTXError, match="uninitialised global memory"):
        run(body, y, undefined=undefined)
    run(WRITE + body, y, undefined=undefined)
    run(body, y, undefined=undefined)


WRITE = "mad.wide.u32 %d2, %t, 4, %q0; st.global.b32 [%d2], %t;"


def test_much_memory_behind_what_is_uninitialised() -> None:
    undefined = UndefinedBytes()
    y, z = words(64), words(100_000)
    undefined.add(y)
    body = "mad.wide.u32 %d1, %t, 4, %q{}; ld.global.b32 %r1, [%d1+{}];"
    run(body.format(1, 4 * (len(z) - 64)), y, z, undefined=undefined)
    with pytest.raises(PTXError, match="uninitialised global memory"):
        run(body.format(0, 0), y, z, undefined=undefined)


def test_strided_views_are_uninitialised_element_by_element() -> None:
    y = torch.zeros(64, 2, dtype=torch.int16)
    undefined = UndefinedBytes()
    undefined.add(y[:, 1])
    body = "mad.wide.u32 %d1, %t, 4, %q0; ld.global.b16 %h1, [%d1{}];"
    run(body.format(""), y, undefined=undefined)
    with pytest.raises(PTXError, match="uninitialised"):
        run(body.format("+2"), y, undefined=undefined)


# Memory at its own addresses, for pointers within a struct.

STRUCT = "ld.param.u64 %q0, [both]; ld.param.u64 %q1, [both+8]; ld.param.u32 %r9, [both+16];"


def run_in_place(
    body: str,
    struct_bytes: bytes,
    memory: Sequence[torch.Tensor],
    *,
    threads: int = 64,
    undefined: UndefinedBytes | None = None,
) -> int:
    """Runs a body that a struct of two pointers, ``%q0`` and ``%q1``, and ``%r9`` is given."""
    text = module(kernel(STRUCT + body, pointers=0, more=".param .align 8 .b8 both[24]"))
    assemble(text)
    arguments = [struct_bytes]
    return run_ptx(text, "kernel", (1,), (threads,), arguments, memory=memory, undefined=undefined)


def pointers(x: torch.Tensor, y: torch.Tensor, offset: int = 0) -> bytes:
    return struct.pack("<QQixxxx", x.data_ptr(), y.data_ptr(), offset)


def apart(count: int, *, gap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns words whose storages lie in one piece of memory, so many bytes between them."""
    whole = np.zeros(8 * count + gap, np.uint8)
    return tuple(
        torch.frombuffer(whole[start : start + 4 * count], dtype=torch.int32)
        for start in (0, 4 * count + gap)
    )


COPY_WORDS = """
mad.wide.u32 %d1, %t, 4, %q0; cvt.s64.s32 %d3, %r9; add.s64 %d1, %d1, %d3; mad.wide.u32 %d2, %t, 4,
%q1; ld.global.b32 %r1, [%d1]; st.global.b32 [%d2], %r1;
"""


def test_memory_in_place() -> None:
    x, y = torch.arange(100, 200, dtype=torch.int32), words(64)
    run_in_place(COPY_WORDS, pointers(x[30:], y), [x, y, torch.empty(0), x[5:]])
    assert torch.equal(y, x[30:94])


@pytest.mark.parametrize("gap", [4, 512])
def test_memory_in_place_ends_where_it_does(gap: int) -> None:
    x, y = apart(64, gap=gap)
    run_in_place(COPY_WORDS, pointers(x, y), [x, y])
    for first, offset, where in ((x, 4, "byte 256"), (x, -4, "byte -4"), (y, -4, "byte ")):
        with pytest.raises(PTXError, match=rf"out of bounds \({where}"):
            run_in_place(COPY_WORDS, pointers(first, y, offset), [x, y])
    with pytest.raises(PTXError, match="of the 256 of tensor 0"):
        run_in_place("st.global.b8 [%q0+256], %t;", pointers(x, y), [x, y])


def test_memory_in_place_is_what_lies_between_elements() -> None:
    whole, y = words(200), words(64)
    rows = whole[20:180].view(10, 16)[:, :4]
    assert rows[-1, -1].data_ptr() == whole[167].data_ptr()
    run_in_place(COPY_WORDS, pointers(whole[20:], y), [rows, y])
    run_in_place(COPY_WORDS, pointers(whole[104:], y), [y, rows])
    for start in (19, 105):
        with pytest.raises(PTXError, match=r"out of bounds \(byte -?\d+ of the 592 of tensor 1"):
            run_in_place(COPY_WORDS, pointers(whole[start:], y), [y, rows])
    # Two views of one storage, which overlap.
    run_in_place(COPY_WORDS, pointers(whole[100:], y), [rows, y, whole[100:200]])
    run_in_place(COPY_WORDS, pointers(whole[136:], y), [whole[100:200], rows, y, rows[2:4]])
    with pytest.raises(ValueError, match="arguments: expected no tensors beside memory"):
        run_ptx(module(kernel("")), "kernel", (1,), (32,), [y, y], memory=[y])


def test_memory_in_place_that_is_not_given() -> None:
    x, y = apart(64, gap=1 << 22)
    run_in_place(COPY_WORDS, pointers(x, y), [y, x])
    with pytest.raises(PTXError, match=r"global access to a wild address .*: ld\.global"):
        run_in_place(COPY_WORDS, pointers(x, y), [y])
    with pytest.raises(PTXError, match=r"global access to a wild address .*: st\.global"):
        run_in_place(COPY_WORDS, pointers(x, y), [x])
    with pytest.raises(PTXError, match="there are no allocations"):
        run_in_place(COPY_WORDS, pointers(x, y), [])


# Each thread reads from one of two places, or from between them.
SEVERAL = """
mad.wide.u32 %d1, %t, 4, %q0; mad.wide.u32 %d2, %t, 4, %q1; and.b32 %r1, %t, 1;
setp.eq.u32 %p1, %r1, 0; selp.b64 %d3, %d1, %d2, %p1; ld.global.b32 %r2, [%d3];
add.s32 %r2, %r2, 1; st.global.b32 [%d3], %r2;
"""


def test_one_access_to_several_allocations() -> None:
    x, y = apart(64, gap=68)
    run_in_place(SEVERAL, pointers(x, y), [x, y])
    run_in_place(SEVERAL, pointers(y, x), [y, x])
    assert torch.equal(x, torch.ones(64, dtype=torch.int32))
    assert torch.equal(y, torch.ones(64, dtype=torch.int32))
    for offset in (4, -4):
        text = SEVERAL.replace("%d3];", f"%d3+{offset}];")
        with pytest.raises(PTXError, match="global access out of bounds"):
            run_in_place(text, pointers(x, y), [x, y])


def test_undefined_memory_in_place() -> None:
    x, y = apart(64, gap=16)
    undefined = UndefinedBytes()
    undefined.add(y)
    with pytest.raises(PTXError, match="uninitialised global memory"):
        run_in_place(COPY_WORDS, pointers(y, x), [x, y], undefined=undefined)
    run_in_place(COPY_WORDS, pointers(x, y), [x, y], undefined=undefined)
    run_in_place(COPY_WORDS, pointers(y, x), [x, y], undefined=undefined)


def test_parameters_end_where_they_do() -> None:
    body = "mov.u64 %d1, both; mad.wide.u32 %d1, %t, 4, %d1; {} ld.param.u32 %r1, [%d1{}];"
    few = "setp.lt.u32 %p1, %t, 6; @%p1 "
    run_in_place(body.format(few, ""), bytes(24), [])
    with pytest.raises(PTXError, match="parameter out of bounds"):
        run_in_place(body.format("", ""), bytes(24), [])
    with pytest.raises(PTXError, match="parameter out of bounds"):
        run_in_place(body.format(few, "+4"), bytes(24), [])


def test_allocations_do_not_overlap() -> None:
    memory = ptx_memory.GlobalMemory()
    start = ptx_memory.GLOBAL_BASE + (1 << 30) + 8
    content = np.arange(40, dtype=np.uint8)
    assert memory.allocate(content, address=start) == start
    assert memory.allocate(content + 1, address=start + 40) == start + 40
    assert memory.allocate(content + 2, address=start - 40) == start - 40
    for place, offset in enumerate((0, 40, -40)):
        assert np.array_equal(memory.read(start + offset, 40), content + place)
    for address in (start, start - 1, start + 79, start - 79):
        with pytest.raises(ValueError, match=r"address: .* lies in another allocation"):
            memory.allocate(content, address=address)
    with pytest.raises(ValueError, match="address: expected at least 0x1000000000, got 0x1000"):
        memory.allocate(content, address=4096)


# Shared memory.


def test_shared_memory_read_before_it_is_written() -> None:
    run(PLACES + "st.shared.b32 [%s], %t; ld.shared.b32 %r1, [%s];")
    with pytest.raises(PTXError, match="shared memory is read that nothing wrote"):
        run(PLACES + "ld.shared.b32 %r1, [%s];")
    with pytest.raises(PTXError, match="shared memory is read that nothing wrote"):
        run(PLACES + "st.shared.b32 [%s], %t; bar.sync 0; ld.shared.b32 %r1, [%s+256];")


def test_shared_memory_out_of_bounds_and_misaligned() -> None:
    run(PLACES + "st.shared.b32 [%s+768], %t;")
    with pytest.raises(PTXError, match=r"shared access out of bounds \(byte 1024 of 1024\)"):
        run(PLACES + "st.shared.b32 [%s+772], %t;")
    with pytest.raises(PTXError, match="shared access out of bounds"):
        run(PLACES + "st.shared.b32 [%s+-4], %t;")
    with pytest.raises(PTXError, match="misaligned 4-byte access"):
        run(PLACES + "st.shared.b32 [%s+2], %t;")


# The same word of shared memory is written by one warp and read by another.
EXCHANGE = (
    PLACES
    + """
st.shared.b32 [%s], %t; {} ld.shared.b32 %r1, [%u]; {} st.shared.b32 [%s], %r1;
"""
)


def test_race_between_warps() -> None:
    run(EXCHANGE.format("bar.sync 0;", "bar.sync 0;"))
    with pytest.raises(
        PTXError, match=r"shared-memory race: warp \d wrote and warp \d reads the same"
    ):
        run(EXCHANGE.format("", "bar.sync 0;"))
    with pytest.raises(
        PTXError, match=r"shared-memory race: warp \d read and warp \d writes the same"
    ):
        run(EXCHANGE.format("bar.sync 0;", ""))
    run(EXCHANGE.format("", ""), races=False)


def test_no_race_within_a_warp() -> None:
    body = PLACES + "st.shared.b32 [%s], %t; xor.b32 %r1, %t, 1; mov.u32 %r2, buffer;"
    run(body + "mad.lo.u32 %r1, %r1, 4, %r2; ld.shared.b32 %r3, [%r1];")


def test_several_readers_and_then_a_writer() -> None:
    """Warps 0 and 1 read what was written before a barrier; a write after them races with both."""
    body = PLACES + "st.shared.b32 [%s], %t; bar.sync 0; ld.shared.b32 %r1, [buffer]; {}"
    body += "setp.eq.u32 %p1, %t, 0; @%p1 st.shared.b32 [buffer], 9;"
    run(body.format("bar.sync 0;"))
    with pytest.raises(PTXError, match="several warps read and warp 0 writes the same byte"):
        run(body.format(""))


def test_writes_to_one_place() -> None:
    same = PLACES + "mov.b32 %r1, 7; {} st.shared.b32 [buffer], %r1;"
    run(same.format(""))
    with pytest.raises(PTXError, match="store different values to one place"):
        run(same.format("mov.b32 %r1, %t;"))
    # One warp after the other, without a barrier between them.
    body = (
        PLACES
        + """
    setp.lt.u32 %p1, %t, 32; @%p1 st.shared.b32 [buffer], 7; @!%p1 st.shared.b32 [buffer], {};
    """
    )
    run(body.format(7))
    with pytest.raises(PTXError, match="race: warp 0 wrote and warp 1 writes the same byte"):
        run(body.format(8))
    with pytest.raises(PTXError, match="store different values to one place"):
        run("st.global.b32 [%q0], %t;")


def test_blocks_that_pass_different_numbers_of_barriers() -> None:
    """What a block has synchronised does not count for another."""
    body = (
        PLACES
        + """
    st.shared.b32 [%s], %t; setp.eq.u32 %p1, %c, {}; @%p1 bra JOIN; bar.sync 0;
    JOIN: ld.shared.b32 %r1, [%u];
    """
    )
    y = words(64)
    run(body.format(9), y, blocks=3)
    with pytest.raises(PTXError, match="shared-memory race"):
        run(body.format(1), y, blocks=3)


# The same word of global memory is written by one warp and read by another.
THROUGH_MEMORY = """
mad.lo.u32 %r1, %c, 64, %t; mad.wide.u32 %d1, %r1, 4, %q0;
xor.b32 %r2, %t, 32; mad.lo.u32 %r2, %c, 64, %r2; mad.wide.u32 %d2, %r2, 4, %q0;
st.global.b32 [%d1], %t; {} ld.global.b32 %r3, [%d2]; {} st.global.b32 [%d1], %r3;
"""


@pytest.mark.parametrize("blocks", [1, 3])
def test_race_between_warps_on_global_memory(blocks: int) -> None:
    y = words(64 * blocks)
    run(THROUGH_MEMORY.format("bar.sync 0;", "bar.sync 0;"), y, blocks=blocks)
    assert torch.equal(y.view(-1, 64)[0], torch.arange(64, dtype=torch.int32) ^ 32)
    message = "warp . writes and warp . of the same block reads a byte"
    for barriers in (("", "bar.sync 0;"), ("bar.sync 0;", "")):
        with pytest.raises(PTXError, match=message):
            run(THROUGH_MEMORY.format(*barriers), y, blocks=blocks)
        run(THROUGH_MEMORY.format(*barriers), y, blocks=blocks, races=False)


# Every second block jumps over a barrier: whole blocks, or after their threads went apart. Another
# barrier follows for those that did.
JUMPS = {
    "together": """
    and.b32 %r5, %c, 1; setp.eq.u32 %p1, %r5, 0; @%p1 bra JOIN; bar.sync 0;
    JOIN: setp.ne.u32 %p1, %r5, 0; @%p1 bra OVER; {} OVER:
    """,
    "apart": """
    and.b32 %r5, %c, 1; setp.eq.u32 %p1, %r5, 1; setp.lt.u32 %p2, %t, 7;
    @%p2 bra FIRST; @%p1 bra JOIN;
    FIRST: @%p1 bra JOIN; bar.sync 0;
    JOIN: @!%p1 bra OVER; {} OVER:
    """,
}


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("memory", ["shared", "global"])
def test_only_blocks_that_pass_a_barrier_are_synchronised(jump: str, memory: str) -> None:
    """Also when only some threads access the memory."""
    right, wrong = (JUMPS[jump].format(barrier) for barrier in ("bar.sync 0;", ""))
    program = EXCHANGE if memory == "shared" else THROUGH_MEMORY
    some = program.replace("ld.", "setp.lt.u32 %p3, %t, 9; @%p3 ld.")
    for text in (program, some):
        run(text.format(right, "bar.sync 0;"), words(192), blocks=3)
        with pytest.raises(PTXError, match=f"{memory}-memory race"):
            run(text.format(wrong, "bar.sync 0;"), words(192), blocks=3)


def test_warps_that_write_the_same_to_global_memory() -> None:
    body = """
    setp.lt.u32 %p1, %t, 32; @%p1 st.global.b32 [%q0], 7; @!%p1 st.global.b32 [%q0], {};
    """
    run(body.format(7), words(1))
    with pytest.raises(PTXError, match="warps of a block write different values"):
        run(body.format(8), words(1))
    run(body.format(8).replace("@!%p1", "bar.sync 0; @!%p1"), words(1))


# Asynchronous copies.

COPY = PLACES + "cp.async.ca.shared.global [%s], [%d1], 4;"


def test_copies_land_at_their_wait() -> None:
    x, y = torch.arange(64, dtype=torch.int32), words(64)
    body = COPY + "cp.async.commit_group; cp.async.wait_group 0; ld.shared.b32 %r1, [%s];"
    run(body + "mad.wide.u32 %d2, %t, 4, %q1; st.global.b32 [%d2], %r1;", x, y)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    "synchronisation",
    [
        "",
        "cp.async.commit_group;",
        "cp.async.commit_group; cp.async.wait_group 1;",
        # A wait for what is committed does not include what is not.
        "cp.async.wait_group 0;",
    ],
)
def test_copies_that_are_not_waited_for(synchronisation: str) -> None:
    with pytest.raises(PTXError, match="read before its copy was waited for"):
        run(COPY + synchronisation + "ld.shared.b32 %r1, [%s];")


def test_wait_all_includes_what_is_not_committed() -> None:
    run(COPY + "cp.async.wait_all; ld.shared.b32 %r1, [%s];")


@pytest.mark.parametrize(("pending", "right"), [(0, True), (1, True), (2, False)])
def test_two_stages(pending: int, right: bool) -> None:
    body = COPY + "cp.async.commit_group; cp.async.ca.shared.global [%s+256], [%d1], 4;"
    body += f"cp.async.commit_group; cp.async.wait_group {pending}; ld.shared.b32 %r1, [%s];"
    if right:
        run(body)
    else:
        with pytest.raises(PTXError, match="read before its copy was waited for"):
            run(body)


def test_copies_of_other_warps_need_a_barrier_too() -> None:
    body = COPY + "cp.async.commit_group; cp.async.wait_group 0; {} ld.shared.b32 %r1, [%u];"
    run(body.format("bar.sync 0;"))
    with pytest.raises(PTXError, match="shared-memory race"):
        run(body.format(""))


def test_buffer_reused_before_all_have_read_it() -> None:
    body = PLACES + "st.shared.b32 [%s], %t; bar.sync 0; ld.shared.b32 %r1, [%u]; {}"
    body += "cp.async.ca.shared.global [%s], [%d1], 4;"
    run(body.format("bar.sync 0;"))
    with pytest.raises(PTXError, match="shared-memory race"):
        run(body.format(""))


def test_writes_to_the_target_of_a_copy() -> None:
    with pytest.raises(PTXError, match="written while a copy to it is in flight"):
        run(COPY + "st.shared.b32 [%s], %t;")
    with pytest.raises(PTXError, match="written while a copy to it is in flight"):
        run(COPY + "cp.async.ca.shared.global [%s], [%d1], 4;")


def test_two_warps_copy_to_one_place() -> None:
    body = PLACES + "and.b32 %r1, %t, {}; mov.u32 %r2, buffer; mad.lo.u32 %r1, %r1, 4, %r2;"
    body += "cp.async.ca.shared.global [%r1], [%d1], 4;"
    run(body.format(63))
    with pytest.raises(PTXError, match="shared-memory race"):
        run(body.format(31))


def test_copies_of_threads_that_went_apart() -> None:
    """One warp copies and waits while the other one does something else, or waits for less."""
    x, y = torch.arange(1, 65, dtype=torch.int32), words(64)
    body = (
        PLACES
        + """
    setp.lt.u32 %p1, %t, 32; @%p1 bra ONE;
    cp.async.ca.shared.global [%s], [%d1], 4; cp.async.commit_group;
    cp.async.ca.shared.global [%s+256], [%d1], 4; cp.async.commit_group;
    cp.async.wait_group {}; bra JOIN;
    ONE: cp.async.ca.shared.global [%s], [%d1], 4; cp.async.commit_group; cp.async.wait_group {};
    JOIN: ld.shared.b32 %r1, [%s]; mad.wide.u32 %d2, %t, 4, %q1; st.global.b32 [%d2], %r1;
    """
    )
    for pending in ((0, 0), (1, 0)):
        y.zero_()
        run(body.format(*pending), x, y)
        assert torch.equal(x, y)
    for pending in ((2, 0), (0, 1)):
        with pytest.raises(PTXError, match="read before its copy was waited for"):
            run(body.format(*pending), x, y)
    # All threads issue together, each warp waits on its own.
    body = (
        COPY
        + """
    cp.async.commit_group; setp.lt.u32 %p1, %t, 32; @%p1 bra ONE; cp.async.wait_group {};
    ONE: ld.shared.b32 %r1, [%s{}]; cp.async.wait_group 0; ld.shared.b32 %r1, [%s];
    """
    )
    with pytest.raises(PTXError, match="read before its copy was waited for"):
        run(body.format(0, ""), x)
    run(body.format(0, "").replace("ONE: ld", "bra TWO; ONE: cp.async.wait_group 0; TWO: ld"), x)


def test_copies_fill_with_zeros() -> None:
    x, y = torch.arange(1, 257, dtype=torch.int32), torch.full((256,), -1, dtype=torch.int32)
    body = """
    mov.u32 %r1, buffer; mad.lo.u32 %r1, %t, 16, %r1; mad.wide.u32 %d1, %t, 16, %q0;
    and.b32 %r2, %t, 3; mul.lo.u32 %r2, %r2, 4; setp.eq.u32 %p1, %r2, 12; @%p1 mov.u32 %r2, 16;
    cp.async.cg.shared.global [%r1], [%d1], 16, %r2; cp.async.wait_all;
    ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r1];
    mad.wide.u32 %d2, %t, 16, %q1; st.global.v4.b32 [%d2], {%r3, %r4, %r5, %r6};
    """
    run(body, x, y)
    read = torch.tensor([0, 1, 2, 4]).repeat(16)
    expected = x.view(64, 4) * (torch.arange(4) < read[:, None])
    assert torch.equal(y.view(64, 4), expected.int())


def test_copies_are_in_bounds_as_far_as_they_read() -> None:
    body = PLACES + "mov.u32 %r1, {}; setp.lt.u32 %p1, %t, 50; @!%p1 mov.u32 %r1, 0;"
    body += "cp.async.ca.shared.global [%s], [%d1], 4, %r1; cp.async.wait_all;"
    run(body.format(4), words(50))
    with pytest.raises(PTXError, match="out of bounds"):
        run(body.format(4), words(49))
    with pytest.raises(PTXError, match="reads more than it writes"):
        run(body.format(8), words(64))


# Barriers, warps and loops.


def test_divergent_barrier() -> None:
    run("setp.lt.u32 %p1, %t, 64; @%p1 bar.sync 0;")
    with pytest.raises(PTXError, match="divergent barrier"):
        run("setp.lt.u32 %p1, %t, 63; @%p1 bra A; bra B; A: bar.sync 0; B: mov.b32 %r1, 0;")
    with pytest.raises(PTXError, match="divergent barrier"):
        run("setp.lt.u32 %p1, %t, 32; @%p1 bar.sync 0;")
    with pytest.raises(PTXError, match="some threads of the block have ended"):
        run("setp.lt.u32 %p1, %t, 32; @%p1 ret; bar.sync 0;")
    with pytest.raises(PTXError, match="wait at different barriers"):
        run("setp.lt.u32 %p1, %t, 32; @%p1 bra A; bar.sync 0; ret; A: bar.sync 0;")


def test_barrier_in_a_branch_that_all_take() -> None:
    """Threads of a block that went apart and met again, and whole blocks that went apart."""
    run(
        """
        setp.lt.u32 %p1, %t, 9; @%p1 bra A; add.u32 %r1, %t, 1; A: bar.sync 0;
        setp.lt.u32 %p2, %c, 1; @%p2 bra B; bar.sync 0; B: bar.sync 0;
        """,
        blocks=3,
    )


def test_threads_that_end_apart() -> None:
    y = words(64)
    run(
        """
        mad.wide.u32 %d1, %t, 4, %q0; setp.lt.u32 %p1, %t, 5; @%p1 bra A; st.global.b32 [%d1], 1;
        setp.lt.u32 %p2, %t, 40; @%p2 ret; st.global.b32 [%d1], 2; bra B;
        A: st.global.b32 [%d1], 3; B: mov.u32 %r1, 0;
        """,
        y,
    )
    assert y.tolist() == [3] * 5 + [1] * 35 + [2] * 24


def test_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx_machine, "_MAX_STEPS", 1000)
    with pytest.raises(PTXError, match="an endless loop"):
        run("A: add.u32 %r1, %r1, 1; bra A;")
    with pytest.raises(PTXError, match="an endless loop"):
        run("setp.eq.u32 %p1, %t, 3; A: add.u32 %r1, %r1, 1; @%p1 bra A;")


@pytest.mark.parametrize(
    "instruction",
    [
        "shfl.sync.bfly.b32 %r1, %t, 1, 31, -1",
        "vote.sync.any.pred %p2, %p3, -1",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%s]",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4},"
        " {%r5,%r6}, {%f1,%f2,%f3,%f4}",
    ],
)
def test_inactive_lanes(instruction: str) -> None:
    body = f"""
    mov.u32 %s, buffer; setp.eq.u32 %p3, %t, %t; st.shared.v4.b32 [%s], {{%r1, %r1, %r1, %r1}};
    bar.sync 0; setp.lt.u32 %p1, %t, COUNT; @!%p1 bra END; {instruction}; END: mov.b32 %r2, 0;
    """
    run(body.replace("COUNT", "32"))
    with pytest.raises(PTXError, match="inactive lane"):
        run(body.replace("COUNT", "31"))


def test_division_by_zero_and_trap() -> None:
    with pytest.raises(PTXError, match="division by zero"):
        run("div.s32 %r1, %t, %t;")
    run("setp.ne.u32 %p1, %t, 0; @%p1 div.s32 %r1, %t, %t;")
    with pytest.raises(PTXError, match="trapped"):
        run("setp.eq.u32 %p1, %t, 7; @%p1 trap;")


# Races between blocks.

# Block c writes the words from 32 * {} * c on and reads those from {} bytes on.
BETWEEN = """
mad.lo.u32 %r1, %c, {}, %t; mad.wide.u32 %d1, %r1, 4, %q0; {}
"""


@pytest.mark.parametrize("threads_at_once", [8192, 64])
def test_race_between_blocks(threads_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between blocks that the interpreter does not run at the same time."""
    monkeypatch.setitem(ptx_machine.launch.__kwdefaults__, "threads_at_once", threads_at_once)
    y = words(64 * 5)
    write = "st.global.b32 [%d1], %t;"
    run(BETWEEN.format(64, write), y, blocks=5)
    with pytest.raises(PTXError, match=r"global-memory race: blocks \d and \d both write a byte"):
        run(BETWEEN.format(63, write), y, blocks=5)
    run(BETWEEN.format(63, write), y, blocks=5, races=False)
    for order in ("{read} {write}", "{write} {read}"):
        for offset, right in ((0, True), (64 * 4, False), (-64 * 4, False)):
            read = f"setp.ne.u32 %p1, %c, {4 if offset > 0 else 0};"
            read += f"@%p1 ld.global.b32 %r2, [%d1+{offset}];"
            body = BETWEEN.format(64, order.format(read=read, write=write))
            if right:
                run(body, y, blocks=5)
            else:
                message = r"global-memory race: block \d reads a byte that block \d writes"
                with pytest.raises(PTXError, match=message):
                    run(body, y, blocks=5)


def test_blocks_may_read_the_same_and_their_own() -> None:
    body = "ld.global.b32 %r2, [%q0];" + BETWEEN.format(
        64, "add.u64 %d1, %d1, 16; st.global.b32 [%d1], %t; ld.global.b32 %r3, [%d1];"
    )
    run(body, words(64 * 3 + 4), blocks=3)
    with pytest.raises(PTXError, match="global-memory race"):
        run(body.replace("%d1, 16", "%d1, 0"), words(64 * 3 + 4), blocks=3)


def test_neighbouring_bytes_are_no_race() -> None:
    """Each block writes every third byte."""
    body = """
    mad.lo.u32 %r1, %t, 3, %c; cvt.u64.u32 %d1, %r1; add.u64 %d1, %d1, %q0;
    st.global.u8 [%d1], %c; ld.global.u8 %h1, [%d1];
    """
    y = torch.zeros(192, dtype=torch.uint8)
    run(body, y, blocks=3)
    assert torch.equal(y, torch.arange(3, dtype=torch.uint8).repeat(64))
    with pytest.raises(PTXError, match="global-memory race: block"):
        run(body + "bar.sync 0; ld.global.u8 %h1, [%q0+1];", y, blocks=3)


def test_atomics_are_no_race() -> None:
    run("red.global.add.u32 [%q0], 1;", words(1), blocks=3)


def test_reads_as_constant() -> None:
    """What a launch writes must not be read so, not even by the thread that writes it."""
    body = BETWEEN.format(
        64, "ld.global.nc.b32 %r2, [%d1]; bar.sync 0; st.global.b32 [%d1+{}], %r2;"
    )
    message = r"global-memory race: a read as constant is of a byte that block \d writes"
    for blocks in (1, 3):
        run(body.format(256 * blocks), words(128 * blocks), blocks=blocks)
        for offset in (0, 256 * blocks - 4):
            with pytest.raises(PTXError, match=message):
                run(body.format(offset), words(128 * blocks), blocks=blocks)
        run(body.replace(".nc", "").format(0), words(64 * blocks), blocks=blocks)
        run(body.format(0), words(64 * blocks), blocks=blocks, races=False)


def test_many_reads_are_condensed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx_memory, "_MAX_LOGGED_BYTES", 1)
    read = "mad.wide.u32 %d2, %t, 4, %q0; ld.global.b32 %r2, [%d2]; ld.global.b32 %r2, [%d2];"
    write = BETWEEN.format(64, "add.u64 %d1, %d1, {}; st.global.b32 [%d1], %t;")
    message = (
        "global-memory race: (a block reads a byte that another|block . reads a byte that block)"
    )
    for text in (write + "bar.sync 0;" + read, read + "bar.sync 0;" + write):
        run(text.format(256), words(64 * 4), blocks=3)
        with pytest.raises(PTXError, match=message):
            run(text.format(252), words(64 * 4), blocks=3)


def test_number_of_threads() -> None:
    text = module(kernel("mov.u32 %r1, %t;"))
    for directive, fewer, more in (
        (".maxntid 8, 8, 2", True, "at most 128"),
        (".reqntid 128", False, "requires 128"),
    ):
        bounded = text.replace(")\n{", f")\n{directive}\n{{")
        assemble(bounded)
        y = words(64)
        run_ptx(bounded, "kernel", (1,), (128,), [y, y])
        with pytest.raises(PTXError, match=more):
            run_ptx(bounded, "kernel", (1,), (160,), [y, y])
        if fewer:
            run_ptx(bounded, "kernel", (1,), (32, 2), [y, y])
        else:
            with pytest.raises(PTXError, match=more):
                run_ptx(bounded, "kernel", (1,), (32, 2), [y, y])
