"""Attention by a kernel generated from the pattern: the key blocks are literals in its source.

Covering and compiling take seconds, so they happen in the background, and the table kernel serves
until then. Both take the same tiles in the same order with the same arithmetic, so the switch
changes no bit of the output: in the background only covers that add nothing are made. One that adds
a few blocks is taken where `calibatt build` has made it before.
"""

from __future__ import annotations

from concurrent.futures import CancelledError, Future, TimeoutError
from typing import Any, Protocol

import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.baked.cache import (
    CacheEntry,
    Target,
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
from calibatt_compiler.kernels.common.operands import check_operands, empty_output
from calibatt_compiler.kernels.common.row_copies import DeviceCopies
from calibatt_compiler.kernels.hopper.launch import HopperConfig
from calibatt_compiler.kernels.portable.attention import TableAttention
from calibatt_compiler.kernels.portable.launch import (
    DeviceKernel,
    LaunchConfig,
    Softmax,
    aligned,
    call_arguments,
    grid,
    key_sources,
    on_device,
)
from calibatt_compiler.logs import logger
from calibatt_compiler.plan.pattern import BlockPattern

log = logger("kernels")


class _Table(Protocol):
    """The kernel that serves until the generated one does."""

    arch: int

    @property
    def config(self) -> LaunchConfig | HopperConfig:
        """What it is specialised on."""

    @property
    def table_bytes(self) -> int: ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Attend."""


class _Generated(Protocol):
    """A generated kernel, and whether it has been launched."""

    launched: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Attend."""


class BakedAttention:
    """Block-sparse attention by a generated kernel; by the table kernel until that is compiled.

    Args:
        pattern: which blocks to attend.
        device: "cuda", or "cpu" under the Triton interpreter, where nothing is compiled.
        dtype: of q, k and v.
        head_dim: elements a head.
        limits: make a cover within these now, and its kernel in the background. Default: take what
            `calibatt build` has made, else have a kernel of the exact mask made.
        compiler: who compiles; default the process's own.
        hopper: take the Hopper kernel and its tables instead of the portable ones.
        softmax: as in `CompileOptions`; "fixed" insists on a fixed reference.

    Attributes:
        pattern: what is really attended: the covered mask.
        added_density: blocks that the cover adds / all blocks.
        reason: why no baked kernel serves and none will, or None.

    Raises:
        KernelError: dtype or head dim that no portable kernel takes.
    """

    def __init__(
        self,
        pattern: BlockPattern,
        *,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        limits: CoverLimits | None = None,
        compiler: KernelCompiler | None = None,
        hopper: bool = False,
        softmax: Softmax = "auto",
    ) -> None:
        self.pattern = pattern
        self.added_density = 0.0
        self.reason: str | None = None
        self._baked: _Generated | None = None
        self._target: Target = "hopper" if hopper else "portable"
        self._future: Future[CompiledSource] | None = None
        self._entry: CacheEntry | None = None
        where: dict[str, Any] = {"device": device, "dtype": dtype, "head_dim": head_dim}
        where["softmax"] = softmax
        if device.type == "cpu" and limits is None:
            limits = WIDENED  # interpreted: there is nothing to wait for
        self._limits = limits or EXACT
        entry: CacheEntry | None = None
        try:
            if pattern.weights is not None or pattern.pooled:
                raise KernelError("generated source has no weights and no pooled keys yet")
            entry = get_entry(pattern, limits, self._target) if limits else self._built(pattern)
        except (KernelError, OSError) as error:
            self.reason = getattr(error, "problem", str(error))
        if entry is not None:
            self._take(entry)
        self.table: _Table = self._make_table(where)
        if self.reason is not None:
            log.info("the table kernel serves pattern %s: %s", pattern.digest[:12], self.reason)
            return
        self._where = where
        if entry is not None and (device.type == "cpu" or self._compiled(entry, dtype)):
            self._switch()
        else:
            arch = self.table.arch
            spec = KernelSpec(pattern, dtype, head_dim, arch, self._limits, self._target, softmax)
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

    @property
    def kind(self) -> str:
        """ "triton-baked", or "triton-table" while that serves; on request, "hopper-" either."""
        family = "hopper" if self._target == "hopper" else "triton"
        return f"{family}-baked" if self.ready() else f"{family}-table"

    @property
    def density(self) -> float:
        """Blocks computed / all blocks, of either kernel."""
        return self.pattern.density

    @property
    def repairs(self) -> int:
        """Calls computed again because a fixed softmax reference overflowed."""
        kernels = (self.table, self._baked)
        return sum(getattr(kernel, "repairs", 0) for kernel in kernels)

    @property
    def table_bytes(self) -> int:
        """What the table kernel holds, which serves until the baked one does, or if it can't."""
        return self.table.table_bytes

    def ready(self) -> bool:
        """Whether the baked kernel serves the next call."""
        if self._baked is None and self._future is not None and self._future.done():
            future, self._future = self._future, None
            error = None if future.cancelled() else future.exception()
            if future.cancelled() or error is not None:
                self.reason = getattr(error, "problem", str(error))
                if future.cancelled():
                    self.reason = "compiling was cancelled"
            else:
                self._switch()
        return self._baked is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the baked kernel is compiled, or has failed; return whether it serves.

        Args:
            timeout: seconds to wait at most; default: until it is decided.
        """
        future = self._future
        if future is not None:
            try:
                future.exception(timeout)
            except TimeoutError:
                return False
            except CancelledError:
                pass  # `ready` keeps the reason
        return self.ready()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Attend; see `TableAttention`, whose bits this gives."""
        if self.ready():
            assert self._baked is not None
            try:
                return self._baked(q, k, v, scale=scale)
            except KernelError:
                raise
            except Exception as error:
                # Such as a GPU with less shared memory than its generation: never stop a video.
                if self._baked.launched:
                    raise
                self.reason, self._baked = f"{type(error).__name__}: {error}", None
                log.warning("a baked kernel can't be launched: %s", self.reason)
        return self.table(q, k, v, scale=scale)

    def _make_table(self, where: dict[str, Any]) -> _Table:
        if self._target == "hopper":
            from calibatt_compiler.kernels.hopper.attention import HopperAttention

            return HopperAttention(self.pattern, **where)
        return TableAttention(self.pattern, **where)

    def _compiled(self, entry: CacheEntry, dtype: torch.dtype) -> bool:
        """Whether all kernels that a call takes are compiled."""
        config = self.table.config
        if isinstance(config, HopperConfig):
            names = [config.variant_name(repair=repair) for repair in config.repairs]
        else:
            configs = [config, config.repair()] if config.softmax == "fixed" else [config]
            names = [variant_name(each, arch=self.table.arch, dtype=dtype) for each in configs]
        return all(is_compiled(entry, name) for name in names)

    def _switch(self) -> None:
        try:
            if self._entry is None:
                self._take(get_entry(self.pattern, self._limits, self._target))
            assert self._entry is not None
            if self._target == "hopper":
                from calibatt_compiler.kernels.baked.hopper_literals import HopperLiterals
                from calibatt_compiler.kernels.hopper.attention import HopperAttention

                assert isinstance(self.table, HopperAttention)
                self._baked = HopperLiterals(self._entry, self.table, **self._where)
            else:
                table: Any = self.table
                self._baked = _GeneratedKernel(self._entry, self.pattern, table, **self._where)
        except Exception as error:
            self.reason = f"{type(error).__name__}: {error}"
            log.warning("a generated kernel can't be loaded: %s", self.reason)


class _GeneratedKernel(DeviceKernel):
    """A launch of one generated kernel; where its fixed reference overflows, the table repairs."""

    def __init__(
        self, entry: CacheEntry, pattern: BlockPattern, table: TableAttention, **where: Any
    ) -> None:
        super().__init__(pattern, **where)
        self.table = table
        self.kernel = load_kernel(entry)
        self.copies = DeviceCopies.upload(pattern, self.device)
        self.launched = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        pattern, config = self.pattern, self.config
        check_operands(pattern, q, k, v)
        self.check_specialisation(q)
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
        self.launched = True
        return out

    def _tables(self) -> dict[str, Tensor]:
        """Tables of copied rows; the rest is in the source."""
        if self.copies is None:
            return {}
        shared = self.copies.shared
        return {"computed_ptr": shared.computed, "targets_ptr": shared.targets}
