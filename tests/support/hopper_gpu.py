"""What tests of the Hopper kernel on a GPU share: the device, their marks, the error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibatt_compiler.kernels.hopper.capability import gluon_reason
from calibatt_compiler.kernels.portable.tiles import HOPPER, architecture

CUDA = torch.device("cuda", 0)
ON_HOPPER = torch.cuda.is_available() and architecture(CUDA) == HOPPER
REASON = gluon_reason() or (None if ON_HOPPER else "needs a Hopper GPU")
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    # A kernel that waits for ever can't be interrupted: end the process.
    pytest.mark.timeout(120, method="thread"),
]
Operands = tuple[Tensor, Tensor, Tensor]
BF16, FP16 = torch.bfloat16, torch.float16


def error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()
