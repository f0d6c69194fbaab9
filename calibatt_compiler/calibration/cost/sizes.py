"""How large what a calibration holds and writes will be, from shapes alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from calibatt_compiler.calibration.select.repetition import SHARE
from calibatt_compiler.calibration.select.repetition_scores import ARRAY, copies_of, heads_at_once
from calibatt_compiler.calibration.store import run_folder as store
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.kernels.common.row_similarity import working_bytes as similarity_bytes
from calibatt_compiler.kernels.energy import CHUNK
from calibatt_compiler.plan import file
from calibatt_compiler.plan.refine import SHARED
from calibatt_compiler.plan.schema import (
    CalibrationInputs,
    ModelIdentity,
    PlanMetadata,
    Sampler,
    SiteRecord,
)
from calibatt_compiler.plan.stored import Entries, Entry
from calibatt_compiler.version import PRODUCER

SELECTION = 112
"""Bytes a block while one call is selected: its energy in float32, some ten arrays of 64 bits
(units, sort keys, their order and sorted units, running sums, what a GPU sorts in), and masks."""

OPERANDS = 8
"""Copies of the queries that one call may hold: output, joined branches, packed operands."""

SCORING = 9
"""Copies of the queries of one group of heads while its sparse form is computed: queries, keys and
values, the same in another order or packed, and outputs."""

SUMS, TILE = 32 * 2 * 8, 1 << 18
"""What a thread of the CPU kernel holds: bytes a key block, and bytes of its tile of queries."""

DERIVATION = 40
"""Bytes a block of one pattern while it is agreed upon and refined: votes, masks, intervals."""

COPIES = 3
"""How often the masks of an input are in memory while they are written: themselves, joined, and as
bytes. A plan's codes are there twice: one by one or themselves, and joined or as bytes."""

