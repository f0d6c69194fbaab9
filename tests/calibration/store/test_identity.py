"""What tells one model, input or seed from another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calibatt_compiler.calibration.observe.pipelines import read_inputs
from calibatt_compiler.calibration.store.identity import weights_fingerprint
from calibatt_compiler.errors import OptionError


@pytest.mark.parametrize(
    "shape", [(512, 512), (4096, 256), (256, 4096), (1000, 1000), (768, 3072), (512, 512, 3), (7,)]
)
def test_a_fingerprint_looks_at_all_parts_of_a_weight(shape: tuple[int, ...]) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)
    empty = weights_fingerprint(module)
    assert weights_fingerprint(module) == empty
    for dim, size in enumerate(shape):
        parts = min(size, 8)
        for part in range(parts):
            module.weight.zero_()
            begin, end = part * size // parts, (part + 1) * size // parts
            module.weight.narrow(dim, begin, end - begin).fill_(1.0)
            assert weights_fingerprint(module) != empty, f"dimension {dim}, from {begin}"


@pytest.mark.parametrize("seed", [True, 1.0, "1", None, 2**64, -(2**63) - 1])
def test_seeds_that_are_no_integers(seed: Any) -> None:
    with pytest.raises(OptionError, match="seed"):
        read_inputs(["a"], [seed], {})
    assert read_inputs(["a", "b"], [np.int64(3), 2**64 - 1], {}) == [
        (3, {"prompt": "a"}),
        (2**64 - 1, {"prompt": "b"}),
    ]
