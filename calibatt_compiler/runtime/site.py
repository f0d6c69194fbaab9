"""Sites at run time: one serves a plan, the other records for calibration."""

from __future__ import annotations

import math
from collections.abc import Hashable

from torch import Tensor

from calibatt_compiler.capture import Recorder
from calibatt_compiler.errors import PlanMismatchError
from calibatt_compiler.kernels.common.dense import dense_attention
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.gradients import attention_gradients, masked_gradients
from calibatt_compiler.kernels.request import KernelSettings, Padded
from calibatt_compiler.options import OnMismatch
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.text import other_text
from calibatt_compiler.runtime.device_queue import queue_of
from calibatt_compiler.runtime.kernel_cache import KernelCache, KernelFactory
from calibatt_compiler.runtime.monitor import KeptMassMonitor
from calibatt_compiler.runtime.sampler_watch import SamplerWatch
from calibatt_compiler.runtime.site_counts import SiteCounts
from calibatt_compiler.runtime.site_kernels import SiteKernelFactory
from calibatt_compiler.runtime.timestep import OTHER_TOKENS
from calibatt_compiler.runtime.token_order import Rearrangement, Rearrangements, attend_in_order

DENSE_OUTSIDE = "dense: timestep outside the plan's range"
DENSE_FOREIGN = "dense: no timestep so far is one of the plan's range"
DENSE_MIXED = "dense: samples of one batch at different timesteps"
DENSE_LENGTH = "dense: a sequence that is not the plan's video with text"
DENSE_TOKENS = "dense: tokens that are not laid out as the plan's"
DENSE_FULL = "dense: the plan keeps every block"
DENSE_MASKED = "dense: a mask that cuts more than padded keys"
DENSE_POOLED = "dense: pooled keys can't be told from padded ones"


