"""Sites at run time: one serves a plan, the other records for calibration."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from calibatt_compiler.capture import Recorder
from calibatt_compiler.kernels.attention import AttentionKernel, dense_attention, make_attention
from calibatt_compiler.options import Lowering
from calibatt_compiler.plan import BlockPattern, Plan
from calibatt_compiler.plan.text import fit_pattern, other_text
from calibatt_compiler.runtime.order import Rearrangement, attend_in_order, rearrangement

DENSE_OUTSIDE = "dense: timestep outside the plan's range"
DENSE_MIXED = "dense: samples of one batch at different timesteps"
DENSE_LENGTH = "dense: a sequence that is not the plan's video with text"
FITTED_LENGTHS = 8
"""Text lengths beside the plan's whose kernels a site keeps; the one used least recently goes."""
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
        hopper: bool = False,
    ) -> None:
        self._plan = plan
        self._site = plan.sites[name]
        self._steps = self._site.steps
        self._lowering: Lowering = lowering
        self._device, self._dtype, self._head_dim = device, dtype, head_dim
        self._hopper = hopper
        self._kernels: Sequence[AttentionKernel | None] = [
            self._make(pattern, lowering) for pattern in self._site.patterns
        ]
        self._fitted: OrderedDict[tuple[int, tuple[int, int]], AttentionKernel | None]
        self._fitted = OrderedDict()
        self.calls: Counter[str] = Counter()

    def _make(self, pattern: BlockPattern, lowering: Lowering) -> AttentionKernel | None:
        # A pattern that keeps everything is served best by the stock dense kernel.
        if pattern.density == 1.0 and lowering != "reference":
            return None
        return make_attention(
            pattern,
            lowering=lowering,
            device=self._device,
            dtype=self._dtype,
            head_dim=self._head_dim,
            hopper=self._hopper,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, timestep: float, scale: float) -> Tensor:
        """Attention at a timestep: sparse where the plan has a step near it, else dense."""
        step = self._plan.step_of(timestep)
        if step is None:
            mixed = math.isnan(timestep)
            self.calls[DENSE_MIXED if mixed else DENSE_OUTSIDE] += 1
            return dense_attention(q, k, v, scale)
        lengths = (q.shape[2], k.shape[2])
        if not self._serves(lengths):
            self.calls[DENSE_LENGTH] += 1
            return dense_attention(q, k, v, scale)
        kernel = self._kernel(self._steps[step], lengths)
        if kernel is None:
            self.calls[DENSE_FULL] += 1
            return dense_attention(q, k, v, scale)
        self.calls[kernel.kind] += 1
        orders = [self._rearrangement(length) for length in lengths]
        return attend_in_order(kernel, q, k, v, scale, (orders[0], orders[1]))

    def _rearrangement(self, length: int) -> Rearrangement | None:
        return rearrangement(
            self._plan.token_order,
            self._plan.grid,
            length,
            text_first=self._plan.text_position == "first",
            device=self._device,
        )

    def _serves(self, lengths: tuple[int, int]) -> bool:
        planned = (self._site.query_length, self._site.key_length)
        if lengths == planned or self._plan.text_position is None:
            return True
        # Weights are of blocks, which another text length may cut elsewhere.
        return not self._site.weighted and other_text(planned, lengths, math.prod(self._plan.grid))

    def _kernel(self, index: int, lengths: tuple[int, int]) -> AttentionKernel | None:
        """Return the kernel of a pattern, completed for another text length where it must be."""
        position = self._plan.text_position
        if position is None or lengths == (self._site.query_length, self._site.key_length):
            return self._kernels[index]
        key = (index, lengths)
        if key not in self._fitted:
            video = math.prod(self._plan.grid)
            pattern = self._site.patterns[index]
            pattern = fit_pattern(pattern, lengths, video=video, position=position)
            # Text lengths come and go with prompts: not worth a generated kernel for each.
            lowering: Lowering = "reference" if self._lowering == "reference" else "table"
            self._fitted[key] = self._make(pattern, lowering)
            if len(self._fitted) > FITTED_LENGTHS * len(self._kernels):
                self._fitted.popitem(last=False)
        self._fitted.move_to_end(key)
        return self._fitted[key]

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
    def repairs(self) -> int:
        """Calls computed again because a fixed softmax reference overflowed; waits for the GPU."""
        kernels = (*self._kernels, *self._fitted.values())
        return sum(getattr(kernel, "repairs", 0) for kernel in kernels)

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
