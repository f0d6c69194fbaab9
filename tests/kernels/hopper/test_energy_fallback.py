"""Block energies where the Hopper kernel turns out not to launch."""

from __future__ import annotations

import pytest
import torch

from calibatt_compiler.kernels.hopper import energy as hopper_energy

BLOCK = (128, 128)
KEY = (torch.bfloat16, BLOCK)


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What the coming launches raise; the state of the module is put back afterwards."""
    coming: list[Exception | None] = []

    def attend(q, k, v, block, scale):
        error = coming.pop(0)
        if error is not None:
            raise error
        return q, k

    monkeypatch.setattr(hopper_energy, "hopper_attention_and_energy", attend)
    monkeypatch.setattr(hopper_energy, "_launches", {})
    return coming


def call() -> object:
    q = torch.zeros(1, 1, 256, 64, dtype=torch.bfloat16)
    return hopper_energy.try_hopper(q, q, q, BLOCK, 1.0)


def test_an_error_of_the_first_launch_leaves_it_to_another_kernel(launch):
    launch[:] = [RuntimeError("no\n such instruction")]
    assert call() is None
    assert (
        hopper_energy._launches[KEY].reason == "no Hopper kernel: RuntimeError: no such instruction"
    )
    assert call() is None
    assert not launch, "it is not tried again"


def test_an_error_after_a_good_launch_is_raised(launch):
    launch[:] = [None, RuntimeError("illegal address")]
    assert call() is not None
    with pytest.raises(RuntimeError, match="illegal"):
        call()
    assert hopper_energy._launches[KEY].reason is None
