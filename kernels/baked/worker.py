"""A process that compiles: reads jobs as JSON lines, answers each with one JSON line.

`python -m calibatt_compiler.kernels.baked.worker`, started by `KernelCompiler`. It never launches
a kernel and needs no GPU. It ends when its input does, so it never outlives its parent.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import time
import traceback
import zlib
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from calibatt_compiler.kernels.baked.cache import (
    CacheEntry,
    SourceEntry,
    get_entry,
    is_compiled,
    load_kernel,
    record_compiled,
    variant_name,
)
from calibatt_compiler.kernels.baked.cover import CoverError, CoverLimits
from calibatt_compiler.kernels.baked.zone_entries import get_zone_entry
from calibatt_compiler.kernels.baked.zone_jobs import Variants, decode_zones, zone_variants
from calibatt_compiler.kernels.hopper.launch import hopper_config
from calibatt_compiler.kernels.hopper.offline import compile_hopper
from calibatt_compiler.kernels.portable.launch import LaunchConfig, launch_config
from calibatt_compiler.kernels.portable.offline import compile_offline, table_arguments
from calibatt_compiler.plan.copies import AnchorRows
from calibatt_compiler.plan.order import TokenOrder
from calibatt_compiler.plan.pattern import BlockPattern


def encode_pattern(pattern: BlockPattern) -> dict[str, Any]:
    """A pattern as JSON values."""
    bits = base64.b64encode(zlib.compress(pattern.bits.tobytes(), 1)).decode()
    copies = None
    if pattern.copies is not None and pattern.repetitive is not None:
        order = str(pattern.copies.order)
        copies = {
            "heads": np.flatnonzero(pattern.repetitive).tolist(),
            **asdict(pattern.copies),
            "order": order,
        }
    return {
        "heads": pattern.heads,
        "query_length": pattern.query_length,
        "key_length": pattern.key_length,
        "block_m": pattern.block_m,
        "block_n": pattern.block_n,
        "bits": bits,
        "copies": copies,
    }


def decode_pattern(data: dict[str, Any]) -> BlockPattern:
    """Inverse of `encode_pattern`."""
    sizes = {name: value for name, value in data.items() if name not in ("bits", "copies")}
    rows = -(-sizes["query_length"] // sizes["block_m"])
    bits = np.frombuffer(zlib.decompress(base64.b64decode(data["bits"])), np.uint8)
    pattern = {**sizes, "bits": bits.reshape(sizes["heads"], rows, -1)}
    if data["copies"] is None:
        return BlockPattern(**pattern)
    copies = dict(data["copies"])
    repetitive = np.isin(np.arange(sizes["heads"]), copies.pop("heads"))
    order = TokenOrder.parse(copies.pop("order"))
    rows_copied = AnchorRows(tuple(copies.pop("grid")), order=order, **copies)
    return BlockPattern(**pattern, copies=rows_copied, repetitive=repetitive)


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Generate and compile one kernel; a kernel that is compiled already costs a look-up."""
    start = time.perf_counter()
    entry, variants = _prepare(job)
    cached, names = True, []
    for variant, compile_variant in variants:
        names.append(variant)
        if not is_compiled(entry, variant):
            cached = False
            record_compiled(entry, variant, compile_variant(), time.perf_counter() - start)
    return {
        "digest": entry.digest,
        "variant": " ".join(names),
        "source_path": str(entry.source_path),
        "seconds": time.perf_counter() - start,
        "cached": cached,
    }


def _prepare(job: dict[str, Any]) -> tuple[SourceEntry, Variants]:
    """Generate the source of a job; return it, and what to compile of it."""
    if "zones" in job["pattern"]:
        zones = decode_zones(job["pattern"])
        source = get_zone_entry(zones, job["target"])
        return source, zone_variants(source, zones, job)
    pattern = decode_pattern(job["pattern"])
    entry = get_entry(pattern, CoverLimits(**job["limits"]), job["target"])
    variants = _hopper_variants if job["target"] == "hopper" else _portable_variants
    return entry, variants(entry, pattern, job)


def _portable_variants(entry: CacheEntry, pattern: BlockPattern, job: dict[str, Any]) -> Variants:
    """The kernel of a portable entry and, with a fixed shift, the one that recomputes."""
    dtype, arch = getattr(torch, job["dtype"]), job["arch"]
    config = launch_config(
        pattern, arch=arch, dtype=dtype, head_dim=job["head_dim"], softmax=job["softmax"]
    )
    table = torch.int32 if pattern.key_blocks >= 2**15 else torch.int16
    copies = pattern.repetitive is not None

    def compile_kernel(config: LaunchConfig, **literals: Any) -> Any:
        extra = table_arguments(dtype, config, table, copies=copies, **literals)
        return compile_offline(arch=arch, dtype=dtype, config=config, extra=extra)

    runs = entry.cover.max_intervals
    yield (
        variant_name(config, arch=arch, dtype=dtype),
        lambda: compile_kernel(config, literals=load_kernel(entry), runs=runs),
    )
    if config.softmax == "fixed":
        # By the table, the same for every pattern: in Triton's cache after the first.
        repair = config.repair()
        yield variant_name(repair, arch=arch, dtype=dtype), lambda: compile_kernel(repair)


def _hopper_variants(entry: CacheEntry, pattern: BlockPattern, job: dict[str, Any]) -> Variants:
    """The kernels of a Hopper entry: with a fixed shift, also the one that recomputes."""
    config = hopper_config(
        pattern,
        dtype=getattr(torch, job["dtype"]),
        head_dim=job["head_dim"],
        softmax=job["softmax"],
    )
    runs = entry.cover.max_intervals
    yield (
        config.variant_name(repair=False),
        lambda: compile_hopper(config, literals=load_kernel(entry), runs=runs),
    )
    if config.fixed:
        # By the tables, the same for every pattern: in Triton's cache after the first.
        yield config.variant_name(repair=True), lambda: compile_hopper(config, repair=True)


def main() -> None:
    """Serve jobs until end of input."""
    # Ctrl-C goes to the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a library prints must not land among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = {"ok": True, **compile_job(json.loads(line))}
        except CoverError as error:
            answer = {"ok": False, "declined": True, "reason": error.problem}
        except Exception as error:
            # One broken kernel must not stop the others; the table kernel serves its site.
            trace = traceback.format_exc()
            reason = f"{type(error).__name__}: {error}"
            answer = {"ok": False, "declined": False, "reason": reason, "trace": trace}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
