"""A Gluon kernel that only specialises warps: what compute-sanitizer says of it is triton's own."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def write(out_ptr, place, value):
    """Store one number."""
    gl.store(out_ptr + place, value)


@gluon.jit
def control(out_ptr, value):
    """Two partitions of warps, each of which stores a number; no shared memory of its own."""
    gl.warp_specialize([(write, (out_ptr, 0, value)), (write, (out_ptr, 1, value))], [1], [24])


def run_control() -> None:
    """Launch it once."""
    out = torch.zeros(2, dtype=torch.int32, device="cuda")
    control[(4,)](out, 7, num_warps=4)
    torch.cuda.synchronize()
    assert out.tolist() == [7, 7]
