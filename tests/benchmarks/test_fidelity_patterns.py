"""The masks of `benchmarks/fidelity.py` against their definitions, token by token."""

from __future__ import annotations

import math
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt_compiler.calibration.select.selection import covering_mask
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.order import TokenOrder

FOLDER = Path(__file__).parents[2] / "benchmarks"
GRIDS = [(4, 4, 8), (3, 5, 7), (1, 6, 9), (9, 3, 4)]


@pytest.fixture(autouse=True, scope="module")
def _path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in [name for name in sys.modules if name.partition(".")[0].endswith("_study")]:
        del sys.modules[name]


def tokens(grid, tile=None):
    """Places in the order of tiles, by sorting; raster without a tile."""
    raster = list(product(*(range(size) for size in grid)))
    if tile is None:
        return raster
    return sorted(raster, key=lambda at: [x // size for x, size in zip(at, tile, strict=True)])


def ranked_by_hand(distance, at, block):
    """Ranks by (least, mean, index) of all pairs of tokens, the diagonal first."""
    blocks = [at[first : first + block] for first in range(0, len(at), block)]
    rows = []
    for r, queries in enumerate(blocks):
        keys = []
        for c, others in enumerate(blocks):
            pairs = [distance(a, b) for a in queries for b in others]
            keys.append((c != r, min(pairs), round(sum(pairs) / len(pairs), 4), c))
        order = sorted(range(len(blocks)), key=keys.__getitem__)
        rows.append([order.index(c) for c in range(len(blocks))])
    return rows


def by_hand(name, grid):
    """Distance of two places (frame, row, column) by the definition of each pattern."""
    _, height, width = grid
    size = height * width

    def frame_position(at):
        return at[1] * width + at[2]

    def radial(a, b):
        apart = abs(a[0] - b[0])
        window = size / 2 ** apart.bit_length()
        return abs(frame_position(a) - frame_position(b)) / window

    def spatial(a, b):
        return abs(a[0] * size + frame_position(a) - b[0] * size - frame_position(b))

    def temporal(a, b):
        return abs(frame_position(a) * grid[0] + a[0] - frame_position(b) * grid[0] - b[0])

    return {"radial": radial, "spatial": spatial, "temporal": temporal}[name]


def agree(found, wanted, distance, at, block):
    """Whether two rankings are one, where rounding does not decide between equal means."""
    blocks = [at[first : first + block] for first in range(0, len(at), block)]
    for r, (row, other) in enumerate(zip(found, wanted, strict=True)):
        for c, (x, y) in enumerate(zip(row, other, strict=True)):
            if x != y:
                swapped = other.index(x)
                means = [
                    sum(distance(a, b) for a in blocks[r] for b in blocks[column])
                    / (len(blocks[r]) * len(blocks[column]))
                    for column in (c, swapped)
                ]
                least = [
                    min(distance(a, b) for a in blocks[r] for b in blocks[column])
                    for column in (c, swapped)
                ]
                if abs(least[0] - least[1]) > 1e-6 or abs(means[0] - means[1]) > 1e-3:
                    return False
    return True


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("name", ["radial", "spatial", "temporal"])
def test_ranks_of_bands_are_those_of_the_definition(grid, name, sink):
    from fidelity_study import geometry

    measure = getattr(geometry, name)(grid)
    plain = by_hand(name, grid)
    distance = plain
    if sink:
        measure = geometry.with_sink(measure)

        def distance(a, b):
            return -1.0 if b[0] == 0 else plain(a, b)

    found = geometry.ranks(measure, geometry.places(grid, TokenOrder(None)), 16).tolist()
    at = tokens(grid)
    assert agree(found, ranked_by_hand(distance, at, 16), distance, at, 16)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("reach", [(1.0, 1.0, 1.0), (4.0, 1.0, 2.0)])
def test_ranks_of_tiles_are_those_of_the_definition(grid, reach):
    from fidelity_study import geometry

    tile = geometry.block_tile(16)
    assert math.prod(tile) == 16

    def distance(a, b):
        return max(
            abs(x // size - y // size) / scale
            for x, y, size, scale in zip(a, b, tile, reach, strict=True)
        )

    at = tokens(grid, tile)
    assert geometry.places(grid, TokenOrder(tile)).tolist() == [list(place) for place in at]
    found = geometry.ranks(
        geometry.tiles_apart(tile, reach), geometry.places(grid, TokenOrder(tile)), 16
    )
    assert agree(found.tolist(), ranked_by_hand(distance, at, 16), distance, at, 16)


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_tiles_hold_one_block(block):
    from fidelity_study.geometry import block_tile

    tile = block_tile(block)
    assert math.prod(tile) == block
    assert max(tile) <= 2 * 4 * max(1, block // 128)


def test_a_window_keeps_the_tiles_around_the_query():
    from fidelity_study.geometry import block_tile, places, ranks, tiles_apart

    grid = (5, 20, 20)  # 5 x 5 x 5 whole tiles of 1 x 4 x 4
    tile = block_tile(16)
    rank = ranks(tiles_apart(tile, (1.0, 1.0, 1.0)), places(grid, TokenOrder(tile)), 16)
    middle = rank[2 * 25 + 2 * 5 + 2] < 27
    at = middle.view(5, 5, 5)
    assert at[1:4, 1:4, 1:4].all()
    assert int(at.sum()) == 27


def test_a_radial_window_halves_with_the_bits_of_the_distance():
    from fidelity_study.geometry import radial

    measure = radial((9, 1, 64))
    query = torch.tensor([[0, 0, 0]])
    keys = torch.tensor([[frame, 0, 8] for frame in range(9)])
    assert measure(query, keys)[0].tolist() == [x / 8 for x in (1, 2, 4, 4, 8, 8, 8, 8, 16)]


def test_a_whole_frame_comes_before_all_other_frames():
    from fidelity_study.geometry import places, radial, ranks, whole_frame

    grid = (3, 4, 16)  # four blocks a frame
    rank = ranks(whole_frame(radial(grid)), places(grid, TokenOrder(None)), 16)
    for row in range(12):
        own = rank[row].view(3, 4)[row // 4]
        assert sorted(own.tolist()) == [0, 1, 2, 3]
    assert not all(
        sorted(rank[row].view(3, 4)[row // 4].tolist()) == [0, 1, 2, 3]
        for rank in [ranks(radial(grid), places(grid, TokenOrder(None)), 16)]
        for row in range(12)
    )


@given(heads=st.integers(1, 5), rows=st.integers(1, 20), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_blocks_are_shared_out_evenly(heads, rows, share):
    from fidelity_study.patterns import nearest, random_ranks, row_counts

    least, most = heads * rows, heads * rows * rows
    kept = round(least + share * (most - least))
    counts = row_counts(kept, heads, rows)
    assert counts.shape == (heads, rows)
    assert int(counts.sum()) == kept
    assert int(counts.max() - counts.min()) <= 1
    mask = nearest(random_ranks(heads, rows, kept), counts)
    assert torch.equal(mask.sum(-1), counts)
    assert mask.diagonal(dim1=1, dim2=2).all()


def calibrated(grid, block, density, steps=3, heads=2, sites=2):
    """A plan of random masks whose rows, steps and sites differ in density."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-math.prod(grid) // block)
    chance = torch.rand(sites, steps, heads, blocks, 1, generator=generator) * 2 * density
    masks = torch.rand(sites, steps, heads, blocks, blocks, generator=generator) < chance
    masks |= torch.eye(blocks, dtype=torch.bool)
    names = {f"blocks.{site}.attn1": mask for site, mask in enumerate(masks)}
    return Plan.from_masks(names, grid, [900.0, 500.0, 100.0][:steps], (block, block))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_every_static_peer_keeps_what_our_plan_keeps(grid, density):
    from fidelity_study.patterns import Budget, families, peer_plan, random_plan

    plan = calibrated(grid, 16, density)
    budget = Budget.of(plan)
    assert budget.density() == pytest.approx(plan.density())
    peers = {"random": random_plan(budget, plan, 5)}
    for name, family in families(grid, 16).items():
        for variant in family.variants:
            choices = {site: [[variant] * 2] * plan.steps for site in plan.sites}
            peers[f"{name} {variant}"] = peer_plan(family, budget, choices, plan)
    for name, peer in peers.items():
        for site, step in product(plan.sites, range(plan.steps)):
            mask = peer.block_mask(site, step)
            assert int(mask.sum()) == plan.sites[site].kept_at(step), name
            rows = mask.sum(-1)
            assert int(rows.max() - rows.min()) <= 1, name
            assert int(rows.min()) >= 1
            assert mask.diagonal(dim1=1, dim2=2).all(), name
    assert peers["tiles cube"].token_order == TokenOrder((1, 4, 4))
    a, b = (peers["random"].block_mask(site, 0) for site in plan.sites)
    assert not torch.equal(a, b)


def test_an_even_budget_is_as_large_and_alike_at_all_steps():
    from fidelity_study.patterns import Budget, random_plan

    plan = calibrated((4, 4, 8), 16, 0.4)
    own, even = Budget.of(plan), Budget.even(plan)
    shares = [kept for by_step in even.kept.values() for kept in by_step]
    assert sum(shares) == sum(kept for by_step in own.kept.values() for kept in by_step)
    assert max(shares) - min(shares) <= 1
    assert even.density() == pytest.approx(plan.density())
    assert len(set(own.kept["blocks.0.attn1"])) > 1, "the plan's own steps differ"
    assert random_plan(even, plan, 1).density() == pytest.approx(plan.density())


def test_heads_take_their_own_variants():
    from fidelity_study.patterns import Budget, families, peer_plan

    plan = calibrated((4, 4, 8), 16, 0.4)
    family = families((4, 4, 8), 16)["heads"]
    names = ["spatial", "temporal"]
    choices = {site: [names, names[::-1], names] for site in plan.sites}
    mixed = peer_plan(family, Budget.of(plan), choices, plan)
    for step, head in product(range(3), range(2)):
        alone = {site: [[choices[site][step][head]] * 2] * 3 for site in plan.sites}
        one = peer_plan(family, Budget.of(plan), alone, plan)
        for site in plan.sites:
            assert torch.equal(mixed.block_mask(site, step)[head], one.block_mask(site, step)[head])


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_covering_is_the_library_selection_at_some_threshold(seed, share):
    from fidelity_study.serve import covering, entry

    generator = torch.Generator().manual_seed(seed)
    energy = (4 * torch.randn(2, 5, 7, generator=generator)).softmax(-1)
    kept = round(10 + share * 60)
    mask = covering(energy, kept)
    assert int(mask.sum()) == kept
    assert mask.any(-1).all()
    levels = entry(energy).flatten().sort().values
    if kept < 70 and levels[kept] - levels[kept - 1] > 1e-6:
        threshold = float(levels[kept - 1] + levels[kept]) / 2
        assert torch.equal(mask, covering_mask(energy, threshold)[0])
