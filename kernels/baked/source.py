"""Triton source for one cover: its interval bounds are literals in straight-line code.

The source depends on nothing but the cover, the lengths and the block sizes, so equal patterns give
equal source and share one compiled kernel. Tiles, head dim and dtype stay parameters.
"""

from __future__ import annotations

import numpy as np

from calibatt_compiler.kernels.baked.cover_template import Cover
from calibatt_compiler.kernels.baked.source_templates import (
    TRITON,
    check_key_blocks,
    choose_form,
    docstring,
    form_function,
)
from calibatt_compiler.kernels.common.row_copies import copy_tables
from calibatt_compiler.plan.pattern import BlockPattern

_SHARED = ("attend_tile", "flag_overflow", "head_rows", "reference_maximum", "split_tiles")
_PLAIN = ("load_rows", "store_rows")

ENTRY_POINT = "baked_attention"
"""Name of the kernel in generated source."""

_IMPORTS = """\
import triton
import triton.language as tl

from calibatt_compiler.kernels.portable.primitives import (
{names})
"""

_SIGNATURE = """\
@triton.jit(
    do_not_specialize=[
        "stride_qb", "stride_qh", "stride_qs", "stride_kb", "stride_kh", "stride_ks",
        "stride_vb", "stride_vh", "stride_vs", "stride_ob", "stride_oh", "stride_os",
    ]
)
def baked_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    flag_ptr,
{tables}    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qs,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_ks,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vs,
    stride_ob: tl.int64,
    stride_oh: tl.int64,
    stride_os,
    scale_log2,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    ROW_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    RAGGED_K: tl.constexpr,
    PRECISION: tl.constexpr,
    FIXED: tl.constexpr,
    TMA: tl.constexpr,
):
    tile = tl.program_id(0)
    batch = tl.program_id(1) // {heads}
    head = tl.program_id(1) % {heads}
    row = tile // ROW_TILES
"""

_TABLES = """\
    computed_ptr,
    targets_ptr,
"""

_COMPUTED_ROWS = """\
    # These heads compute {rows} rows and copy the others.
{repetitive}    rows = tl.where(repetitive, {rows}, {length_q})
    if tile * TILE_M >= rows:
        return
"""

_HEADS = """\
    first = tile * TILE_M
    q_head, stride_qs = head_rows(
        q_ptr, stride_qb, stride_qh, stride_qs, batch, head, ALIGN
    )
    k_head, stride_ks = head_rows(
        k_ptr, stride_kb, stride_kh, stride_ks, batch, head, ALIGN, TMA
    )
    v_head, stride_vs = head_rows(
        v_ptr, stride_vb, stride_vh, stride_vs, batch, head, ALIGN, TMA
    )
    o_head, stride_os = head_rows(
        o_ptr, stride_ob, stride_oh, stride_os, batch, head, ALIGN
    )
"""

_LOAD = """\
    q = load_rows(q_head, stride_qs, first, {length_q}, TILE_M, HEAD_DIM, PADDED_DIM, True)
"""

_GATHER = """\
    q = gather_rows(
        q_head, stride_qs, computed_ptr, repetitive, first, rows, TILE_M, HEAD_DIM, PADDED_DIM
    )
"""

_BEGIN = """\
    acc = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    maximum = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
"""

_REFERENCE = """\
    if FIXED:
        # The lowest kept block from the diagonal on, or the highest.
        diagonal = {diagonal}
        reference = end_block - 1
{reference}        maximum = reference_maximum(
            q, k_head, stride_ks, reference * KEY_TILES * TILE_N, {length_k}, scale_log2,
            TILE_N, HEAD_DIM, PADDED_DIM, PRECISION, batch, head, TMA,
        )
"""

_CANDIDATE = """\
        begin = tl.maximum(run_{k} & 0xFFFF, diagonal)
        reference = tl.where((run_{k} >> 16) > begin, begin, reference)
"""

_ATTEND = """\
        acc, maximum, total = attend_tile(
            q, k_head, v_head, stride_ks, stride_vs, key_tile * TILE_N, {length_k},
            acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, False, PRECISION,
            0.0, False, batch, head, FIXED, TMA,
        )
        key_tile += 1
{jump}    if RAGGED_K:
        if ragged:
            acc, maximum, total = attend_tile(
                q, k_head, v_head, stride_ks, stride_vs, {length_k} // TILE_N * TILE_N, {length_k},
                acc, maximum, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, True, PRECISION,
                0.0, False, batch, head, FIXED, TMA,
            )
    if FIXED:
        flag_overflow(flag_ptr, acc, total)
"""

_STORE = """\
    store_rows(o_head, stride_os, first, {length_q}, acc, total, TILE_M, HEAD_DIM, PADDED_DIM)
"""

_SCATTER = """\
    scatter_rows(
        o_head, stride_os, targets_ptr, repetitive, {slots}, first, rows, acc, total,
        TILE_M, HEAD_DIM, PADDED_DIM,
    )
"""


