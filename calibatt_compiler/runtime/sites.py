"""Sites at run time: one serves a plan, the other records for calibration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from calibatt_compiler.capture import Recorder
from calibatt_compiler.kernels.attention import AttentionKernel, dense_attention, make_attention
from calibatt_compiler.options import Lowering
from calibatt_compiler.plan import Plan

DENSE_OUTSIDE = "dense: timestep outside the plan's range"
DENSE_MIXED = "dense: samples of one batch at different timesteps"
DENSE_FULL = "dense: the plan keeps every block"


class SparseSite:
    """Serves one attention call by the kernel of its step; counts what it serves.

    Attributes:
        calls: calls by kind of kernel; dense calls by their reason, one of the `DENSE_` texts.
    """

    def __init__(
        self,
        plan: Plan,
        name: str,
        *,
        lowering: Lowering,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
    ) -> None:
        self._plan = plan
        self._steps = plan.sites[name].steps
        self._kernels: Sequence[AttentionKernel | None] = [
            # A pattern that keeps everything is served best by the stock dense kernel.
            None
            if pattern.density == 1.0 and lowering != "reference"
            else make_attention(
                pattern, lowering=lowering, device=device, dtype=dtype, head_dim=head_dim
            )
            for pattern in plan.sites[name].patterns
        ]
        self.calls: Counter[str] = Counter()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float) -> Tensor:
        """Attention at a timestep: sparse where the plan has a step near it, else dense."""
        step = self._plan.step_of(timestep)
        if step is None:
            mixed = math.isnan(timestep)
            self.calls[DENSE_MIXED if mixed else DENSE_OUTSIDE] += 1
            return dense_attention(q, k, v, scale)
        kernel = self._kernels[self._steps[step]]
        if kernel is None:
            self.calls[DENSE_FULL] += 1
            return dense_attention(q, k, v, scale)
        self.calls[kernel.kind] += 1
        return kernel(q, k, v, scale=scale)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of kernel that serve the site now, without repetition."""
        kinds = ("sdpa" if kernel is None else kernel.kind for kernel in self._kernels)
        return tuple(dict.fromkeys(kinds))

    @property
    def reasons(self) -> Counter[str]:
        """Why another kernel than the one asked for serves, by number of patterns."""
        return Counter(
            kernel.reason
            for kernel in self._kernels
            if kernel is not None and kernel.reason is not None
        )

    @property
    def computed_density(self) -> float:
        """Blocks that the kernels compute / all blocks, mean over steps."""
        by_pattern = [1.0 if kernel is None else kernel.density for kernel in self._kernels]
        return sum(by_pattern[index] for index in self._steps) / len(self._steps)


class RecordingSite:
    """Hands the operands of one attention call to a recorder."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self._name = name

    def attend(self, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float) -> Tensor:
        """Dense attention, observed by the recorder."""
        return self._recorder.attend(self._name, q, k, v, timestep, scale)
