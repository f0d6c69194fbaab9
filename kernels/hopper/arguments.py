"""Arguments of the Hopper kernel: named tuples of pointers and numbers, what it is compiled for.

The kernel reads their fields by name. Tuples of pointers are arguments as they are, numbers come
one by one (see `kernel.NUMBERS`) and make the same tuples in the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Variant:
    """What `hopper_attention` is compiled for; Triton's cache knows it by its `repr`.

    Attributes:
        block_n: keys a block.
        head_dim: 64 or 128.
        stages: key blocks in flight, a power of two; values have one more.
        fixed: fixed softmax shift; its failure sets the flag.
        repair: the launch that computes everything again by the exact form if the flag is set.
        ragged: keys end within a block.
        lengths: each batch item has a number of valid keys.
        weighted: blocks have weights.
        lse: the log-sum-exp is written.
        energy: the sums of each query and key block are written; every key block is kept.
        copies: some heads are row-shared.
        zones: tiles and runs are those of zones.
    """

    block_n: int
    head_dim: int
    stages: int
    fixed: bool
    repair: bool
    ragged: bool
    lengths: bool
    weighted: bool
    lse: bool
    energy: bool
    copies: bool
    zones: bool


class TileTables(NamedTuple):
    """Which tile is whose, and what it keeps: an argument of `hopper_attention`.

    Attributes:
        tiles_ptr: int32 (T, 4), see `schedule.Schedule`; of zones, `zone_table`.
        starts_ptr: int32 (programs + 1).
        runs_ptr: int32.
        codes_ptr: uint8, with weights only; see `schedule.BlockCodes`.
        code_starts_ptr: int32 (T + 1), with weights only.
        counts_ptr: int32 (B + 1, T), from `hopper_counts`; with lengths only.
        lengths_ptr: int32 (B), valid keys of each batch item; with lengths only.
    """

    tiles_ptr: Any
    starts_ptr: Any
    runs_ptr: Any
    codes_ptr: Any
    code_starts_ptr: Any
    counts_ptr: Any
    lengths_ptr: Any


class Results(NamedTuple):
    """Where a call leaves what is not its output: an argument of `hopper_attention`.

    Attributes:
        flag_ptr: int32 (1), set where the fixed shift failed; read by the repair.
        repairs_ptr: int32 (1), calls that were repaired so far.
        lse_ptr: float32 (B, H, Sq), natural log-sum-exp, of a row-shared head row by row; or None.
        sums_ptr: float32 (B, H, query_blocks, key_blocks | 1, 128), log2 of each query's sum of
            exponentials over the key block at each position of its tile; or None.
    """

    flag_ptr: Any
    repairs_ptr: Any
    lse_ptr: Any
    sums_ptr: Any


class Sizes(NamedTuple):
    """Numbers of every call."""

    batches: int
    heads: int
    tiles: int
    query_blocks: int
    length_q: int
    length_k: int


class RowPointers(NamedTuple):
    """What row-shared heads read and write row by row, for TMA can't gather.

    Tiles whose last word is negative are theirs.

    Attributes:
        q_ptr: (B, H, Sq, D).
        o_ptr: contiguous (B, Sq, H, D).
        computed_ptr: int32 (computed_rows), the token that is row i.
        targets_ptr: int32 (slots, computed_rows), the tokens that take its output; none below 0.
    """

    q_ptr: Any = None
    o_ptr: Any = None
    computed_ptr: Any = None
    targets_ptr: Any = None


class RowSizes(NamedTuple):
    """Numbers that go with `RowPointers`.

    Attributes:
        q_batch: stride of q from item to item of the batch, in units of 8 elements.
        q_head: from head to head, in these units.
        q_token: from token to token, in these units.
        computed_rows: a multiple of 128.
        stores: pieces of 8 rows x 64 columns that are stored of a tile, all slots together.
    """

    q_batch: int | None = None
    q_head: int | None = None
    q_token: int | None = None
    computed_rows: int | None = None
    stores: int | None = None


class Draw(NamedTuple):
    """Numbers that draw a step from zones.

    Attributes:
        phase: of the step, see `drawing.phase`.
        left: first key block without text.
        right: one past the last.
    """

    phase: int | None = None
    left: int | None = None
    right: int | None = None
