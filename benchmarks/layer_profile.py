"""Where the time of one call goes: kernels by name and kind, and how long the device waits.

`dit_layer.py --profile --out OUT` writes what it finds of a layer to OUT/layer_profile.json.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "attention": ("attention", "attn", "flash", "fmha", "sdpa", "hopper"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "matmul", "addmm", "aten::mm"),
}
"""What names of kernels hold, in any case; the first kind that fits counts."""


@dataclass(frozen=True)
class CallProfile:
    """One call on a device, in milliseconds.

    Attributes:
        span: from the first kernel's start to the last one's end.
        idle: part of `span` in which no kernel runs.
        by_name: time and number of calls of each kernel, longest first.
    """

    span: float
    idle: float
    by_name: dict[str, tuple[float, int]]

    def kinds(self) -> dict[str, float]:
        """Milliseconds by kind of kernel, of others, and of waiting."""
        found = dict.fromkeys((*KINDS, "others"), 0.0)
        for name, (ms, _) in self.by_name.items():
            fits = (kind for kind, parts in KINDS.items() if any(p in name.lower() for p in parts))
            found[next(fits, "others")] += ms
        return {**found, "waiting": self.idle}

    def text(self, layers: int, longest: int = 14) -> str:
        """Say what a layer takes, one line a kernel."""
        lines = [f"    {self.span / layers:8.3f} ms a layer, {self.idle / layers:.3f} of it idle"]
        lines += [
            f"    {ms / layers:8.3f} ms  {count:4d} x {name[:90]}"
            for name, (ms, count) in list(self.by_name.items())[:longest]
        ]
        rest = list(self.by_name.values())[longest:]
        if rest:
            lines.append(f"    {sum(ms for ms, _ in rest) / layers:8.3f} ms  {len(rest)} others")
        return "\n".join(lines)


def profile_call(run: Callable[[], Any], *, on_gpu: bool) -> CallProfile:
    """Profile one call; on a CPU operators stand for kernels."""
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    if on_gpu:
        torch.cuda.synchronize()  # kernels of earlier calls are not this one's
    with profile(activities=[activity]) as found:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    events = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in found.events()
        if event.device_type == kind
    )
    by_name: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    busy, until = 0.0, -1.0
    for start, end, name in events:
        ms, count = by_name[name]
        by_name[name] = ms + (end - start) / 1e3, count + 1
        # Kernels of two streams may overlap.
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    span = until - events[0][0] if events else 0.0
    ordered = dict(sorted(by_name.items(), key=lambda item: -item[1][0]))
    return CallProfile(span / 1e3, (span - busy) / 1e3, ordered)
