"""What the compiling process receives of zones, and what it compiles for them."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from calibatt_compiler.kernels.baked.cache import SourceEntry, load_kernel, variant_name
from calibatt_compiler.kernels.hopper.launch import hopper_config
from calibatt_compiler.kernels.hopper.offline import compile_hopper
from calibatt_compiler.kernels.portable.launch import launch_config
from calibatt_compiler.kernels.portable.offline import compile_offline, zone_arguments
from calibatt_compiler.plan.zones import ZonePattern

_SIZES = ("heads", "query_length", "key_length", "block_m", "block_n")
_OTHERS = ("video", "text", "seed", "formula")

Variants = Iterator[tuple[str, Callable[[], Any]]]


def encode_zones(zones: ZonePattern) -> dict[str, Any]:
    """Zones as JSON values."""
    arrays = {
        name: (array.dtype.str, base64.b64encode(zlib.compress(array.tobytes(), 1)).decode())
        for name, array in zones.to_arrays().items()
    }
    return {"zones": arrays, **{name: getattr(zones, name) for name in (*_SIZES, *_OTHERS)}}


def decode_zones(data: dict[str, Any]) -> ZonePattern:
    """Inverse of `encode_zones`."""
    arrays = {
        name: np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)
        for name, (dtype, text) in data["zones"].items()
    }
    heads, queries, keys, block_m, block_n = (data[name] for name in _SIZES)
    others = {name: data[name] for name in _OTHERS}
    return ZonePattern.from_arrays((heads, queries, keys, block_m, block_n), arrays, **others)


def zone_variants(entry: SourceEntry, zones: ZonePattern, job: dict[str, Any]) -> Variants:
    """The kernel with literals and, with a fixed shift, the one that recomputes, by tables."""
    dtype, head_dim, arch = getattr(torch, job["dtype"]), job["head_dim"], job["arch"]
    if job["target"] == "hopper":
        hopper = hopper_config(zones, dtype=dtype, head_dim=head_dim, softmax=job["softmax"])
        for repair in hopper.repairs:
            yield hopper.variant_name(repair=repair), _hopper(hopper, entry, repair)
        return
    config = launch_config(zones, arch=arch, dtype=dtype, head_dim=head_dim, softmax=job["softmax"])
    for each in (config, config.repair()) if config.softmax == "fixed" else (config,):
        yield variant_name(each, arch=arch, dtype=dtype), _portable(each, entry, arch, dtype)


def _hopper(config: Any, entry: SourceEntry, repair: bool) -> Callable[[], Any]:
    return lambda: compile_hopper(
        config, repair=repair, literals=None if repair else load_kernel(entry)
    )


def _portable(config: Any, entry: SourceEntry, arch: int, dtype: torch.dtype) -> Callable[[], Any]:
    def compile_kernel() -> Any:
        literals = None if config.softmax == "repair" else load_kernel(entry)
        extra = zone_arguments(config, literals)
        return compile_offline(arch=arch, dtype=dtype, config=config, extra=extra)

    return compile_kernel
