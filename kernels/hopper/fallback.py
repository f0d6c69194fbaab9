"""The Hopper kernel with a portable one behind it, for where it turns out not to compile.

`hopper_capability` looks at names; whether the installed triton compiles the kernel is known once
it is launched. A kernel that can't be launched never stops a video.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from calibatt_compiler.errors import KernelError
from calibatt_compiler.kernels.protocol import AttentionKernel
from calibatt_compiler.logs import logger

log = logger("kernels")


def failure(error: Exception) -> str:
    """Why another kernel serves, from the error of the first launch."""
    words = " ".join(str(error).split())[:200]
    return f"no Hopper kernel: {type(error).__name__}: {words}"


class WithFallback:
    """Serves by one kernel; by another one from the first call on if that call fails.

    Args:
        kernel: the Hopper kernel.
        make_portable: makes the kernel that serves in its place.

    Attributes:
        kernel: what serves now.
    """

    def __init__(
        self, kernel: AttentionKernel, make_portable: Callable[[], AttentionKernel]
    ) -> None:
        self.kernel = kernel
        self._make_portable: Callable[[], AttentionKernel] | None = make_portable
        self._reason: str | None = None

    @property
    def kind(self) -> str:
        """What serves right now."""
        return self.kernel.kind

    @property
    def density(self) -> float:
        """Blocks really computed / all blocks."""
        return self.kernel.density

    @property
    def reason(self) -> str | None:
        """Why the Hopper kernel does not serve, or not as asked for; else None."""
        return self._reason or self.kernel.reason

    @property
    def table_bytes(self) -> int:
        """Bytes of tables of the kernel that serves now."""
        return self.kernel.table_bytes

    @property
    def repairs(self) -> int:
        """Calls computed again because a fixed softmax reference overflowed."""
        return int(getattr(self.kernel, "repairs", 0))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """Attend; see `AttentionKernel`."""
        try:
            out = self.kernel(q, k, v, scale=scale)
        except KernelError:
            raise
        except Exception as error:
            # After one good call an error is not about what is installed here.
            if self._make_portable is None:
                raise
            self._reason = failure(error)
            log.warning("%s; a portable kernel serves", self._reason)
            self.kernel, self._make_portable = self._make_portable(), None
            return self.kernel(q, k, v, scale=scale)
        self._make_portable = None
        return out
