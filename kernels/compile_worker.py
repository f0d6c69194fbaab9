"""A process that compiles: reads jobs as JSON lines, answers each with one JSON line.

`python -m calibatt_compiler.kernels.compile_worker`, started by `KernelCompiler`. It never launches
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
from typing import Any

import numpy as np
import torch

from calibatt_compiler.kernels.cache import (
    get_entry,
    is_compiled,
    load_kernel,
    record_compiled,
    variant_name,
)
from calibatt_compiler.kernels.offline import compile_offline
from calibatt_compiler.kernels.triton_launch import launch_config
from calibatt_compiler.plan.pattern import BlockPattern


def encode_pattern(pattern: BlockPattern) -> dict[str, Any]:
    """A pattern as JSON values."""
    bits = base64.b64encode(zlib.compress(pattern.bits.tobytes(), 1)).decode()
    return {
        "heads": pattern.heads,
        "query_length": pattern.query_length,
        "key_length": pattern.key_length,
        "block_m": pattern.block_m,
        "block_n": pattern.block_n,
        "bits": bits,
    }


def decode_pattern(data: dict[str, Any]) -> BlockPattern:
    """Inverse of `encode_pattern`."""
    sizes = {name: value for name, value in data.items() if name != "bits"}
    rows = -(-sizes["query_length"] // sizes["block_m"])
    bits = np.frombuffer(zlib.decompress(base64.b64decode(data["bits"])), np.uint8)
    return BlockPattern(**sizes, bits=bits.reshape(sizes["heads"], rows, -1))


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Generate and compile one kernel; a kernel that is compiled already costs a look-up."""
    pattern = decode_pattern(job["pattern"])
    dtype = getattr(torch, job["dtype"])
    start = time.perf_counter()
    entry = get_entry(
        pattern, literal_budget=job["literal_budget"], max_intervals=job["max_intervals"]
    )
    config = launch_config(pattern, arch=job["arch"], dtype=dtype, head_dim=job["head_dim"])
    variant = variant_name(config, arch=job["arch"], dtype=dtype)
    cached = is_compiled(entry, variant)
    if not cached:
        compiled = compile_offline(
            load_kernel(entry), arch=job["arch"], dtype=dtype, config=config, extra={}
        )
        record_compiled(entry, variant, compiled, time.perf_counter() - start)
    return {
        "digest": entry.digest,
        "variant": variant,
        "source_path": str(entry.source_path),
        "added_density": entry.covering.added_density,
        "seconds": time.perf_counter() - start,
        "cached": cached,
    }


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
        except Exception as error:
            # One broken kernel must not stop the others; the table kernel serves its site.
            trace = traceback.format_exc()
            answer = {"ok": False, "reason": f"{type(error).__name__}: {error}", "trace": trace}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
