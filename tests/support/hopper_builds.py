"""Compile the Hopper kernel for a GPU that need not be here; for test_hopper_offline.py.

A process of its own: it puts a stand-in driver in Triton's place. Prints one JSON line a kernel.
Arguments: names of variants to build; default all.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton import knobs
from zone_patterns import zone_pattern

from calibatt_compiler.kernels.baked import cache, source_zones
from calibatt_compiler.kernels.baked.compiler import KernelCompiler, KernelSpec
from calibatt_compiler.kernels.baked.cover import EXACT
from calibatt_compiler.kernels.common.zone_table import zone_table
from calibatt_compiler.kernels.hopper.launch import HopperConfig
from calibatt_compiler.kernels.hopper.offline import compile_counts, compile_hopper
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.pattern import BlockPattern

BF16, FP16 = torch.bfloat16, torch.float16

# block_n, head_dim, dtype, fixed, ragged, then optional: tail, lse, lengths, copies
TABLES = {
    "fixed, D 128": HopperConfig(128, 128, BF16, True, False),
    "fixed, D 128, everything": HopperConfig(128, 128, BF16, True, True, True, True),
    "fixed, D 128, lengths": HopperConfig(128, 128, BF16, True, True, False, True, True),
    "exact, D 128, ragged": HopperConfig(128, 128, BF16, False, True),
    "fp16, D 128, lse": HopperConfig(128, 128, FP16, False, True, False, True),
    "fixed, D 128, blocks of 64": HopperConfig(64, 128, BF16, True, True),
    "fixed, D 128, energy": HopperConfig(128, 128, BF16, True, True, lse=True, energy=True),
    "exact, D 128, energy": HopperConfig(128, 128, FP16, False, True, lse=True, energy=True),
    "fixed, D 64": HopperConfig(128, 64, BF16, True, True),
    "fp16, D 64, blocks of 64": HopperConfig(64, 64, FP16, False, True),
    "fixed, D 128, copies": HopperConfig(128, 128, BF16, True, True, copies=True),
    "fixed, D 128, copies, everything": HopperConfig(
        *(128, 128, BF16, True, True, True, True), copies=True
    ),
    "fixed, D 128, copies, lengths": HopperConfig(
        *(128, 128, BF16, True, True, False, True, True), copies=True
    ),
    "exact, D 128, copies, lengths": HopperConfig(
        *(128, 128, BF16, False, True, False, True, True), copies=True
    ),
    "exact, D 128, copies, blocks of 64": HopperConfig(
        *(64, 128, BF16, False, True, True, True), copies=True
    ),
    "fixed, D 64, copies": HopperConfig(128, 64, BF16, True, True, lse=True, copies=True),
    "fp16, D 64, copies, blocks of 64": HopperConfig(64, 64, FP16, False, True, copies=True),
    "fixed, D 128, zones": HopperConfig(128, 128, BF16, True, False, zones=True),
    "fixed, D 128, zones, everything": HopperConfig(
        *(128, 128, BF16, True, True), lse=True, zones=True
    ),
    "exact, D 128, zones, everything": HopperConfig(
        *(128, 128, FP16, False, True), lse=True, zones=True
    ),
    "fixed, D 64, zones": HopperConfig(128, 64, BF16, True, True, lse=True, zones=True),
    "fp16, D 64, zones, blocks of 64": HopperConfig(64, 64, FP16, False, True, zones=True),
}


def run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def rescaling(ptx: str) -> list[bool]:
    """Of each place that rescales: whether its warps look at all factors that they multiply by."""
    found = []
    for block in re.findall(r"\{ \.reg \.pred changed;(.*?)SAME: \}", ptx, re.DOTALL):
        tested = set(re.findall(r"setp\.neu\.f32 changed, (%\w+), 0f3F800000", block))
        used = set(re.findall(r"mul\.f32 %\w+, %\w+, (%\w+)", block))
        found.append(len(tested) == 2 and tested == used)
    return found


def describe(kernel: Any) -> dict[str, Any]:
    cubin = kernel.asm["cubin"]
    dump = run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    pairs = (word.split(":") for word in dump.split() if word.count(":") == 1)
    usage = {name: int(value) for name, value in pairs if value.isdigit()}
    code = run(knobs.nvidia.nvdisasm.path, "-c", cubin)
    return {
        "registers": usage["REG"],
        "rescaling": rescaling(kernel.asm["ptx"]),
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "shared": kernel.metadata.shared,
        "threads": kernel.metadata.num_warps * 32,
        "local_access": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wgmma": len(re.findall(r"\bHGMMA\b", code)),
        "half_products": len(re.findall(r"\bHMMA\b", code)),
        "tma_loads": len(re.findall(r"\bUTMALDG\b", code)),
        "tma_dimensions": sorted(set(re.findall(r"\bUTMALDG\.(\dD)", code))),
        "tma_stores": len(re.findall(r"\bUTMASTG\b", code)),
        "gathers": len(re.findall(r"\bLDGSTS\S*\.128\b", code)),
        "scatters": len(re.findall(r"\bSTG\S*\.128\b", code)),
        "register_moves": sorted(set(re.findall(r"USETMAXREG\S* (?:\w+, )?(0x\w+)", code))),
        "literal_reads": len(re.findall(r"c\[0x3\]\[", code)),
        "exponentials": len(re.findall(r"\bMUFU\.EX2\b", code)),
    }


def cached_files() -> int:
    return sum(1 for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*") if path.is_file())


def pattern(*, copies: bool = False) -> BlockPattern:
    row = torch.arange(12)
    mask = (row[:, None] - row[None]).abs()[None] <= torch.tensor([1, 2])[:, None, None]
    mask[:, :, 0] = True
    length = 12 * 128 - 37
    repeated: dict[str, Any] = {}
    if copies:
        repeated = {"repetitive": np.array([True, False]), "copies": AnchorRows((3, 20, 20), 4)}
    return BlockPattern.from_mask(mask, query_length=length, key_length=length, **repeated)


def build_literals(*, copies: bool = False) -> None:
    """By the compiling process, as a model does; then a launch must find everything."""
    made = pattern(copies=copies)
    with KernelCompiler(workers=1) as compiler:
        report = compiler.build([KernelSpec(made, BF16, 128, 90, target="hopper")])
    assert not report.failed, report.failed
    entry = cache.get_entry(made, EXACT, "hopper")
    config = HopperConfig(128, 128, BF16, True, True, copies=copies)
    for repair in config.repairs:
        assert cache.is_compiled(entry, config.variant_name(repair=repair))
        before = cached_files()
        literals, runs = cache.load_kernel(entry), entry.cover.max_intervals
        indices = {} if repair else {"literals": literals, "runs": runs}
        kernel = compile_hopper(config, repair=repair, **indices)
        name = f"literals{', copies' if copies else ''}, repair {repair}"
        facts = {"name": name, "new_files": cached_files() - before}
        print(json.dumps(facts | describe(kernel)), flush=True)


def build_zones() -> None:
    """With as many runs as become literals; then again with others of them."""
    for name, case in (("literals, zones", "text first"), ("literals, zones in part", "ragged")):
        zones = zone_pattern(case)
        table = zone_table(zones)
        if "part" in name:
            source_zones.generate_zones.__defaults__ = (int((table.heads == 0).sum()),)
        start = time.perf_counter()
        literals = source_zones.load_zones(zones, table, "hopper")
        kernel = compile_hopper(TABLES["fixed, D 128, zones, everything"], literals=literals)
        facts = {"name": name, "seconds": time.perf_counter() - start}
        print(json.dumps(facts | describe(kernel)), flush=True)


def main() -> None:
    chosen = sys.argv[1:] or [
        *TABLES, "counts", "repair", "literals", "literals, copies", "literals, zones"
    ]  # fmt: skip
    for name, config in TABLES.items():
        if name in chosen:
            start = time.perf_counter()
            facts = describe(compile_hopper(config))
            seconds = time.perf_counter() - start
            print(json.dumps({"name": name, "seconds": seconds} | facts), flush=True)
    if "counts" in chosen:
        print(json.dumps({"name": "counts"} | describe(compile_counts(128))), flush=True)
    if "repair" in chosen:
        kernel = compile_hopper(TABLES["fixed, D 128"], repair=True)
        print(json.dumps({"name": "repair"} | describe(kernel)), flush=True)
    for copies in (False, True):
        if f"literals{', copies' if copies else ''}" in chosen:
            build_literals(copies=copies)
    if "literals, zones" in chosen:
        build_zones()


if __name__ == "__main__":
    main()
