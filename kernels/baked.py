"""Attention by a kernel generated from the pattern: the key blocks are literals in its source.

Compiling takes seconds, so it happens in the background; until then the table kernel serves the
same covered pattern. Both take the same tiles in the same order with the same arithmetic, so the
switch changes no bit of the output.
"""

from __future__ import annotations

import logging
from concurrent.futures import CancelledError, Future, TimeoutError
from typing import Any, Protocol

import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.cache import (
    CacheEntry,
    Target,
    get_entry,
    is_compiled,
    load_kernel,
    variant_name,
)
from calibatt_compiler.kernels.compiler import (
    CompiledSource,
    KernelCompiler,
    KernelSpec,
    shared_compiler,
)
from calibatt_compiler.kernels.cover import LITERAL_BUDGET, MAX_INTERVALS
from calibatt_compiler.kernels.hopper_launch import HopperConfig
from calibatt_compiler.kernels.operands import check_operands, empty_output
from calibatt_compiler.kernels.triton_launch import (
    DeviceKernel,
    LaunchConfig,
    aligned,
    call_arguments,
    grid,
    on_device,
)
from calibatt_compiler.kernels.triton_table import TableAttention
from calibatt_compiler.plan.pattern import BlockPattern

log = logging.getLogger("calibatt")

MAX_ADDED_DENSITY = 0.05
"""Above it a cover costs more time than literals can win back: the table serves the exact mask."""


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
        literal_budget: literals the source may hold; a mask that needs more is covered.
        max_intervals: intervals a row may have; likewise.
        max_added_density: where a cover would add more, the table kernel serves the exact mask.
        compiler: who compiles; default the process's own.
        hopper: take the Hopper kernel and its tables instead of the portable ones.

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
        literal_budget: int = LITERAL_BUDGET,
        max_intervals: int = MAX_INTERVALS,
        max_added_density: float = MAX_ADDED_DENSITY,
        compiler: KernelCompiler | None = None,
        hopper: bool = False,
    ) -> None:
        self.pattern = pattern
        self.added_density = 0.0
        self.reason: str | None = None
        self._baked: _Generated | None = None
        self._target: Target = "hopper" if hopper else "portable"
        self._future: Future[CompiledSource] | None = None
        self._entry: CacheEntry | None = None
        where: dict[str, Any] = {"device": device, "dtype": dtype, "head_dim": head_dim}
        try:
            if pattern.weights is not None or pattern.pooled:
                raise KernelError("generated source has no weights and no pooled keys yet")
            entry = get_entry(
                pattern,
                literal_budget=literal_budget,
                max_intervals=max_intervals,
                target=self._target,
            )
            added = entry.covering.added_density
            if added > max_added_density:
                self.reason = (
                    f"{literal_budget} literals cover the mask only with {added:.3f} more density"
                )
            else:
                self._entry, self.added_density = entry, added
                self.pattern = entry.covering.pattern
        except (KernelError, OSError) as error:
            self.reason = str(error)
        self.table: _Table = self._make_table(where)
        if self._entry is None:
            log.info("the table kernel serves pattern %s: %s", pattern.digest[:12], self.reason)
            return
        self._where = where
        compiled = all(is_compiled(self._entry, variant) for variant in self._variants(dtype))
        if device.type == "cpu" or compiled:
            self._switch()
        else:
            limits = (literal_budget, max_intervals)
            arch = self.table.arch
            spec = KernelSpec(pattern, dtype, head_dim, arch, *limits, self._target)
            self._future = (compiler or shared_compiler()).submit(spec)

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
        """Calls computed again because a fixed softmax reference overflowed (Hopper only)."""
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
                self.reason = str(error) if error is not None else "compiling was cancelled"
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
            from calibatt_compiler.kernels.hopper import HopperAttention

            return HopperAttention(self.pattern, **where)
        return TableAttention(self.pattern, **where)

    def _variants(self, dtype: torch.dtype) -> list[str]:
        """Names of the compiled kernels that a call takes."""
        config = self.table.config
        if isinstance(config, HopperConfig):
            return [config.variant_name(repair=repair) for repair in config.repairs]
        return [variant_name(config, arch=self.table.arch, dtype=dtype)]

    def _switch(self) -> None:
        assert self._entry is not None
        try:
            if self._target == "hopper":
                from calibatt_compiler.kernels.hopper import HopperLiterals

                self._baked = HopperLiterals(self._entry, self.pattern, **self._where)
            else:
                self._baked = _GeneratedKernel(self._entry, self.pattern, **self._where)
        except Exception as error:
            self.reason = f"{type(error).__name__}: {error}"
            log.warning("a generated kernel can't be loaded: %s", self.reason)


class _GeneratedKernel(DeviceKernel):
    """A launch of one generated kernel."""

    def __init__(self, entry: CacheEntry, pattern: BlockPattern, **where: Any) -> None:
        super().__init__(pattern, **where)
        self.kernel = load_kernel(entry)
        self.launched = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        pattern, config = self.pattern, self.config
        check_operands(pattern, q, k, v)
        self.check_specialisation(q)
        q, k, v = (aligned(tensor, config) for tensor in (q, k, v))
        out = empty_output(q)
        q, arguments = call_arguments(q, k, v, out, scale, config)
        with on_device(q):
            self.kernel[grid(pattern, config, q.shape[0])](
                q, k, v, out, **arguments, **config.constexprs, **config.options
            )
        self.launched = True
        return out
