"""The fit of zones: against every choice of octaves on small lines, and what it promises."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.codecache import CppCodeCache
from torch._inductor.exc import InvalidCxxCompiler

from calibatt_compiler.calibration.select.zones import native
from calibatt_compiler.calibration.select.zones.fit import SiteFit, SiteZones
from calibatt_compiler.calibration.select.zones.lines import (
    Lines,
    absolute_lines,
    diagonal_lines,
    solve,
)
from calibatt_compiler.calibration.select.zones.price import ZonePricing, ZoneSource
from calibatt_compiler.calibration.zone_target import ZoneTarget
from calibatt_compiler.errors import OptionError
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.groups import pack

Squares = npt.NDArray[np.float64]


def reference_cost(
    squares: list[Fraction], blocks: list[int], octaves: tuple[int, ...], number: Fraction
) -> Fraction:
    """Price in kept blocks of a line of octaves, at a price of 1."""
    runs = 1 + sum(a != b for a, b in itertools.pairwise(octaves))
    parts = zip(squares, blocks, octaves, strict=True)
    each = (square * (2**k - 1) + count * Fraction(1, 2**k) for square, count, k in parts)
    return sum(each, number * runs)


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_a_line_has_the_least_cost_of_all(data: st.DataObject):
    places = data.draw(st.integers(1, 4))
    # Eighths, so that floats hold all sums exactly.
    squares = [Fraction(data.draw(st.integers(0, 64)), 8) for _ in range(places)]
    blocks = [data.draw(st.integers(0, 9)) for _ in range(places)]
    number = Fraction(data.draw(st.integers(0, 40)), 8)
    lead = data.draw(st.integers(-1, places - 1))
    lines = Lines(np.array([squares], np.float64), np.array([blocks], np.float64), np.array([lead]))
    found = solve(lines, 1.0, float(number))
    octaves = tuple(found.octaves[0].tolist())
    assert lead < 0 or octaves[lead] == 0
    cost = reference_cost(squares, blocks, octaves, number)
    assert found.cost(1.0, float(number))[0] == cost
    assert found.runs[0] == 1 + sum(a != b for a, b in itertools.pairwise(octaves))
    least = min(
        reference_cost(squares, blocks, choice, number)
        for choice in itertools.product(range(8), repeat=places)
        if lead < 0 or choice[lead] == 0
    )
    assert cost == least


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_lines_hold_the_sums_of_their_rows(rows: int, columns: int, size: int, seed: int):
    squares = np.random.default_rng(seed).integers(1, 100, (2, rows, columns)).astype(np.float64)
    size = min(size, rows)
    groups = -(-rows // size)
    straight, slanted = absolute_lines(squares, size), diagonal_lines(squares, size)
    for head, group in itertools.product(range(2), range(groups)):
        first, last = group * size, min(group * size + size, rows)
        line = head * groups + group
        assert np.array_equal(straight.squares[line], squares[head, first:last].sum(0))
        assert (straight.blocks[group] == last - first).all()
        assert straight.leads[line] == squares[head, first:last].sum(0).argmax()
        sums = np.zeros(columns + size - 1)
        counts = np.zeros(columns + size - 1)
        for row, column in itertools.product(range(first, last), range(columns)):
            sums[column - row + first + size - 1] += squares[head, row, column]
            counts[column - row + first + size - 1] += 1
        assert np.array_equal(slanted.squares[line], sums)
        assert np.array_equal(slanted.blocks[group], counts)
        common = np.flatnonzero(counts == last - first)
        if last - first > columns:
            assert slanted.leads[line] == -1
        else:
            assert slanted.leads[line] == common[sums[common].argmax()]


@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.25, 3.0, 1e12]),
    st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=100)
def test_compiled_lines_equal_those_of_numpy_bit_for_bit(
    heads: int, rows: int, columns: int, size: int, number: float, seed: int
):
    """Also among equal costs: half of the squares are small whole numbers."""
    generator = np.random.default_rng(seed)
    squares = np.where(
        generator.random((heads, rows, columns)) < 0.5,
        generator.integers(0, 4, (heads, rows, columns)),
        generator.exponential(1.0, (heads, rows, columns)),
    )
    for lines in (absolute_lines(squares, min(size, rows)), diagonal_lines(squares, size)):
        plain, fast = (solve(lines, 0.5, number, compiled=made) for made in (False, True))
        for name in ("octaves", "variance", "kept", "runs"):
            one, other = getattr(plain, name), getattr(fast, name)
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)


def test_sites_side_by_side_give_the_plan_of_one_after_the_other(monkeypatch: pytest.MonkeyPatch):
    target = ZoneTarget(density=0.3)
    one = ZonePricing(sources(), budget=300)
    expected = one.search(target)
    zones = list(one.fits(expected.price))
    monkeypatch.setattr(native, "FROM_BLOCKS", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    together = ZonePricing(sources(), budget=300)
    assert together.search(target) == expected
    for a, b in zip(zones, together.fits(expected.price), strict=True):
        assert (a.kept, a.variance, a.numbers, a.number) == (
            b.kept,
            b.variance,
            b.numbers,
            b.number,
        )
        for mine, other in zip(a.heads, b.heads, strict=True):
            assert np.array_equal(mine.lines, other.lines)
            assert np.array_equal(mine.diagonal, other.diagonal)
            assert np.array_equal(mine.leads, other.leads)


def test_without_a_compiler_numpy_fits_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(native, "FROM_BLOCKS", 1)

    def missing(*args: object, **options: object) -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr(CppCodeCache, "load", missing)
    native.library.cache_clear()
    try:
        found = SiteFit(energies(2, 12, 12), 40).at(1e-3)
    finally:
        native.library.cache_clear()
    assert "fitted by numpy" in caplog.text
    assert found.numbers <= 40


def energies(heads: int, rows: int, columns: int, seed: int = 0) -> Squares:
    """Squared energies of heads that attend along diagonals and to single columns."""
    generator = np.random.default_rng(seed)
    row, column = np.arange(rows)[:, None], np.arange(columns)[None]
    found = np.empty((heads, rows, columns))
    for head in range(heads):
        width = 1 + head % 3
        energy = np.exp(-abs(column * rows / columns - row) / width)
        energy += 0.5 * (head % 2) * (column == head) + 0.01
        energy *= np.exp(generator.normal(0, 0.3, energy.shape))
        found[head] = energy / energy.sum(1, keepdims=True)
    return found**2


def pattern_of(zones: SiteZones, rows: int, columns: int) -> ZonePattern:
    arrays = pack(zones.heads, rows, columns)
    return ZonePattern.from_arrays((len(zones.heads), 16 * rows, 16 * columns, 16, 16), arrays)


@given(
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 100),
    st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]),
    st.integers(2, 40),
)
@settings(deadline=None, max_examples=80)
def test_a_fit_makes_zones_within_its_budget(
    heads: int, rows: int, columns: int, seed: int, price: float, share: int
):
    squares = energies(heads, rows, columns, seed)
    budget = share * heads
    zones = SiteFit(squares, budget, group_rows=(1, 3, 4)).at(price)
    pattern = pattern_of(zones, rows, columns)  # which checks that each row keeps its lead
    assert zones.numbers == pattern.numbers.sum() <= budget
    assert zones.kept == pytest.approx(pattern.density * squares.size, rel=1e-12)
    octaves = pattern.map_octaves().astype(np.float64)
    assert zones.variance == pytest.approx((squares * (2**octaves - 1)).sum(), abs=1e-9)


def test_a_price_keeps_what_it_is_worth():
    squares = energies(6, 32, 32)
    fit = SiteFit(squares, 100_000)
    found = [fit.at(price) for price in np.geomspace(1e-7, 1, 15)]
    kept = [zones.kept + zones.number * zones.numbers for zones in found]
    variance = [zones.variance for zones in found]
    assert kept == sorted(kept, reverse=True)
    assert variance == sorted(variance)
    assert found[0].kept == squares.size
    assert found[-1].kept < 0.1 * squares.size


def test_coordinates_and_groups_follow_the_head():
    row, column = np.arange(48)[:, None], np.arange(48)[None]
    band = np.where(abs(row - column) < 3, 0.2, 1e-3)
    bars = np.where(column % 16 < 2, 0.2, 1e-3) + 0 * row
    halves = np.where((column < 6) == (row < 16), 0.2, 1e-3)
    squares = np.stack([band, bars, halves]) ** 2
    zones = SiteFit(squares, 200, group_rows=(16,)).at(1e-3)
    assert [head.rows for head in zones.heads] == [48, 48, 16]
    assert zones.heads[0].diagonal.all()
    assert not zones.heads[1].diagonal.any()
    octaves = pattern_of(zones, 48, 48).map_octaves()
    assert (octaves[squares > 0.01] == 0).all()
    assert (octaves[squares < 0.01] > 2).all()


def test_a_budget_of_two_numbers_a_head_can_be_kept_and_no_less():
    squares = energies(3, 16, 16)
    zones = SiteFit(squares, 6).at(1e-3)
    assert zones.numbers == 6
    with pytest.raises(OptionError, match="so few numbers"):
        SiteFit(squares, 5)


def sources() -> list[ZoneSource]:
    maps = [energies(4, 24, 24, 1), energies(2, 20, 30, 2), energies(3, 16, 16, 3) * 1e-2]
    return [
        ZoneSource(lambda found=found: found, steps, found[..., 0].size, found.size)
        for found, steps in zip(maps, (1, 3, 2), strict=True)
    ]


@pytest.mark.parametrize("density", [0.12, 0.2, 0.5, 0.9])
def test_one_price_gives_the_wanted_density(density: float):
    pricing = ZonePricing(sources(), budget=4000)
    found = pricing.search(ZoneTarget(density=density))
    assert found.density == pytest.approx(density, rel=0.02)
    again = list(pricing.fits(found.price))
    kept = sum(s.steps * zones.kept for s, zones in zip(pricing.sources, again, strict=True))
    assert kept / sum(s.steps * s.blocks for s in pricing.sources) == pytest.approx(found.density)
    # Sparsity goes where it is cheap: the site of small energies keeps the least.
    shares = [zones.kept / s.blocks for s, zones in zip(pricing.sources, again, strict=True)]
    assert shares[2] == min(shares)


def test_error_and_speed_up_are_densities_by_other_names():
    pricing = ZonePricing(sources(), budget=4000)
    error = pricing.search(ZoneTarget(error=0.2))
    assert error.error == pytest.approx(0.2, rel=0.02)
    target = ZoneTarget(speed_up=1.6, attention_share=0.75)
    assert target.wanted_density == pytest.approx(0.5)
    faster = pricing.search(target)
    assert 1 / (0.25 + 0.75 * faster.density) == pytest.approx(1.6, rel=0.02)


def test_what_can_not_be_had_is_the_nearest():
    pricing = ZonePricing(sources(), budget=4000)
    assert pricing.search(ZoneTarget(density=1.0)).density == pytest.approx(1.0, rel=0.01)
    least = pricing.search(ZoneTarget(density=1e-3)).density
    assert least == pytest.approx(min(pricing.at(price).density for price in (1e2, 1e6)))


def test_what_is_held_does_not_change_the_plan(monkeypatch: pytest.MonkeyPatch):
    target = ZoneTarget(density=0.3)
    held = ZonePricing(sources(), budget=300)
    monkeypatch.setattr("calibatt_compiler.calibration.select.zones.price.MEMORY", 0)
    streamed = ZonePricing(sources(), budget=300)
    assert held.search(target) == streamed.search(target)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"density": 0.2, "error": 0.1},
        {"density": 0.0},
        {"density": 1.5},
        {"error": 0.0},
        {"error": float("inf")},
        {"speed_up": 2.0},
        {"speed_up": 0.5, "attention_share": 0.5},
        {"speed_up": 2.0, "attention_share": 0.5},
        {"speed_up": 2.0, "attention_share": 1.5},
    ],
)
def test_targets_out_of_range_are_refused(given: dict[str, float]):
    with pytest.raises(OptionError) as caught:
        ZoneTarget(**given)
    assert caught.value.expected is not None
