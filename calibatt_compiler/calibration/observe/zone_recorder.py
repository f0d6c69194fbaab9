"""Observes the attention of a model for a plan of zones: energies in, sums of step groups out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from calibatt_compiler.calibration.observe.observation import InputObservation
from calibatt_compiler.calibration.observe.observer import ObservedModel
from calibatt_compiler.calibration.observe.recorder import BEST, AttentionRecorder
from calibatt_compiler.calibration.observe.sums_beside import SumsBeside
from calibatt_compiler.calibration.select.repetition_scores import AttentionCall
from calibatt_compiler.calibration.select.selection import best_share
from calibatt_compiler.calibration.select.zones.site import group_of
from calibatt_compiler.calibration.store.energies import EnergyBuffer
from calibatt_compiler.calibration.store.records import InputRecord, SiteSize
from calibatt_compiler.calibration.store.zone_sums import GroupSums, ZoneSums, units
from calibatt_compiler.errors import CalibrationError
from calibatt_compiler.plan.zones.form import video_blocks


class ZoneRecorder(AttentionRecorder):
    """Sums the energies of each site and step group, and adds an input's to those of the run.

    Of the input in progress the sums of the step group in progress are in memory, where they grow,
    and those of the groups before on disk, in the buffer.

    Args:
        model: what is observed.
        buffer: where sums of the input in progress lie.
        sums: of the run.
    """

    def __init__(self, model: ObservedModel, buffer: EnergyBuffer, sums: ZoneSums) -> None:
        super().__init__(model, buffer)
        self._total = sums
        self._sums: dict[str, dict[int, GroupSums]] = {}
        self._adding = SumsBeside()

    def begin(
        self, name: str, about: Mapping[str, Any], samples: int | None, *, scored: bool = False
    ) -> None:
        """Start an input; the arguments are those of `AttentionRecorder.begin`."""
        super().begin(name, about, samples, scored=scored)
        self._sums = {}

    def abandon(self) -> None:
        """Forget the input in progress, if there is one."""
        self._adding.drop()
        self._sums = {}
        super().abandon()

    def finish(self) -> tuple[InputRecord, dict[str, npt.NDArray[Any]]]:
        """End the input and add its sums to the run's; return its record, and no arrays.

        Raises:
            CalibrationError: nothing was observed, or not every site at every step.
        """
        record, arrays = super().finish()
        self._adding.settle()
        for site, groups in self._sums.items():
            self._total.add(record.name, site, groups)
        self._sums = {}
        self._buffer.clear()
        about = {"form": "zones", "step_groups": self._config.step_groups}
        return record.model_copy(update={**about, "thresholds": {}, "kept_mass": {}}), arrays

    def _select(
        self,
        run: InputObservation,
        size: SiteSize,
        step: int,
        energy: Tensor,
        steps: int,
        call: AttentionCall | None = None,
    ) -> None:
        group = group_of(run.positions[step], steps, self._config.step_groups)
        video = math.prod(self._grid(size.query_length))
        rows, columns = (
            slice(*video_blocks(length, video, block, self._text))
            for length, block in zip(self._lengths(size), self._config.block, strict=True)
        )
        self._check_text(size)
        inner = energy[:, :, rows, columns]
        groups = self._sums.setdefault(size.name, {})
        if group not in groups:
            shape = tuple(inner.shape[1:])
            self._adding.settle()
            for before in groups.values():
                before.squares = self._buffer.shelve(before.squares)
            groups[group] = GroupSums(np.zeros(shape, np.int64))
        squares = units(inner)
        value: Any = best_share(energy, BEST).mean((-1, -2)).sum().item()
        run.best_share[size.name, step] += value
        self._adding.add(groups[group], squares, len(energy))  # computed: the value has come

    def _lengths(self, size: SiteSize) -> tuple[int, int]:
        return size.query_length, size.key_length

    def _check_text(self, size: SiteSize) -> None:
        """Raise `CalibrationError` if blocks cut the video elsewhere than in the first input."""
        known = self._sites[size.name]
        pairs = zip(self._lengths(size), self._lengths(known), self._config.block, strict=True)
        if self._text == "first" and any((new - old) % block for new, old, block in pairs):
            raise CalibrationError(
                "sums of inputs whose blocks cut the video elsewhere can't be kept together",
                expected=f"{known.query_length} tokens at site {size.name}, or others by a "
                f"multiple of {self._config.block[0]}, for the text stands first",
                got=f"{size.query_length}",
                remedy="use prompts of one length in tokens",
            )
