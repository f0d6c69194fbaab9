"""A block pattern: which key blocks each query block of each head attends.

The stored form is a bit per block. Intervals, indices and boolean masks are derived from it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibatt_compiler.arguments import is_integers, require
from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan import weights as block_weights
from calibatt_compiler.plan.copies import AnchorRows, check_repetitive, check_rows
from calibatt_compiler.plan.intervals import Intervals, runs_of, runs_of_bits
from calibatt_compiler.plan.sizes import check_sizes


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """Kept blocks of one attention call; what a kernel is generated from.

    Query block `r` holds the tokens `r * block_m` to `min((r + 1) * block_m, query_length)`, key
    block `c` the same with `block_n` and `key_length`; the two lengths are independent. The last
    block of either may be ragged.

    In a row-shared head query block `r` holds the positions `r * block_m` to `(r + 1) * block_m` of
    `copies.computed(query_length)` instead; the query blocks past the last of these keep nothing
    and are not computed. Each token takes the output that `copies.sources` names.

    Attributes:
        heads: number of heads.
        query_length: tokens on the query side.
        key_length: tokens on the key side.
        block_m: tokens a query block.
        block_n: tokens a key block.
        bits: uint8 (heads, query_blocks, ceil(key_blocks / 8)), little-endian bit order,
            read-only; padding bits are zero.
        weights: uint8 (heads, query_blocks, key_blocks), how many times each kept block counts, as
            coded by `plan.weights`; None if once. Read-only.
        pooled: keys that each dropped block is pooled to; 0 drops it. Sub-block `j` of `pooled`
            equal parts of a dropped block takes part as one key and one value, the means of its
            tokens, that count as many times as it has tokens.
        copies: what row-shared heads compute and copy; may be there without such a head.
        repetitive: bool (heads,), which heads are row-shared; None if none is. Read-only.

    Raises:
        PlanError: sizes out of range, bits or weights of another shape, a query block with no
            kept key block (its softmax would be empty), a row-shared head with weights or with
            blocks for rows that it does not compute.
    """

    heads: int
    query_length: int
    key_length: int
    block_m: int
    block_n: int
    bits: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.uint8] | None = None
    pooled: int = 0
    copies: AnchorRows | None = None
    repetitive: npt.NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        check_sizes(self.heads, self.query_length, self.key_length, self.block_m, self.block_n)
        kinds: dict[str, Any] = {"error": PlanError}
        for name, kind in (("bits", np.ndarray), ("weights", np.ndarray), ("copies", AnchorRows)):
            value = getattr(self, name)
            fits = isinstance(value, kind) or (value is None and name != "bits")
            require(fits, name, value, kind.__name__, **kinds)
        whole = isinstance(self.pooled, int) and not isinstance(self.pooled, bool)
        require(whole, "pooled", self.pooled, "an integer", **kinds)
        shape = (self.heads, self.query_blocks, (self.key_blocks + 7) // 8)
        for name in ("bits", "weights", "repetitive"):
            # Kernels read these by their address.
            array = getattr(self, name)
            if isinstance(array, np.ndarray) and not array.flags.c_contiguous:
                object.__setattr__(self, name, np.ascontiguousarray(array))
        if self.bits.dtype != np.uint8 or self.bits.shape != shape:
            raise PlanError(
                "the bits of a pattern have the wrong shape",
                expected=f"uint8 {shape}",
                got=f"{self.bits.dtype} {self.bits.shape}",
                remedy="build patterns with BlockPattern.from_mask",
            )
        tail = self.key_blocks % 8
        if tail and (self.bits[..., -1] >> tail).any():
            raise PlanError(
                "a pattern keeps key blocks past the end of the keys",
                expected=f"at most {self.key_blocks} key blocks",
                got="bits set in the padding",
                remedy="calibrate again; the plan was written by something else or is damaged",
            )
        if self.copies is not None:
            self.copies.computed(self.query_length)  # which checks that the grid is in the sequence
        if self.repetitive is not None:
            check_repetitive(self.repetitive, self.heads, self.copies)
            if not self.repetitive.any():
                object.__setattr__(self, "repetitive", None)
        check_rows(self.bits, self.computed_rows(), repetitive=self.repetitive is not None)
        self.bits.setflags(write=False)
        if self.weights is not None:
            block_weights.check(self.weights, self.numpy_mask(), self.repetitive)
            if not self.weights.any():
                object.__setattr__(self, "weights", None)
        if not 0 <= self.pooled <= self.block_n or (self.pooled and self.block_n % self.pooled):
            raise PlanError(
                "dropped blocks can't be pooled to this many keys",
                expected=f"0, or a divisor of the {self.block_n} tokens of a key block",
                got=self.pooled,
                remedy="pool to 1, 2 or 4 keys",
            )

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        query_length: int | None = None,
        key_length: int | None = None,
        block: tuple[int, int] = (128, 128),
        weight: Tensor | None = None,
        pooled: int = 0,
        repetitive: npt.NDArray[np.bool_] | None = None,
        copies: AnchorRows | None = None,
    ) -> BlockPattern:
        """Pack a boolean block mask.

        Args:
            mask: bool (heads, query_blocks, key_blocks), on any device.
            query_length: tokens on the query side; default `query_blocks * block[0]`.
            key_length: tokens on the key side; default `key_blocks * block[1]`.
            block: tokens a query block, tokens a key block.
            weight: float like `mask`, how many times each kept block counts; default once.
            pooled: keys that each dropped block is pooled to.
            repetitive: bool (heads,), heads whose rows of the mask are not looked at: they attend
                all keys from the rows that they compute.
            copies: what these compute and copy.

        Raises:
            PlanError: not a boolean 3-D tensor, lengths that don't fit, an empty row, weights out
                of range, or row-shared heads without copies.
        """
        kinds: dict[str, Any] = {"error": PlanError}
        require(isinstance(mask, Tensor), "mask", mask, "torch.Tensor of torch.bool", **kinds)
        require(is_integers(block, 2), "block", block, "two integers", **kinds)
        require(weight is None or isinstance(weight, Tensor), "weight", weight, "a tensor", **kinds)
        if mask.dtype != torch.bool or mask.dim() != 3:
            raise PlanError(
                "a block mask must be a boolean tensor of three dimensions",
                expected="bool (heads, query_blocks, key_blocks)",
                got=f"{mask.dtype} {tuple(mask.shape)}",
                remedy="pass mask.bool() with one row a query block",
            )
        heads, rows, columns = mask.shape
        query_length = rows * block[0] if query_length is None else query_length
        key_length = columns * block[1] if key_length is None else key_length
        check_sizes(heads, query_length, key_length, *block)
        expected = (math.ceil(query_length / block[0]), math.ceil(key_length / block[1]))
        if (rows, columns) != expected:
            raise PlanError(
                "the mask does not cover the sequence",
                expected=f"{expected} (query_blocks, key_blocks) for {query_length} queries and "
                f"{key_length} keys in blocks of {block}",
                got=f"{(rows, columns)}",
                remedy="check the block size and the number of tokens",
            )
        if repetitive is not None:
            repetitive = np.array(repetitive)
            check_repetitive(repetitive, heads, copies)
            assert copies is not None
            dense = np.arange(rows) < -(-len(copies.computed(query_length)) // block[0])
            flags = torch.tensor(repetitive, device=mask.device)[:, None, None]
            mask = mask.where(~flags, torch.from_numpy(dense).to(mask.device)[:, None])
            weight = None if weight is None else weight.where(~flags.to(weight.device), 1.0)
        bits = np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little")
        codes = None if weight is None else block_weights.encode(mask, weight)
        return cls(heads, query_length, key_length, *block, bits, codes, pooled, copies, repetitive)

    @classmethod
    def dense(
        cls, heads: int, query_length: int, key_length: int, block: tuple[int, int] = (128, 128)
    ) -> BlockPattern:
        """Return the pattern that keeps every block."""
        require(is_integers(block, 2), "block", block, "two integers", error=PlanError)
        check_sizes(heads, query_length, key_length, *block)
        rows, columns = math.ceil(query_length / block[0]), math.ceil(key_length / block[1])
        mask = torch.ones(heads, rows, columns, dtype=torch.bool)
        return cls.from_mask(mask, query_length=query_length, key_length=key_length, block=block)

    @property
    def query_blocks(self) -> int:
        """Number of query blocks, the ragged last one included."""
        return -(-self.query_length // self.block_m)

    @property
    def key_blocks(self) -> int:
        """Number of key blocks, the ragged last one included."""
        return -(-self.key_length // self.block_n)

    @cached_property
    def kept(self) -> int:
        """Number of kept blocks over all heads."""
        return (
            int(np.bitwise_count(self.bits).sum())
            if hasattr(np, "bitwise_count")
            else int(self.numpy_mask().sum())
        )

    @property
    def density(self) -> float:
        """Kept blocks / all blocks, in (0, 1]."""
        return self.kept / (self.heads * self.query_blocks * self.key_blocks)

    @property
    def weighted(self) -> bool:
        """Whether a block has a weight."""
        return self.weights is not None

    @property
    def full(self) -> bool:
        """Whether it is dense attention: every block kept, none weighted, no row copied.

        Copied rows may save no block: what is computed is what the plan says, not its blocks.
        """
        return self.density == 1.0 and self.weights is None and self.repetitive is None

    @property
    def computed_density(self) -> float:
        """Density with the work that pooled keys are: each row attends those of every block."""
        return self.density + self.pooled / self.block_n * float(self.computed_rows().mean())

    def computed_rows(self) -> npt.NDArray[np.bool_]:
        """Boolean (heads, query_blocks): False past the last row of a row-shared head."""
        rows = np.ones((self.heads, self.query_blocks), dtype=np.bool_)
        if self.repetitive is not None:
            assert self.copies is not None
            computed = -(-len(self.copies.computed(self.query_length)) // self.block_m)
            rows[self.repetitive, computed:] = False
        return rows

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over sizes, bits and what else is there: equal patterns share kernels."""
        sizes = (self.heads, self.query_length, self.key_length, self.block_m, self.block_n)
        h = hashlib.sha256(repr(sizes).encode())
        h.update(np.ascontiguousarray(self.bits).tobytes())
        if self.weights is not None:
            h.update(b"weights" + np.ascontiguousarray(self.weights).tobytes())
        if self.pooled:
            h.update(b"pooled %d" % self.pooled)
        if self.repetitive is not None:
            h.update(f"copies {self.copies}".encode() + self.repetitive.tobytes())
        return h.hexdigest()

    def numpy_mask(self) -> npt.NDArray[np.bool_]:
        """Boolean (heads, query_blocks, key_blocks) in host memory."""
        bits = np.unpackbits(self.bits, axis=-1, count=self.key_blocks, bitorder="little")
        return bits.view(np.bool_)

    def row_mask(self, row: int) -> npt.NDArray[np.bool_]:
        """Boolean (heads, key_blocks): what one row of query blocks keeps."""
        bits = np.unpackbits(self.bits[:, row], axis=-1, count=self.key_blocks, bitorder="little")
        return bits.astype(np.bool_)

    @property
    def block_weights(self) -> npt.NDArray[np.uint8]:
        """Codes of weights, uint8 (heads, query_blocks, key_blocks); 0: the block counts once."""
        if self.weights is not None:
            return self.weights
        return np.zeros((self.heads, self.query_blocks, self.key_blocks), dtype=np.uint8)

    def kept_weights(self) -> npt.NDArray[np.uint8]:
        """Codes of weights of the kept blocks, row after row, uint8 (kept,)."""
        return self.block_weights.reshape(-1)[np.flatnonzero(self.numpy_mask())]

    def log_weights(self) -> npt.NDArray[np.float32]:
        """Float32 (heads, query_blocks, key_blocks): natural logarithm of each block's weight."""
        return block_weights.log_weight(self.block_weights)

    def mask(self) -> Tensor:
        """Boolean tensor (heads, query_blocks, key_blocks) on the CPU; True is kept.

        The rows of a row-shared head are those of the queries that it computes.
        """
        return torch.from_numpy(self.numpy_mask())

    def token_mask(self) -> Tensor:
        """Boolean tensor (heads, query_length, key_length): the mask expanded to tokens.

        In a row-shared head a token that copies has the keys of the one that it copies.
        Quadratic in the sequence length: for tests and references only.
        """
        mask = self.mask().repeat_interleave(self.block_n, 2)[..., : self.key_length]
        return self.rows_to_tokens(mask)

    def rows_to_tokens(self, rows: Tensor) -> Tensor:
        """Return (heads, query_length, ...) from values (heads, query_blocks, ...) of its rows."""
        tokens = rows.repeat_interleave(self.block_m, 1)[:, : self.query_length]
        if self.repetitive is not None:
            assert self.copies is not None
            source = torch.from_numpy(self.copies.sources(self.query_length).astype(np.int64))
            flags = torch.from_numpy(np.flatnonzero(self.repetitive))
            tokens[flags] = rows[flags][:, source // self.block_m]
        return tokens

    def intervals(self) -> Intervals:
        """Kept key blocks as sorted runs of one weight, row by row."""
        if self.weights is None:
            return runs_of_bits(self.bits)
        codes = self.numpy_mask().astype(np.int16) - 1 + self.weights
        runs, values = runs_of(codes.reshape(-1, self.key_blocks))
        return replace(runs, log_weights=block_weights.log_weight(values.astype(np.uint8)))

    def kv_blocks(self) -> tuple[Tensor, Tensor]:
        """`kv_num_blocks` int32 (heads, query_blocks) and `kv_indices` int32 (heads,
        query_blocks, key_blocks), with the meaning they have in PyTorch's `BlockMask`.
        """
        mask = self.mask()
        count = mask.sum(-1, dtype=torch.int32)
        indices = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
        return count, indices
