"""Attention by octave zones with the runs as literals of generated source.

One kernel serves all steps of a step group. It is compiled in the background, and the table form of
the same runs serves until then: both give the same bits.
"""

from __future__ import annotations

from concurrent.futures import CancelledError, Future, TimeoutError
from typing import TYPE_CHECKING

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.baked.cache import (
    SourceEntry,
    is_compiled,
    load_kernel,
    variant_name,
)
from calibatt_compiler.kernels.baked.compiler import (
    CompiledSource,
    KernelCompiler,
    KernelSpec,
    shared_compiler,
)
from calibatt_compiler.kernels.baked.zone_entries import get_zone_entry
from calibatt_compiler.kernels.common.zone_step import ZoneKernel
from calibatt_compiler.kernels.portable.zones import ZoneAttention
from calibatt_compiler.kernels.request import KernelRequest, Target
from calibatt_compiler.kernels.tiered import Tier, TieredZones
from calibatt_compiler.logs import logger
from calibatt_compiler.plan.zones import ZonePattern

if TYPE_CHECKING:
    from calibatt_compiler.kernels.hopper.zones import HopperZones

log = logger("kernels")


def baked_zones(
    request: KernelRequest[ZonePattern],
    target: Target = "portable",
    *,
    compiler: KernelCompiler | None = None,
    reason: str | None = None,
) -> TieredZones:
    """Return attention by zones with literals, by tables until that is compiled.

    Arguments: see `ZoneTier` and `TieredZones`.
    """
    baked = ZoneTier(request, target, compiler=compiler)
    return TieredZones([baked, Tier(lambda: baked.table)], reason)


class ZoneTier(Tier[ZoneKernel]):
    """A kernel of zones with literals, which is being compiled.

    Args:
        request: what to serve, on a GPU.
        target: whose kernels to take.
        compiler: who compiles; default the process's own.

    Attributes:
        table: serves the same zones by tables.

    Raises:
        KernelError: dtype, head dim or number of blocks that the kernel does not take.
    """

    def __init__(
        self,
        request: KernelRequest[ZonePattern],
        target: Target = "portable",
        *,
        compiler: KernelCompiler | None = None,
    ) -> None:
        super().__init__()
        self.table: HopperZones | ZoneAttention
        if target == "hopper":
            from calibatt_compiler.kernels.hopper.zones import HopperZones

            self.table = HopperZones(request)
        else:
            self.table = ZoneAttention(request)
        self._entry: SourceEntry | None = None
        self._future: Future[CompiledSource] | None = None
        try:
            self._entry = get_zone_entry(request.pattern, target)
        except (KernelError, OSError) as error:
            self.reason = getattr(error, "problem", str(error))
            log.info("tables serve zones %s: %s", request.pattern.digest[:12], self.reason)
            return
        if not self._compiled(self._entry):
            spec = KernelSpec(
                request.pattern, request.dtype, request.head_dim, self.table.arch, target=target,
                softmax=request.softmax,
            )  # fmt: skip
            self._future = (compiler or shared_compiler()).submit(spec)

    def _compiled(self, entry: SourceEntry) -> bool:
        """Whether all kernels that a call takes are compiled."""
        if isinstance(self.table, ZoneAttention):
            config, dtype = self.table.config, self.table.request.dtype
            configs = [config, config.repair()] if config.softmax == "fixed" else [config]
            names = [variant_name(each, arch=self.table.arch, dtype=dtype) for each in configs]
        else:
            hopper = self.table.config
            names = [hopper.variant_name(repair=repair) for repair in hopper.repairs]
        return all(is_compiled(entry, name) for name in names)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the kernel is compiled, or has failed; see `Tier.wait`."""
        if self._future is not None:
            try:
                self._future.exception(timeout)
            except TimeoutError:
                return False
            except CancelledError:
                pass  # `make` keeps the reason
        return self.kernel() is not None

    def make(self) -> ZoneKernel | None:
        """Return the kernel if it is compiled; keep the reason if it can't be."""
        if self._future is not None:
            if not self._future.done():
                return None
            future, self._future = self._future, None
            if future.cancelled():
                self.reason = "compiling was cancelled"
                return None
            error = future.exception()
            if error is not None:
                self.reason = getattr(error, "problem", str(error))
                return None
        assert self._entry is not None
        try:
            return self.table.with_literals(load_kernel(self._entry))
        except Exception as error:
            self.reason = f"{type(error).__name__}: {error}"
            log.warning("a generated kernel can't be loaded: %s", self.reason)
            return None