class SparseSite:
    """Serves one attention call by the kernel of its step; counts what it serves.

    One kernel is made at once, so that what can't be served is known when the model is compiled;
    the others when they are needed.

    Args:
        plan: the plan.
        name: of the site.
        settings: what its kernels have in common.
        monitor: see `CompileOptions`.
        on_mismatch: see `CompileOptions`.
        watch: what remembers the timesteps of the graph; None: they are not compared.
        kernels: where the kernels of the graph are held; default: a cache of its own.

    Attributes:
        counts: what was served.
        calls: these by kind of kernel; dense calls by their reason, one of the `DENSE_` texts.
        monitor: what watches the attention mass kept; None if nothing does.

    Raises:
        KernelError: there is no kernel for this device, dtype and head dim.
    """

    def __init__(
        self,
        plan: Plan,
        name: str,
        settings: KernelSettings,
        *,
        monitor: int = 0,
        on_mismatch: OnMismatch = "dense",
        watch: SamplerWatch | None = None,
        kernels: KernelCache | None = None,
    ) -> None:
        self._plan = plan
        self._name = name
        self._site = plan.sites[name]
        self._steps = self._site.steps
        self._device = settings.device
        self._on_mismatch = on_mismatch
        self._watch = watch
        self._rearrangements = Rearrangements()
        self._made = SiteKernelFactory(plan, name, settings)
        # What a weighted sample keeps is no measure of how well it serves.
        watched = monitor and not self._site.weighted
        self.monitor = KeptMassMonitor(name, monitor) if watched else None
        self.counts = SiteCounts(self._site, self._made.dense, self.monitor)
        self.calls = self.counts.calls
        self._kernels = KernelCache(queue_of(settings.device)) if kernels is None else kernels
        sparse = (s for s, index in enumerate(self._steps) if index not in self._made.dense)
        first, held = next(sparse, None), self._made.held
        kernel = None if first is None else self._made.make(held[first], None)
        self._kernels.add(name, held, KernelFactory(self._made.make, self.counts.release))
        if first is not None and kernel is not None:
            self._kernels.insert(name, held[first], kernel)
            self.counts.note(self._steps[first], self._made.at(kernel, first))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        timestep: float,
        scale: float,
        *,
        ordered: bool = False,
        mask: KeyPadding | Tensor | None = None,
    ) -> Tensor:
        """Attention at a timestep: sparse where the plan has a step near it, else dense.

        Dense attention is the same for any order of tokens. So only kernels of patterns ask
        whether the operands are `ordered` the plan's way; if not, they are brought into its order.
        """
        lengths = (q.shape[2], k.shape[2])
        step = self._step(timestep, lengths, mask)
        if isinstance(step, str):
            self.calls[step] += 1
            return dense_attention(q, k, v, scale, mask)
        assert not isinstance(mask, Tensor)
        variant = self._variant(lengths)
        held = self._kernels.get(self._name, step, variant)
        if held is None:
            self.calls[DENSE_FULL] += 1
            return dense_attention(q, k, v, scale, mask)
        kernel = self._made.at(held, step)
        self.calls[kernel.kind] += 1
        if variant is None:
            self.counts.note(self._steps[step], kernel)
        as_is = ordered or (variant is None and self._made.is_full(self._steps[step]))
        orders = [None if as_is else self._rearrangement(length) for length in lengths]
        out = attend_in_order(kernel, q, k, v, scale, (orders[0], orders[1]), mask)
        self._kernels.record_use(self._name)
        if self.monitor is not None and self.monitor.due():
            index = self._steps[step]
            self.monitor.sample(
                step,
                lambda: self._made.pattern(index, variant),
                q,
                k,
                scale,
                (orders[0], orders[1]),
                mask,
            )
        return out

    def gradients(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        timestep: float,
        scale: float,
        *,
        ordered: bool = False,
        mask: KeyPadding | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Site`: over the plan's blocks, though a kernel may have covered a few more."""
        lengths = (q.shape[2], k.shape[2])
        step = self._step(timestep, lengths, mask)
        if isinstance(step, str) or self._made.is_full(self._steps[step]):
            return masked_gradients(grad, q, k, v, scale, mask)
        assert not isinstance(mask, Tensor)
        pattern = self._made.pattern(self._steps[step], self._variant(lengths))
        of_queries, of_keys = (
            None if ordered else self._rearrangement(length) for length in lengths
        )
        if of_queries is not None:
            grad, q = of_queries.apply(grad), of_queries.apply(q)
        if of_keys is not None:
            k, v = of_keys.apply(k), of_keys.apply(v)
            mask = None if mask is None else mask.ordered(of_keys.tokens)
        dq, dk, dv = attention_gradients(grad, q, k, v, pattern, scale, mask)
        dq = dq if of_queries is None else of_queries.undo(dq)
        return (dq, dk, dv) if of_keys is None else (dq, of_keys.undo(dk), of_keys.undo(dv))

    def _step(
        self, timestep: float, lengths: tuple[int, int], mask: KeyPadding | Tensor | None
    ) -> int | str:
        """Return the step whose pattern serves a call, or why it is dense.

        Raises:
            PlanMismatchError: if asked to, where tokens or sampler are not the plan's.
        """
        if timestep == OTHER_TOKENS:
            if self._on_mismatch == "error":
                frames, height, width = self._plan.grid
                raise PlanMismatchError(
                    f"the plan does not fit a call of {self._name}",
                    expected=f"the token layout of calibration, {frames} x {height} x {width}",
                    got=DENSE_TOKENS.removeprefix("dense: "),
                    remedy='calibrate for this size, or pass on_mismatch="dense" to run it dense',
                )
            return DENSE_TOKENS
        step = self._plan.step_of(timestep)
        if (reason := self._unserved(step, timestep)) is not None:
            return reason
        assert step is not None
        if isinstance(mask, Tensor):
            return DENSE_MASKED
        if mask is not None and self._site.size.pooled:
            return DENSE_POOLED
        return step if self._serves(lengths) else DENSE_LENGTH

    def _unserved(self, step: int | None, timestep: float) -> str | None:
        """Return why no step serves a timestep, None if one does.

        Raises:
            PlanMismatchError: if asked to, where no timestep so far is of the plan's range.
        """
        if math.isnan(timestep):
            return DENSE_MIXED
        reason = DENSE_OUTSIDE if step is None else None
        if self._watch is None:
            return reason
        self._watch.see(timestep)
        if self._watch.overlaps or (reason is None and self._watch.fits(timestep)):
            return reason
        if self._on_mismatch == "error":
            raise PlanMismatchError(
                "the plan does not fit the sampler",
                expected=self._watch.range(),
                got=self._watch.seen(),
                remedy="give each transformer of the pipeline its own plan (those of Wan 2.2 take "
                'turns), calibrate with this sampler, or pass on_mismatch="dense"',
            )
        return reason or DENSE_FOREIGN

    def _rearrangement(self, length: int) -> Rearrangement | None:
        return self._rearrangements.of(
            self._plan.token_order,
            self._plan.grid,
            length,
            text_first=self._plan.text_position == "first",
            device=self._device,
        )

    def _serves(self, lengths: tuple[int, int]) -> bool:
        planned = (self._site.query_length, self._site.key_length)
        if lengths == planned:
            return True
        if self._plan.text_position is None:
            return False
        # Weights are of blocks, which another text length may cut elsewhere; zones are drawn anew.
        fits = self._site.zones is not None or not self._site.weighted
        return fits and other_text(planned, lengths, math.prod(self._plan.grid))

    def _variant(self, lengths: tuple[int, int]) -> Hashable:
        """Return what distinguishes the kernel from that of the plan's own lengths, or None."""
        planned = (self._site.query_length, self._site.key_length)
        return None if self._plan.text_position is None or lengths == planned else lengths

    @property
    def repairs(self) -> int:
        """Calls computed again because a fixed softmax shift overflowed; waits for the GPU."""
        kernels = self._kernels.held(self._name)
        return self.counts.recomputed + sum(kernel.repairs for kernel in kernels)

    def release_kernels(self) -> None:
        """Free the tables of the whole graph; calls that come after all have them made again."""
        self._kernels.clear()


def expected_padding(plan: Plan) -> Padded:
    """Return where the masks of a plan's sites are expected to cut keys: where text ends."""
    return "tail" if plan.text_position == "last" else "any"


class DenseSite:
    """Dense attention, where the graph has our operator for other modules that it serves."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        timestep: float,
        scale: float,
        *,
        ordered: bool = False,
        mask: KeyPadding | Tensor | None = None,
    ) -> Tensor:
        """As in `Site`; the same for any order of tokens."""
        return dense_attention(q, k, v, scale, mask)

    def gradients(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        timestep: float,
        scale: float,
        *,
        ordered: bool = False,
        mask: KeyPadding | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in `Site`."""
        return masked_gradients(grad, q, k, v, scale, mask)


class RecordingSite(DenseSite):
    """Hands the operands of one attention call to a recorder; its gradients are not observed."""

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
        mask: KeyPadding | Tensor | None = None,
    ) -> Tensor:
        """Dense attention, observed by the recorder, which knows tokens in the model's order."""
        assert not ordered, "recording graphs are not permuted"
        if mask is None:
            return self._recorder.attend(self._name, q, k, v, timestep, scale)
        return self._recorder.attend(self._name, q, k, v, timestep, scale, mask=mask)