SMALL = 32 << 20
"""Bytes for records, names and everything else that does not grow with the number of blocks."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of one calibration, all from the shapes of its attention calls.

    Attributes:
        record: of an input, its arrays not yet known.
        keep_energies: see `CalibrationConfig`.
        anchor_rows: of the inputs that are scored for spatial repetition; 0 if none is.
    """

    record: InputRecord
    keep_energies: bool | Literal["coarse"]
    anchor_rows: int = 0

    def arrays(self, *, scored: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype as safetensors names it and shape of each array of an input, by name."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for size in self.record.sites:
            rows, columns = self._blocks(size)
            for step, votes in enumerate(self.record.votes[size.name]):
                shape = (votes, size.heads, rows, -(-columns // 8))
                found[f"{size.name}@{step}"] = ("U8", shape)
                if self.keep_energies:
                    energies = (votes, size.heads, rows, columns)
                    kind = "U8" if self.keep_energies == "coarse" else "F32"
                    found[f"{size.name}@{step}/energy"] = (kind, energies)
                if scored and self._copies(size):
                    found[f"{size.name}@{step}/{ARRAY}"] = ("F32", (4, votes, size.heads))
        return found

    def input_bytes(self, name: str, about: Mapping[str, object], *, scored: bool = False) -> int:
        """Bytes of the file of one input."""
        arrays = self.arrays(scored=scored)
        changes = {
            "name": name,
            "about": dict(about),
            "tensors": dict.fromkeys(arrays, "0" * 64),
            "anchor_rows": self.anchor_rows if scored else 0,
        }
        text = store.record_text(self.record.model_copy(update=changes))
        return safetensors_bytes(store.FORMAT, text, arrays)

    def plan_bytes(self, thresholds: Mapping[str, float], inputs: int) -> int:
        """Bytes of the plan's file if no two steps share a pattern and no code is shorter than
        what it stands for: at most. Calibrated masks take about a tenth of it.
        """
        steps = len(self.record.timesteps)
        sites = tuple(self._site(size, steps) for size in self.record.sites)
        copied = any(map(self._copies, self.record.sites))
        fixed_by = self.record.fixed_by
        model = self.record.model or ModelIdentity(class_name="", config_digest="0" * 64)
        used = {
            "repetition": copied,
            "fixed_by": fixed_by is not None,
            "model_entries": bool(model.entries),
        }
        figures = ["best_20_percent_share", "input_kept_mass", SHARED]
        metadata = PlanMetadata(
            producer=PRODUCER,
            model=model,
            grid=self.record.grid,
            requires=tuple(name for name, whether in used.items() if whether),
            sampler=Sampler(
                name=self.record.scheduler,
                timesteps=self.record.timesteps,
                sigmas=self.record.sigmas,
            ),
            thresholds=dict(thresholds),
            inputs=CalibrationInputs(count=inputs, digest="0" * 64),
            quality=dict.fromkeys([*figures, *([SHARE] * (self.anchor_rows > 0))], 0.123456),
            fixed_by=fixed_by,
            sites=sites,
        )
        arrays: dict[str, tuple[str, tuple[int, ...]]] = {}
        entries: dict[str, Entries] = {}
        for size in self.record.sites:
            bits = math.prod(self._bits(size))
            of_step: tuple[Entry, ...] = (("bits", "deflate/previous", bits // steps),)
            if self._copies(size):
                of_step += (("repetitive", "deflate/previous", size.heads),)
            entries[size.name] = (of_step,) * steps
            arrays[size.name] = ("U8", (sum(length for *_, length in of_step) * steps,))
        index = file.index({name: ("0" * 64, patterns) for name, patterns in entries.items()})
        return safetensors_bytes(file.FORMAT, f"{index}\n{file.to_json(metadata)}", arrays)

    def working_bytes(self, element_size: int, device: torch.device) -> int:
        """Most memory that observing one call takes on the model's device, beside the model.

        Args:
            element_size: bytes of an element of queries and keys.
            device: of the model.
        """
        return max(self._call_bytes(size, element_size, device) for size in self.record.sites)

    def host_bytes(self) -> int:
        """Most host memory that an input's masks and then the plan take, beside the model."""
        arrays = self.arrays(scored=True)
        on_disk = [name for name in arrays if name.endswith("/energy")]
        one_input = sum(_bytes(*arrays[name]) for name in arrays.keys() - on_disk)
        bits = [_bytes("U8", self._bits(size)) for size in self.record.sites]
        blocks = [size.heads * math.prod(self._blocks(size)) for size in self.record.sites]
        plan = 2 * sum(bits) + max(bits) + DERIVATION * max(blocks)
        return max(COPIES * one_input, plan) + SMALL

    def _call_bytes(self, size: SiteSize, element_size: int, device: torch.device) -> int:
        votes = max(self.record.votes[size.name])
        tokens = max(size.query_length, size.key_length)
        # The CPU kernel packs keys and values in float32 at least, channels in panels of 16.
        channels = -(-size.head_dim // 16) * 16 * max(4, element_size)
        operand = votes * size.heads * tokens * channels
        scores = (
            torch.get_num_threads() * (SUMS * -(-size.key_length // self.record.block[1]) + TILE)
            if device.type == "cpu"
            else 16 * min(CHUNK, votes * size.heads * size.query_length * size.key_length)
        )
        blocks = votes * size.heads * math.prod(self._blocks(size))
        return (
            SELECTION * blocks
            + OPERANDS * operand
            + max(scores, self._scoring(size, operand, device))
        )

    def _copies(self, size: SiteSize) -> bool:
        """Whether a call of a scored input has scores."""
        grid, text, rows = self.record.grid, self.record.text, self.anchor_rows
        return rows > 0 and copies_of(grid, size.query_length, text, rows) is not None

    def _scoring(self, size: SiteSize, operand: int, device: torch.device) -> int:
        """Bytes that scoring takes beside the output and the masks."""
        if not self._copies(size):
            return 0
        tokens = max(size.query_length, size.key_length)
        group = min(size.heads, heads_at_once(tokens, size.head_dim))
        one = operand // (max(self.record.votes[size.name]) * size.heads)
        lengths = size.key_length, size.head_dim
        return SCORING * group * one + similarity_bytes(self.record.grid, *lengths, device)

    def _bits(self, size: SiteSize) -> tuple[int, int, int, int]:
        rows, columns = self._blocks(size)
        return len(self.record.timesteps), size.heads, rows, -(-columns // 8)

    def _blocks(self, size: SiteSize) -> tuple[int, int]:
        block = self.record.block
        return -(-size.query_length // block[0]), -(-size.key_length // block[1])

    def _site(self, size: SiteSize, steps: int) -> SiteRecord:
        return SiteRecord(
            name=size.name,
            heads=size.heads,
            head_dim=size.head_dim,
            query_length=size.query_length,
            key_length=size.key_length,
            block_m=self.record.block[0],
            block_n=self.record.block[1],
            patterns=steps,
            digests=("0" * 64,) * steps,
            steps=tuple(range(steps)),
            density=(1 / 3,) * steps,
            head_forms="mixed" if self._copies(size) else "blocks",
            anchor_rows=self.anchor_rows if self._copies(size) else 0,
            repetitive=(size.heads,) * steps if self._copies(size) else (),
        )


def safetensors_bytes(
    key: str, value: str, arrays: Mapping[str, tuple[str, tuple[int, ...]]]
) -> int:
    """Bytes of a safetensors file.

    Args:
        key: of its one entry of metadata.
        value: text of that entry, which follows a digest and a line feed.
        arrays: dtype and shape by name; `U8` or `F32`.
    """
    header: dict[str, object] = {"__metadata__": {key: "0" * 64 + "\n" + value}}
    at = 0
    for name in sorted(arrays, key=lambda name: (arrays[name][0] != "F32", name)):
        dtype, shape = arrays[name]
        end = at + _bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return 8 + -(-len(text.encode()) // 8) * 8 + at


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return (4 if dtype == "F32" else 1) * math.prod(shape)
