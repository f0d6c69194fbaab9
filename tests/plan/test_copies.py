"""Row-shared heads in a plan: which rows are computed, where they go, and how they are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt_compiler.errors import PlanError, PlanFormatError
from calibatt_compiler.plan import (
    AnchorRows,
    BlockPattern,
    Plan,
    Sampler,
    SitePatterns,
    merge_intervals,
    share_steps,
)
from calibatt_compiler.plan.order import RASTER, TokenOrder
from calibatt_compiler.plan.text import fit_pattern

GRID = (2, 7, 5)
VIDEO = 70
BLOCK = (16, 32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[AnchorRows, int]:
    """Copies and a sequence length: any grid, text on either side, tiles that cut the grid."""
    size = st.integers(1, 7)
    grid = (draw(st.integers(1, 3)), draw(size), draw(size))
    tile = st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4))
    order = TokenOrder(draw(st.none() | tile))
    first, after = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    copies = AnchorRows(grid, draw(st.integers(1, 9)), first, order)
    return copies, first + copies.video + after


@given(cases())
@settings(deadline=None, max_examples=200)
def test_each_token_takes_its_column_of_the_nearest_anchor(case: tuple[AnchorRows, int]):
    copies, length = case
    frames, height, width = copies.grid
    count = min(copies.anchor_rows, height)
    anchors = [(2 * i + 1) * height // (2 * count) for i in range(count)]
    assert len(set(anchors)) == count
    order = copies.order.tokens(copies.grid, length=length, first=copies.first)
    token_at = list(range(length)) if order is None else order.tolist()

    def taken_from(token: int) -> int:
        place = token - copies.first
        if not 0 <= place < copies.video:
            return token
        frame, row, column = place // (height * width), place // width % height, place % width
        nearest = min(anchors, key=lambda anchor: (abs(row - anchor), anchor))
        return copies.first + (frame * height + nearest) * width + column

    computed, sources = copies.computed(length), copies.sources(length)
    assert computed.dtype == sources.dtype == np.int32
    assert [token_at[computed[source]] for source in sources] == [taken_from(t) for t in token_at]
    kept = [p for p, token in enumerate(token_at) if taken_from(token) == token]
    assert computed.tolist() == kept
    assert len(kept) == length - copies.video + frames * count * width


def test_anchor_rows_are_the_middles_of_equal_parts():
    def anchors(height: int, count: int) -> list[int]:
        return list(AnchorRows((1, height, 1), count).anchors)

    assert anchors(30, 5) == [3, 9, 15, 21, 27]
    assert anchors(8, 5) == [0, 2, 4, 5, 7]
    assert anchors(8, 1) == [4]
    assert anchors(3, 3) == anchors(3, 9) == [0, 1, 2]


def test_of_two_nearest_anchors_the_upper_one_is_taken():
    copies = AnchorRows((1, 4, 1), 2)  # anchors 1 and 3: row 2 is as near to either
    assert copies.computed(4).tolist() == [1, 3]
    assert copies.sources(4).tolist() == [0, 0, 0, 1]


def test_tables_can_not_be_changed():
    for table in (AnchorRows(GRID, 2).computed(VIDEO), AnchorRows(GRID, 2).sources(VIDEO)):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 1


@pytest.mark.parametrize(
    "arguments",
    [(GRID, 0), (GRID, -1), (GRID, 2.0), ((2, 7), 2), ((2, 0, 5), 2), (GRID, 2, -1), (GRID, True)],
)
def test_sizes_are_checked(arguments: Any):
    with pytest.raises(PlanError, match="copied rows need a grid"):
        AnchorRows(*arguments)


def test_a_sequence_must_hold_the_grid():
    with pytest.raises(PlanError, match="not in a sequence of this length"):
        AnchorRows(GRID, 2, first=1).computed(VIDEO)


def sparse(heads: int, length: int, seed: int = 0) -> torch.Tensor:
    """Bool mask of square sequences in blocks of `BLOCK`, no row empty."""
    shape = (heads, *(-(-length // size) for size in BLOCK))
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (draw < 0.4).scatter(-1, draw.argmin(-1, keepdim=True), True)


def mixed(
    *repetitive: bool, length: int = VIDEO, first: int = 0, seed: int = 0, **others: Any
) -> BlockPattern:
    """A pattern of `GRID` in which some heads are row-shared, with two anchor rows of seven."""
    order = others.pop("order", RASTER)
    return BlockPattern.from_mask(
        sparse(len(repetitive), length, seed),
        query_length=length,
        key_length=length,
        block=BLOCK,
        repetitive=np.array(repetitive),
        copies=AnchorRows(GRID, others.pop("anchor_rows", 2), first, order),
        **others,
    )


def test_a_repetitive_head_keeps_all_keys_for_the_rows_it_computes():
    pattern = mixed(False, True)
    mask = pattern.mask()
    # 2 frames x 2 rows x 5 columns: 20 of 70 queries, 2 of 5 blocks.
    assert mask[1].tolist() == [[True] * 3] * 2 + [[False] * 3] * 3
    assert torch.equal(mask[0], sparse(2, VIDEO)[0])
    assert pattern.kept == mask.sum()
    assert pattern.density == mask.sum() / mask.numel()
    assert pattern.computed_rows().tolist() == [[True] * 5, [True] * 2 + [False] * 3]
    runs = pattern.intervals()
    assert np.diff(runs.offsets[5:]).tolist() == [1, 1, 0, 0, 0]


def test_pooled_keys_are_work_of_computed_rows_alone():
    pattern = mixed(False, True, pooled=1)
    assert pattern.computed_density == pytest.approx(pattern.density + 7 / 10 / 32)


def test_the_mask_of_tokens_is_that_of_the_rows_they_copy():
    pattern = mixed(True, False, length=80, first=10)
    bits = pattern.bits.copy()
    bits[0, 1, 0] = 0b010  # query block 1 of the computed ones now has keys of its own
    pattern = replace(pattern, bits=bits)
    tokens = pattern.token_mask()
    computed, sources = pattern.copies.computed(80), pattern.copies.sources(80)
    keys = [[True] * 80, [False] * 32 + [True] * 32 + [False] * 16, [True] * 80]
    for query in range(80):
        copied = int(computed[sources[query]])
        row = computed.tolist().index(copied) // BLOCK[0]
        assert tokens[0, query].tolist() == keys[row]
    assert torch.equal(tokens[1], mixed(False, False, length=80, first=10).token_mask()[1])


def test_the_digest_tells_copies_apart():
    plain, one = mixed(False, False), mixed(False, True)
    others = [
        mixed(True, False),
        mixed(True, True),
        mixed(False, True, anchor_rows=3),
        mixed(False, True, order=TokenOrder((1, 2, 2))),
        plain,
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 6
    assert mixed(False, True).digest == one.digest


def test_copies_without_a_repetitive_head_are_no_part_of_the_digest():
    plain = mixed(False, False)
    assert plain.repetitive is None
    assert plain.copies is not None
    without = replace(plain, copies=None)
    assert without.digest == plain.digest
    assert np.array_equal(without.bits, plain.bits)


def test_what_contradicts_itself_is_refused():
    pattern = mixed(False, True)
    flags = pattern.repetitive
    with pytest.raises(PlanError, match="keeps key blocks for rows that it does not compute"):
        replace(pattern, bits=np.full_like(pattern.bits, 7))
    empty = pattern.bits.copy()
    empty[1, 1] = 0
    with pytest.raises(PlanError, match="no kept key block"):
        replace(pattern, bits=empty)
    with pytest.raises(PlanError, match="one flag a head"):
        replace(pattern, copies=None)
    with pytest.raises(PlanError, match="one flag a head"):
        replace(pattern, repetitive=np.array([True]))
    with pytest.raises(PlanError, match="one flag a head"):
        replace(pattern, repetitive=np.array([0, 1]))
    with pytest.raises(PlanError, match="not in a sequence of this length"):
        replace(pattern, copies=AnchorRows((3, 7, 5), 2))
    with pytest.raises(PlanError, match="a row-shared head has weights"):
        replace(pattern, weights=pattern.numpy_mask().astype(np.uint8))
    assert flags is not None
    with pytest.raises(ValueError, match="read-only"):
        flags[0] = True


def test_weights_are_for_the_other_heads():
    weight = torch.full((2, 5, 3), 2.0)
    pattern = mixed(False, True, weight=weight)
    assert pattern.weights is not None
    assert (pattern.weights[0] > 0).tolist() == pattern.mask()[0].tolist()
    assert not pattern.weights[1].any()


@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("text", [1, 9, 17, 40])
def test_carried_to_another_text_length(position: Any, text: int):
    def pattern(*flags: bool, text: int) -> BlockPattern:
        first = text if position == "first" else 0
        return mixed(*flags, length=VIDEO + text, first=first)

    old, plain = pattern(False, True, text=9), pattern(False, False, text=9)
    to = (VIDEO + text, VIDEO + text)
    new = fit_pattern(old, to, video=VIDEO, position=position)
    assert new.copies == AnchorRows(GRID, 2, text if position == "first" else 0)
    assert new.repetitive.tolist() == [False, True]
    assert np.array_equal(new.bits[1], pattern(False, True, text=text).bits[1])
    assert np.array_equal(
        new.bits[0], fit_pattern(plain, to, video=VIDEO, position=position).bits[0]
    )


def plan_of(*patterns: BlockPattern, **others: Any) -> Plan:
    sampler = Sampler(timesteps=tuple(float(-step) for step in range(len(patterns))))
    return Plan.create({"a": SitePatterns.share(patterns)}, grid=GRID, sampler=sampler, **others)


def test_steps_share_only_if_the_same_heads_are_repetitive():
    plain, one, other = mixed(False, False), mixed(False, True), mixed(True, False)
    changed = replace(one, bits=one.bits | np.array([7, 0], np.uint8)[:, None, None])
    shared = share_steps(plan_of(plain, one, changed, other, other), 0.01)
    assert shared.sites["a"].steps == (0, 1, 1, 2, 2)
    assert shared.sites["a"].at(1).digest == changed.digest
    assert [shared.sites["a"].repetitive_at(step) for step in range(5)] == [0, 1, 1, 1, 1]


def test_merging_leaves_repetitive_heads_alone():
    pattern = mixed(False, True, seed=3)
    merged = merge_intervals(plan_of(pattern), 0.9).sites["a"].at(0)
    assert np.array_equal(merged.bits[1], pattern.bits[1])
    assert merged.kept > pattern.kept
    assert merged.repetitive.tolist() == [False, True]


@pytest.mark.parametrize(
    ("policy", "text", "first"),
    [("none", 0, 0), ("dense_first", 10, 10), ("dense_last", 10, 0), ("dense_last", 0, 0)],
)
@pytest.mark.parametrize("order", ["raster", "1x2x2"])
def test_a_plan_comes_back_from_its_file(
    tmp_path: Path, policy: Any, text: int, first: int, order: str
):
    order_ = TokenOrder.parse(order)
    where: dict[str, Any] = {"length": VIDEO + text, "first": first, "order": order_}
    patterns = [
        mixed(*flags, seed=seed, **where)
        for flags, seed in [
            ((False, False), 0),
            ((False, True), 1),
            ((False, True), 2),
            ((True, True), 2),
            ((False, False), 0),
        ]
    ]
    plan = plan_of(*patterns, token_order=order_, text_policy=policy)
    assert "repetition" in plan.metadata.requires
    record = plan.metadata.sites[0]
    assert (record.head_forms, record.anchor_rows) == ("mixed", 2)
    assert record.repetitive == (0, 1, 1, 2, 0)
    path = tmp_path / "plan"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded.digest == plan.digest
    assert loaded.metadata == plan.metadata
    for step in (3, 1, 0, 4, 2):
        found, pattern = loaded.sites["a"].at(step), patterns[step]
        assert found.digest == pattern.digest
        assert found.copies == pattern.copies
        assert np.array_equal(found.bits, pattern.bits)
        assert loaded.sites["a"].repetitive_at(step) == plan.sites["a"].repetitive_at(step)
    again = loaded.with_sites(dict(loaded.sites), thresholds={}, quality={})
    assert again.metadata.sites == plan.metadata.sites


def test_a_plan_without_repetitive_heads_says_nothing_of_them(tmp_path: Path):
    plan = plan_of(mixed(False, False))
    without = plan_of(replace(mixed(False, False), copies=None))
    assert plan.digest == without.digest
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").sites["a"].size.copies is None
    assert b"anchor_rows" not in (tmp_path / "plan").read_bytes()


@pytest.mark.parametrize(
    ("change", "others", "match"),
    [
        ({"anchor_rows": 3, "order": TokenOrder((1, 2, 2))}, {}, "rows of another video"),
        ({"length": VIDEO + 3, "first": 2}, {"text_policy": "dense_first"}, "of another video"),
        ({"length": VIDEO + 3, "first": 3}, {"text_policy": "dense_last"}, "of another video"),
        ({"length": VIDEO + 3}, {"text_policy": "in_mask"}, "no valid plan"),
    ],
)
def test_copies_must_be_those_of_the_plan(change: Any, others: Any, match: str):
    with pytest.raises(PlanError, match=match):
        plan_of(mixed(False, True, **change), **others)
    with pytest.raises(PlanError, match=match):
        plan_of(mixed(False, False, **change), **others).with_sites(
            {"a": SitePatterns.share([mixed(False, True, **change)])}, thresholds={}, quality={}
        )


def test_a_site_has_one_kind_of_copies():
    with pytest.raises(PlanError, match="one size"):
        SitePatterns.share([mixed(False, True), mixed(False, True, anchor_rows=3)])


@pytest.mark.parametrize(
    "change",
    [
        {"head_forms": "blocks"},
        {"anchor_rows": 0},
        {"anchor_rows": -1},
        {"repetitive": [0]},
        {"repetitive": [3]},
        {"repetitive": [1, 1]},
        {"repetitive": []},
    ],
)
def test_a_record_that_contradicts_itself_is_refused(change: dict[str, Any]):
    metadata = plan_of(mixed(False, True)).metadata
    raw = metadata.model_dump(mode="json")
    assert type(metadata).model_validate_json(json.dumps(raw)) == metadata
    raw["sites"][0].update(change)
    with pytest.raises(ValueError, match=r"head_forms|repetitive|anchor_rows"):
        type(metadata).model_validate_json(json.dumps(raw))


def test_a_wrong_number_of_heads_is_noticed_when_a_pattern_is_decoded():
    site = plan_of(mixed(False, True), mixed(True, True)).sites["a"].packed()
    with pytest.raises(PlanFormatError, match="not what was stored"):
        replace(site.patterns, repetitive=(1, 1))[1]


def test_flags_are_zero_or_one(decoded: Callable[[int], BlockPattern]):
    assert decoded(1).repetitive.tolist() == [False, True]
    with pytest.raises(PlanFormatError, match="neither 0 nor 1"):
        decoded(2)


@pytest.fixture
def decoded() -> Callable[[int], BlockPattern]:
    """Decode a pattern whose last flag is stored as this number."""

    def decode(flag: int) -> BlockPattern:
        stored = plan_of(mixed(False, True)).sites["a"].packed().patterns
        ((bits, (name, _, length)),) = stored.entries
        assert name == "repetitive"
        code = np.concatenate([stored.code[:-length], np.array([0, flag], np.uint8)])
        entries = ((bits, (name, "raw", 2)),)
        return replace(stored, code=code, entries=entries)[0]

    return decode
