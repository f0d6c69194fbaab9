"""One compiled model that serves any plan: for a search that tries many."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from calibatt_compiler.backend import recording_backend
from calibatt_compiler.calibration.observe.attach import DYNAMO
from calibatt_compiler.capture import CaptureInfo, Recorder
from calibatt_compiler.kernels.common.dense import dense_attention
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.request import KernelSettings
from calibatt_compiler.model.families import unwrap
from calibatt_compiler.plan import Plan
from calibatt_compiler.runtime.device_queue import queue_of
from calibatt_compiler.runtime.kernel_cache import TABLE_BUDGET, KernelCache
from calibatt_compiler.runtime.site import SparseSite, expected_padding

BUDGET = 4 * TABLE_BUDGET
"""Bytes of tables to hold of one plan: when steps are timed, a few far apart come again and again,
and making their tables anew would be timed too."""


class PlanServer(Recorder):
    """Serves a plan that can be exchanged; implements `calibatt_compiler.capture.Recorder`.

    The model is compiled as for a recording: every attention call asks here what to compute. So
    neither Dynamo nor Inductor sees which plan it is, and one compilation serves all. Kernels read
    the plan from tables; the generated ones of the lowering `baked` would be compiled anew.
    """

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._sites: dict[tuple[str, str, torch.device, torch.dtype, bool], SparseSite] = {}
        self._caches: dict[tuple[str, torch.device, bool], KernelCache] = {}

    def use(self, plan: Plan | None) -> None:
        """Serve another plan from now on; None: all attention dense, by the stock kernel."""
        self._plan = plan

    def forget(self) -> None:
        """Free the tables of all plans that were served."""
        self._sites.clear()
        self._caches.clear()

    def on_capture(self, capture: CaptureInfo) -> None:
        """Nothing to note: each call is looked at when it comes."""

    def attend(
        self,
        site: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        timestep: float,
        scale: float,
        mask: KeyPadding | Tensor | None = None,
    ) -> Tensor:
        """Attention by the plan, dense where it has no such site or the lengths are others.

        Shapes: see `calibatt_compiler.capture.Recorder`.
        """
        plan = self._plan
        if plan is None or not _fits(plan, site, q, k):
            return dense_attention(q, k, v, scale, mask)
        key = (plan.digest, site, q.device, q.dtype, mask is not None)
        if key not in self._sites:
            self._sites[key] = SparseSite(
                plan,
                site,
                KernelSettings(
                    device=q.device,
                    dtype=q.dtype,
                    head_dim=q.shape[3],
                    lowering="table",
                    padded="" if mask is None else expected_padding(plan),
                ),
                kernels=self._cache(plan, q.device, mask is not None),
            )
        return self._sites[key].attend(q, k, v, timestep, scale, mask=mask)

    def _cache(self, plan: Plan, device: torch.device, padded: bool) -> KernelCache:
        """Sites are added as the first forward pass calls them: in the order of the graph."""
        key = (plan.digest, device, padded)
        if key not in self._caches:
            self._caches[key] = KernelCache(queue_of(device), budget=BUDGET)
        return self._caches[key]


def _fits(plan: Plan, site: str, q: Tensor, k: Tensor) -> bool:
    planned = plan.sites.get(site)
    if planned is None or planned.heads != q.shape[1]:
        return False
    lengths = (planned.query_length, planned.key_length)
    return plan.text_position is not None or lengths == (q.shape[2], k.shape[2])


@contextmanager
def served(pipe: Any, component: str, server: PlanServer, *, inductor: bool) -> Iterator[nn.Module]:
    """Let a pipeline call its transformer compiled for a server; put it back at the end.

    Args:
        pipe: the pipeline.
        component: which module of it.
        server: asked at every attention call.
        inductor: compile what is around attention.

    Yields:
        The compiled module.
    """
    held = getattr(pipe, component)
    isolated = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    extra: dict[str, Any] = {"isolate_recompiles": True} if isolated else {}
    model = unwrap(held)
    backend = recording_backend(server, inductor=inductor, model=model)
    compiled = cast(nn.Module, torch.compile(model, backend=backend, dynamic=False, **extra))
    setattr(pipe, component, compiled)
    try:
        with torch._dynamo.config.patch(DYNAMO), torch.no_grad():
            yield compiled
    finally:
        setattr(pipe, component, held)