def generate(cover: Cover, pattern: BlockPattern) -> str:
    """Write the kernel for `cover`.

    Args:
        cover: the mask in symbolic form.
        pattern: its lengths, block sizes and row-shared heads; the bits are not looked at.

    Returns:
        Source of a module whose `baked_attention` takes the arguments of `triton_launch`, a flag
        for a softmax with a FIXED reference and, if a head is row-shared, the tables of
        `kernels.copies`. The flag is acted upon by `TableAttention.repair`.

    Raises:
        KernelError: more key blocks than an interval's bounds can name.
    """
    check_key_blocks(cover)
    copies = copy_tables(pattern)
    parts = [docstring(cover, pattern), _imports(copies is not None)]
    for index, form in enumerate(cover.forms):
        parts.append("\n" + form_function(index, form, cover, TRITON))
    lengths = {"length_q": pattern.query_length, "length_k": pattern.key_length}
    tables = "" if copies is None else _TABLES
    kernel = [_SIGNATURE.format(heads=pattern.heads, tables=tables)]
    if copies is not None:
        slots, rows = copies.targets.shape
        lengths |= {"rows": rows, "slots": slots}
        kernel.append(_COMPUTED_ROWS.format(**lengths, repetitive=_repetitive(pattern)))
    kernel += choose_form(cover)
    kernel += _positions(cover.max_intervals, pattern.key_length)
    kernel += [_HEADS, (_LOAD if copies is None else _GATHER).format(**lengths), _BEGIN]
    kernel.append(_reference(cover.max_intervals, pattern))
    kernel.append(_loop(cover.max_intervals))
    kernel.append(_ATTEND.format(**lengths, jump=_jump(cover.max_intervals)))
    kernel.append((_STORE if copies is None else _SCATTER).format(**lengths))
    parts.append("\n" + "".join(kernel))
    return "\n".join(parts)


def _imports(copies: bool) -> str:
    by_form = ("gather_rows", "scatter_rows") if copies else _PLAIN
    names = sorted((*_SHARED, *by_form))
    return _IMPORTS.format(names="".join(f"    {name},\n" for name in names))


def _repetitive(pattern: BlockPattern) -> str:
    """Lines that set `repetitive` from `head`."""
    assert pattern.repetitive is not None
    edges = np.flatnonzero(np.diff(pattern.repetitive, prepend=False, append=False)).reshape(-1, 2)
    (first, last), *others = edges.tolist()
    lines = [f"    repetitive = (head >= {first}) & (head < {last})\n"]
    lines += [f"    repetitive |= (head >= {first}) & (head < {last})\n" for first, last in others]
    return "".join(lines)


def _reference(intervals: int, pattern: BlockPattern) -> str:
    """Lines that set `maximum` where the softmax takes a fixed shift; see `IndexTables`."""
    diagonal = f"row * {pattern.block_m} // {pattern.block_n}"
    return _REFERENCE.format(
        diagonal="row" if pattern.block_m == pattern.block_n else diagonal,
        reference="".join(_CANDIDATE.format(k=k) for k in reversed(range(intervals))),
        length_k=pattern.key_length,
    )


def _loop(intervals: int) -> str:
    """Lines before the loop over the tiles of all intervals, and its first."""
    lines = [*_look_up(intervals, "0", "    "), "    for position in tl.range(0, tiles):\n"]
    if intervals > 1:
        lines.insert(0, "    # At the position `end` the loop jumps to the next interval.\n")
    return "".join(lines)


def _jump(intervals: int) -> str:
    """Lines that go on to the next interval where one ends."""
    if intervals == 1:
        return ""
    lines = ["        if position + 1 == end:\n"]
    return "".join([*lines, *_look_up(intervals, "position + 1", " " * 12)])


def _look_up(intervals: int, position: str, indent: str) -> list[str]:
    """Lines that find the key tile of a position, and where its interval ends."""
    known = range(1, intervals)
    return [
        f"{indent}key_tile = shift_0\n",
        *(
            f"{indent}key_tile = tl.where({position} >= tiles_{k}, shift_{k}, key_tile)\n"
            for k in known
        ),
        *([] if position == "0" else [f"{indent}key_tile += {position}\n"]),
        *([f"{indent}end = tiles\n"] if intervals > 1 else []),
        *(
            f"{indent}end = tl.where(tiles_{k} > {position}, tiles_{k}, end)\n"
            for k in reversed(known)
        ),
    ]


def _positions(intervals: int, key_length: int) -> list[str]:
    """Lay the intervals end to end: tiles before each, and what turns a position into a tile."""
    lines = [
        "    # A run holds the start of its interval and, 16 bits up, the end.\n",
        "    start = run_0 & 0xFFFF\n",
        "    end = run_0 >> 16\n",
        "    blocks = end - start\n",
        "    end_block = end\n",
        "    # Key tile = position in the loop + shift of its interval.\n",
        "    shift_0 = start * KEY_TILES\n",
    ]
    for k in range(1, intervals):
        lines += [
            f"    start = run_{k} & 0xFFFF\n",
            f"    end = run_{k} >> 16\n",
            f"    tiles_{k} = blocks * KEY_TILES\n",
            f"    shift_{k} = start * KEY_TILES - tiles_{k}\n",
            "    blocks += end - start\n",
            "    end_block = tl.where(end > start, end, end_block)\n",
        ]
    lines.append(
        f"    tiles, ragged = split_tiles(blocks, end_block, {key_length}, KEY_TILES, TILE_N)\n"
    )
    return lines
