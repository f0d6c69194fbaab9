"""Attention by a kernel generated from the pattern: the key blocks are literals in its source.

Covering and compiling take seconds, so they happen in the background, and the table kernel serves
until then. Both take the same tiles in the same order with the same arithmetic, so the switch
changes no bit of the output: in the background only covers that add nothing are made. One that adds
a few blocks is taken where `calibatt build` has made it before.
"""

from __future__ import annotations

from concurrent.futures import CancelledError, Future, TimeoutError
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.baked.cache import (
    CacheEntry,
    find_entry,
    get_entry,
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
from calibatt_compiler.kernels.baked.cover import EXACT, WIDENED, CoverLimits
from calibatt_compiler.kernels.common.operands import (
    check_operands,
    check_specialisation,
    empty_output,
)
from calibatt_compiler.kernels.hopper.launch import HopperConfig
from calibatt_compiler.kernels.portable.attention import TableAttention
from calibatt_compiler.kernels.portable.launch import (
    DeviceKernel,
    aligned,
    call_arguments,
    grid,
    key_sources,
    on_device,
)
from calibatt_compiler.kernels.protocol import AttentionKernel
from calibatt_compiler.kernels.request import KernelRequest, Target
from calibatt_compiler.kernels.tiered import Tier, TieredKernel
from calibatt_compiler.logs import logger
from calibatt_compiler.plan.pattern import BlockPattern

if TYPE_CHECKING:
    from calibatt_compiler.kernels.hopper.attention import HopperAttention

log = logger("kernels")


def baked_attention(
    request: KernelRequest[BlockPattern],
    target: Target = "portable",
    *,
    limits: CoverLimits | None = None,
    compiler: KernelCompiler | None = None,
    reason: str | None = None,
) -> TieredKernel:
    """Return block-sparse attention by a generated kernel, by tables until that is compiled.

    Arguments: see `BakedTier` and `TieredKernel`.
    """
    baked = BakedTier(request, target, limits=limits, compiler=compiler)
    return TieredKernel([baked, Tier(lambda: baked.table)], reason)


class BakedTier(Tier[AttentionKernel]):
    """A generated kernel, which is being compiled.

    Args:
        request: what to serve, without weights and pooled keys; on a CPU, under the Triton
            interpreter, where nothing is compiled.
        target: whose kernels and tables to take.
        limits: make a cover within these now, and its kernel in the background. Default: take what
            `calibatt build` has made, else have a kernel of the exact mask made.
        compiler: who compiles; default the process's own.

    Attributes:
        pattern: what is really attended: the covered mask.
        added_density: blocks that the cover adds / all blocks.
        table: serves the same pattern by tables.

    Raises:
        KernelError: dtype or head dim that the table kernel does not take.
    """

    def __init__(
        self,
        request: KernelRequest[BlockPattern],
        target: Target = "portable",
        *,
        limits: CoverLimits | None = None,
        compiler: KernelCompiler | None = None,
    ) -> None:
        super().__init__()
        self.pattern = pattern = request.pattern
        assert not pattern.weighted, "generated source has no weights"
        assert not pattern.pooled, "generated source has no pooled keys"
        self.added_density = 0.0
        self._target: Target = target
        self._future: Future[CompiledSource] | None = None
        self._entry: CacheEntry | None = None
        on_cpu = request.device.type == "cpu"
        if on_cpu and limits is None:
            limits = WIDENED  # interpreted: there is nothing to wait for
        self._limits = limits or EXACT
        entry: CacheEntry | None = None
        try:
            entry = get_entry(pattern, limits, target) if limits else self._built(pattern)
        except (KernelError, OSError) as error:
            self.reason = getattr(error, "problem", str(error))
        if entry is not None:
            self._take(entry)
        covered = replace(request, pattern=self.pattern)
        self.table: TableAttention | HopperAttention
        if target == "hopper":
            from calibatt_compiler.kernels.hopper.attention import HopperAttention

            self.table = HopperAttention(covered)
        else:
            self.table = TableAttention(covered)
        if self.reason is not None:
            log.info("the table kernel serves pattern %s: %s", pattern.digest[:12], self.reason)
        elif entry is None or not (on_cpu or self._compiled(entry)):
            spec = KernelSpec(
                pattern, request.dtype, request.head_dim, self.table.arch, self._limits, target,
                request.softmax,
            )  # fmt: skip
            self._future = (compiler or shared_compiler()).submit(spec)

    def _built(self, pattern: BlockPattern) -> CacheEntry | None:
        """Return the entry that lies in the cache, of `calibatt build` first; None without one.

        Raises:
            CoverError: there is none, for the mask takes too many literals.
        """
        built = find_entry(pattern, WIDENED, self._target)
        if built is not None:
            self._limits = WIDENED
            return built
        return find_entry(pattern, EXACT, self._target)

    def _take(self, entry: CacheEntry) -> None:
        self._entry, self.added_density = entry, entry.covering.added_density
        self.pattern = entry.covering.pattern

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

    def _compiled(self, entry: CacheEntry) -> bool:
        """Whether all kernels that a call takes are compiled."""
        config = self.table.config
        if isinstance(config, HopperConfig):
            names = [config.variant_name(repair=repair) for repair in config.repairs]
        else:
            configs = [config, config.repair()] if config.softmax == "fixed" else [config]
            dtype = self.table.request.dtype
            names = [variant_name(each, arch=self.table.arch, dtype=dtype) for each in configs]
        return all(is_compiled(entry, name) for name in names)

    def make(self) -> AttentionKernel | None:
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
        try:
            if self._entry is None:
                self._take(get_entry(self.pattern, self._limits, self._target))
            assert self._entry is not None
            if isinstance(self.table, TableAttention):
                return _GeneratedKernel(self._entry, self.table)
            from calibatt_compiler.kernels.baked.hopper_literals import HopperLiterals

            return HopperLiterals(self._entry, self.table)
        except Exception as error:
            self.reason = f"{type(error).__name__}: {error}"
            log.warning("a generated kernel can't be loaded: %s", self.reason)
            return None


class _GeneratedKernel(DeviceKernel):
    """A launch of one generated kernel; where its fixed shift overflows, the table recomputes."""

    kind = "triton-baked"

    def __init__(self, entry: CacheEntry, table: TableAttention) -> None:
        super().__init__(table.request)
        self.table = table
        self.density = table.density
        self.kernel = load_kernel(entry)

    @property
    def table_bytes(self) -> int:
        """Those of the table kernel, which recomputes."""
        return self.table.table_bytes

    @property
    def repairs(self) -> int:
        """Counted by the table kernel, which recomputes."""
        return self.table.repairs

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Attend; see `TableAttention`, whose bits this gives."""
        pattern, config = self.pattern, self.config
        check_operands(pattern, q, k, v)
        check_specialisation(q, self.request)
        q, k, v = (aligned(tensor, config) for tensor in (q, k, v))
        out = empty_output(q)
        q, arguments = call_arguments(q, k, v, out, scale, config)
        with on_device(q):
            flag = self.flag()
            self.kernel[grid(pattern, config, q.shape[0])](
                q,
                *key_sources(k, v, config),
                out,
                flag,
                **self._tables(),
                **arguments,
                **config.constexprs,
                **config.options,
            )
            if flag is not None:
                self.table.repair((q, k, v, out), flag, arguments)
        return out

    def _tables(self) -> dict[str, Tensor]:
        """Tables of copied rows; the rest is in the source."""
        copies = self.table.copies
        if copies is None:
            return {}
        return {"computed_ptr": copies.shared.computed, "targets_ptr": copies.shared.targets}
