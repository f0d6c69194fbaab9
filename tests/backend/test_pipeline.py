"""The whole way on a tiny pipeline: calibrate, compile, generate twice."""

from __future__ import annotations

import torch

import calibatt_compiler
from calibatt_compiler import CalibrationConfig, calibrate


def test_calibrated_pipeline_runs_sparse_without_a_recompile(
    tiny_wan_pipeline, tiny_wan_arguments, tiny_wan_grid, tmp_path
):
    torch._dynamo.reset()
    pipe = tiny_wan_pipeline
    out = tmp_path / "tiny.calibatt"
    config = CalibrationConfig(block=(32, 32), A=0.6, C=0.8, k=4.0, progress=False)
    plan = calibrate(pipe, ["a big rabbit"], 1, out=out, config=config, **tiny_wan_arguments)
    assert plan.grid == tiny_wan_grid
    assert plan.density() < 0.95
    assert set(plan.sites) == {"blocks.0.attn1", "blocks.1.attn1"}

    model = pipe.transformer
    generate = {"prompt": "the small bird", "output_type": "latent", **tiny_wan_arguments}
    dense = pipe(generator=torch.Generator().manual_seed(5), **generate).frames
    try:
        pipe.transformer = torch.compile(
            model, backend="calibatt", fullgraph=True, options={"plan": str(out)}
        )
        with torch._dynamo.config.patch(error_on_recompile=True):
            first, second = (
                pipe(generator=torch.Generator().manual_seed(5), **generate).frames
                for _ in range(2)
            )
        summary = calibatt_compiler.summary(pipe)
    finally:
        pipe.transformer = model
    assert torch.equal(first, second)
    assert not torch.equal(first, dense)
    assert (first - dense).norm() < 0.5 * dense.norm()
    # Two runs, each step two calls (guidance), each call two sites.
    assert summary.sparse_calls == 2 * plan.steps * 2 * 2
    assert summary.graphs == 1
