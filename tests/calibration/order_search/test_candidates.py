"""Candidates of a token order, and how one is chosen by what was measured."""

from __future__ import annotations

import torch

from calibatt_compiler.calibration.order_search.candidates import (
    SAVING,
    SquaredError,
    Tally,
    candidates,
    choose,
    survey_of,
    surveyed_steps,
)
from calibatt_compiler.calibration.order_search.measure import SAMPLE, at_density, sampled_rows
from calibatt_compiler.calibration.store.order_survey import OrderSurvey


def test_candidates_are_few_and_different_and_of_the_block() -> None:
    for grid in ((21, 30, 52), (9, 12, 20), (1, 64, 64), (13, 80, 45), (3, 7, 9)):
        for block in (32, 48, 128):
            orders = candidates(grid, (block, block))
            assert str(orders[0]) == "raster"
            assert 2 <= len(orders) <= 13
            tokens = [x.tokens(grid) for x in orders[1:]]
            assert all(x is not None and sorted(x) == list(range(len(x))) for x in tokens)
            assert len({x.tobytes() for x in tokens if x is not None}) == len(tokens)
            for order in orders[1:]:
                assert order.tile is not None
                if None not in order.tile:
                    frames, height, width = (size or 0 for size in order.tile)
                    assert frames * height * width == block
                    assert grid[1] % height == grid[2] % width == 0
    assert [str(x) for x in candidates((1, 1, 150), (32, 32))] == ["raster"]
    assert {str(x) for x in candidates((8, 64, 64), (128, 128))} > {"1x8x16", "2x8x8", "4x4x8"}
    assert "2x8xall" in [str(x) for x in candidates((21, 30, 52), (128, 128))]
    assert "2xallx8" in [str(x) for x in candidates((21, 52, 30), (128, 128))]


def test_surveyed_steps_are_spread_and_within() -> None:
    assert surveyed_steps(50) == (6, 18, 31, 43)
    assert surveyed_steps(4) == (0, 1, 2, 3)
    assert surveyed_steps(1) == (0,)


def test_an_order_must_pay() -> None:
    enough, error = 0.4 * (1 - SAVING), {"raster": 0.1, "a": 0.1, "b": 0.09}
    assert choose({"raster": 0.4, "a": enough, "b": enough + 1e-6}, error) == "a"
    assert choose({"raster": 0.4, "a": enough + 1e-6, "b": 0.4}, error) == "raster"
    assert choose({"raster": 0.4, "a": 0.2, "b": 0.1}, error) == "b"
    # Sparser, but worse where both keep as much: it does not pay.
    assert choose({"raster": 0.4, "a": 0.3, "b": 0.1}, {**error, "b": 0.11}) == "a"
    assert choose({"raster": 0.4, "a": 0.2, "b": 0.2}, error) == "a", "the first of equal ones"
    assert choose({"raster": 0.4}, {"raster": 0.0}) == "raster"


def test_tallies_make_a_survey() -> None:
    tallies = {
        "raster": {
            "one": Tally(40, 100, own=SquaredError(4.0, 100.0)),
            "two": Tally(60, 100, own=SquaredError(0.0, 300.0)),
        },
        "2x8xall": {
            "one": Tally(20, 100, own=SquaredError(1.0, 100.0)),
            "two": Tally(20, 100, own=SquaredError(3.0, 300.0)),
        },
    }
    found = survey_of([{"seed": 3}], (1, 2), tallies)
    assert not found.held_out
    assert found.density == {"raster": 0.5, "2x8xall": 0.2}
    assert found.error == {"raster": 0.1, "2x8xall": 0.1}
    assert found.sites["raster"] == {"one": 0.4, "two": 0.6}
    assert found.chosen == "2x8xall"
    assert OrderSurvey.model_validate_json(found.text()) == found
    assert "raster 50.0% (0.100), 2x8xall 20.0% (0.100)" in str(found)
    assert "not judged on another" in str(found)
    # What the masks of another input are worth goes before.
    tallies["raster"]["one"].others = SquaredError(4.0, 100.0)
    tallies["2x8xall"]["one"].others = SquaredError(9.0, 100.0)
    found = survey_of([], (1, 2), tallies)
    assert found.held_out
    assert "not judged on another" not in str(found)
    assert found.error == {"raster": 0.2, "2x8xall": 0.3}
    assert found.chosen == "raster"


def test_masks_are_found_by_density() -> None:
    energy = torch.rand(2, 3, 16, 40, generator=torch.Generator().manual_seed(0)) ** 3
    previous = torch.zeros(2, 3, 16, 40, dtype=torch.bool)
    for density in (0.05, 0.2, 0.5, 0.9):
        mask = at_density(energy, density, None)
        assert density - 0.02 < mask.double().mean().item() <= density
        assert not (previous & ~mask).any(), "more density only adds"
        # The highest blocks of each row are kept.
        lowest = torch.where(mask, energy, torch.inf).amin(-1)
        assert (torch.where(mask, 0, energy).amax(-1) <= lowest).all()
        previous = mask
    always = torch.zeros(40, dtype=torch.bool)
    always[-2:] = True
    assert at_density(energy, 0.3, always)[..., -2:].all()


def test_sampled_rows_hold_no_text_and_are_whole() -> None:
    assert sampled_rows(100, 100, 32, None).tolist() == [0, 1, 2]
    assert sampled_rows(20, 20, 32, None).tolist() == [0]
    assert sampled_rows(128, 90, 32, "first").tolist() == [2, 3]
    assert sampled_rows(128, 90, 32, "last").tolist() == [0, 1]
    many = sampled_rows(32 * 1000 + 1, 32 * 1000 + 1, 32, None)
    assert len(many) == SAMPLE
    assert many[0] < 1000 // SAMPLE
    assert 1000 > many[-1] > 1000 - 1000 // SAMPLE
