"""Copies the timestep to the host: sent when a forward pass begins, read at its first site.

A site's kernel is chosen on the host, by the value of a tensor on the device. To read it at once
would leave the device idle until the host has queued its next work. So it is copied behind what is
queued, and the host waits for it at the first site only: what lies before that is queued by then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from calibatt_compiler.runtime.invocation import current

OTHER_TOKENS = math.inf
"""Stands for the timestep of a forward pass whose tokens are not where the plan's are."""


def send(timestep: Tensor, fits: Sequence[Tensor] = ()) -> Tensor:
    """Return float64 (2) on the CPU: will hold the diffusion timestep, see `read`, and one more.

    A timestep per token (the conditioning frames at zero) stands for its greatest value. Samples
    of one batch at different timesteps have no common step: NaN. Where the tokens are not the
    plan's, it is `OTHER_TOKENS`: so one copy tells both.

    Args:
        timestep: any shape, any dtype, one entry a sample on the first dimension.
        fits: boolean scalars, whether the tokens are the plan's.
    """
    values = timestep.detach().to(torch.float64)
    if values.dim() > 0:
        by_sample = values.reshape(values.shape[0], -1).amax(1)
        values = by_sample[0].where((by_sample == by_sample[0]).all(), math.nan)
    for each in fits:
        values = values.where(each.to(values.device), OTHER_TOKENS)
    invocation = current()
    if values.device.type != "cuda" or invocation is None:
        return torch.stack([values.to("cpu"), torch.zeros_like(values, device="cpu")])
    host = torch.zeros(2, dtype=torch.float64, pin_memory=True)
    host[0].copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(values.device))
    invocation.timestep_copied = event
    return host


def read(host: Tensor) -> float:
    """Return the value of what `send` returned, once it is there.

    It is waited for in the run of a graph that it was sent in: what comes later finds it there.
    """
    invocation = current()
    if invocation is not None and invocation.timestep_copied is not None:
        invocation.timestep_copied.synchronize()
        invocation.timestep_copied = None
    return float(host.view(-1)[0])
