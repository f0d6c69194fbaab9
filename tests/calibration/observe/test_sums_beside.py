"""Sums that a thread adds beneath the model's calls."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from calibatt_compiler.calibration.observe.sums_beside import WAITING, SumsBeside
from calibatt_compiler.calibration.store.zone_sums import GroupSums


def test_a_thread_adds_what_is_added_at_once():
    generator = torch.Generator().manual_seed(0)
    calls = [torch.randint(0, 1 << 40, (2, 3, 5), generator=generator) for _ in range(20)]
    at_once, beside = (GroupSums(np.zeros((2, 3, 5), np.int64)) for _ in range(2))
    adding = SumsBeside()
    for squares in calls:
        adding.add(at_once, squares, 2)
        adding.add_beside(beside, squares, 2)
    adding.settle()
    assert (beside.squares == at_once.squares).all()
    assert (at_once.squares == torch.stack(calls).sum(0).numpy()).all()
    assert beside.votes == at_once.votes == 2 * len(calls)


class Blocked(GroupSums):
    """Sums that wait to be added to."""

    def __init__(self) -> None:
        super().__init__(np.zeros(1, np.int64))
        self.free = threading.Event()

    def add(self, squares, votes: int) -> None:
        assert self.free.wait(30)
        super().add(squares, votes)


def test_few_wait_and_what_is_dropped_is_not_added():
    adding, sums = SumsBeside(), Blocked()
    one = torch.ones(1, dtype=torch.int64)
    for _ in range(WAITING):
        adding.add_beside(sums, one, 1)
    third = threading.Thread(target=adding.add_beside, args=(sums, one, 1))
    third.start()
    third.join(0.2)
    assert third.is_alive(), "more wait than may"
    sums.free.set()
    third.join(30)
    adding.settle()
    assert sums.squares == WAITING + 1
    sums.free.clear()
    for _ in range(WAITING):
        adding.add_beside(sums, one, 1)
    threading.Timer(0.2, sums.free.set).start()
    adding.drop()
    adding.settle()
    assert sums.squares <= WAITING + 2, "all but what had begun is forgotten"


def test_what_went_wrong_is_raised():
    adding = SumsBeside()
    adding.add_beside(GroupSums(np.zeros(3, np.int64)), torch.ones(2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="broadcast"):
        adding.settle()
    adding.settle()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpus_squares_are_added_beside():
    adding, sums = SumsBeside(), GroupSums(np.zeros((40, 256, 256), np.int64))
    total = torch.zeros(40, 256, 256, dtype=torch.int64, device="cuda")
    for step in range(10):
        squares = torch.full_like(total, step).mul_(torch.arange(256, device="cuda"))
        total += squares
        torch.cuda.synchronize()
        adding.add(sums, squares, 1)
        del squares
    adding.settle()
    assert (sums.squares == total.cpu().numpy()).all()
