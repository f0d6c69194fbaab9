"""Sites at run time: one serves a plan, the other records for calibration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from calibatt_compiler.capture import Recorder
from calibatt_compiler.kernels.common.dense import dense_attention
from calibatt_compiler.kernels.protocol import AttentionKernel
from calibatt_compiler.options import Lowering, Softmax
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.text import other_text
from calibatt_compiler.runtime.device_queue import lane_of
from calibatt_compiler.runtime.kernel_cache import KernelStore, Maker
from calibatt_compiler.runtime.monitor import KeptMassMonitor
from calibatt_compiler.runtime.site_kernels import SiteKernels
from calibatt_compiler.runtime.token_order import Rearrangement, attend_in_order, rearrangement

DENSE_OUTSIDE = "dense: timestep outside the plan's range"
DENSE_MIXED = "dense: samples of one batch at different timesteps"
DENSE_LENGTH = "dense: a sequence that is not the plan's video with text"
DENSE_FULL = "dense: the plan keeps every block"


class SparseSite:
    """Serves one attention call by the kernel of its step; counts what it serves.

    One kernel is made at once, so that what can't be served is known when the model is compiled;
    the others when they are needed.

    Args:
        plan: the plan.
        name: of the site.
        lowering: as in `CompileOptions`.
        device: of the operands.
        dtype: of the operands.
        head_dim: of the operands.
        hopper: as in `CompileOptions`.
        softmax: as in `CompileOptions`.
        monitor: as in `CompileOptions`.
        kernels: where the kernels of the graph are held; default: a store of its own.

    Attributes:
        calls: calls by kind of kernel; dense calls by their reason, one of the `DENSE_` texts.
        monitor: what watches the attention mass kept; None if nothing does.

    Raises:
        KernelError: there is no kernel for this device, dtype and head dim.
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
        hopper: bool = True,
        softmax: Softmax = "auto",
        monitor: int = 0,
        kernels: KernelStore | None = None,
    ) -> None:
        self._plan = plan
        self._name = name
        self._site = plan.sites[name]
        self._steps = self._site.steps
        self._device = device
        self._made = SiteKernels(
            plan, name, lowering, device, dtype, head_dim, hopper=hopper, softmax=softmax
        )
        self._served: dict[int, _Served] = {}
        self.calls: Counter[str] = Counter()
        # What a weighted sample keeps is no measure of how well it serves.
        watched = monitor and not self._site.weighted
        self.monitor = KeptMassMonitor(name, monitor) if watched else None
        self._kernels = KernelStore(lane_of(device)) if kernels is None else kernels
        first = next((index for index in self._steps if not self._made.is_dense(index)), None)
        kernel = None if first is None else self._made.make(first, None)
        self._kernels.add(name, self._steps, Maker(self._made.make, self._made.retire))
        if first is not None and kernel is not None:
            self._kernels.put(name, first, kernel)
            self._note(first, kernel)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        timestep: float,
        scale: float,
        *,
        ordered: bool = False,
    ) -> Tensor:
        """Attention at a timestep: sparse where the plan has a step near it, else dense.

        Dense attention is the same for any order of tokens. So only kernels of patterns ask
        whether the operands are `ordered` as in the plan; if not, they are brought into its order.
        """
        step = self._plan.step_of(timestep)
        if step is None:
            mixed = math.isnan(timestep)
            self.calls[DENSE_MIXED if mixed else DENSE_OUTSIDE] += 1
            return dense_attention(q, k, v, scale)
        lengths = (q.shape[2], k.shape[2])
        if not self._serves(lengths):
            self.calls[DENSE_LENGTH] += 1
            return dense_attention(q, k, v, scale)
        variant = self._variant(lengths)
        kernel = self._kernels.get(self._name, step, variant)
        if kernel is None:
            self.calls[DENSE_FULL] += 1
            return dense_attention(q, k, v, scale)
        self.calls[kernel.kind] += 1
        if variant is None:
            self._note(self._steps[step], kernel)
        as_is = ordered or (variant is None and self._made.is_full(self._steps[step]))
        orders = [None if as_is else self._rearrangement(length) for length in lengths]
        out = attend_in_order(kernel, q, k, v, scale, (orders[0], orders[1]))
        self._kernels.launched(self._name)
        if self.monitor is not None and self.monitor.due():
            index = self._steps[step]
            self.monitor.sample(
                step,
                lambda: self._made.pattern(index, variant),
                q,
                k,
                scale,
                (orders[0], orders[1]),
            )
        return out

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
        # Weights are of blocks, which another text length may cut elsewhere; zones are drawn anew.
        fits = self._site.zones is not None or not self._site.weighted
        return fits and other_text(planned, lengths, math.prod(self._plan.grid))

    def _variant(self, lengths: tuple[int, int]) -> Hashable:
        """Return what distinguishes the kernel from that of the plan's own lengths, or None."""
        planned = (self._site.query_length, self._site.key_length)
        return None if self._plan.text_position is None or lengths == planned else lengths

    def _note(self, index: int, kernel: AttentionKernel) -> None:
        self._served[index] = _Served(kernel.kind, kernel.density, kernel.reason)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of kernel that serve the site, as far as they were made, without repetition."""
        kinds = [
            "sdpa" if self._made.is_dense(index) else self._served[index].kind
            for index in dict.fromkeys(self._steps)
            if self._made.is_dense(index) or index in self._served
        ]
        return tuple(dict.fromkeys(kinds))

    @property
    def reasons(self) -> Counter[str]:
        """Why another kernel than the one asked for serves, by number of patterns."""
        return Counter(
            served.reason for served in self._served.values() if served.reason is not None
        )

    @property
    def repairs(self) -> int:
        """Calls computed again because a fixed softmax reference overflowed; waits for the GPU."""
        kernels = self._kernels.held(self._name)
        return self._made.repaired + sum(getattr(kernel, "repairs", 0) for kernel in kernels)

    @property
    def computed_density(self) -> float:
        """Blocks that the kernels compute / all blocks, mean over steps.

        Patterns that have not served yet count with their own density.
        """
        densities = [
            self._served[index].density if index in self._served else self._site.density_at(step)
            for step, index in enumerate(self._steps)
        ]
        return sum(densities) / len(densities)


class _Served(NamedTuple):
    """What is known of a kernel after it is gone."""

    kind: str
    density: float
    reason: str | None


class RecordingSite:
    """Hands the operands of one attention call to a recorder."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self._name = name

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        timestep: float,
        scale: float,
        *,
        ordered: bool = False,
    ) -> Tensor:
        """Dense attention, observed by the recorder, which knows tokens in the model's order."""
        assert not ordered, "recording graphs are not permuted"
        return self._recorder.attend(self._name, q, k, v, timestep, scale)
