"""Compile the portable kernels for GPUs that need not be here; for test_triton_offline.py.

A process of its own: it puts a stand-in driver in Triton's place. Prints one JSON line a kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from triton import knobs
from zone_patterns import many_runs

from calibatt_compiler.kernels.baked import cache, source_zones
from calibatt_compiler.kernels.baked.compiler import KernelCompiler, KernelSpec
from calibatt_compiler.kernels.baked.cover import EXACT
from calibatt_compiler.kernels.common.operands import empty_output
from calibatt_compiler.kernels.common.row_copies import DeviceCopies
from calibatt_compiler.kernels.common.zone_table import zone_table
from calibatt_compiler.kernels.portable.index_tables import IndexTables
from calibatt_compiler.kernels.portable.kernel import portable_attention
from calibatt_compiler.kernels.portable.launch import (
    LaunchConfig,
    call_arguments,
    key_sources,
    launch_config,
)
from calibatt_compiler.kernels.portable.offline import (
    compile_offline,
    table_arguments,
    zone_arguments,
)
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.pattern import BlockPattern

HEAD_DIMS = {89: (64, 128), 90: (64, 128)}
"""Of the generation with least shared memory and of that with its own loads; others have 128."""


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    pairs = (word.split(":") for word in dump.split() if word.count(":") == 1)
    return {name: int(value) for name, value in pairs if value.isdigit()}


def describe(kernel: Any) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    usage = resources(kernel.asm["cubin"])
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "shared": kernel.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "mma": ptx.count("mma.sync"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "cp_async": ptx.count("cp.async.cg"),
    }


def cached_files() -> int:
    return sum(1 for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*") if path.is_file())


def main() -> None:
    row = torch.arange(12)
    mask = (row[:, None] - row[None]).abs()[None] <= torch.tensor([1, 2])[:, None, None]
    mask[:, :, 0] = True
    length = 12 * 128 - 37
    made = BlockPattern.from_mask(mask, query_length=length, key_length=length)
    archs = [int(arch) for arch in os.environ["CALIBATT_TEST_ARCHS"].split(",")]
    bf16 = torch.bfloat16

    copies = AnchorRows((2, 30, 24), 5, first=50)
    mixed = replace_heads(made, np.array([True, False]), copies)
    # Copied rows are code of the source, not of a generation: two of them, with TMA and without.
    patterns = {arch: (made, mixed) if arch in HEAD_DIMS else (made,) for arch in archs}
    specs = [KernelSpec(x, bf16, 128, arch) for arch in archs for x in patterns[arch]]
    with KernelCompiler(workers=2) as compiler:
        report = compiler.build(specs)
    assert not report.failed, report.failed
    for arch in archs:
        for head_dim in HEAD_DIMS.get(arch, (128,)):
            where: dict[str, Any] = {"arch": arch, "dtype": bf16}
            config = launch_config(made, **where, head_dim=head_dim)
            exact = launch_config(made, **where, head_dim=head_dim, softmax="exact")
            pooling = launch_config(replace(made, pooled=4), **where, head_dim=head_dim)
            forms: list[tuple[str, LaunchConfig, dict[str, Any]]] = [
                ("table", config, {}),
                ("repair", config.repair(), {}),
                ("exact", exact, {}),
                ("weighted", pooling, {"weighted": True, "pooled": 4}),
                ("copies", config, {"copies": True}),
            ]
            if head_dim == 128 and arch in (80, 90):  # without TMA and with it
                forms.append(("padded", config, {"padded": True}))
            for kind, form, arguments in forms:
                extra = table_arguments(bf16, form, **arguments)
                kernel = compile_offline(**where, config=form, extra=extra)
                facts = {"kind": kind, "arch": arch, "head_dim": head_dim, **describe(kernel)}
                print(json.dumps(facts))
            for facts in zones(arch, head_dim):
                print(json.dumps(facts))
        for pattern in patterns[arch]:
            print(json.dumps(baked(pattern, arch, config)))


def zones(arch: int, head_dim: int) -> Iterator[dict[str, Any]]:
    """The kernel of zones, and with as many literals as one may have."""
    some = many_runs(source_zones.MOST_RUNS - 8)
    table = zone_table(some)
    assert source_zones.literal_heads(some, table) == some.heads
    where: dict[str, Any] = {"arch": arch, "dtype": torch.bfloat16}
    config = launch_config(some, **where, head_dim=head_dim)
    for kind, form in (("zones", config), ("zones, repair", config.repair()),
                       ("zones, literals", config)):  # fmt: skip
        literals = None
        if kind == "zones, literals":
            literals = source_zones.load_zones(some, table, "portable")
        extra = zone_arguments(form, literals)
        start = time.perf_counter()
        kernel = compile_offline(**where, config=form, extra=extra)
        seconds = time.perf_counter() - start
        facts = {"kind": kind, "arch": arch, "head_dim": head_dim, "seconds": seconds}
        yield facts | describe(kernel)


def replace_heads(
    pattern: BlockPattern, repetitive: npt.NDArray[np.bool_], copies: AnchorRows
) -> BlockPattern:
    """The pattern with some heads row-shared."""
    return BlockPattern.from_mask(
        pattern.mask(),
        query_length=pattern.query_length,
        key_length=pattern.key_length,
        repetitive=repetitive,
        copies=copies,
    )


def baked(pattern: BlockPattern, arch: int, config: LaunchConfig) -> dict[str, Any]:
    """The launch path with real operands: everything must come out of Triton's cache."""
    entry = cache.get_entry(pattern, EXACT)
    for each in (config, config.repair()):
        assert cache.is_compiled(entry, cache.variant_name(each, arch=arch, dtype=torch.bfloat16))
    shape = (2, pattern.query_length, 2, 128)
    q, k, v = (torch.zeros(shape, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    out = empty_output(q)
    q, arguments = call_arguments(q, k, v, out, None, config)
    before = cached_files()
    flag = torch.zeros(1, dtype=torch.int32)
    copies = DeviceCopies.upload(pattern, flag.device)
    if copies is not None:
        arguments |= {"COPIES": True, **copies.arguments()}

    def launch(config: LaunchConfig, **literals: Any) -> Any:
        return portable_attention.warmup(
            q, *key_sources(k, v, config), out, flag, flag, grid=(1, 1),
            **IndexTables.upload(pattern, flag.device).arguments(), **arguments,
            heads=2, query_blocks=pattern.query_blocks, length_q=pattern.query_length,
            length_k=pattern.key_length, WEIGHTED=False, REPAIR=config.softmax == "repair",
            **literals, **config.constexprs, **config.options,
        )  # fmt: skip

    runs = entry.cover.max_intervals
    kernel = launch(config, LITERALS=cache.load_kernel(entry), RUNS=runs)
    launch(config.repair())  # by the table
    kind = "baked" if copies is None else "baked copies"
    facts = {"kind": kind, "arch": arch, "head_dim": 128, **describe(kernel)}
    return {**facts, "new_files": cached_files() - before}


if __name__ == "__main__":
    main()
