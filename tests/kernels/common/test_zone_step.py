"""A step of zones is a number among a launch's arguments: nothing is compiled or made for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from zone_patterns import zone_pattern

from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.zones.drawing import phase

pytest.importorskip("triton")

from calibatt_compiler.kernels.baked.source_zones import load_zones
from calibatt_compiler.kernels.common.zone_table import zone_table
from calibatt_compiler.kernels.hopper import zones as hopper
from calibatt_compiler.kernels.portable import zones as portable

FAMILIES = {
    "portable": (portable, "portable_attention", portable.ZoneAttention, "draw_phase"),
    "hopper": (hopper, "hopper_attention", hopper.HopperZones, "phase"),
}


class Recorder:
    """Stands for a kernel and keeps the arguments of its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **named: self.launches.append((grid, args, named))


def host_value(value: Any) -> Any:
    """What of an argument is known on the host: of memory, its form and dtype."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, tuple):
        return type(value), *map(host_value, value)
    return value


@pytest.mark.parametrize("softmax", ["fixed", "exact"])
@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_launches_of_two_steps_differ_in_one_number(
    family: str,
    literal: bool,
    softmax: Any,
    operands: Callable[..., tuple[Tensor, ...]],
    interpreter: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    """So a captured graph is that of its step, and its kernel is that of all steps."""
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        "calibatt_compiler.kernels.hopper.launch.descriptor", lambda *_: "descriptor"
    )
    module, name, kind, number = FAMILIES[family]
    zones = zone_pattern("diagonal")
    recorder = Recorder()
    real = getattr(module, name)
    monkeypatch.setattr(module, name, recorder)
    request = KernelRequest(
        zones, device=torch.device("cpu"), dtype=torch.bfloat16, head_dim=64, softmax=softmax
    )
    kernel: Any = kind(request)
    if literal:
        kernel = kernel.with_literals(load_zones(zones, zone_table(zones), family))  # type: ignore[arg-type]
    q, k, v = operands(query_length=1000, key_length=1000, dtype=torch.bfloat16)
    by_step = {}
    for step in (0, 1, 64, 127):
        recorder.launches.clear()
        kernel(q, k, v, step=step)
        assert len(recorder.launches) == (2 if softmax == "fixed" else 1)
        said = []
        for grid, args, named in recorder.launches:
            given = dict(named)
            assert given.pop(number) == phase(step, zones.seed)
            values = {each: host_value(value) for each, value in given.items()}
            shape = None if callable(grid) else grid
            said.append((shape, tuple(map(host_value, args)), values))
        by_step[step] = said
    assert all(said == by_step[0] for said in by_step.values())
    # Nor does Triton compile another kernel for a number that is 1 or a multiple of 16.
    (parameter,) = (each for each in real.params if each.name == number)
    assert parameter.do_not_specialize
    assert not parameter.is_constexpr
