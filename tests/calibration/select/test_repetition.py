"""Spatial repetition: what is measured of a call, and which form a head takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from calibatt_compiler.calibration.select import repetition_scores as repetition
from calibatt_compiler.calibration.select.repetition import choose_head_modes
from calibatt_compiler.calibration.select.repetition_scores import (
    AttentionCall,
    at_other_share,
    copies_of,
    decimals,
    measure,
)
from calibatt_compiler.calibration.select.selection import covering_mask
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.kernels.common.row_similarity import row_similarity
from calibatt_compiler.kernels.energy import block_energy
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.runtime.token_order import Rearrangements

GRID, TEXT = (2, 7, 9), 5
VIDEO = math.prod(GRID)
TOKENS = VIDEO + TEXT
ANCHORS = [1, 3, 5]
NEAREST = [1, 1, 1, 3, 3, 5, 5]
"""Anchor of each of the 7 rows; rows 2 and 4 lie between two and take the upper one."""


def call(order: str, first: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """An observed call of two samples and three heads, its masks and the share they keep.

    All heads are alike enough to be compared whole; the last one attends exactly alike.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, TOKENS, 16)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    video = slice(first, first + VIDEO)
    rows = q[:, :, video].unflatten(2, GRID)
    rows[:, 0] = rows[:, 0, :, :1] + 0.5 * rows[:, 0]
    rows[:, 2] = rows[:, 2, :, :1]
    q[:, :, video] = rows.flatten(2, 4)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = (q.double() @ k.double().mT / 4).softmax(-1) @ v.double()
    where = {"text_first": first > 0, "device": torch.device("cpu")}
    laid = Rearrangements().of(TokenOrder.parse(order), GRID, TOKENS, **where)
    observed = [x if laid is None else laid.apply(x) for x in (q, k)]
    energy = block_energy(*observed, block=(16, 32), scale=0.25)
    mask, kept = covering_mask(energy, 0.6)
    return AttentionCall(q, k, v, out.to(dtype), 0.25, (laid, laid)), mask, kept, out


@pytest.mark.parametrize("elements", [1, 1 << 26])
@pytest.mark.parametrize("first", [0, TEXT])
@pytest.mark.parametrize("order", ["raster", "1x4x4"])
def test_errors_are_those_of_float64(
    order: str, first: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repetition, "ELEMENTS", elements)  # heads one by one, or together
    seen, mask, kept, out = call(order, first)
    copies = copies_of(GRID, TOKENS, "first" if first else "last", 3)
    assert copies is not None
    assert copies.first == first
    scores = measure(seen, mask, kept, copies, (16, 32))
    assert (scores.dtype, scores.shape) == (np.float32, (4, 2, 3))

    video = out[:, :, first : first + VIDEO]
    copied = video.unflatten(2, GRID)[:, :, :, NEAREST].flatten(2, 4)
    tokens = mask.repeat_interleave(16, 2).repeat_interleave(32, 3)[:, :, :TOKENS, :TOKENS]
    if seen.orders[0] is not None:
        positions = seen.orders[0].positions.long()
        tokens = tokens[:, :, positions][..., positions]
    weights = (seen.q.double() @ seen.k.double().mT / 4).masked_fill(~tokens, -torch.inf)
    sparse = (weights.softmax(-1) @ seen.v.double())[:, :, first : first + VIDEO]

    def error(other: Tensor) -> Tensor:
        return (video - other).square().sum((-1, -2)) / video.square().sum((-1, -2))

    similarity = row_similarity(seen.q, seen.k, grid=GRID, first=first, scale=0.25).numpy()
    np.testing.assert_allclose(scores[0], similarity, rtol=1e-6)
    np.testing.assert_allclose(scores[1], error(copied).numpy(), rtol=1e-4, atol=1e-12)
    compared = similarity >= 0.5
    assert compared[:, [0, 2]].all()
    assert not compared.all()
    np.testing.assert_allclose(scores[2][compared], error(sparse).numpy()[compared], rtol=1e-4)
    assert (scores[2][~compared] == 0).all()
    np.testing.assert_allclose(scores[3], 1 - kept.mean(-1).numpy(), rtol=1e-6)
    assert (scores[0][:, 2] == 1).all()
    assert (scores[1][:, 2] == 0).all()  # rounding is no error
    assert (scores[1][:, :2] > 0.01).all()


def test_rounding_of_a_low_precision_output_is_no_error() -> None:
    seen, mask, kept, _ = call("raster", 0, torch.bfloat16)
    copies = copies_of(GRID, TOKENS, "last", 3)
    assert copies is not None
    scores = measure(seen, mask | True, kept, copies, (16, 32))
    assert (scores[2] == 0).all()


def test_an_error_follows_the_dropped_share() -> None:
    scores = np.array([[[0.9, 0.9, 0.9]], [[0.1, 0.1, 0.1]], [[0.04, 0.0, 0.04]], [[0.1, 0, 0.1]]])
    kept = torch.tensor([[[0.9, 0.7], [0.8, 0.8], [0.9, 0.9]]])
    found = at_other_share(scores.astype(np.float32), kept)
    np.testing.assert_allclose(found[:2], scores[:2], rtol=1e-6)
    np.testing.assert_allclose(found[2], [[0.04 * 2**1.75, 0, 0.04]], rtol=1e-6)
    np.testing.assert_allclose(found[3], [[0.2, 0.2, 0.1]], rtol=1e-6)


