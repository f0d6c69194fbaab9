"""How `attention.py` measures: sustained and burst times, errors against float64.

A GPU under its power limit slows down, so times compare only within one process and one regime:
sustained is round-robin without idle; burst is each kernel alone after half a second of idle.
"""

from __future__ import annotations

import faulthandler
import math
import random
import statistics
import time
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from attention_kernels import Contestant, Operands, Run
from torch import Tensor

STUCK_SECONDS = 120
"""A step longer than this is taken for a kernel that hangs: the process says where and ends."""


def beat() -> None:
    """Note progress."""
    faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)


def calls(run: Run, number: int, on_gpu: bool) -> list[float]:
    """Milliseconds of each of `number` calls in a row."""
    if not on_gpu:
        times = []
        for _ in range(number):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
    for start_event, end_event in events:
        start_event.record()
        run()
        end_event.record()
    torch.cuda.synchronize()
    beat()
    return [float(a.elapsed_time(b)) for a, b in events]


def sustained_and_burst(
    runs: Mapping[str, Run], *, on_gpu: bool, rounds: int, block_ms: float = 60.0
) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of each kernel in both regimes."""
    number = calls_a_block(runs, on_gpu=on_gpu, block_ms=block_ms)
    return (
        sustained(runs, number, on_gpu=on_gpu, rounds=rounds),
        burst(runs, number, on_gpu=on_gpu),
    )


def calls_a_block(runs: Mapping[str, Run], *, on_gpu: bool, block_ms: float) -> dict[str, int]:
    """How many calls in a row of each kernel fill `block_ms`."""
    once = {name: min(calls(run, 2, on_gpu)) for name, run in runs.items()}
    return {name: max(2, int(block_ms / t)) if on_gpu else 1 for name, t in once.items()}


def sustained(
    runs: Mapping[str, Run], number: Mapping[str, int], *, on_gpu: bool, rounds: int
) -> dict[str, float]:
    """Median milliseconds of each kernel, in turns without idle."""
    warm_until = time.monotonic() + (1.5 if on_gpu else 0)
    while time.monotonic() < warm_until:
        for name, run in runs.items():
            calls(run, number[name], on_gpu)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(rounds):
        random.Random(turn).shuffle(order)
        for name in order:
            # The first call of a block still shares the machine with the kernel before.
            times = calls(runs[name], number[name] + on_gpu, on_gpu)
            samples[name] += times[on_gpu:]
    return _medians(samples)


def burst(runs: Mapping[str, Run], number: Mapping[str, int], *, on_gpu: bool) -> dict[str, float]:
    """Median milliseconds of each kernel, each alone after half a second of idle."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2 if on_gpu else 1):
        for name, run in runs.items():
            if on_gpu:
                time.sleep(0.5)
            samples[name] += calls(run, max(2, number[name] // 2), on_gpu)[on_gpu:]
    return _medians(samples)


def _medians(samples: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def relative_error(contestant: Contestant, out: Tensor, operands: Operands) -> float:
    """RMS error against float64 over SDPA's own, on twelve query blocks of different heads."""
    q, k, v = operands
    heads, length = q.shape[1], q.shape[2]
    pattern = contestant.pattern
    generator = torch.Generator().manual_seed(1)
    blocks = -(-length // 128)
    chosen = [*torch.randint(blocks, (11,), generator=generator).tolist(), blocks - 1]
    ours = theirs = 0.0
    if pattern is not None:
        mask, weights = pattern.mask(), torch.from_numpy(pattern.log_weights())
    for i, block in enumerate(chosen):
        head = (5 * i) % heads
        tokens = slice(block * 128, min(block * 128 + 128, length))
        kept: slice | Tensor = slice(None)
        bias = None
        if pattern is not None:
            place = head, block * 128 // pattern.block_m
            kept, weight = (
                x[place].repeat_interleave(pattern.block_n)[: pattern.key_length].to(q.device)
                for x in (mask, weights)
            )
            bias = None if pattern.weights is None else weight[kept]
        part = q[:1, head, tokens], k[:1, head, kept], v[:1, head, kept]
        scores = part[0].double() @ part[1].double().mT / math.sqrt(q.shape[-1])
        scores = scores if bias is None else scores + bias.double()
        exact = scores.softmax(-1) @ part[2].double()
        rows = None if bias is None else bias.to(q.dtype).expand(1, 1, scores.shape[1], -1)
        plain = F.scaled_dot_product_attention(*(x[:, None] for x in part), attn_mask=rows)[:, 0]
        ours += (out[:1, head, tokens].double() - exact).square().sum().item()
        theirs += (plain.double() - exact).square().sum().item()
    return math.sqrt(ours / theirs)
