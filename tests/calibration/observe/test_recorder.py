"""The recorder, called as a compiled model calls it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.calibration import CalibrationConfig
from calibatt_compiler.calibration.observe.observation import Branch, SamplerSchedule
from calibatt_compiler.calibration.observe.observer import ObservedModel
from calibatt_compiler.calibration.observe.recorder import AttentionRecorder
from calibatt_compiler.calibration.select.selection import covering_mask, pack
from calibatt_compiler.calibration.store.energies import EnergyBuffer
from calibatt_compiler.calibration.store.records import InputRecord
from calibatt_compiler.capture import CaptureInfo, SiteInfo
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.kernels.common.row_similarity import row_similarity
from calibatt_compiler.kernels.energy import block_energy

GRID = (2, 5, 9)
TOKENS = math.prod(GRID)
SCHEDULE = SamplerSchedule((900.0, 500.0, 100.0), (0.9, 0.5, 0.1), "S")
CONFIG = CalibrationConfig(block=(32, 32), A=0.5, C=0.8, k=2.0)

Make = Callable[..., AttentionRecorder]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(
        config: CalibrationConfig = CONFIG,
        *,
        text: Any = None,
        schedule: SamplerSchedule | None = SCHEDULE,
        grid: tuple[int, int, int] | None = GRID,
        branch: Branch = "any",
    ) -> AttentionRecorder:
        model = ObservedModel(
            module=torch.nn.Identity(),
            config=replace(config, text=text),
            schedule=lambda: schedule,
        )
        recorder = AttentionRecorder(model, EnergyBuffer(tmp_path / "energies"))
        recorder.on_capture(CaptureInfo(model=None, grid=grid, sites=()))
        recorder.branch = branch
        return recorder

    return made


def operands(seed: int, batch: int = 1, length: int = TOKENS) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, length, 2, 16, generator=generator).transpose(1, 2) for _ in range(3)
    )
    return 3 * q, k, v


def run(
    recorder: AttentionRecorder, name: str = "0", *, samples: int | None = 1, **kwargs: Any
) -> tuple[InputRecord, dict[str, Any]]:
    recorder.begin(name, {"n": name}, samples)
    for index, timestep in enumerate(kwargs.pop("timesteps", SCHEDULE.timesteps)):
        recorder.attend("s", *operands(index, **kwargs), timestep, 0.25)  # type: ignore[arg-type]
    return recorder.finish()


def expected(seed: int, threshold: float, part: slice = slice(None), **kwargs: Any) -> Any:
    q, k, _ = operands(seed, **kwargs)
    return pack(
        covering_mask(block_energy(q[part], k[part], block=(32, 32), scale=0.25), threshold)[0]
    )


def test_output_is_dense_attention_in_the_promised_layout(make: Make) -> None:
    q, k, v = operands(0, batch=2)
    dense = scaled_dot_product_attention(q, k, v, scale=0.25)
    recorder = make()
    outputs = [recorder.attend("s", q, k, v, 900.0, 0.25)]
    for branch in ("any", "unconditional", "batched"):
        recorder.begin("0", {}, 1)
        recorder.branch = branch
        outputs.append(recorder.attend("s", q, k, v, 900.0, 0.25))
    for out in outputs:
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)
        assert out.transpose(1, 2).is_contiguous()


def test_masks_are_covering_sets_at_the_threshold_of_their_step(make: Make) -> None:
    record, arrays = run(make())
    assert record.timesteps == SCHEDULE.timesteps
    assert record.sigmas == SCHEDULE.sigmas
    assert record.positions == (0, 1, 2)
    assert sorted(arrays) == ["s@0", "s@1", "s@2"]
    for step in range(3):
        threshold = CONFIG.thresholds(3).at(step, 3)
        assert np.array_equal(arrays[f"s@{step}"], expected(step, threshold))
        assert record.kept_mass["s"][step] >= threshold
    assert record.votes == {"s": (1, 1, 1)}
    assert all(0.2 < share < 1 for share in record.best_share["s"])


@pytest.mark.parametrize("schedule", [None, SCHEDULE])
def test_steps_unknown_at_first_change_nothing(
    make: Make, schedule: SamplerSchedule | None
) -> None:
    _, known = run(make())
    record, arrays = run(make(schedule=schedule))
    assert record.schedule_steps == 3
    assert all(np.array_equal(arrays[name], known[name]) for name in known)
    assert record.kept_mass == run(make())[0].kept_mass


def test_num_steps_is_t_of_the_formula(make: Make) -> None:
    config = CalibrationConfig(block=(32, 32), A=0.5, C=0.8, k=2.0, num_steps=30)
    record, arrays = run(make(config))
    assert record.schedule_steps == 30
    assert np.array_equal(arrays["s@2"], expected(2, config.thresholds(30).at(2, 30)))


def test_a_model_of_late_steps_has_their_thresholds(make: Make) -> None:
    # As the low-noise model of two: it is called from the second step on.
    record, arrays = run(make(), timesteps=(500.0, 100.0))
    assert record.positions == (1, 2)
    assert record.sigmas == (0.5, 0.1)
    assert np.array_equal(arrays["s@0"], expected(0, CONFIG.thresholds(3).at(1, 3)))


def test_each_sample_of_a_batch_votes(make: Make) -> None:
    record, arrays = run(make(), batch=3)
    assert record.votes["s"] == (3, 3, 3)
    assert arrays["s@1"].shape == (3, 2, 3, 1)


def test_of_batched_guidance_the_second_half_counts(make: Make) -> None:
    record, arrays = run(make(branch="batched"), batch=2)
    threshold = CONFIG.thresholds(3).at(0, 3)
    assert np.array_equal(arrays["s@0"], expected(0, threshold, slice(1, 2), batch=2))
    assert record.guided
    # Two samples without guidance are not two branches.
    record, arrays = run(make(branch="batched"), batch=2, samples=2)
    assert len(arrays["s@0"]) == 2
    assert not record.guided


def test_both_branches_vote_if_asked_to(make: Make) -> None:
    config = CalibrationConfig(block=(32, 32), cfg="both")
    record, arrays = run(make(config, branch="batched"), batch=2)
    assert len(arrays["s@0"]) == 2
    assert record.guided


def test_the_unconditional_branch_does_not_count(make: Make) -> None:
    recorder = make()
    recorder.begin("0", {}, 1)
    for index, timestep in enumerate(SCHEDULE.timesteps):
        for branch, seed in (("unconditional", 50), ("conditional", index)):
            recorder.branch = branch  # type: ignore[assignment]
            recorder.attend("s", *operands(seed), timestep, 0.25)  # type: ignore[arg-type]
    record, arrays = recorder.finish()
    _, alone = run(make())
    assert all(np.array_equal(arrays[name], alone[name]) for name in alone)
    assert record.guided


def test_of_an_unknown_branch_the_first_call_counts(make: Make) -> None:
    recorder = make(branch="unknown")
    recorder.begin("0", {}, 1)
    for index, timestep in enumerate(SCHEDULE.timesteps):
        for seed in (index, 50):
            recorder.attend("s", *operands(seed), timestep, 0.25)  # type: ignore[arg-type]
    _, arrays = recorder.finish()
    _, alone = run(make())
    assert all(np.array_equal(arrays[name], alone[name]) for name in alone)


@pytest.mark.parametrize("text", ["first", "last"])
def test_text_in_the_sequence_stays_dense(make: Make, text: str) -> None:
    recorder = make(text=text)
    length = TOKENS + 40
    _, arrays = run(recorder, length=length)
    mask = np.unpackbits(arrays["s@2"], axis=-1, count=5, bitorder="little").astype(bool)
    blocks = slice(0, 2) if text == "first" else slice(2, 5)
    assert mask[..., blocks].all()
    assert mask[:, :, blocks].all()
    assert not mask.all()


def test_less_than_a_video_is_left_alone(make: Make) -> None:
    recorder = make()
    recorder.begin("0", {}, 1)
    q, k, v = operands(0, length=TOKENS - 1)
    recorder.attend("refiner", q, k, v, 900.0, 0.25)
    with pytest.raises(CalibrationError, match="no attention call") as caught:
        recorder.finish()
    assert "fewer queries" in str(caught.value.got)


def test_an_unknown_family_has_one_row_of_tokens(make: Make) -> None:
    record, _ = run(make(grid=None))
    assert record.grid == (1, 1, TOKENS)


def test_energies_are_kept_if_asked_to(make: Make) -> None:
    _, arrays = run(make(CalibrationConfig(block=(32, 32), keep_energies=True)))
    q, k, _ = operands(1)
    energy = block_energy(q, k, block=(32, 32), scale=0.25)
    np.testing.assert_allclose(arrays["s@1/energy"], energy.numpy(), rtol=1e-4, atol=1e-6)


def test_refusals(make: Make) -> None:
    recorder = make()
    recorder.begin("0", {}, 1)
    q, k, v = operands(0)
    with pytest.raises(CalibrationError, match="not one number"):
        recorder.attend("s", q, k, v, math.nan, 0.25)
    with pytest.raises(CalibrationError, match="site s, step 0 is not finite"):
        recorder.attend("s", q * math.nan, k, v, 900.0, 0.25)
    recorder.attend("s", q, k, v, 900.0, 0.25)
    with pytest.raises(CalibrationError, match="another size"):
        recorder.attend("s", *operands(0, length=2 * TOKENS), 900.0, 0.25)  # type: ignore[arg-type]
    recorder.abandon()

    recorder = make()
    recorder.on_capture(CaptureInfo(model=None, grid=(5, 2, 9), sites=()))
    with pytest.raises(CalibrationError, match="another size"):
        run(recorder)


def test_inputs_must_be_whole_and_alike(make: Make) -> None:
    recorder = make()
    recorder.reference, _ = run(recorder)
    run(recorder, "1")
    with pytest.raises(CalibrationError, match="other timesteps"):
        run(recorder, "2", timesteps=(900.0, 400.0, 100.0))
    with pytest.raises(CalibrationError, match="other timesteps"):
        run(recorder, "3", timesteps=(900.0, 500.0, 100.0, 50.0))
    with pytest.raises(CalibrationError, match="not observed whole"):
        run(recorder, "4", timesteps=(900.0, 500.0))

    recorder = make()
    recorder.begin("0", {}, 1)
    for site, timestep in (("a", 900.0), ("b", 900.0), ("a", 500.0)):
        recorder.attend(site, *operands(0), timestep, 0.25)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="1 missing, first: b at step 1"):
        recorder.finish()


def test_why_nothing_was_observed_is_told(make: Make) -> None:
    recorder = make()
    sites = (
        SiteInfo("x", 1, 8, 8, 8, skip="cross-attention"),
        SiteInfo("y", 1, 8, 8, 8, skip="masked"),
        SiteInfo("z", 1, 8, 8, 8, skip="masked"),
    )
    recorder.on_capture(CaptureInfo(model=None, grid=GRID, sites=sites))
    recorder.begin("0", {}, 1)
    with pytest.raises(CalibrationError) as caught:
        recorder.finish()
    assert "3 skipped: {'cross-attention': 1, 'masked': 2}" in str(caught.value.got)


@pytest.mark.parametrize("text", [None, "first"])
def test_scores_are_of_the_samples_that_count(make: Make, text: Any) -> None:
    config = replace(CONFIG, gamma=0.87, anchor_rows=2)
    length = TOKENS + 10 * (text is not None)
    q, k, v = operands(0, batch=2, length=length)
    found = []
    for branch, part in (("batched", slice(None)), ("any", slice(1, None))):
        recorder = make(config, text=text, branch=branch)
        recorder.begin("0", {}, 1, scored=True)
        recorder.attend("s", q[part], k[part], v[part], 900.0, 0.25)
        record, arrays = recorder.finish()
        assert record.anchor_rows == 2
        found.append(arrays["s@0/repetition"])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    alike = row_similarity(q[1:], k[1:], grid=GRID, first=length - TOKENS, scale=0.25)
    np.testing.assert_allclose(found[0][0], alike.numpy(), rtol=1e-6)
    unscored = make(config, text=text, branch="any")
    unscored.begin("0", {}, 1)
    unscored.attend("s", q, k, v, 900.0, 0.25)
    record, arrays = unscored.finish()
    assert (record.anchor_rows, list(arrays)) == (0, ["s@0"])


def test_nothing_is_scored_where_the_video_is_not_known(make: Make) -> None:
    """Text tokens of an unknown place, or frames without rows to copy."""
    for length, rows in ((TOKENS + 10, 2), (TOKENS, 5)):
        recorder = make(replace(CONFIG, gamma=0.87, anchor_rows=rows))
        recorder.begin("0", {}, 1, scored=True)
        recorder.attend("s", *operands(0, length=length), 900.0, 0.25)
        assert list(recorder.finish()[1]) == ["s@0"]
