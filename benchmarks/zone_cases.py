"""Zones for `attention.py`: fitted to made-up energies, at a wanted density."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import torch
from attention_cases import Case
from attention_kernels import Contestant, Operands

from calibatt_compiler.calibration.select.zones.fit import SiteFit
from calibatt_compiler.kernels.baked.source_zones import load_zones
from calibatt_compiler.kernels.common.zone_table import zone_table
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.groups import pack

HEADS = 4
"""Heads that are fitted; the others are the same again, with draws of their own."""

NUMBERS = 50
"""Numbers a head: 2,000 for 40 heads."""


def make_zones(case: Case) -> ZonePattern:
    """Zones of a case, their density within 2 % of the one asked for.

    Energies fall off along diagonals a whole number of frames apart, or towards the first keys,
    with noise; see `zone_fit` for what is fitted.
    """
    size = case.size
    fit = SiteFit(_squares(case), budget=HEADS * NUMBERS)
    blocks = HEADS * (-(-size.tokens // size.block[0])) * (-(-size.tokens // size.block[1]))
    low, high = math.log(1e-9), math.log(1.0)  # a higher price keeps fewer blocks
    for _ in range(16):
        price = (low + high) / 2
        found = fit.at(math.exp(price), fit.rise)
        if abs(found.kept / blocks / case.density - 1) < 0.02:
            break
        low, high = (price, high) if found.kept / blocks > case.density else (low, price)
    heads = [found.heads[index % HEADS] for index in range(size.heads)]
    rows, columns = (-(-size.tokens // length) for length in size.block)
    sizes = (size.heads, size.tokens, size.tokens, *size.block)
    return ZonePattern.from_arrays(sizes, pack(heads, rows, columns))


def _squares(case: Case) -> Any:
    size = case.size
    rows, columns = (-(-size.tokens // length) for length in size.block)
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(rows)[:, None] * size.block[0]
    column = torch.arange(columns)[None] * size.block[1]
    offset = (column - row).abs().float()
    found = []
    for head in range(HEADS):
        frame = size.frame * (1 + head / 8)
        to_band = (offset / frame - (offset / frame).round()).abs() * frame
        cost = to_band / (size.block[1] * (2 + head)) + offset / (frame * (1.5 + head))
        if head == HEADS - 1:
            cost = column / (12 * size.block[1]) + offset / frame / 3
        noise = torch.rand(rows, columns, generator=generator)
        found.append(torch.softmax(1.5 * noise - cost, -1).square())
    return torch.stack(found).numpy()


def _contestant(zones: ZonePattern, operands: Operands, kernel: Any) -> Contestant:
    """Each call is another step; the first one, whose error is looked at, is step 0."""
    steps = count()
    return Contestant(
        lambda: kernel(*operands, step=next(steps)), zones.density, zones.draw(0), kernel
    )


def _where(operands: Operands) -> dict[str, Any]:
    q = operands[0]
    return {"device": q.device, "dtype": q.dtype, "head_dim": q.shape[-1]}


def hopper(*, literal: bool = False, **options: Any) -> Any:
    """Ours for Hopper, from the table or with literals."""

    def make(zones: ZonePattern, operands: Operands) -> Contestant:
        from calibatt_compiler.kernels.hopper.zones import HopperZones

        literals = load_zones(zones, zone_table(zones), "hopper") if literal else None
        kernel = HopperZones(KernelRequest(zones, **_where(operands)), literals, **options)
        return _contestant(zones, operands, kernel)

    return make


def portable(*, literal: bool = False) -> Any:
    """Ours, portable, from the table or with literals."""

    def make(zones: ZonePattern, operands: Operands) -> Contestant:
        from calibatt_compiler.kernels.portable.zones import ZoneAttention

        literals = load_zones(zones, zone_table(zones), "portable") if literal else None
        request = KernelRequest(zones, **_where(operands))
        return _contestant(zones, operands, ZoneAttention(request, literals=literals))

    return make


def cpu(zones: ZonePattern, operands: Operands) -> Contestant:
    """Ours on a CPU."""
    from calibatt_compiler.kernels.cpu.zones import CpuZones

    where = _where(operands)
    where.pop("device")
    return _contestant(zones, operands, CpuZones(zones, **where))


def drawn(make: Any) -> Any:
    """A kernel of patterns with what step 0 draws: weighted tables."""
    return lambda zones, operands: make(zones.draw(0), operands)
