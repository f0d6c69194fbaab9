"""Plans of zones: made of one's own maps, written, read, damaged, and what each step draws."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calibatt_compiler.errors import PlanError, PlanFormatError
from calibatt_compiler.kernels.reference.attention import masked_dense_attention
from calibatt_compiler.kernels.request import KernelSettings
from calibatt_compiler.plan import BlockPattern, Plan, share_steps
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.runtime.site import SparseSite

GRID = (3, 5, 10)
TIMESTEPS = [1000.0, 800.0, 600.0, 400.0, 200.0]
BLOCK = (32, 16)


def octave_maps(groups: int, heads: int, lengths: tuple[int, int], seed: int = 0) -> Tensor:
    """Bands that widen from head to head; each group has others."""
    rows, columns = (-(-n // b) for n, b in zip(lengths, BLOCK, strict=True))
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    far = (column * rows // columns - row).abs()
    maps = [
        far // (1 + (head + group + seed) % 3) for group in range(groups) for head in range(heads)
    ]
    return torch.stack(maps).clamp_max(7).view(groups, heads, rows, columns)


def plan_of(**options: Any) -> Plan:
    tokens = math.prod(GRID)
    maps = {f"blocks.{i}.attn1": octave_maps(2, 2, (tokens, tokens), i) for i in range(2)}
    return Plan.from_zones(maps, GRID, TIMESTEPS, BLOCK, **options)


def text_plan(text: str, length: int = 170) -> Plan:
    maps = octave_maps(2, 2, (length, length))
    for axis, block in ((-2, BLOCK[0]), (-1, BLOCK[1])):
        edges = torch.arange(0, length, block)
        holds = edges < length - 150 if text == "first" else (edges + block).clamp_max(length) > 150
        maps.index_fill_(axis, holds.nonzero().flatten(), 0)
    return Plan.from_zones(
        {"a": maps},
        GRID,
        TIMESTEPS,
        BLOCK,
        lengths={"a": (length, length)},
        text=f"dense_{text}",  # type: ignore[arg-type]
    )


def test_each_step_draws_from_the_map_of_its_group() -> None:
    plan = plan_of()
    assert plan.metadata.requires == ("zones",)
    kept = 0
    for index, (name, site) in enumerate(plan.sites.items()):
        maps = octave_maps(2, 2, (150, 150), index)
        assert site.zones is not None
        assert site.zones.groups == (0, 0, 0, 1, 1)
        assert site.weighted
        for step, group in enumerate(site.zones.groups):
            zones = ZonePattern.from_octaves(
                maps[group],
                query_length=150,
                key_length=150,
                block=BLOCK,
                seed=site.zones.common.seed,
            )
            drawn = zones.draw(step)
            assert torch.equal(plan.block_mask(name, step), drawn.mask())
            weights = torch.where(drawn.mask(), maps[group] * math.log(2), 0.0)
            assert torch.allclose(plan.log_weights(name, step), weights.float(), rtol=1e-6)
            assert plan.density(name, step) == drawn.density
            kept += drawn.kept
    assert plan.density() == pytest.approx(kept / (2 * 5 * 2 * 5 * 10))
    first, second = plan.sites.values()
    assert first.zones is not None
    assert second.zones is not None
    assert first.zones.common.seed != second.zones.common.seed


def test_a_file_gives_the_plan_back(tmp_path: Path) -> None:
    plan = plan_of(groups=[1, 0, 0, 1, 0])
    path, again = tmp_path / "zones.calibatt", tmp_path / "again.calibatt"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded.digest == plan.digest
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    for name, site in loaded.sites.items():
        assert site.digests == plan.sites[name].digests
        for step in range(5):
            assert site.at(step).digest == plan.sites[name].at(step).digest
            assert site.kept_at(step) == plan.sites[name].kept_at(step)
    packed = {name: site.packed() for name, site in plan.sites.items()}
    assert plan.with_sites(packed, thresholds={}, quality={}).digest == plan.digest


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "zones.calibatt"
    plan_of().save(path)
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(place) % 8
        path.write_bytes(damaged)
        with pytest.raises(PlanError):
            Plan.load(path)


def edited(path: Path, edit: Callable[[Any], object], code: bytes | None = None) -> Plan:
    """Load a plan whose record or codes were changed and all checksums made to fit."""
    import hashlib

    from safetensors.numpy import load_file, save_file

    from calibatt_compiler.plan import file

    plan = plan_of()
    stored = {name: site.stored for name, site in plan.sites.items()}
    plan.save(path)
    document = json.loads(file.to_json(plan.metadata))
    edit(document)
    tensors = load_file(path)
    parts = {}
    for name, site in stored.items():
        if code is not None:
            tensors[name] = np.frombuffer(
                code[: len(tensors[name])].ljust(len(tensors[name])), np.uint8
            )
        parts[name] = (hashlib.sha256(tensors[name].tobytes()).hexdigest(), site.entries)
    rest = f"{file.index(parts)}\n{json.dumps(document)}"
    save_file(tensors, path, metadata={file.FORMAT: f"{file.digest(rest)}\n{rest}"})
    return Plan.load(path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["sites"][0]["zones"].update(formula=2),
        lambda d: d["sites"][0]["zones"].update(seed=128),
        lambda d: d["sites"][0]["zones"].update(other=1),
        lambda d: d["sites"][0].update(weighted=True),
        lambda d: d["sites"][0].update(pooled=4),
        lambda d: d["sites"][0].update(steps=[0, 0, 0, 0, 0]),
        lambda d: d["sites"][0].update(steps=[0, 0, 0, 1, 2]),
        lambda d: d["sites"][0].pop("zones"),
        lambda d: d.update(requires=[]),
        lambda d: d.update(requires=["zones", "zones2"]),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(
    tmp_path: Path, edit: Callable[[Any], object]
) -> None:
    with pytest.raises(PlanFormatError):
        edited(tmp_path / "zones.calibatt", edit)


def test_what_contradicts_the_record_is_refused_when_it_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "zones.calibatt"
    plan = edited(path, lambda d: d["sites"][0].update(digests=["0" * 64] * 2))
    with pytest.raises(PlanFormatError, match="not what was stored"):
        plan.sites["blocks.0.attn1"].at(0)
    other = edited(path, lambda d: d["sites"][0]["zones"].update(seed=1))
    with pytest.raises(PlanFormatError, match="not what was stored"):
        other.sites["blocks.0.attn1"].at(0)
    denser = edited(path, lambda d: d["sites"][0].update(density=[1.0] * 5))
    with pytest.raises(PlanFormatError, match="recorded density"):
        denser.sites["blocks.0.attn1"].at(0)
    junk = np.random.default_rng(1).bytes(4096)
    with pytest.raises(PlanFormatError, match="not what was stored"):
        edited(path, lambda d: None, junk).sites["blocks.0.attn1"].at(0)


def test_maps_that_make_no_plan_are_refused() -> None:
    maps = octave_maps(2, 2, (150, 150))
    for given, options, match in (
        (maps[0], {}, "wrong form"),
        (maps.repeat(3, 1, 1, 1), {}, "wrong form"),
        (maps + 1, {}, "site 'a'"),
        (maps.float(), {}, "site 'a'"),
        (maps, {"groups": [0, 0, 0, 0, 0]}, "no zones"),
        (maps, {"groups": [0, 1]}, "no valid plan"),
        (maps, {"lengths": {"b": (150, 150)}}, "lengths name"),
        (maps, {"lengths": {"a": (500, 150)}}, "site 'a'"),
    ):
        with pytest.raises(PlanError, match=match):
            Plan.from_zones({"a": given}, GRID, TIMESTEPS, BLOCK, **options)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="weights can't share"):
        share_steps(plan_of())


def operands(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 2, length, 32, generator=generator) for _ in range(3)]


def served(plan: Plan, name: str) -> SparseSite:
    return SparseSite(
        plan,
        name,
        KernelSettings(
            lowering="table", device=torch.device("cpu"), dtype=torch.float32, head_dim=32
        ),
    )


@pytest.mark.slow
def test_a_site_serves_each_step_by_its_own_sample() -> None:
    plan = plan_of()
    site = served(plan, "blocks.1.attn1")
    q, k, v = operands(150)
    outputs = []
    for step, timestep in enumerate(TIMESTEPS):
        outputs.append(site.attend(q, k, v, timestep, 0.2))
        pattern = plan.sites["blocks.1.attn1"].at(step)
        wanted = masked_dense_attention(q, k, v, pattern, scale=0.2)
        assert (outputs[-1] - wanted).abs().max() < 1e-5
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert sum(site.calls.values()) == 5
    assert not any(kind.startswith("dense") for kind in site.calls)


@pytest.mark.parametrize("text", ["first", "last"])
@pytest.mark.parametrize("length", [151, 170, 182, 202, 234])
def test_another_text_length_is_served_by_the_same_zones(text: str, length: int) -> None:
    plan = text_plan(text)
    site = served(plan, "a")
    q, k, v = operands(length)
    for step in (0, 4):
        out = site.attend(q, k, v, TIMESTEPS[step], 0.2)
        zones = plan.sites["a"].zones
        assert zones is not None
        own = zones.zones[zones.groups[step]]
        other = own.with_lengths(length, length) if length != 170 else own
        pattern = other.draw(step)
        wanted = masked_dense_attention(q, k, v, pattern, scale=0.2)
        assert (out - wanted).abs().max() < 1e-5
        check_video(own, other, text)
    assert not any(kind.startswith("dense") for kind in site.calls)


def check_video(own: ZonePattern, other: ZonePattern, text: str) -> None:
    """No pair of video tokens is kept less often, and pairs with text for certain."""
    wide = [
        np.repeat(np.repeat(zones.map_octaves(), BLOCK[0], 1), BLOCK[1], 2)[
            :, : zones.query_length, : zones.key_length
        ]
        for zones in (own, other)
    ]
    text_tokens = [zones.query_length - 150 for zones in (own, other)]
    video = [
        octaves[:, n:, n:] if text == "first" else octaves[:, :150, :150]
        for octaves, n in zip(wide, text_tokens, strict=True)
    ]
    if text == "last":
        # Blocks at the border may hold text with one length and none with another.
        inner = [octaves[:, :128, :144] for octaves in video]
        assert np.array_equal(*inner)
    else:
        assert (video[1] <= video[0]).all()
    edge = slice(0, text_tokens[1]) if text == "first" else slice(150, None)
    assert not wide[1][:, edge].any()
    assert not wide[1][:, :, edge].any()


def test_a_pattern_without_text_has_one_length() -> None:
    zones = plan_of().sites["blocks.0.attn1"].zones
    assert zones is not None
    with pytest.raises(PlanError, match="other lengths"):
        zones.zones[0].with_lengths(170, 170)


def test_drawn_patterns_are_plain_patterns() -> None:
    site = plan_of().sites["blocks.0.attn1"]
    assert all(isinstance(pattern, BlockPattern) for pattern in site.patterns)
    assert len(site.patterns) == 5
    assert site.patterns[-1].digest == site.at(4).digest
    assert site.patterns[1:3][0].digest == site.at(1).digest
