"""A small Wan transformer, a plan for it, and the transformer under the plan's masks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_models
import torch

from calibatt_compiler import Plan

STOCK = torch.nn.functional.scaled_dot_product_attention
GRID, OTHER, TIMES = (3, 7, 9), (3, 9, 7), (900.0, 500.0, 100.0)
PAGE = Path(__file__).parents[2] / "docs" / "ways.md"


def model(layers: int = 2) -> Any:
    """Return the transformer; all of these are alike."""
    made = tiny_models.wan(num_layers=layers).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, p in made.named_parameters():
        if p.dim() > 1:
            p.copy_(torch.randn(p.shape, generator=generator) * (1.5 / p[0].numel() ** 0.5))
        elif "norm" not in name:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return made


def plan_of(layers: int = 2, seed: int = 7, times: tuple[float, ...] = TIMES) -> Plan:
    """Return a plan of random blocks."""
    blocks = -(-math.prod(GRID) // 32)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(times), 2, blocks, blocks)
    masks = {
        f"blocks.{i}.attn1": (torch.rand(shape, generator=generator) < 0.3)
        | torch.eye(blocks, dtype=torch.bool)
        for i in range(layers)
    }
    return Plan.from_masks(masks, GRID, times, (32, 32))


def inputs(grid: tuple[int, int, int], timestep: float) -> dict[str, Any]:
    """Return the arguments of a call."""
    generator = torch.Generator().manual_seed(int(timestep))
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(1, 4, frames, 2 * height, 2 * width, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, 16, generator=generator),
        "timestep": torch.tensor([timestep]),
        "return_dict": False,
    }


@contextlib.contextmanager
def under_masks(eager: torch.nn.Module, plan: Plan) -> Iterator[list[str]]:
    """Let a model that is not compiled attend by the plan's masks, expanded to tokens.

    Yields:
        The names of the sites that ran so far.
    """
    ran: list[str] = []
    now: dict[str, Any] = {}

    def called(module: torch.nn.Module, args: Any, given: dict[str, Any]) -> None:
        now["step"] = plan.step_of(float(given["timestep"].flatten()[0]))

    def enters(name: str) -> Any:
        return lambda module, args: now.update(site=name)

    def attend(query: Any, key: Any, value: Any, **options: Any) -> torch.Tensor:
        if query.shape[2] == key.shape[2]:
            ran.append(now["site"])
            options["attn_mask"] = plan.sites[now["site"]].at(now["step"]).token_mask()[None]
        return STOCK(query, key, value, **options)

    handles = [eager.register_forward_pre_hook(called, with_kwargs=True)]
    for name in plan.sites:
        handles.append(eager.get_submodule(name).register_forward_pre_hook(enters(name)))
    try:
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", attend):
            yield ran
    finally:
        for handle in handles:
            handle.remove()


def masked(eager: torch.nn.Module, plan: Plan, given: dict[str, Any]) -> torch.Tensor:
    """Return what a model that is not compiled makes of a call under the plan's masks."""
    with under_masks(eager, plan) as ran:
        out: torch.Tensor = eager(**given)[0]
    assert ran == list(plan.sites), "the oracle missed a site"
    return out


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error."""
    return float((got - expected).norm() / expected.norm())


class Table:
    """One table of docs/ways.md.

    Args:
        heading: how its first line begins.
        ways: what its rows are about, in order.
    """

    def __init__(self, heading: str, ways: list[str]) -> None:
        self._heading = heading
        self._ways = ways

    def rows(self) -> dict[str, str]:
        """Return what the page has."""
        return {line.split(" | ")[0][2:]: line.split(" | ")[1][:-2] for line in self._parts()[1]}

    def write(self, way: str, found: str) -> None:
        """Put a row into the page."""
        before, _, after = self._parts()
        known = {**self.rows(), way: found}
        rows = [f"| {w} | {known[w]} |" for w in self._ways if w in known]
        PAGE.write_text("\n".join([*before, *rows, *after, ""]), "utf-8")

    def _parts(self) -> tuple[list[str], list[str], list[str]]:
        lines = PAGE.read_text("utf-8").splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith(self._heading)) + 2
        last = next((i for i in range(first, len(lines)) if not lines[i]), len(lines))
        return lines[:first], lines[first:last], lines[last:]
