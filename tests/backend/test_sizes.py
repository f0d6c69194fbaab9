"""Other sizes of video: dense and counted, or an error; never sparse by accident."""

from __future__ import annotations

import pytest
import torch

import calibatt_compiler
from calibatt_compiler.errors import PlanMismatchError


def compiled_with(case, **options):
    options = {"plan": case.plan, "lowering": "reference", **options}
    return torch.compile(case.model, backend="calibatt", fullgraph=True, options=options)


def turned(arguments):
    """The same number of tokens on another grid: height and width exchanged."""
    if "height" in arguments:
        return arguments | {"height": arguments["width"], "width": arguments["height"]}
    return arguments | {"hidden_states": arguments["hidden_states"].transpose(-1, -2).contiguous()}


@pytest.mark.slow
def test_same_token_count_on_another_grid_runs_dense(case):
    if "cog" in type(case.model).__name__.lower():
        pytest.skip("its position table has the size of its configuration")
    compiled = compiled_with(case)
    right, other = case.arguments(900.0), turned(case.arguments(900.0))
    expected_right, expected_other = case.expanded(900.0), case.model(**other)[0]
    for _ in range(2):  # the second round runs what the first compiled
        assert torch.allclose(compiled(**right)[0], expected_right, atol=1e-4)
        assert torch.allclose(compiled(**other)[0], expected_other, atol=1e-4)
    summary = calibatt_compiler.summary(compiled)
    assert summary.sparse_calls == 2 * len(case.sites)
    assert sum("another size" in row.status for row in summary.rows) == len(case.sites)


@pytest.mark.slow
def test_other_grid_first_does_not_spoil_the_right_one(wan):
    compiled = compiled_with(wan)
    other = turned(wan.arguments(900.0))
    assert torch.allclose(compiled(**other)[0], wan.model(**other)[0], atol=1e-4)
    got = compiled(**wan.arguments(900.0))[0]
    assert torch.allclose(got, wan.expanded(900.0), atol=1e-4)


@pytest.mark.slow
def test_longer_video_runs_dense(wan):
    compiled = compiled_with(wan)
    compiled(**wan.arguments(900.0))
    for frames in (4, 5, 6):
        longer = wan.arguments(900.0) | {"hidden_states": torch.randn(2, 4, frames, 14, 18)}
        assert torch.allclose(compiled(**longer)[0], wan.model(**longer)[0], atol=1e-4)
    assert calibatt_compiler.summary(compiled).sparse_calls == 2


@pytest.mark.slow
def test_another_size_is_an_error_on_request(wan):
    compiled = compiled_with(wan, on_mismatch="error")
    compiled(**wan.arguments(900.0))
    with pytest.raises(PlanMismatchError, match="3 x 9 x 7"):
        compiled(**turned(wan.arguments(900.0)))


def test_another_batch_is_still_sparse(wan):
    compiled = compiled_with(wan)
    compiled(**wan.arguments(900.0))
    single = {name: value[:1] for name, value in wan.inputs.items()}
    arguments = wan.arguments(900.0) | single | {"timestep": torch.tensor([900.0])}
    got = compiled(**arguments)[0]
    assert torch.allclose(got, wan.expanded(900.0)[:1], atol=1e-4)
