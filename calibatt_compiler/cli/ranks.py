"""A command run by torchrun: its process group, and which device is whose."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from calibatt_compiler.errors import OptionError

if TYPE_CHECKING:
    import torch


@contextmanager
def process_group() -> Iterator[int]:
    """Join the processes that torchrun started; without torchrun there is one.

    The group is one of gloo: ranks of a calibration exchange a few words, and no GPU tensors.

    Yields:
        The rank of this process.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """Return this rank's GPU where ranks of one machine would otherwise take the same.

    Raises:
        OptionError: there are more ranks than GPUs.
    """
    import torch

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type != "cuda" or ranks == 1:
        return device
    count = torch.cuda.device_count()
    if ":" in str(device) or ranks > count:
        raise OptionError(
            "each rank needs a GPU of its own",
            expected=f"--device auto or cuda, and at most {count} processes on this machine",
            got=f"--device {device}, {ranks} processes",
            remedy=f"torchrun --nproc-per-node={count}; CUDA_VISIBLE_DEVICES chooses GPUs",
        )
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own
