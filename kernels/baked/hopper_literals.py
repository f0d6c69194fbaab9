"""The Hopper kernel with its key blocks as literals of generated source."""

from __future__ import annotations

from typing import Any

from calibatt_compiler.kernels.baked.cache import CacheEntry, load_kernel
from calibatt_compiler.kernels.hopper.attention import HopperAttention
from calibatt_compiler.kernels.hopper.launch import HopperConfig


class HopperLiterals(HopperAttention):
    """The same with key blocks as literals in generated source; gives the same bits.

    Where its fixed shift overflows, the tables recompute: that is rare, and a launch that ends
    at once need not be compiled for each pattern.

    Args:
        entry: of the kernel cache, with target "hopper".
        table: the kernel of the same pattern that served until this one was compiled.

    Attributes:
        kind: "hopper-baked".
    """

    kind = "hopper-baked"

    def __init__(self, entry: CacheEntry, table: HopperAttention) -> None:
        self._literals = load_kernel(entry)
        self._intervals = entry.cover.max_intervals
        self._table = table
        super().__init__(table.request)
        self._repairs = table._repairs  # what recomputes, counts

    @property
    def table_bytes(self) -> int:
        """Those of the table kernel, which recomputes."""
        return self._table.table_bytes

    def _indices(self) -> dict[str, Any]:
        return {"LITERALS": self._literals, "RUNS": self._intervals}

    def repair(self, config: HopperConfig, given: dict[str, object]) -> None:
        """As the table kernel does."""
        self._table.repair(config, given)
