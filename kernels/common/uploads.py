"""Tables on their way to a GPU: copied without waiting, and waited for by whoever reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy a table; to a GPU from pinned memory on the current stream, without waiting."""
    host = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


class Uploaded:
    """A place on the current stream, behind copies to a device.

    Tables are shared: another thread may find them, and launch on another stream, before the copies
    are done.

    Args:
        device: where they go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Let the current stream wait for it."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)
