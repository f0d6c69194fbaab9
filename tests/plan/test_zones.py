"""Octave zones: what is drawn, against a plain reference in fractions; and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibatt_compiler.errors import PlanError
from calibatt_compiler.plan.zones import ZonePattern, drawing
from calibatt_compiler.plan.zones.checks import ARRAYS

STEPS = [0, 1, 2, 3, 17, 64, 127, 128, 1000]


def reference_start(head: int, row: int, step: int, seed: int = 0) -> int:
    """Start of a row in 1/128, from the words of `plan.zones.drawing` and in Python's integers."""
    weyl = (head * 0xC13FA9A9 + row * 0x9E3779B9) % 2**32 // 2**25
    return (weyl + int(f"{step % 128:07b}"[::-1], 2) + seed) % 128


def reference_row(octaves: list[int], start: int) -> list[bool]:
    """Madow's systematic sample of one row, in fractions."""
    total, kept = Fraction(start, 128), []
    for octave in octaves:
        after = total + Fraction(1, 2**octave)
        kept.append(floor(after) > floor(total))
        total = after
    return kept


def reference_draw(octaves: Tensor, step: int, *, first_row: int = 0, seed: int = 0) -> Tensor:
    """Draw of a whole map; rows without text begin at `first_row`."""
    kept = [
        [
            reference_row(row, reference_start(head, number - first_row, step, seed))
            for number, row in enumerate(rows)
        ]
        for head, rows in enumerate(octaves.tolist())
    ]
    return torch.tensor(kept)


def shared_map(data: st.DataObject, heads: int, rows: int, columns: int) -> Tensor:
    """An octave map whose heads are made of runs, rows alike or shifted, each with an octave 0."""
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed of the map"))
    found = np.zeros((heads, rows, columns), np.int64)
    for head in range(heads):
        group = data.draw(st.integers(1, rows), "rows a group")
        for first in range(0, rows, group):
            last = min(first + group, rows)
            line = np.repeat(generator.integers(0, 8, rows + columns), generator.integers(1, 5))
            diagonal = data.draw(st.booleans(), "diagonal") and last - first <= columns
            for row in range(first, last):
                shift = last - 1 - row if diagonal else 0
                found[head, row] = line[shift : shift + columns]
            lead = generator.integers(last - first - 1, columns) if diagonal else 0
            for row in range(first, last):
                found[head, row, lead - (last - 1 - row) if diagonal else lead] = 0
    return torch.from_numpy(found)


