"""Joint attention at other text lengths than the plan's: still sparse, text dense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny_models
import torch

import calibatt_compiler
from calibatt_compiler import Plan
from calibatt_compiler.calibration import CalibrationConfig, validate_run
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.plan import AnchorRows, BlockPattern, Sampler, SitePatterns
from calibatt_compiler.plan.order import RASTER, TokenOrder
from calibatt_compiler.plan.text import fit_pattern, text_blocks

GRID, VIDEO, TEXT = (3, 5, 7), 105, 6
SITES = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
BLOCK = (16, 16)


def cogvideox() -> torch.nn.Module:
    return lively(
        tiny_models.cogvideox(max_text_seq_length=TEXT, use_rotary_positional_embeddings=True)
    )


def mochi() -> torch.nn.Module:
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=64,
    )
    return lively(model)


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Default initialisation leaves outputs near zero: a wrong mask would hardly show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5, generator=generator)
    return model.eval().requires_grad_(False)


def arguments(family: str, text: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(text)
    common: dict[str, Any] = {"timestep": torch.tensor([900.0]), "return_dict": False}
    if family == "cogvideox":
        hidden, length = (1, 3, 4, 10, 14), text
    else:
        hidden, length = (1, 4, 3, 10, 14), 64
        common["encoder_attention_mask"] = torch.arange(64)[None] < text
    return common | {
        "hidden_states": torch.randn(hidden, generator=generator),
        "encoder_hidden_states": torch.randn(1, length, 16, generator=generator),
    }


def plan_of(
    position: Any,
    repetitive: tuple[bool, bool] = (False, False),
    order: TokenOrder = RASTER,
) -> Plan:
    length = VIDEO + TEXT
    text = text_blocks(length, VIDEO, BLOCK[0], position)
    assert text is not None
    generator = torch.Generator().manual_seed(7)
    sites = {}
    for name in SITES:
        mask = torch.rand(2, 7, 7, generator=generator) < 0.3
        mask |= torch.eye(7, dtype=torch.bool) | text | text[:, None]
        pattern = BlockPattern.from_mask(
            mask,
            query_length=length,
            key_length=length,
            block=BLOCK,
            repetitive=np.array(repetitive),
            copies=AnchorRows(GRID, 2, TEXT if position == "first" else 0, order),
        )
        sites[name] = SitePatterns.share([pattern])
    sampler = Sampler(timesteps=(900.0,))
    policy: Any = f"dense_{position}"
    return Plan.create(sites, grid=GRID, sampler=sampler, text_policy=policy, token_order=order)


def expanded(
    model: torch.nn.Module, plan: Plan, text: int, inputs: dict[str, Any], attend: Any
) -> Any:
    """The model run eagerly, with the plan's masks completed and expanded to tokens."""
    stock = torch.nn.functional.scaled_dot_product_attention
    names = iter(SITES)
    position = plan.text_position
    assert position is not None

    def masked(query: Any, key: Any, value: Any, **options: Any) -> torch.Tensor:
        if query.shape[2] == VIDEO + text and (name := next(names, None)):
            pattern = plan.sites[name].at(0)
            to = (VIDEO + text, VIDEO + text)
            pattern = fit_pattern(pattern, to, video=VIDEO, position=position)
            return attend(pattern, plan, query, key, value, **options)
        return stock(query, key, value, **options)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", masked):
        return model(**inputs)[0]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["raster", "2x4xall"])
