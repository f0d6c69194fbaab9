"""The log-sum-exp that SDPA's kernels return: operators, layouts, and what happens without."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.kernels.common import dense as dense_lse


@pytest.fixture(autouse=True)
def _told_anew() -> Iterator[None]:
    dense_lse._tell.cache_clear()
    yield
    dense_lse._tell.cache_clear()


@pytest.mark.parametrize("backend", list(dense_lse.OPERATORS), ids=str)
@pytest.mark.parametrize("head_dim", [64, 36])
def test_operators_of_this_torch_give_shapes_as_expected(
    backend: SDPBackend, head_dim: int
) -> None:
    q = torch.empty(2, 45, 3, head_dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    k = torch.empty(2, 3, 70, head_dim, dtype=torch.bfloat16, device="meta")
    out, lse = dense_lse.OPERATORS[backend](q, k, k, 0.3)
    assert out.shape == q.shape
    assert dense_lse.by_query(lse, q).shape == q.shape[:3]
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("shape", [(2, 3, 45), (2, 3, 45, 1), (2, 3, 64)])
def test_layouts_of_the_log_sum_exp(shape: tuple[int, ...]) -> None:
    lse = torch.arange(torch.Size(shape).numel()).view(shape)
    found = dense_lse.by_query(lse, torch.empty(2, 3, 45, 8))
    assert found.shape == (2, 3, 45)
    assert torch.equal(found[1, 2], lse[1, 2].flatten()[:45])


def test_the_kernel_is_the_one_that_sdpa_chooses(
    operands: Callable[..., tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = operands(query_length=40, key_length=70)
    exact = torch.logsumexp(q @ k.mT * 0.3, -1)

    def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        # The operator of the same kernel for a CPU.
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        return found[0], found[1][..., None]

    monkeypatch.setitem(dense_lse.OPERATORS, SDPBackend.FLASH_ATTENTION, flash)
    out, lse = dense_lse.dense_attention_and_lse(q.requires_grad_(), k, v, 0.3)
    assert lse is not None
    assert out.transpose(1, 2).is_contiguous()
    assert not out.requires_grad
    assert torch.equal(out, scaled_dot_product_attention(q.detach(), k, v, scale=0.3))
    torch.testing.assert_close(lse, exact)


def refuses(*_: object) -> tuple[Tensor, Tensor]:
    raise TypeError("unexpected keyword argument")


@pytest.mark.parametrize("reason", ["math", "no choice", "another operator"])
def test_without_a_log_sum_exp_the_output_is_the_same_and_the_reason_is_told_once(
    operands: Callable[..., tuple[Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    reason: str,
) -> None:
    q, k, v = operands(query_length=40)
    if reason == "another operator":
        monkeypatch.setitem(dense_lse.OPERATORS, SDPBackend.FLASH_ATTENTION, refuses)
    elif reason == "no choice":
        monkeypatch.delattr(torch, "_fused_sdp_choice")
    backend = SDPBackend.MATH if reason == "math" else SDPBackend.FLASH_ATTENTION
    with caplog.at_level(logging.WARNING, "calibatt"), torch.nn.attention.sdpa_kernel(backend):
        for _ in range(2):
            out, lse = dense_lse.dense_attention_and_lse(q, k, v, 0.3)
            assert lse is None
            assert torch.equal(out, scaled_dot_product_attention(q, k, v, scale=0.3))
    assert len(caplog.records) == 1
    assert "no log-sum-exp" in caplog.text
    if reason == "another operator":
        assert "unexpected keyword argument" in caplog.text