def test_four_digits_count() -> None:
    values = np.array([0.87, 0.870004, 0.869951, 1.23456e-9, 0.0, 1.0], np.float32)
    expected = [0.87, 0.87, 0.87, 1.235e-9, 0.0, 1.0]
    assert decimals(values).tolist() == pytest.approx(expected, rel=1e-14)


def test_copies_need_rows_and_a_known_place() -> None:
    assert copies_of(GRID, VIDEO, None, 7) is None
    assert copies_of((1, 1, VIDEO), VIDEO, None, 1) is None
    assert copies_of(GRID, TOKENS, None, 3) is None
    plain = copies_of(GRID, VIDEO, None, 3, "1x4x4")
    assert plain is not None
    assert (plain.first, str(plain.order)) == (0, "1x4x4")


# Scores of one sample: similarity, copy error, sparse error, dropped share.
GOOD = (0.9, 0.01, 0.02, 0.1)


def record(name: str = "0", anchor_rows: int = 3, grid: tuple[int, int, int] = GRID) -> InputRecord:
    fields: dict[str, Any] = {
        "name": name,
        "about": {},
        "model": None,
        "grid": grid,
        "text": None,
        "block": (16, 16),
        "scheduler": None,
        "timesteps": (1.0,),
        "sigmas": None,
        "positions": (0,),
        "schedule_steps": 1,
        "thresholds": {"A": 0.8, "C": 0.9, "k": 1.0},
        "guided": False,
        "sites": (),
        "votes": {},
        "kept_mass": {},
        "best_share": {},
        "anchor_rows": anchor_rows,
    }
    return InputRecord(**fields)


def stored(arrays: Mapping[str, list[list[tuple[float, ...]]]]) -> RunStore:
    """A store of scores by input, sample and head."""
    found = {name: np.array(votes, np.float32).transpose(2, 0, 1) for name, votes in arrays.items()}
    fake = SimpleNamespace(folder="run", tensor=lambda name, key: found[name])
    return cast(RunStore, fake)


def chosen(
    votes: list[list[tuple[float, ...]]], density: float = 0.6, gamma: float = 0.87, **kwargs: Any
) -> list[bool]:
    heads = len(votes[0])
    size = SiteSize(name="s", heads=heads, head_dim=16, query_length=VIDEO, key_length=VIDEO)
    mask = torch.zeros(heads, 8, 8, dtype=torch.bool)
    mask.view(heads, -1)[:, : round(64 * density)] = True
    store = stored({"0": votes})
    forms = choose_head_modes(store, [record()], size, 0, mask, gamma=gamma, **kwargs)
    assert forms.copies is not None
    assert forms.repetitive is not None
    return [bool(flag) for flag in forms.repetitive]


def test_a_head_takes_the_cheaper_form_at_the_same_error() -> None:
    # 2 x 3 x 9 of 126 tokens are computed: 4 of 8 rows of blocks.
    assert chosen([[GOOD]]) == [True]
    assert chosen([[GOOD]], density=0.52) == [True]
    assert chosen([[GOOD]], density=0.5) == [False]  # costs as much
    assert chosen([[GOOD]], density=0.4) == [False]
    # Pooled keys are computed for every row of blocks that is: .4 + 4/16 against .5 * (1 + 4/16).
    assert chosen([[GOOD]], density=0.4, pooled=4) == [True]
    assert chosen([[(0.87, 0.02, 0.02, 0.1)]]) == [True]  # as alike, as much error
    assert chosen([[(0.8699, 0.01, 0.02, 0.1)]]) == [False]
    assert chosen([[(0.99, 0.0201, 0.02, 0.1)]]) == [False]
    assert chosen([[(0.8699, 0.01, 0.02, 0.1), GOOD]], gamma=0.86) == [True, True]


def test_scores_are_means_over_samples_and_inputs() -> None:
    unlike = (0.85, 0.01, 0.02, 0.1)
    assert chosen([[GOOD], [unlike]]) == [True]
    assert chosen([[GOOD], [unlike]], gamma=0.88) == [False]
    size = SiteSize(name="s", heads=1, head_dim=16, query_length=VIDEO, key_length=VIDEO)
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    store = stored({"0": [[GOOD]], "2": [[(0.5, 0.01, 0.02, 0.1)], [(0.5, 0.01, 0.02, 0.1)]]})
    records = [record("0"), record("1", 0), record("2")]  # the second one has no scores
    for gamma, expected in ((0.63, True), (0.64, False)):
        forms = choose_head_modes(store, records, size, 0, mask, gamma=gamma)
        assert forms.repetitive is not None
        assert forms.repetitive.tolist() == [expected]


def test_another_threshold_moves_the_sparse_error() -> None:
    fair = (0.9, 0.01, 0.008, 0.1)
    assert chosen([[fair]]) == [False]
    assert chosen([[fair]], kept=lambda record: torch.full((1, 1, 8), 0.85)) == [True]
    assert chosen([[GOOD]], kept=lambda record: torch.full((1, 1, 8), 0.95)) == [False]


def test_nothing_is_chosen_where_nothing_can_be() -> None:
    size = SiteSize(name="s", heads=1, head_dim=16, query_length=VIDEO, key_length=VIDEO)
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    store = stored({})
    assert choose_head_modes(store, [record("0", 0)], size, 0, mask, gamma=None).copies is None
    few = record(anchor_rows=7)
    assert choose_head_modes(store, [few], size, 0, mask, gamma=0.87).repetitive is None
    with pytest.raises(CalibrationError, match="was scored for spatial repetition"):
        choose_head_modes(store, [record("0", 0)], size, 0, mask, gamma=0.87)