@pytest.mark.parametrize("repetitive", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("family", ["cogvideox", "mochi"])
def test_other_text_lengths_are_served_sparse(
    family: str, repetitive: tuple[bool, bool], order: str, attend: Any
) -> None:
    torch._dynamo.reset()
    model = {"cogvideox": cogvideox, "mochi": mochi}[family]()
    position = "first" if family == "cogvideox" else "last"
    plan = plan_of(position, repetitive, TokenOrder.parse(order))
    options = {"plan": plan, "lowering": "table"}
    compiled = torch.compile(model, backend="calibatt", fullgraph=True, options=options)
    lengths = (TEXT, 9, 22, 40)
    for text in lengths:
        inputs = arguments(family, text)
        expected = expanded(model, plan, text, inputs, attend)
        got = compiled(**inputs)[0]
        scale = expected.abs().max()
        assert (got - expected).abs().max() < 2e-5 * scale
        assert (model(**inputs)[0] - expected).abs().max() > 1e-3 * scale
    summary = calibatt_compiler.summary(compiled)
    assert summary.sparse_calls == len(SITES) * len(lengths)
    assert not any("length" in reason for reason in summary.dense_calls)
    once = () if order == "raster" else (f"token order {order}: permuted once a forward pass",)
    assert summary.orders == once


def test_masks_of_ones_own_serve_their_length_only() -> None:
    torch._dynamo.reset()
    model, plan = cogvideox(), plan_of("first")
    metadata = plan.metadata.model_copy(update={"text_policy": "in_mask"})
    own = Plan(metadata, plan.sites)
    compiled = torch.compile(model, backend="calibatt", options={"plan": own})
    for text in (TEXT, 9):
        compiled(**arguments("cogvideox", text))
    assert calibatt_compiler.summary(compiled).sparse_calls == len(SITES)


def test_more_frames_are_not_taken_for_more_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of one frame, called with three: the other two are as many tokens as a longer text."""
    monkeypatch.setattr(
        "calibatt_compiler.backend._inductor", lambda gm, given, settings: gm.forward
    )
    torch._dynamo.reset()
    plan = plan_of("first")
    one = Plan(plan.metadata.model_copy(update={"grid": (1, 15, 7)}), plan.sites)
    inputs = arguments("cogvideox", TEXT)
    assert inputs["hidden_states"].shape[1] == 3
    inputs["hidden_states"] = torch.randn(1, 3, 4, 30, 14)
    model = lively(tiny_models.cogvideox())
    compiled = torch.compile(model, backend="calibatt", options={"plan": one})
    expected = model(**inputs)[0]
    assert (compiled(**inputs)[0] - expected).abs().max() < 2e-5 * expected.abs().max()
    summary = calibatt_compiler.summary(compiled)
    assert summary.sparse_calls == 0
    assert any("3 x 15 x 7" in reason for reason in (*summary.skipped, *summary.dense_calls))


@pytest.mark.slow
def test_prompts_of_any_length_calibrate_one_plan(tmp_path: Path) -> None:
    model = mochi()
    config = CalibrationConfig(block=BLOCK, A=0.5, C=0.5, num_steps=1)

    def calibrated(name: str, *texts: int, **settings: Any) -> Plan:
        torch._dynamo.reset()
        changed = replace(config, run_folder=tmp_path / name, **settings)
        with calibatt_compiler.calibration(model, changed) as run:
            for text in texts:
                with run.input(), torch.no_grad():
                    model(**arguments("mochi", text))
            return run.plan()

    alone, mixed = calibrated("alone", 40), calibrated("mixed", TEXT, 40, 22)
    assert mixed.metadata.text_policy == alone.metadata.text_policy == "dense_last"
    assert mixed.metadata.inputs.count == 3
    assert 0 < mixed.density() < 1
    video = VIDEO // BLOCK[0]
    store = RunStore(tmp_path / "mixed")
    for site in SITES:
        assert mixed.sites[site].query_length == VIDEO + TEXT
        # Stored beside a shorter prompt, its video blocks are what they are alone.
        bits = store.tensor("00001", f"{site}@0")[0]
        carried = np.unpackbits(bits, axis=-1, bitorder="little")[:, :video, :video]
        assert (carried == alone.block_mask(site, 0).numpy()[:, :video, :video]).all()
        assert not carried.all()
    with pytest.raises(CalibrationError, match="different text lengths"):
        calibrated("energies", TEXT, 40, keep_energies=True)
    # Validated on a prompt of yet another length, by the mask completed for it.
    calibrated("other", 31, keep_energies=True)
    kept = validate_run(tmp_path / "other", mixed)
    assert all(0.3 < site.mean < 1 for site in kept.sites)
