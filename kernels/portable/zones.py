"""Attention by octave zones on any NVIDIA GPU: a step is drawn as the runs of a row are walked.

One kernel for all steps of a site's step group. The runs come from a table, or from a generated
function that holds them as literals; both give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibatt_compiler.kernels.common.operands import (
    check_operands,
    check_specialisation,
    empty_output,
)
from calibatt_compiler.kernels.common.uploads import Uploaded, to_device
from calibatt_compiler.kernels.common.zone_step import GpuZones
from calibatt_compiler.kernels.common.zone_table import zone_table
from calibatt_compiler.kernels.portable.launch import (
    STRIDES,
    DeviceKernel,
    aligned,
    call_arguments,
    grid,
    key_sources,
    on_device,
)
from calibatt_compiler.kernels.portable.primitives import (
    attend_tile,
    flag_overflow,
    head_rows,
    load_rows,
    reference_maximum,
    split_tiles,
    store_rows,
)
from calibatt_compiler.kernels.portable.tiles import TileSettings
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.drawing import phase

RUN_TIME_SIZES = ("heads", "query_blocks", "length_q", "length_k", "draw_phase", "left", "right")
"""Integers that must not be specialised: no pattern and no step compiles a kernel of its own."""


@triton.jit
def run_at(runs_ptr, index, LITERALS: tl.constexpr):
    """The word of a run; see `zone_table`."""
    # Not two returns: what follows one is compiled, too.
    if LITERALS is None:  # noqa: SIM108
        word = tl.load(runs_ptr + index)
    else:
        word = LITERALS(index, runs_ptr)
    return word


@triton.jit
def seek(
    runs_ptr,
    offset,
    runs,
    slide,
    left,
    right,
    key_blocks,
    wanted,
    begin,
    end,
    before,
    reached,
    rate,
    walked,
    LITERALS: tl.constexpr,
):
    """Walk to the run in which the sum of rates reaches `wanted` units; the last run at most.

    Returns the run's first block and the end of its blocks, the sum before it and behind it, the
    binary logarithm of its rate in units, and how many runs have been walked.
    """
    # Not `while` alone: a loop that stands directly in the one over blocks ends its pipeline.
    if (reached < wanted) & (walked < runs):
        while (reached < wanted) & (walked < runs):
            word = run_at(runs_ptr, offset + walked, LITERALS)
            walked += 1
            begin = end
            end = tl.minimum(tl.maximum((word >> 3) + slide, left), right)
            end = tl.where(walked == runs, key_blocks, end)
            rate = 7 - (word & 7)
            before = reached
            reached += (end - begin) << rate
    return begin, end, before, reached, rate, walked


@triton.jit
def attend_zones(
    q,
    k_ptr,
    v_ptr,
    stride_ks,
    stride_vs,
    row_ptr,
    runs_ptr,
    draw_phase,
    left,
    right,
    key_blocks,
    length_k,
    acc,
    maximum,
    total,
    scale_log2,
    TILE_N: tl.constexpr,
    KEY_TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    RAGGED_K: tl.constexpr,
    PRECISION: tl.constexpr,
    batch,
    head,
    FIXED: tl.constexpr,
    TMA: tl.constexpr,
    LITERALS: tl.constexpr,
):
    """Attend what the row of zones whose words are at `row_ptr` keeps at a step.

    Block number p of a row is the one in which its sum of rates reaches p + 1 wholes: see
    `drawing`. A block of octave k has the weight 2^k, so its scores are k more in units of
    log2: `maximum` is lowered by k for it instead. Returns the new acc, maximum and total.
    """
    where = tl.load(row_ptr)
    drawn = tl.load(row_ptr + 1)
    lead_runs = tl.load(row_ptr + 2)
    offset = tl.load(row_ptr + 3)
    before = (drawn + draw_phase) & 127
    sums = ((drawn >> 7) & 0x1FFFFF) + before
    last_octave = (drawn >> 28) & 7
    end_block = tl.where((sums & 127) < (128 >> last_octave), key_blocks, 0)
    tiles, ragged = split_tiles(sums >> 7, end_block, length_k, KEY_TILES, TILE_N)
    if FIXED:
        maximum = reference_maximum(
            q, k_ptr, stride_ks, (lead_runs & 0xFFFF) * KEY_TILES * TILE_N, length_k, scale_log2,
            TILE_N, HEAD_DIM, PADDED_DIM, PRECISION, batch, head, TMA,
        )  # fmt: skip
    runs = lead_runs >> 16
    slide = tl.where(offset < 0, where & 0xFFFF, 0)
    offset = offset & 0x7FFFFFFF
    # Before the first run.
    begin, end, rate, walked, reached = 0, 0, 7, 0, before
    begin, end, before, reached, rate, walked = seek(
        runs_ptr, offset, runs, slide, left, right, key_blocks, 128,
        begin, end, before, reached, rate, walked, LITERALS,
    )  # fmt: skip
    # One flat loop over all blocks, like the table kernel's; each tile is looked up while the one
    # before is attended.
    after = (begin + ((127 - before) >> rate)) * KEY_TILES
    for position in tl.range(0, tiles):
        key_tile = after
        weight = (7 - rate).to(tl.float32)
        wanted = ((position + 1) // KEY_TILES + 1) * 128
        begin, end, before, reached, rate, walked = seek(
            runs_ptr, offset, runs, slide, left, right, key_blocks, wanted,
            begin, end, before, reached, rate, walked, LITERALS,
        )  # fmt: skip
        after = (begin + ((wanted - 1 - before) >> rate)) * KEY_TILES + (position + 1) % KEY_TILES
        acc, maximum, total = attend_tile(
            q, k_ptr, v_ptr, stride_ks, stride_vs, key_tile * TILE_N, length_k,
            acc, maximum - weight, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, False,
            PRECISION, 0.0, False, batch, head, FIXED, TMA,
        )  # fmt: skip
        maximum += weight
    # Not `and`: RAGGED_K is decided when compiling, `ragged` when running.
    if RAGGED_K:  # noqa: SIM102
        if ragged:
            weight = last_octave.to(tl.float32)
            acc, maximum, total = attend_tile(
                q, k_ptr, v_ptr, stride_ks, stride_vs, length_k // TILE_N * TILE_N, length_k,
                acc, maximum - weight, total, scale_log2, TILE_N, HEAD_DIM, PADDED_DIM, True,
                PRECISION, 0.0, False, batch, head, FIXED, TMA,
            )  # fmt: skip
    return acc, maximum, total


@triton.jit(do_not_specialize=[*STRIDES, *RUN_TIME_SIZES])
def zone_attention(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    flag_ptr,
    repairs_ptr,
    rows_ptr,
    runs_ptr,
    stride_qb: tl.int64,
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
    heads,
    query_blocks,
    length_q,
    length_k,
    draw_phase,
    left,
    right,
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
    REPAIR: tl.constexpr,
    LITERALS: tl.constexpr,
):
    """Attention of TILE_M queries of one head over the key blocks that a step keeps.

    q, k, v, o, flag and repairs as for `table_attention`. rows int32 (heads * query_blocks, 4) and
    runs int32: see `zone_table`. draw_phase: `drawing.phase` of the step. Blocks `left` to
    `right` are the keys without text. LITERALS: None, or a generated function that gives the word
    of a run by its number, in the place of `runs`.
    """
    if REPAIR:
        if tl.load(flag_ptr) == 0:
            return
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.atomic_add(repairs_ptr, 1)
    tile = tl.program_id(0)
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    first = tile * TILE_M
    q_head, stride_qs = head_rows(q_ptr, stride_qb, stride_qh, stride_qs, batch, head, ALIGN)
    k_head, stride_ks = head_rows(k_ptr, stride_kb, stride_kh, stride_ks, batch, head, ALIGN, TMA)
    v_head, stride_vs = head_rows(v_ptr, stride_vb, stride_vh, stride_vs, batch, head, ALIGN, TMA)
    o_head, stride_os = head_rows(o_ptr, stride_ob, stride_oh, stride_os, batch, head, ALIGN)
    q = load_rows(q_head, stride_qs, first, length_q, TILE_M, HEAD_DIM, PADDED_DIM, True)
    acc = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    maximum = tl.full([TILE_M], -float("inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    row = head * query_blocks + tile // ROW_TILES
    key_blocks = (length_k + KEY_TILES * TILE_N - 1) // (KEY_TILES * TILE_N)
    acc, maximum, total = attend_zones(
        q, k_head, v_head, stride_ks, stride_vs, rows_ptr + row * 4, runs_ptr, draw_phase, left,
        right, key_blocks, length_k, acc, maximum, total, scale_log2, TILE_N, KEY_TILES, HEAD_DIM,
        PADDED_DIM, RAGGED_K, PRECISION, batch, head, FIXED, TMA, LITERALS,
    )  # fmt: skip
    if FIXED:
        flag_overflow(flag_ptr, acc, total)
    store_rows(o_head, stride_os, first, length_q, acc, total, TILE_M, HEAD_DIM, PADDED_DIM)


class ZoneAttention(GpuZones, DeviceKernel):
    """Block-sparse attention by zones; see `ZoneKernel`.

    Args:
        request: what to serve; a fixed softmax shift comes from each row's lead.
        settings: tiles to use instead of the architecture's own.
        literals: generated function that gives the runs, see `baked.source_zones`; None: they are
            read from a table. Both give the same bits.

    Attributes:
        kind: "triton-zones-baked" with literals, else "triton-zones".
        density: expected density over steps.

    Raises:
        KernelError: dtype or head dim that no portable kernel takes, or too many blocks.
    """

    pattern: ZonePattern

    family = "triton"

    def __init__(
        self,
        request: KernelRequest[ZonePattern],
        settings: TileSettings | None = None,
        literals: Any = None,
    ) -> None:
        super().__init__(request, settings)
        zones, device = request.pattern, request.device
        self.density = zones.density
        table = zone_table(zones)
        self._rows, self._runs = (to_device(x, device) for x in (table.rows, table.runs))
        self._edges = {"left": table.left, "right": table.right}
        self.literals = literals
        self._repairs = torch.zeros(1, dtype=torch.int32, device=device)
        Uploaded(device).wait()

    @property
    def table_bytes(self) -> int:
        """Bytes of its tables."""
        return self._rows.nbytes + self._runs.nbytes

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, step: int, scale: float | None = None
    ) -> Tensor:
        """Attend what the zones keep at a step; see `ReferenceAttention` for the meaning.

        Args:
            q: (B, H, Sq, D); strides other than unit along D, or not 16-byte aligned, cost a copy.
            k: (B, H, Sk, D).
            v: (B, H, Sk, D).
            step: the diffusion step.
            scale: factor on the scores; default 1 / sqrt(D).

        Returns:
            (B, H, Sq, D), laid out as contiguous (B, Sq, H, D).

        Raises:
            KernelError: the operands don't fit the pattern or this kernel.
        """
        zones = self.pattern
        check_operands(zones, q, k, v)
        check_specialisation(q, self.request)
        q, k, v = (aligned(tensor, self.config) for tensor in (q, k, v))
        out = empty_output(q)
        q, arguments = call_arguments(q, k, v, out, scale, self.config)
        with on_device(q):
            flag = self.flag()
            for config in (self.config, *([] if flag is None else [self.config.repair()])):
                repair = config.softmax == "repair"
                zone_attention[grid(zones, config, q.shape[0])](
                    q,
                    *key_sources(k, v, config),
                    out,
                    flag,
                    None if flag is None else self._repairs,
                    self._rows,
                    self._runs,
                    **arguments,
                    heads=zones.heads,
                    query_blocks=zones.query_blocks,
                    length_q=zones.query_length,
                    length_k=zones.key_length,
                    draw_phase=phase(step, zones.seed),
                    **self._edges,
                    REPAIR=repair,
                    # Recomputing is rare, and its launch need not be compiled for each pattern.
                    LITERALS=None if repair else self.literals,
                    **config.constexprs,
                    **config.options,
                )
        return out
