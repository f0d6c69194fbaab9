"""Which samples of a batch are unconditional, however a pipeline is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from calibatt_compiler import Plan
from calibatt_compiler.calibration import CalibrationConfig, calibrate
from calibatt_compiler.calibration.observe.observation import InputObservation
from calibatt_compiler.calibration.observe.repeated_samples import CallSamples
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.errors import CalibrationError

Masks = dict[str, torch.Tensor]


def ltx() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        num_layers=1,
        caption_channels=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return LTXPipeline(
        scheduler=scheduler,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=made_peaked(transformer),
    )


def cogvideox() -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=1,
        sample_width=18,
        sample_height=14,
        sample_frames=9,
        max_text_seq_length=6,
    )
    return CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=made_peaked(transformer),
        scheduler=CogVideoXDDIMScheduler(),
    )


def made_peaked(model: torch.nn.Module) -> torch.nn.Module:
    """Give a model weights with which attention depends on the text as much as on the noise."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * (1.5 / p[0].numel() ** 0.5)
        elif "norm" not in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.eval().requires_grad_(False)


def texts(number: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(number, 6, 16, generator=torch.Generator().manual_seed(seed))


def prompt(make: Any, number: int) -> dict[str, Any]:
    out: dict[str, Any] = {
        "prompt_embeds": texts(number, 1),
        "negative_prompt_embeds": texts(number, 2, 30.0),
    }
    if make is ltx:
        ones = torch.ones(number, 6)
        out |= {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
    return out


SIZES: dict[Any, dict[str, int]] = {
    ltx: {"height": 160, "width": 224, "num_frames": 17},
    cogvideox: {"height": 112, "width": 144, "num_frames": 9},
}


def observe(pipe: Any, folder: Path, one: dict[str, Any], **arguments: Any) -> tuple[Plan, Masks]:
    """Calibrate on one input of one step; return the plan and each sample's packed masks."""
    config = CalibrationConfig(block=(32, 32), form="masks", progress=False, run_folder=folder)
    arguments = {"num_inference_steps": 1, **arguments}
    plan = calibrate(pipe, [one], 0, config=config, **arguments)
    store = RunStore(folder)
    record = store.record("00000")
    return plan, {
        site.name: torch.from_numpy(store.tensor("00000", f"{site.name}@0"))
        for site in record.sites
    }


@pytest.mark.slow
@pytest.mark.parametrize("make", [ltx, cogvideox])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_of_a_batch_of_prompts_the_conditional_half_counts(
    make: Any, number: int, tmp_path: Path
) -> None:
    pipe, one, size = make(), prompt(make, number), SIZES[make]
    # At the first step both runs see the same noise: guidance only adds the branch not counted.
    plain, wanted = observe(pipe, tmp_path / "plain", one, guidance_scale=1.0, **size)
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "for all": (one, {"guidance_scale": 4.0}),
        "of its own": ({**one, "guidance_scale": 4.0}, {"guidance_scale": 1.0}),
    }
    if make is cogvideox:  # it makes one video whatever it is asked for
        ways["videos"] = ({**one, "num_videos_per_prompt": 2}, {"guidance_scale": 4.0})
    for name, (which, arguments) in ways.items():
        plan, masks = observe(pipe, tmp_path / name, which, **arguments, **size)
        assert (plan.metadata.cfg, plain.metadata.cfg) == ("batched", "none"), name
        for site, bits in wanted.items():
            assert len(bits) == number
            assert torch.equal(masks[site], bits), (name, site)


def test_equal_noise_of_the_user_is_no_guidance(tmp_path: Path) -> None:
    noise = torch.randn(1, 105, 8, generator=torch.Generator().manual_seed(4)).expand(2, -1, -1)
    one = {**prompt(ltx, 2), "latents": noise.clone()}
    plan, masks = observe(ltx(), tmp_path / "plain", one, guidance_scale=1.0, **SIZES[ltx])
    guided, others = observe(ltx(), tmp_path / "guided", one, guidance_scale=4.0, **SIZES[ltx])
    assert (plan.metadata.cfg, guided.metadata.cfg) == ("none", "batched")
    for site, bits in masks.items():
        assert len(bits) == 2
        assert torch.equal(others[site], bits)


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_separate_calls_of_several_samples(
    named: bool,
    tiny_wan_pipeline: Any,
    tiny_wan_arguments: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if not named:
        unknown = "calibatt_compiler.calibration.observe.pipelines.branch_of"
        monkeypatch.setattr(unknown, lambda name: "unknown")
    arguments = {**tiny_wan_arguments, "num_inference_steps": 1}
    for index, (one, number) in enumerate(
        [
            ({"prompt": ["a big rabbit", "the bird"]}, 2),
            ({"prompt": "a big rabbit", "num_videos_per_prompt": 2}, 2),
            ({"prompt": ["a big rabbit", "the bird"], "num_videos_per_prompt": 2}, 4),
        ]
    ):
        found = {}
        for scale, cfg in ((1.0, "none"), (5.0, "separate")):
            folder = tmp_path / f"{index}-{scale}"
            where = {**arguments, "guidance_scale": scale}
            plan, found[cfg] = observe(tiny_wan_pipeline, folder, one, **where)
            assert plan.metadata.cfg == cfg
        for site, bits in found["none"].items():
            assert len(bits) == number
            assert torch.equal(found["separate"][site], bits)


def test_equal_parts_of_a_batch_are_seen() -> None:
    a, b = torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(0))
    for batch, copies in (
        ([a], 1),
        ([a, b], 1),
        ([a, a], 2),
        ([a, b, a], 1),
        ([a, b, a, b], 2),
        ([a, b, b, a], 1),
        ([a, b] * 3, 3),
        ([a * float("nan")] * 2, 1),
    ):
        stacked = torch.cat(batch)[:, None]
        for noise in (stacked, stacked.bfloat16(), list(stacked)):
            found = CallSamples.of((torch.zeros(1), "text"), {"hidden_states": noise})
            assert found == CallSamples(len(batch), copies)
            assert CallSamples.of((noise,), {"timestep": torch.zeros(2)}) == found
    assert CallSamples.of((torch.zeros(4),), {"scale": 2.0}) is None


def test_what_can_not_be_told_apart_is_refused() -> None:
    def counted(
        branch: Any, batch: int, call: CallSamples | None, samples: int | None = None
    ) -> Any:
        one = InputObservation("0", {}, samples, None, call=call)
        return one.counted(branch, "s", 0, batch)

    with pytest.raises(CalibrationError, match="more than two branches"):
        counted("paired", 3, CallSamples(3, 3))
    with pytest.raises(CalibrationError, match="can't be told apart"):
        counted("paired", 1, CallSamples(2, 2))
    with pytest.raises(CalibrationError, match="neither one branch of guidance nor both"):
        counted("batched", 4, None, samples=1)
    # Attention within frames sees frames as samples.
    assert counted("paired", 10, CallSamples(2, 2)) == slice(5, None)
    assert counted("batched", 10, CallSamples(2, 1), samples=1) == slice(5, None)
    assert counted("batched", 10, CallSamples(1, 1), samples=1) == slice(0, None)