@st.composite
def patterns(draw: st.DrawFn) -> tuple[Tensor, ZonePattern]:
    """An octave map of a video, with or without text, and its zones."""
    data = draw(st.data())
    heads, rows, columns = (draw(st.integers(1, n)) for n in (3, 14, 40))
    octaves = shared_map(data, heads, rows, columns)
    block = (16 * draw(st.integers(1, 2)), 16 * draw(st.integers(1, 2)))
    text = draw(st.sampled_from([None, "first", "last"]))
    seed = draw(st.integers(0, 127))
    ragged = draw(st.integers(0, 15))
    if text is None:
        lengths = (rows * block[0] - ragged, columns * block[1] - ragged)
        others: dict[str, Any] = {}
    else:
        # Rows and columns whose tokens are all video; blocks that hold text on one side.
        video = min(rows * block[0], columns * block[1]) + draw(st.integers(0, 15))
        tokens = draw(st.integers(1, 40))
        lengths = (video + tokens, video + tokens)
        others = {"video": video, "text": text}
        blocks = [-(-length // size) for length, size in zip(lengths, block, strict=True)]
        whole = torch.zeros(heads, *blocks, dtype=torch.int64)
        edges = []
        for size, count in zip(block, blocks, strict=True):
            inner = [
                index
                for index in range(count)
                if (index * size >= tokens if text == "first" else (index + 1) * size <= video)
            ]
            edges.append((inner[0], inner[-1] + 1) if inner else (0, 0))
        (top, bottom), (left, right) = edges
        inner_rows, inner_columns = bottom - top, right - left
        if inner_rows and inner_columns:
            whole[:, top:bottom, left:right] = shared_map(data, heads, inner_rows, inner_columns)
        octaves = whole
    pattern = ZonePattern.from_octaves(
        octaves,
        query_length=lengths[0],
        key_length=lengths[1],
        block=block,
        seed=seed,
        **others,
    )
    return octaves, pattern


@given(patterns(), st.sampled_from(STEPS))
@settings(deadline=None, max_examples=150)
def test_each_form_of_the_draw_equals_the_reference(made: tuple[Tensor, ZonePattern], step: int):
    octaves, zones = made
    assert np.array_equal(zones.map_octaves(), octaves.numpy())

    expected = reference_draw(octaves, step, first_row=zones.rows[0], seed=zones.seed)
    text_rows = np.ones(zones.query_blocks, bool)
    text_rows[slice(*zones.rows)] = False
    assert expected[:, torch.from_numpy(text_rows)].all()

    plain = drawing.sample(octaves.numpy(), zones.starts(step))
    assert np.array_equal(plain, expected.numpy())

    drawn = zones.draw(step)
    assert torch.equal(drawn.mask(), expected)
    codes = np.where(expected.numpy(), 16 * octaves.numpy(), 0)
    assert np.array_equal(drawn.block_weights, codes)
    weights = torch.from_numpy(np.exp(drawn.log_weights()))
    assert torch.allclose(weights[expected], 2.0 ** octaves[expected].float(), rtol=1e-6)

    assert zones.kept(step) == drawn.kept
    assert np.array_equal(zones.kept_rows(step), expected.sum(-1).numpy())
    rates = sum(Fraction(1, 2**octave) for octave in octaves.flatten().tolist())
    assert zones.density == float(rates / octaves.numel())


@given(patterns(), st.sampled_from(STEPS))
@settings(deadline=None, max_examples=100)
def test_a_kernel_walks_from_the_lead(made: tuple[Tensor, ZonePattern], step: int):
    octaves, zones = made
    runs = zones.draw_runs(step)
    columns, run_octaves = runs.blocks()
    bounds = np.concatenate([[0], np.cumsum(runs.kept())])
    walk = runs.walk()
    mask = zones.draw(step).mask().flatten(0, 1)
    for row, kept in enumerate(mask):
        part = slice(bounds[row], bounds[row + 1])
        assert columns[part].tolist() == kept.nonzero().flatten().tolist()
        assert run_octaves[part].tolist() == octaves.flatten(0, 1)[row][kept].tolist()
        lead = int(runs.leads[row])
        assert walk[part].tolist() == [lead] + [c for c in columns[part].tolist() if c != lead]
        assert octaves.flatten(0, 1)[row, lead] == 0
    assert (runs.counts > 0).all()


@given(patterns())
@settings(deadline=None, max_examples=60)
def test_arrays_make_the_pattern_again(made: tuple[Tensor, ZonePattern]):
    _, zones = made
    sizes = (zones.heads, zones.query_length, zones.key_length, zones.block_m, zones.block_n)
    others = {"video": zones.video, "text": zones.text, "seed": zones.seed}
    arrays = zones.to_arrays()
    assert list(arrays) == list(ARRAYS)
    again = ZonePattern.from_arrays(sizes, arrays, **others)
    assert again.digest == zones.digest
    with pytest.raises(ValueError, match="read-only"):
        again.octaves[:1] = 0
    # Whoever states the map again gets the same arrays: a map has one form.
    same = ZonePattern.from_octaves(
        torch.from_numpy(zones.map_octaves()),
        query_length=zones.query_length,
        key_length=zones.key_length,
        block=(zones.block_m, zones.block_n),
        **others,
    )
    assert same.digest == zones.digest
    assert zones.with_seed((zones.seed + 1) % 128).digest != zones.digest


def test_every_block_is_kept_at_its_rate():
    octaves = np.random.default_rng(0).integers(0, 8, (20, 50))
    kept = sum(drawing.sample(octaves, np.full(20, start)).astype(int) for start in range(128))
    assert np.array_equal(kept, 128 >> octaves), "over the starts, to the bit"


def test_steps_share_no_more_than_they_must():
    octaves = torch.from_numpy(np.random.default_rng(1).integers(0, 8, (2, 9, 60)))
    octaves[..., 0] = 0
    zones = ZonePattern.from_octaves(octaves, block=(16, 16))
    masks = np.stack([zones.draw(step).numpy_mask() for step in range(128)])
    for octave in range(8):
        of_octave = masks[:, octaves.numpy() == octave]
        period = 2**octave
        times = of_octave.reshape(128 // period, period, -1).sum(1)
        assert (times == 1).all(), f"octave {octave}: once in {period} steps"
    some = octaves.numpy() > 0
    shared = [(a & b & some).sum() / (a & some).sum() for a, b in itertools.pairwise(masks)]
    assert max(shared[::2]) == 0, "a step of odd number keeps nothing that the one before it kept"
    assert np.mean(shared) < 0.15


@pytest.mark.parametrize(("octave", "steps"), [(1, 2), (1, 8), (2, 4), (2, 8), (3, 4), (3, 16)])
def test_errors_cancel_over_steps(octave: int, steps: int):
    phases = np.array([drawing.phase(step) for step in range(50)])
    at = (np.arange(128)[:, None] + phases) % 128
    error = (at + (128 >> octave) >= 128) * 2.0**octave - 1
    windows = np.lib.stride_tricks.sliding_window_view(error, steps, axis=1)
    independent = (2**octave - 1) / steps
    assert (windows.mean(-1) ** 2).mean() < 0.8 * independent


def test_starts_are_spread_over_heads_and_rows():
    found = drawing.starts(40, 591)
    for line in (*found, *found.T):
        counts = np.histogram(line, bins=8, range=(0, 128))[0]
        assert abs(counts - len(line) / 8).max() <= 3
    for axis in (0, 1):
        assert (np.diff(found, axis=axis) != 0).all()
    assert found.dtype == np.int32
    assert (found == [[reference_start(h, r, 0) for r in range(591)] for h in range(40)]).all()


def test_an_estimate_is_unbiased_over_the_phases():
    generator = torch.Generator().manual_seed(3)
    octaves = torch.randint(0, 8, (1, 1, 64), generator=generator)
    octaves[..., 5] = 0
    zones = ZonePattern.from_octaves(octaves, block=(16, 16))
    values = torch.randint(0, 1000, (64,), generator=generator)
    total = 0
    for step in range(128):
        drawn = zones.draw(step)
        total += int((values * drawn.mask()[0, 0] * 2 ** octaves[0, 0]).sum())
    assert total == 128 * int(values.sum())


def test_large_groups_are_found():
    row, column = torch.meshgrid(torch.arange(30), torch.arange(30), indexing="ij")
    bands = ((row - column).abs() // 3).clamp_max(7)
    columns = (column // 5).clamp_max(7)
    zones = ZonePattern.from_octaves(torch.stack([bands, columns]), block=(16, 16))
    assert zones.group_rows.tolist() == [30, 30]
    assert zones.diagonal.tolist() == [1, 0]
    assert zones.leads.tolist() == [0, 4]
    assert zones.numbers.tolist() == [2 * 7 + 1 + 1, 6 + 1]


def small() -> ZonePattern:
    octaves = torch.tensor([[[0, 1, 1, 2], [0, 1, 1, 2], [3, 3, 0, 0], [3, 3, 0, 0]]])
    return ZonePattern.from_octaves(octaves, block=(16, 16))


def test_what_is_no_octave_map_is_refused():
    for wrong, match in (
        (torch.zeros(2, 2, dtype=torch.int64), "an octave map"),
        (torch.zeros(1, 2, 2), "an octave map"),
        (torch.full((1, 2, 2), 8), "octaves of zones"),
        (torch.full((1, 2, 2), -1), "octaves of zones"),
        (torch.tensor([[[0, 1], [1, 1]]]), "kept for certain"),
    ):
        with pytest.raises(PlanError, match=match) as caught:
            ZonePattern.from_octaves(wrong, block=(16, 16))
        assert caught.value.expected is not None
        assert caught.value.remedy
    with pytest.raises(PlanError, match="an octave map"):
        ZonePattern.from_octaves(torch.zeros(1, 2, 2, dtype=torch.int8), key_length=500)
    with pytest.raises(PlanError, match="blocks with text"):
        ZonePattern.from_octaves(
            torch.tensor([[[0, 1], [0, 1]]]), block=(16, 16), video=16, text="last"
        )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"formula": 2}, "formula"),
        ({"seed": 128}, "seed"),
        ({"video": 16}, "without text"),
        ({"text": "last"}, "video of a pattern"),
        ({"text": "middle", "video": 16}, "place of the text"),
        ({"group_rows": [0]}, "group_rows"),
        ({"group_rows": [1]}, "diagonal of zones"),
        ({"diagonal": [0, 2]}, "diagonal of zones"),
        ({"counts": [3, 0]}, "runs of a group"),
        ({"counts": [3, 3]}, "octaves and cuts"),
        ({"octaves": [0, 1, 2, 3, 8]}, "octaves of zones"),
        ({"octaves": [0, 1, 1, 3, 0]}, "neighbouring"),
        ({"cuts": [3, 1, 2]}, "rising"),
        ({"cuts": [1, 1 << 30, 2]}, "rising"),
        ({"leads": [1, 2]}, "does not lead"),
        ({"leads": [0, 4]}, "does not lead"),
        ({"leads": [-1, 2]}, "does not lead"),
        ({"heads": 2}, "group_rows"),
        ({"query_length": 100}, "diagonal of zones"),
    ],
)
def test_damaged_zones_are_refused(change: dict[str, Any], match: str):
    zones = small()
    assert zones.cuts.tolist() == [1, 3, 2]
    assert zones.octaves.tolist() == [0, 1, 2, 3, 0]
    values = {
        name: np.array(value, ARRAYS[name]) if name in ARRAYS else value
        for name, value in change.items()
    }
    with pytest.raises(PlanError, match=match) as caught:
        replace(zones, **values)
    assert caught.value.expected is not None
    assert caught.value.got is not None


def test_arrays_of_another_type_are_refused():
    with pytest.raises(PlanError, match="octaves of zones"):
        replace(small(), octaves=small().octaves.astype(np.int64))
