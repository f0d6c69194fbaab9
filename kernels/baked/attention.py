"""Attention by a kernel generated from the pattern: the key blocks are literals in its source.

Compiling takes seconds, so it happens in the background, and the table kernel serves until then.
Both are one kernel with another source of indices, so the switch changes no bit of the output.
"""

from __future__ import annotations

from concurrent.futures import CancelledError, Future, TimeoutError
from typing import TYPE_CHECKING, Any

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
from calibatt_compiler.kernels.baked.cover import EXACT, CoverLimits
from calibatt_compiler.kernels.hopper.launch import HopperConfig
from calibatt_compiler.kernels.portable.attention import TableAttention
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
        limits: generate source within these now, and its kernel in the background. Default: take
            what lies in the cache, else have it made in the background.
        compiler: who compiles; default the process's own.

    Attributes:
        pattern: what is attended.
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
        self._target: Target = target
        self._future: Future[CompiledSource] | None = None
        on_cpu = request.device.type == "cpu"
        if on_cpu and limits is None:
            limits = EXACT  # interpreted: there is nothing to wait for
        self._limits = limits or EXACT
        entry: CacheEntry | None = None
        try:
            find = find_entry if limits is None else get_entry
            entry = find(pattern, self._limits, target)
        except (KernelError, OSError) as error:
            self.reason = getattr(error, "problem", str(error))
        self._entry = entry
        self.table: TableAttention | HopperAttention
        if target == "hopper":
            from calibatt_compiler.kernels.hopper.attention import HopperAttention

            self.table = HopperAttention(request)
        else:
            self.table = TableAttention(request)
        if self.reason is not None:
            log.info("the table kernel serves pattern %s: %s", pattern.digest[:12], self.reason)
        elif entry is None or not (on_cpu or self._compiled(entry)):
            spec = KernelSpec(
                pattern, request.dtype, request.head_dim, self.table.arch, self._limits, target,
                request.softmax,
            )  # fmt: skip
            self._future = (compiler or shared_compiler()).submit(spec)

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
                self._entry = get_entry(self.pattern, self._limits, self._target)
            if isinstance(self.table, TableAttention):
                return TableLiterals(self._entry, self.table)
            from calibatt_compiler.kernels.baked.hopper_literals import HopperLiterals

            return HopperLiterals(self._entry, self.table)
        except Exception as error:
            self.reason = f"{type(error).__name__}: {error}"
            log.warning("a generated kernel can't be loaded: %s", self.reason)
            return None


class TableLiterals(TableAttention):
    """The table kernel with key blocks as literals in generated source; gives the same bits.

    Where its fixed shift overflows, the table recomputes.

    Args:
        entry: of the kernel cache, with target "portable".
        table: the kernel of the same pattern that served until this one was compiled.

    Attributes:
        kind: "triton-baked".
    """

    kind = "triton-baked"

    def __init__(self, entry: CacheEntry, table: TableAttention) -> None:
        self._literals = load_kernel(entry)
        self._intervals = entry.cover.max_intervals
        super().__init__(table.request)
        self._repairs = table._repairs  # what recomputes, counts

    def _indices(self) -> dict[str, Any]:
        return {"LITERALS": self._literals, "RUNS": self._intervals}
