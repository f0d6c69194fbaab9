"""Run the portable kernel of zones under Triton's interpreter; started by test_zones.py.

A process of its own: the interpreter is chosen when kernels are defined, for the whole process.
Prints one JSON line a case: its name and the largest error against the reference.
"""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from zone_patterns import CASES, zone_pattern

from calibatt_compiler.kernels.baked import source_zones
from calibatt_compiler.kernels.common.zone_table import zone_table
from calibatt_compiler.kernels.portable.zones import ZoneAttention
from calibatt_compiler.kernels.reference.attention import ReferenceAttention
from calibatt_compiler.kernels.request import KernelRequest
from calibatt_compiler.plan.zones import ZonePattern

CPU = torch.device("cpu")


def look_up(_: Any, asm: str, __: str, values: Any, types: Any, *___: Any) -> Any:
    """The one piece of PTX that the kernel has: literals looked up by number."""
    found = re.search(r"\.const \S+ \d+ \.b32 runs\[(\d+)\] = \{([^}]*)\}", asm)
    assert found is not None
    words = np.array([int(word) for word in found[2].split(",")], np.int32)
    assert len(words) == int(found[1])
    assert 0 <= values[0].data.item() < len(words), "literals read out of bounds"
    result = TensorHandle(words[values[0].data], types[0].scalar)
    return SimpleNamespace(get_result=lambda _: result)


def kernels(zones: ZonePattern, softmax: str, head_dim: int = 64) -> tuple[ZoneAttention, ...]:
    literals = source_zones.load_zones(zones, zone_table(zones), "portable")
    where: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "head_dim": head_dim}
    request = KernelRequest(zones, **where, softmax=softmax)
    return ZoneAttention(request), ZoneAttention(request, literals=literals)


def report(name: str, error: float, allowed: float) -> None:
    print(json.dumps({"name": name, "error": error, "allowed": allowed}), flush=True)


def operands(zones: ZonePattern, batch: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    lengths = (zones.query_length, zones.key_length, zones.key_length)
    made = (torch.randn(batch, n, zones.heads, head_dim).transpose(1, 2) for n in lengths)
    return tuple(made)


def main() -> None:
    InterpreterBuilder.create_inline_asm = look_up
    for number, name in enumerate(CASES):
        # Tiles as large as a block, and smaller ones.
        block = (32, 64) if number % 2 else (32, 32)
        zones = zone_pattern(name, block=block)
        head_dim = 40 if name == "ragged" else 64
        q, k, v = operands(zones, 2 if name == "ragged" else 1, head_dim)
        for softmax in ("exact", "fixed"):
            table, literal = kernels(zones, softmax, head_dim)
            worst = 0.0
            for step in ((6, 77)[number % 2],) if softmax == "exact" else (0,):
                out = table(q, k, v, step=step)
                assert torch.equal(literal.at(step)(q, k, v), out)
                exact = ReferenceAttention(zones.draw(step))(q.double(), k.double(), v.double())
                worst = max(worst, (out - exact).abs().max().item())
            assert table.repairs == literal.repairs == 0
            report(f"{name}, {softmax}", worst, 5e-6)

    # Phases: values that name their key block tell what a row has kept, with which weight.
    zones = zone_pattern("text first", block=(32, 32))
    q, k, v = operands(zones, 1, 64)
    block = torch.arange(zones.key_length) // zones.block_n
    q = q * 0
    v = torch.nn.functional.one_hot(block, 64).float().expand_as(v)
    table, _ = kernels(zones, "exact")
    worst = 0.0
    for step in range(0, 128, 13):
        drawn = zones.draw(step)
        weight = torch.from_numpy(np.exp(drawn.log_weights())) * drawn.mask()
        weight = weight * block.bincount(minlength=zones.key_blocks)
        expected = weight / weight.sum(-1, keepdim=True)
        out = table(q, k, v, step=step)[0, :, ::32, : zones.key_blocks]
        worst = max(worst, (out - expected).abs().max().item())
    report("phases", worst, 5e-6)

    # A key far above its row's lead: the call is computed again, at the same step.
    zones = zone_pattern("plain", block=(32, 32))
    q, k, v = operands(zones, 1, 64)
    lead, drawn = int(zones.row_leads()[0, 0]), zones.draw(5)
    later = next(x for x in drawn.mask()[0, 0].nonzero().flatten().tolist() if x != lead)
    q[0, 0, 0], k[0, 0, :, 0] = 0, 0
    q[0, 0, 0, 0] = k[0, 0, later * 32 + 3, 0] = math.sqrt(200 * 8)
    for kernel in kernels(zones, "fixed"):
        error = (kernel(q, k, v, step=5) - ReferenceAttention(drawn)(q, k, v)).abs().max().item()
        assert kernel.repairs == 1
        report("spike", error, 5e-6)


if __name__ == "__main__":
    main()
