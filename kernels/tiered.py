"""Several kernels for one pattern, the best first: each serves until a better one is ready.

One that can't be launched never stops a video: whether the installed triton compiles a kernel, and
whether the GPU takes it, is known once it is launched. Then the next one serves, and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.common.zone_step import ZoneKernel, ZoneStep
from calibatt_compiler.kernels.protocol import AttentionKernel
from calibatt_compiler.logs import logger
from calibatt_compiler.plan.zones import ZonePattern

log = logger("kernels")
T = TypeVar("T")
K = TypeVar("K", bound=AttentionKernel | ZoneKernel)


class FirstLaunch:
    """Launches that may turn out to be impossible at the first of them.

    Args:
        what: what it means if they are, such as "no Hopper kernel: ".

    Attributes:
        reason: why they are impossible; None as long as they seem not to be.
    """

    def __init__(self, what: str = "") -> None:
        self.reason: str | None = None
        self._what = what
        self._launched = False

    def attempt(self, launch: Callable[[], T]) -> T | None:
        """Return what a launch gives, or None if it fails and none has gone well before.

        Raises:
            KernelError: the operands are wrong, which says nothing of the kernel.
            torch.OutOfMemoryError: nor does this.
            Exception: whatever is raised after one good launch.
        """
        try:
            found = launch()
        except (KernelError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self._launched:  # it is not about what is installed here
                raise
            words = " ".join(str(error).split())[:200]
            self.reason = f"{self._what}{type(error).__name__}: {words}"
            log.warning("%s; another kernel serves", self.reason)
            return None
        self._launched = True
        return found


class Tier(FirstLaunch, Generic[K]):
    """One of the kernels: not ready yet, ready, or failed.

    Args:
        make: makes the kernel, when it is first asked for; default: `make` of a subclass.
        what: what it means if it can't be launched.

    Attributes:
        reason: why it does not serve and never will; else None.
    """

    def __init__(self, make: Callable[[], K] | None = None, what: str = "") -> None:
        super().__init__(what)
        self._make = make
        self._kernel: K | None = None

    def kernel(self) -> K | None:
        """Return the kernel if it is ready."""
        if self.reason is not None:
            self._kernel = None
        elif self._kernel is None:
            self._kernel = self.make()
        return self._kernel

    def make(self) -> K | None:
        """Make the kernel; None: it is not ready yet, or there is a `reason` that it won't be."""
        assert self._make is not None
        return self._make()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the kernel is ready or has failed, seconds at most; return whether it is."""
        return self.kernel() is not None


class Tiers(Generic[K]):
    """What kernels of several tiers have in common: the first tier that is ready serves.

    Args:
        tiers: the best first; the last is always ready.
        reason: why a better kernel is not among them; None if there is none.

    Attributes:
        tiers: these.
    """

    def __init__(self, tiers: Sequence[Tier[K]], reason: str | None = None) -> None:
        self.tiers = tuple(tiers)
        self._reason = reason
        _ = self.serving  # what can't be made is known at once

    @property
    def serving(self) -> K:
        """What serves the next call."""
        return next(kernel for tier in self.tiers if (kernel := tier.kernel()) is not None)

    @property
    def kind(self) -> str:
        """What serves right now."""
        return self.serving.kind

    @property
    def density(self) -> float:
        """Blocks really computed / all blocks."""
        return self.serving.density

    @property
    def reason(self) -> str | None:
        """Why another kernel than the one asked for serves, and will go on to; else None."""
        serving = self.serving
        failed = (tier.reason for tier in self.tiers if tier.reason is not None)
        return next(failed, self._reason or serving.reason)

    @property
    def table_bytes(self) -> int:
        """Bytes of index tables that it takes."""
        return self.serving.table_bytes

    @property
    def repairs(self) -> int:
        """Calls computed again because a fixed softmax shift overflowed."""
        return self.serving.repairs

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the best kernel is ready or has failed; return whether it serves.

        Args:
            timeout: seconds to wait at most; default: until it is decided.
        """
        return self.tiers[0].wait(timeout)

    def _attend(self, call: Callable[[K], Tensor]) -> Tensor:
        """Call the best kernel that is ready and can be launched."""
        for tier in self.tiers[:-1]:
            kernel = tier.kernel()
            if kernel is not None:
                out = tier.attempt(partial(call, kernel))
                if out is not None:
                    return out
        last = self.tiers[-1].kernel()
        assert last is not None
        return call(last)


class TieredKernel(Tiers[AttentionKernel]):
    """Serves by the first tier that is ready; see `AttentionKernel`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        padding: KeyPadding | None = None,
    ) -> Tensor:
        """Attend; see `AttentionKernel`."""
        return self._attend(lambda kernel: kernel(q, k, v, scale=scale, padding=padding))


class TieredZones(Tiers[ZoneKernel]):
    """The same for zones; see `ZoneKernel`."""

    @property
    def pattern(self) -> ZonePattern:
        """The zones."""
        return self.serving.pattern

    def at(self, step: int) -> ZoneStep:
        """Return the kernel at a step, by whichever tier is ready when it is called."""
        return ZoneStep(self, step)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        step: int,
        scale: float | None = None,
        padding: KeyPadding | None = None,
    ) -> Tensor:
        """Attend; see `ZoneKernel`."""
        return self._attend(lambda kernel: kernel(q, k, v, step=step, scale=scale, padding=padding))
