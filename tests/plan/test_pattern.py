"""BlockPattern: the stored bits and every form derived from them say the same."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan.pattern import BlockPattern
from calibatt_compiler.plan.sizes import MAX_HEADS, MAX_LENGTH, check_sizes

DIAGONAL = torch.eye(3, dtype=torch.bool)[None]


@st.composite
def patterns(draw: st.DrawFn) -> BlockPattern:
    block = (16 * draw(st.integers(1, 3)), 16 * draw(st.integers(1, 3)))
    query_length, key_length = draw(st.integers(1, 200)), draw(st.integers(1, 400))
    shape = (draw(st.integers(1, 3)), -(-query_length // block[0]), -(-key_length // block[1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scores = torch.rand(shape, generator=generator)
    mask = (scores < draw(st.floats(0, 1))).scatter(-1, scores.argmin(-1, keepdim=True), True)
    return BlockPattern.from_mask(
        mask, query_length=query_length, key_length=key_length, block=block
    )


@given(patterns())
@settings(deadline=None, max_examples=150)
def test_every_form_says_the_same(pattern: BlockPattern):
    mask = pattern.mask()
    assert mask.shape == (pattern.heads, pattern.query_blocks, pattern.key_blocks)

    again = BlockPattern.from_mask(
        mask,
        query_length=pattern.query_length,
        key_length=pattern.key_length,
        block=(pattern.block_m, pattern.block_n),
    )
    assert np.array_equal(again.bits, pattern.bits)
    assert again.digest == pattern.digest

    assert pattern.kept == mask.sum()
    assert pattern.density == mask.sum().item() / mask.numel()
    assert 0 < pattern.density <= 1

    runs = pattern.intervals()
    rebuilt = np.zeros((pattern.heads * pattern.query_blocks, pattern.key_blocks), dtype=bool)
    for row in range(rebuilt.shape[0]):
        before = -1
        for run in range(runs.offsets[row], runs.offsets[row + 1]):
            assert before < runs.starts[run] < runs.ends[run] <= pattern.key_blocks
            rebuilt[row, runs.starts[run] : runs.ends[run]] = True
            before = runs.ends[run]
    assert np.array_equal(rebuilt.reshape(mask.shape), mask.numpy())

    tokens = pattern.token_mask()
    assert tokens.shape == (pattern.heads, pattern.query_length, pattern.key_length)
    query, key = pattern.query_length - 1, pattern.key_length - 1
    for i, j in ((0, 0), (query, 0), (0, key), (query, key), (query // 2, key // 3)):
        block = mask[:, i // pattern.block_m, j // pattern.block_n]
        assert torch.equal(tokens[:, i, j], block)


@given(patterns())
@settings(deadline=None, max_examples=50)
def test_kv_blocks_mean_what_pytorch_means(pattern: BlockPattern):
    count, indices = pattern.kv_blocks()
    assert count.dtype == indices.dtype == torch.int32
    theirs = BlockMask.from_kv_blocks(
        count[None],
        indices[None],
        BLOCK_SIZE=(pattern.block_m, pattern.block_n),
        seq_lengths=(pattern.query_length, pattern.key_length),
    )
    assert torch.equal(theirs.to_dense()[0].bool(), pattern.mask())


def test_bits_are_packed_little_endian():
    mask = torch.zeros(1, 1, 10, dtype=torch.bool)
    mask[0, 0, [0, 3, 9]] = True
    assert BlockPattern.from_mask(mask, block=(16, 16)).bits.tolist() == [[[0b1001, 0b10]]]


def test_dense_keeps_every_block():
    pattern = BlockPattern.dense(2, 100, 333, block=(64, 32))
    assert pattern.density == 1
    assert pattern.mask().shape == (2, 2, 11)
    assert pattern.intervals().ends.tolist() == [11] * 4


def test_digest_tells_patterns_apart():
    base = BlockPattern.from_mask(DIAGONAL, block=(16, 16))
    others = [
        BlockPattern.from_mask(DIAGONAL.flip(1), block=(16, 16)),
        BlockPattern.from_mask(DIAGONAL, block=(32, 16)),
        BlockPattern.from_mask(DIAGONAL, block=(16, 16), query_length=47),
        BlockPattern.from_mask(DIAGONAL, block=(16, 16), key_length=47),
        BlockPattern.from_mask(DIAGONAL.repeat(2, 1, 1), block=(16, 16)),
    ]
    digests = {pattern.digest for pattern in [base, *others]}
    assert len(digests) == 6


def test_bits_are_read_only():
    pattern = BlockPattern.from_mask(DIAGONAL)
    with pytest.raises(ValueError, match="read-only"):
        pattern.bits[0, 0, 0] = 255
    with pytest.raises(AttributeError):
        pattern.heads = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        (DIAGONAL.float(), "boolean"),
        (DIAGONAL[0], "three dimensions"),
        (torch.zeros(1, 3, 3, dtype=torch.bool), "3 empty rows, first: head 0, query block 0"),
        (torch.ones(0, 3, 3, dtype=torch.bool), "heads"),
        (torch.ones(1, 0, 3, dtype=torch.bool), "query_length"),
        (torch.ones(1, 3, 0, dtype=torch.bool), "key_length"),
    ],
)
def test_bad_masks_are_refused(mask: Tensor, problem: str):
    with pytest.raises(PlanError, match=problem):
        BlockPattern.from_mask(mask)


@pytest.mark.parametrize(
    ("lengths", "problem"),
    [
        ({"query_length": 32}, r"got:      \(3, 3\)"),
        ({"query_length": 49}, "does not cover"),
        ({"key_length": 32}, "does not cover"),
        ({"key_length": -1}, "key_length"),
        ({"key_length": MAX_LENGTH + 1}, "key_length"),
        ({"block": (0, 16)}, "query_length"),
        ({"block": (16, 24)}, "multiple of 16"),
        ({"block": (16, 2048)}, "block_n"),
    ],
)
def test_lengths_must_fit(lengths: dict[str, object], problem: str):
    with pytest.raises(PlanError, match=problem):
        BlockPattern.from_mask(DIAGONAL, **({"block": (16, 16)} | lengths))


@pytest.mark.parametrize("bits", [np.ones((1, 3, 2), np.uint8), np.ones((1, 3, 1), np.int8)])
def test_raw_bits_must_have_the_shape(bits: np.ndarray):
    with pytest.raises(PlanError, match="wrong shape"):
        BlockPattern(1, 48, 48, 16, 16, bits)


def test_raw_bits_must_not_reach_past_the_keys():
    with pytest.raises(PlanError, match="past the end"):
        BlockPattern(1, 48, 48, 16, 16, np.full((1, 3, 1), 0b1001, np.uint8))


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("value", [0, -1, 1 << 40, 16.0, True, "16", None])
def test_sizes_out_of_range_are_refused(position: int, value: object):
    sizes: list[object] = [2, 64, 64, 16, 16]
    sizes[position] = value
    with pytest.raises(PlanError, match="out of range"):
        check_sizes(*sizes)  # type: ignore[arg-type]


def test_largest_sizes_are_accepted():
    check_sizes(MAX_HEADS, MAX_LENGTH, MAX_LENGTH, 1024, 1024)


@pytest.mark.parametrize("block", [(0, 16), (16, 0)])
def test_dense_refuses_empty_blocks(block: tuple[int, int]):
    with pytest.raises(PlanError, match="out of range"):
        BlockPattern.dense(1, 64, 64, block=block)


MASK = torch.tensor([[[True, True, False], [False, True, True]]])
WEIGHT = torch.tensor([[[1.0, 2.0, 9.0], [9.0, 1.0, 300.0]]])


def test_weights_are_part_of_what_a_pattern_is():
    plain = BlockPattern.from_mask(MASK, block=(16, 16))
    pattern = BlockPattern.from_mask(MASK, block=(16, 16), weight=WEIGHT)
    other = BlockPattern.from_mask(MASK, block=(16, 16), weight=WEIGHT + 1)
    pooled = BlockPattern.from_mask(MASK, block=(16, 16), pooled=4)
    assert len({plain.digest, pattern.digest, other.digest, pooled.digest}) == 4
    assert pattern.density == plain.density == pooled.density == 4 / 6
    assert pooled.computed_density == 4 / 6 + 4 / 16
    expected = torch.where(MASK, WEIGHT, 1.0).log()
    assert torch.from_numpy(pattern.log_weights()).sub(expected).abs().max() <= 0.022
    assert (plain.log_weights() == 0).all()
    ones = BlockPattern.from_mask(MASK, block=(16, 16), weight=torch.ones(1, 2, 3))
    assert ones.weights is None
    assert ones.digest == plain.digest
    with pytest.raises(ValueError, match="read-only"):
        pattern.weights[0, 0, 0] = 1


@pytest.mark.parametrize("seed", range(20))
def test_intervals_hold_each_kept_block_once_with_its_weight(seed: int):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 4, 9, generator=generator) < 0.7
    mask[..., seed % 9] = True
    weight = 2.0 ** torch.randint(0, 3, (3, 4, 9), generator=generator)
    pattern = BlockPattern.from_mask(mask, block=(16, 16), weight=weight)
    runs = pattern.intervals()
    rebuilt = torch.full((12, 9), -math.inf)
    for row in range(12):
        before = None
        for run in range(runs.offsets[row], runs.offsets[row + 1]):
            start, end = int(runs.starts[run]), int(runs.ends[run])
            log_weight = float(runs.log_weights[run])
            assert start < end
            assert before is None or start > before[0] or log_weight != before[1], "one run in two"
            assert before is None or start >= before[0]
            before = end, log_weight
            rebuilt[row, start:end] = log_weight
    expected = torch.where(mask, weight.log(), -math.inf).reshape(12, 9)
    torch.testing.assert_close(rebuilt, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"weight": torch.ones(1, 2, 3, dtype=torch.int32)}, "as many as blocks"),
        ({"weight": torch.ones(1, 2, 2)}, "as many as blocks"),
        ({"weight": torch.full((1, 2, 3), 0.5)}, "out of range"),
        ({"weight": torch.full((1, 2, 3), math.nan)}, "out of range"),
        ({"weight": torch.full((1, 2, 3), math.inf)}, "out of range"),
        ({"pooled": 3}, "divisor of the 16"),
        ({"pooled": -1}, "divisor of the 16"),
        ({"pooled": 32}, "divisor of the 16"),
    ],
)
def test_bad_weights_and_pools_are_refused(changes: dict[str, object], problem: str):
    with pytest.raises(PlanError, match=problem):
        BlockPattern.from_mask(MASK, block=(16, 16), **changes)


def test_raw_weights_must_be_of_kept_blocks():
    pattern = BlockPattern.from_mask(MASK, block=(16, 16), weight=WEIGHT)
    with pytest.raises(PlanError, match="dropped block has a weight"):
        replace(pattern, weights=np.full((1, 2, 3), 5, dtype=np.uint8))
    with pytest.raises(PlanError, match="wrong shape"):
        replace(pattern, weights=np.zeros((1, 2, 2), dtype=np.uint8))
