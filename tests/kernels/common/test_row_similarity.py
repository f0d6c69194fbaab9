"""How alike rows attend: against the definition in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.common import row_similarity as module
from calibatt_compiler.kernels.common.row_similarity import row_similarity, spread

GRID = (5, 6, 7)


def operands(text: int = 0, seed: int = 0, peak: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, math.prod(GRID) + text, 16, generator=generator)
    return peak * q, torch.randn(q.shape, generator=generator)


def reference(
    q: Tensor,
    k: Tensor,
    frames: list[int],
    *,
    grid: tuple[int, int, int] = GRID,
    first: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Loop over frames and pairs of rows, each flattened over column and key."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = torch.softmax(q.double() @ k.double().mT * scale, -1)
    p = p[:, :, first : first + math.prod(grid)].reshape(*q.shape[:2], *grid, -1)
    total = []
    for frame in frames:
        rows = p[:, :, frame].flatten(3)
        for one, other in itertools.combinations(range(grid[1]), 2):
            total.append(torch.cosine_similarity(rows[:, :, one], rows[:, :, other], dim=-1))
    return torch.stack(total).mean(0)


@pytest.mark.parametrize("first", [0, 11])
@pytest.mark.parametrize("chunk", [1, 4 * 6 * 221, 1 << 20])
def test_it_is_the_mean_cosine_of_flattened_rows(
    first: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    q, k = operands(text=11)
    got = row_similarity(q, k, grid=GRID, first=first, frames=5)
    wanted = reference(q, k, list(range(5)), first=first)
    assert got.dtype == torch.float64
    assert got.shape == (2, 3)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    exact = row_similarity(q.double(), k.double(), grid=GRID, first=first, frames=9)
    torch.testing.assert_close(exact, wanted, rtol=1e-12, atol=1e-12)


def test_scale_and_key_length_are_their_own() -> None:
    q, k = operands()
    k = k[:, :, :33]
    wanted = reference(q, k, list(range(5)), scale=0.7)
    got = row_similarity(q, k, grid=GRID, scale=0.7, frames=5)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert (wanted - reference(q, k, list(range(5)))).abs().max() > 0.01


def test_strided_and_low_precision_operands() -> None:
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands())
    q, k = q.bfloat16(), k.bfloat16()
    got = row_similarity(q, k, grid=GRID, frames=5)
    torch.testing.assert_close(got, reference(q, k, list(range(5))), rtol=1e-5, atol=1e-6)


def test_frames_are_sampled_evenly() -> None:
    assert spread(4, 12) == [1, 4, 7, 10]
    assert spread(3, 3) == [0, 1, 2]
    assert spread(2, 5) == [1, 3]
    q, k = operands()
    got = row_similarity(q, k, grid=GRID, frames=2)
    torch.testing.assert_close(got, reference(q, k, [1, 3]), rtol=1e-5, atol=1e-6)


def test_rows_that_attend_alike_score_one_and_local_rows_little() -> None:
    q, k = operands()
    alike = q.view(2, 3, *GRID, 16)[:, :, :, :1].expand(2, 3, *GRID, 16).reshape(q.shape)
    score = row_similarity(alike, k, grid=GRID)
    torch.testing.assert_close(score, torch.ones(2, 3, dtype=torch.float64))
    # Each token attends to itself alone: no two rows share a key.
    own = 50 * torch.eye(math.prod(GRID)).expand(1, 1, -1, -1)
    assert row_similarity(own, own, grid=GRID, scale=1.0).item() == pytest.approx(0, abs=1e-6)
    # Uniform attention is the same for all rows.
    assert row_similarity(0 * q, k, grid=GRID).min() == pytest.approx(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in operands(text=11))
    got = row_similarity(q.cuda(), k.cuda(), grid=GRID, first=11, frames=5)
    wanted = reference(q, k, list(range(5)), first=11)
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-6)


def test_misfits_are_refused() -> None:
    q, k = operands()
    with pytest.raises(KernelError, match="fit one another"):
        row_similarity(q, k[:, :1], grid=GRID)
    for grid, first in (((5, 6, 8), 0), (GRID, 1), ((30, 1, 7), 0)):
        with pytest.raises(KernelError, match="can't be compared"):
            row_similarity(q, k, grid=grid, first=first)
    with pytest.raises(KernelError, match="can't be compared"):
        row_similarity(q, k, grid=GRID, frames=0)
