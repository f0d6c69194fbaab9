"""Gluon kernels that do little but specialise warps.

What compute-sanitizer says of them is said of triton's own code, not of ours.
"""

from __future__ import annotations

import torch

from calibatt_compiler.kernels.hopper.primitives import fence_async_shared, gl, gluon, mbarrier


@gluon.jit
def write(out_ptr, place, value):
    """Store one number."""
    gl.store(out_ptr + place, value)


@gluon.jit
def control(out_ptr, value):
    """Two partitions of warps, each of which stores a number; no shared memory of its own."""
    gl.warp_specialize([(write, (out_ptr, 0, value)), (write, (out_ptr, 1, value))], [1], [24])


@gluon.jit
def arrive_and_write(out_ptr, place, value, barrier):
    """Store one number, having signalled the other partition."""
    mbarrier.arrive(barrier.index(0), count=1)
    gl.store(out_ptr + place, value)


@gluon.jit
def wait_and_write(out_ptr, place, value, barrier):
    """Store one number, having heard from the other partition."""
    mbarrier.wait(barrier.index(0), 0)
    gl.store(out_ptr + place, value)


@gluon.jit
def control_barrier(out_ptr, value):
    """The same two partitions, one of which waits for the other by a barrier in shared memory."""
    barrier = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier.index(0), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (arrive_and_write, (out_ptr, 0, value, barrier)),
            (wait_and_write, (out_ptr, 1, value, barrier)),
        ],
        [1],
        [24],
    )


def run_control(*, barrier: bool = False) -> None:
    """Launch one of them once."""
    out = torch.zeros(2, dtype=torch.int32, device="cuda")
    (control_barrier if barrier else control)[(4,)](out, 7, num_warps=4)
    torch.cuda.synchronize()
    assert out.tolist() == [7, 7]
