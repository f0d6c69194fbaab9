"""Operands, patterns and the measure of accuracy that all kernel tests share."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calibatt_compiler.kernels.reference.attention import masked_dense_attention
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.pattern import BlockPattern

Operands = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def operands() -> Callable[..., Operands]:
    """Make seeded q, k, v: `operands(heads=2, query_length=100, ...)`.

    They are permuted views of (B, S, H, D), as diffusers hands them over, unless `permuted=False`.
    """

    def make(
        *,
        batch: int = 1,
        heads: int = 2,
        query_length: int = 200,
        key_length: int | None = None,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        permuted: bool = True,
        seed: int = 0,
    ) -> Operands:
        generator = torch.Generator().manual_seed(seed)
        lengths = (query_length, key_length or query_length, key_length or query_length)
        made = []
        for length in lengths:
            x = torch.randn(batch, length, heads, head_dim, generator=generator)
            x = x.to(dtype).to(device).transpose(1, 2)
            made.append(x if permuted else x.contiguous())
        return made[0], made[1], made[2]

    return make


@pytest.fixture
def random_pattern() -> Callable[..., BlockPattern]:
    """Make a seeded pattern with random kept blocks, no row empty.

    With `intervals`, of each row only its first that many runs of blocks.
    """

    def make(
        *,
        heads: int = 2,
        query_length: int = 200,
        key_length: int | None = None,
        block: tuple[int, int] = (64, 64),
        density: float = 0.4,
        weighted: bool = False,
        pooled: int = 0,
        seed: int = 0,
        repetitive: tuple[bool, ...] = (),
        copies: AnchorRows | None = None,
        intervals: int | None = None,
    ) -> BlockPattern:
        key_length = key_length or query_length
        rows, columns = math.ceil(query_length / block[0]), math.ceil(key_length / block[1])
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(heads, rows, columns, generator=generator)
        mask = draw < density
        mask.scatter_(2, draw.argmin(-1, keepdim=True), True)
        if intervals is not None:
            before = torch.nn.functional.pad(mask, (1, 0))[..., :-1]
            mask &= (mask & ~before).cumsum(-1) <= intervals
        weight = None
        if weighted:
            sampled = torch.rand(mask.shape, generator=generator) < 0.5
            weight = torch.where(sampled, 1 + 20 * torch.rand(mask.shape, generator=generator), 1.0)
        return BlockPattern.from_mask(
            mask,
            query_length=query_length,
            key_length=key_length,
            block=block,
            weight=weight,
            pooled=pooled,
            repetitive=np.array(repetitive) if repetitive else None,
            copies=copies,
        )

    return make


@dataclass(frozen=True)
class Accuracy:
    """Errors against float64: of the result under test, and of the low-precision yardstick."""

    largest: float
    rms: float
    allowed_largest: float
    allowed_rms: float

    def check(self) -> None:
        assert self.largest <= self.allowed_largest, self
        assert self.rms <= self.allowed_rms, self


@pytest.fixture
def accuracy() -> Callable[..., Accuracy]:
    """Compare a result with float64, allowing a multiple of a low-precision result's own error.

    `accuracy(result, exact, yardstick, factor=2.0)`: `yardstick` is the plain computation in the
    dtype of the operands. One rounding of the result itself is always allowed. A NaN or an
    infinity anywhere is an infinite error.
    """

    def measure(
        result: Tensor, exact: Tensor, yardstick: Tensor, *, factor: float = 2.0
    ) -> Accuracy:
        assert result.shape == exact.shape == yardstick.shape
        exact = exact.double().cpu()

        def errors(x: Tensor) -> tuple[float, float]:
            difference = (x.double().cpu() - exact).nan_to_num(math.inf)
            return difference.abs().max().item(), difference.square().mean().sqrt().item()

        rounding = torch.finfo(yardstick.dtype).eps
        largest, rms = errors(result)
        reference_largest, reference_rms = errors(yardstick)
        return Accuracy(
            largest,
            rms,
            factor * reference_largest + rounding * exact.abs().max().item(),
            factor * reference_rms + rounding * exact.square().mean().sqrt().item(),
        )

    return measure


@pytest.fixture
def assert_attention(accuracy: Callable[..., Accuracy]) -> Callable[..., None]:
    """Check a kernel's output: values against float64, shape, dtype and the promised layout.

    `assert_attention(out, q, k, v, pattern, scale=None, factor=2.0)`. The yardstick is dense SDPA
    under the expanded mask in the operands' dtype on their device.
    """

    def check(
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: BlockPattern,
        *,
        scale: float | None = None,
        factor: float = 2.0,
    ) -> None:
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        assert out.device == q.device
        assert out.transpose(1, 2).is_contiguous(), out.stride()
        doubles = (x.double().cpu() for x in (q, k, v))
        exact = masked_dense_attention(*doubles, pattern, scale=scale)
        if q.dtype == torch.float64:
            torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-13)
            return
        yardstick = masked_dense_attention(q, k, v, pattern, scale=scale)
        accuracy(out, exact, yardstick, factor=factor).check()

    return check


@pytest.fixture
def flash_attention() -> Callable[..., tuple[Tensor, Tensor]]:
    """Attention under a pattern, `flash_attention(q, k, v, pattern)`: exactly, in float64, and as
    FlashAttention rounds it, probabilities and output in the dtype of the operands.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> tuple[Tensor, Tensor]:
        scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~pattern.token_mask().to(q.device), -math.inf)
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        total = p.sum(-1, keepdim=True)
        exact = p @ v.double() / total
        return exact, (p.to(q.dtype).double() @ v.double() / total).to(q.dtype)

    return attend


@pytest.fixture(scope="session")
def interpreter() -> Any:
    """The module that interprets Gluon kernels."""
    path = Path(__file__).parents[1] / "support" / "gluon_interpreter.py"
    spec = importlib.util.spec_from_file_location("gluon_interpreter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def launches(interpreter: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the Hopper kernel serve a CPU; gives the stand-in that counts its launches."""
    from calibatt_compiler.kernels.hopper import attention as hopper

    kernel = interpreter.Interpreted(hopper.hopper_attention)
    monkeypatch.setattr(hopper, "hopper_attention", kernel)
    monkeypatch.setattr(hopper, "hopper_counts", interpreter.Interpreted(hopper.hopper_counts))
    monkeypatch.setattr(
        "calibatt_compiler.kernels.hopper.launch.descriptor", interpreter.Descriptor
    )
    return kernel


@pytest.fixture
def make() -> Callable[..., Any]:
    """Make a Hopper kernel of few programs on the CPU: `make(pattern, dtype, head_dim, ...)`."""
    from calibatt_compiler.kernels.hopper.attention import HopperAttention

    def kernel(pattern: BlockPattern, dtype: torch.dtype, head_dim: int, **more: Any) -> Any:
        where = {"dtype": dtype, "head_dim": head_dim, "softmax": more.pop("softmax", "auto")}
        request = KernelRequest(pattern, device=torch.device("cpu"), **where)
        return HopperAttention(request, **{"programs": 3, **more})

    return kernel


@pytest.fixture
def spike() -> Callable[..., None]:
    """Make query `row` of head 1 score so many nats on a key: `spike(q, k, row, key, nats)`."""

    def change(q: Tensor, k: Tensor, row: int, key: int, nats: float) -> None:
        direction = torch.zeros(q.shape[-1])
        direction[0] = 1.0
        length = math.sqrt(nats * math.sqrt(q.shape[-1]))
        q[0, 1, row] = (direction * length).to(q.dtype)
        k[0, 1, :, 0] = 0
        k[0, 1, key] = (direction * length).to(k.dtype)

    return change
