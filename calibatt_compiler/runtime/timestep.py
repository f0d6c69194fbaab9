"""The timestep's way to the host: sent when a forward pass begins, read at its first site.

A site's kernel is chosen on the host, by the value of a tensor on the device. To read it at once
would leave the device idle until the host has queued its next work. So it is copied behind what is
queued, and the host waits for it at the first site only: what lies before that is queued by then.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_pending: dict[int, torch.cuda.Event] = {}
# Copies under way: the event behind each, by the address that it goes to. What is done is forgotten
# at the next one.


def send(timestep: Tensor) -> Tensor:
    """Return float64 (2) on the CPU: will hold the diffusion timestep, see `read`, and one more.

    A timestep per token (the conditioning frames at zero) stands for its greatest value. Samples
    of one batch at different timesteps have no common step: NaN.

    Args:
        timestep: any shape, any dtype, one entry a sample on the first dimension.
    """
    values = timestep.detach().to(torch.float64)
    if values.dim() > 0:
        by_sample = values.reshape(values.shape[0], -1).amax(1)
        values = by_sample[0].where((by_sample == by_sample[0]).all(), math.nan)
    if values.device.type != "cuda":
        return torch.stack([values.to("cpu"), torch.zeros_like(values, device="cpu")])
    host = torch.zeros(2, dtype=torch.float64, pin_memory=True)
    host[0].copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(values.device))
    for address, earlier in list(_pending.items()):
        if earlier.query():  # type: ignore[no-untyped-call]
            _pending.pop(address, None)
    _pending[host.data_ptr()] = event
    return host


def read(host: Tensor) -> float:
    """Return the value of what `send` returned, once it is there."""
    event = _pending.pop(host.data_ptr(), None)
    if event is not None:
        event.synchronize()
    return float(host.view(-1)[0])
