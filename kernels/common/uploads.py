"""Tables on a GPU: copied without waiting, waited for by who reads them, shared while in use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

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


class DeviceTables(Protocol):
    """What `DeviceTableCache` holds."""

    @property
    def uploaded(self) -> Uploaded:
        """Behind their copies."""


Tables = TypeVar("Tables", bound=DeviceTables)


class DeviceTableCache(Generic[Tables]):
    """Tables shared by all who need equal ones, for as long as one of them holds them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tables: WeakValueDictionary[Hashable, Tables] = WeakValueDictionary()

    def get(self, key: Hashable, make: Callable[[], Tables]) -> Tables:
        """Return the tables of a key, which are made if nobody holds them.

        The current stream waits for them: another thread may have copied them on another one.
        """
        with self._lock:
            found = self._tables.get(key)
        if found is None:
            made = make()
            with self._lock:
                found = self._tables.setdefault(key, made)
        found.uploaded.wait()
        return found
