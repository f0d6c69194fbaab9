"""What the partitions of the Hopper kernel share: tile entries, barriers, pieces of the softmax.

Written in Gluon, Triton's lower-level dialect, which lets a kernel place warps, shared memory,
barriers and asynchronous products itself. See `kernel` for how the parts work together.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# For the other partitions: one place that knows where Gluon keeps things.
__all__ = [
    "add_sums",
    "advance",
    "async_copy",
    "drawn_count",
    "exp2",
    "fence_async_shared",
    "finite",
    "gl",
    "gluon",
    "high",
    "keep_sums",
    "low",
    "mask_scores",
    "matrix",
    "mbarrier",
    "partial_sums",
    "raised",
    "release",
    "rescale",
    "warp_barrier",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]


@gluon.jit
def low(word):
    """The lower 16 bits of a packed entry, which is never negative."""
    return word & 0xFFFF


@gluon.jit
def high(word):
    """The upper 16 bits of a packed entry, which is never negative."""
    return word >> 16


@gluon.jit
def advance(entry, batch, first, end):
    """The next tile of this program: its entries once for each batch item.

    Past the last one it names a tile that exists, so that it may be loaded without a check.
    """
    wraps = entry + 1 == end
    return gl.where(wraps, first, entry + 1), gl.where(wraps, batch + 1, batch)


@gluon.jit
def drawn_count(word, draw_phase):
    """As `Tiles.count` for a row of zones: see `zone_table.ZoneRows` for its word.

    The last key block is kept if the sum of rates passes a whole number in it.
    """
    sums = ((word >> 7) & 0x1FFFFF) + ((word + draw_phase) & 127)
    keeps_last = (sums & 127) < (128 >> ((word >> 28) & 7))
    masked = gl.where(word < 0, 1, gl.where(keeps_last, sums >> 7, 0))
    return (sums >> 7) + (masked << 16)


@gluon.jit
def matrix(tiles, index):
    """Tile `index` of (N, 1, 1, rows, D) in shared memory as (rows, D).

    The two ones stand for batch and head, which the descriptors address.
    """
    rows: gl.constexpr = tiles.shape[3]
    columns: gl.constexpr = tiles.shape[4]
    return tiles.index(index).reshape([rows, columns])


@gluon.jit
def release(barrier):
    """Arrive with every thread of the warpgroup; the barrier counts threads.

    `mbarrier.arrive` would synchronise the warpgroup first and arrive once: in the inner loop that
    costs more than the 128 arrivals.
    """
    async_copy.mbarrier_arrive(barrier, increment_count=False)


warp_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Orders what the threads of a partition have written; triton 3.6 calls it otherwise."""


@gluon.jit
def exp2(x):
    """2^x by the special function unit alone; denormal results are zero."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def finite(maximum):
    """What to subtract for a row maximum: 0 where only -inf was seen, as inf - inf is NaN."""
    return gl.where(maximum == -float("inf"), 0.0, maximum)


# A row's reference follows its scores where a probability relative to it would be more than this
# share of the row's sum so far, or more than the limit: float16 ends at 65,504.
SHARE = gl.constexpr(0.125)
LIMIT = gl.constexpr(256.0)


@gluon.jit
def raised(reference, found, total):
    """The softmax shift of rows once a block is there with maximum `found`.

    Any reference gives the same quotient, and rescaling costs, so it stays while it can. In a
    sparse row's 16 neighbours some maximum grows in half of all blocks; few of these keys matter
    for the sum. One that does takes the probability 1 and so loses nothing to rounding, as with a
    running maximum; the others hold at most an eighth of their row. A rule of the row alone: what
    else its warp computes changes no bit.
    """
    bound = gl.minimum(gl.convert_layout(gl.sum(total, 1), reference.type.layout) * SHARE, LIMIT)
    follows = exp2(found - reference) > bound
    return gl.where(follows, gl.maximum(reference, found), reference)


@gluon.jit
def partial_sums(p):
    """Sums (M, 4) of p (M, N) over what one thread holds: no shuffles until the row is done."""
    rows: gl.constexpr = p.shape[0]
    columns: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(gl.reshape(p, [rows, columns // 8, 4, 2]), 3), 1)


def _scaling(count: int) -> tuple[gl.constexpr, gl.constexpr]:
    """PTX that multiplies `count` registers by as many others, and its operands.

    They are what a thread holds of an accumulator: of each four in a row, two of one row and two
    of another. So the factors 0 and 2 are all that its warp has to look at.
    """
    lines = [
        "{ .reg .pred changed;",
        f"setp.neu.f32 changed, ${2 * count}, 0f3F800000;",
        f"@!changed setp.neu.f32 changed, ${2 * count + 2}, 0f3F800000;",
        "vote.sync.any.pred changed, changed, 0xffffffff;",
        "@!changed bra.uni SAME;",
        *(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count)),
        "SAME: }",
    ]
    operands = [*["=f"] * count, *map(str, range(count)), *["f"] * count]
    return gl.constexpr("\n".join(lines)), gl.constexpr(",".join(operands))


_SCALING_64, _OPERANDS_64 = _scaling(64)
_SCALING_32, _OPERANDS_32 = _scaling(32)


@gluon.jit
def rescale(acc, shrink):
    """Multiply acc (64, D) by one number a row, with nothing to do for warps where all are 1.

    As they mostly are, see `raised`. A branch written in Gluon would have to ask all warps.
    """
    factors = gl.expand_dims(shrink, 1)
    if acc.shape[1] == 128:
        return gl.inline_asm_elementwise(
            _SCALING_64, _OPERANDS_64, [acc, factors], gl.float32, is_pure=True, pack=64
        )
    else:  # noqa: RET505  only one is compiled
        return gl.inline_asm_elementwise(
            _SCALING_32, _OPERANDS_32, [acc, factors], gl.float32, is_pure=True, pack=32
        )


@gluon.jit
def keep_sums(tiles, place, position, part, maximum, PART: gl.constexpr):
    """With `energy`, store log2 of the sums of a block's 64 rows, the reference added.

    `place` is the tile's own, in elements; it holds 128 rows for each position, and one position
    more where their number is even: tiles that lie a power of two apart fight for the same sets of
    the L2 cache.
    """
    if tiles.VARIANT.energy:
        rows_of: gl.constexpr = maximum.type.layout
        total = gl.convert_layout(gl.sum(part, 1), rows_of)
        row = PART * 64 + gl.arange(0, 64, rows_of)
        kept = tiles.results.sums_ptr + place + position * 128 + row
        gl.store(kept, gl.log2(total) + finite(maximum))


@gluon.jit
def add_sums(total, part, shrink, FIXED: gl.constexpr):
    """Add a block's partial sums (M, 4) to those of its row, which shrink unless FIXED."""
    if not FIXED:
        by_row = gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))
        total = total * gl.expand_dims(by_row, 1)
    return total + part


@gluon.jit
def mask_scores(scores, position, masked, valid, RAGGED: gl.constexpr):
    """Score -inf from key `valid` of the block on, in the one block of a row where keys end.

    A branch, not a select: all other blocks pay one comparison. It stands beside a barrier wait,
    which ends the basic block anyway.
    """
    if RAGGED:  # noqa: SIM102
        if position == masked:
            columns: gl.constexpr = scores.shape[1]
            column = gl.arange(0, columns, gl.SliceLayout(0, scores.type.layout))
            scores = gl.where(gl.expand_dims(column < valid, 0), scores, -float("inf"))
    return scores
