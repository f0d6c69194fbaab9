"""The stages of the study; each result is kept as soon as it is there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from dino_study.measure import Method, features_error, layer_errors
from dino_study.methods import CORE, HIGHEST, ORACLE, POOLED, Setting, catalogue
from dino_study.order import raster_order, tile_order
from dino_study.record import record_frames
from dino_study.vit import Dino
from torch import Tensor

from calibatt_compiler.calibration.select.selection import best_share, covering_mask
from calibatt_compiler.files import write_text

MAIN_TILE = "8x8"
STAGES = ("layers", "features", "orders")
Image = Callable[[], Tensor]


class OutOfTimeError(Exception):
    """The time that a run was given is over; the next run goes on."""


@dataclass
class Study:
    """One network, its images and where results are kept."""

    net: Dino
    calibration: Sequence[Image]
    tests: Mapping[str, Image]
    grid: tuple[int, int]
    folder: Path
    densities: Sequence[float] = (0.5, 0.33, 0.2)
    orders: Sequence[str] = ("raster", "4x16", "16x4", "2x32")
    block: int = 64
    fits: bool = True
    """Record what weights are fitted to; it takes longer and a file of 80 MB or more a frame."""
    deadline: float = float("inf")
    """Of `time.monotonic`."""
    results: dict[str, dict[str, object]] = field(default_factory=dict)
    references: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.folder / "results.json"
        if path.exists():
            self.results = json.loads(path.read_text("utf-8"))

    def order(self, name: str) -> Tensor:
        """Return a token order by its name: raster, or rows x columns of a tile."""
        if name == "raster":
            return raster_order(self.grid)
        rows, columns = name.split("x")
        return tile_order(self.grid, (int(rows), int(columns)))

    def setting(self, order: str, density: float, *, gram: bool) -> Setting:
        """Return what a catalogue needs, recording the calibration frames if need be."""
        tokens = self.order(order)
        folder = self.folder / f"record-{order}"
        record = record_frames(self.net, self.calibration, tokens, self.block, folder, gram=gram)
        return Setting(record, tokens, self.grid, self.block, density)

    def _keep(self, key: str, make: Callable[[], dict[str, object]]) -> dict[str, object]:
        """Return the result of that name, made now unless it is there."""
        if key not in self.results:
            if time.monotonic() > self.deadline:
                raise OutOfTimeError(key)
            self.results[key] = make()
            write_text(self.folder / "results.json", json.dumps(self.results, indent=1))
            print(f"done: {key}", flush=True)
        return self.results[key]

    def _measure_layers(self, order: str, named: Sequence[tuple[float, Method]]) -> None:
        methods = [method for _, method in named]
        for name, image in self.tests.items():

            def make(image: Image = image) -> dict[str, object]:
                errors = layer_errors(self.net, image(), self.order(order), methods, self.block)
                return {
                    f"{density}|{method.name}": [method.cost, *row]
                    for (density, method), row in zip(named, errors.tolist(), strict=True)
                }

            self._keep(f"layers|{order}|{name}", make)

    def main_layers(self) -> None:
        """Per-layer errors of all methods in the main order."""
        if all(f"layers|{MAIN_TILE}|{name}" in self.results for name in self.tests):
            return
        named = []
        for density in self.densities:
            setting = self.setting(MAIN_TILE, density, gram=self.fits)
            named += [(density, method) for method in catalogue(setting)]
        self._measure_layers(MAIN_TILE, named)

    def features(self) -> None:
        """Errors of the final features, the core methods in all layers at once."""
        middle = sorted(self.densities, key=lambda d: abs(d - 0.33))
        for density in middle:
            wanted = [
                (method, name)
                for method in CORE
                for name in self.tests
                if f"features|{density}|{method}|{name}" not in self.results
            ]
            if not wanted:
                continue
            setting = self.setting(MAIN_TILE, density, gram=False)
            methods = {method.name: method for method in catalogue(setting)}
            for chosen, name in wanted:

                def make(
                    method: Method = methods[chosen], name: str = name, setting: Setting = setting
                ) -> dict[str, object]:
                    error = features_error(
                        self.net,
                        self.tests[name](),
                        setting.order,
                        method,
                        self.block,
                        self._reference(name),
                    )
                    return {"cost": method.cost, "error": error}

                self._keep(f"features|{density}|{chosen}|{name}", make)

    def _reference(self, name: str) -> Tensor:
        """Return the dense features of a test image, computed once a run."""
        if name not in self.references:
            self.references[name] = self.net(self.tests[name]())
        return self.references[name]

    def token_orders(self) -> None:
        """Energies and per-layer errors of a few methods in other token orders."""
        few = (HIGHEST, ORACLE, POOLED.format(1), POOLED.format(4))
        for order in (MAIN_TILE, *self.orders):
            self._keep(f"order|{order}", partial(self._concentration, order))
        for order in self.orders:
            if all(f"layers|{order}|{name}" in self.results for name in self.tests):
                continue
            named = [
                (density, method)
                for density in self.densities
                for method in catalogue(self.setting(order, density, gram=False))
                if method.name in few
            ]
            self._measure_layers(order, named)

    def _concentration(self, order: str) -> dict[str, object]:
        """Return how few blocks hold how much of the energy of single inputs, on average."""
        energies = self.setting(order, 0.5, gram=False).record.energies
        found: dict[str, object] = {
            f"best {share:g}": float(best_share(energies, share).mean()) for share in (0.1, 0.2)
        }
        for threshold in (0.7, 0.8, 0.9):
            kept = covering_mask(energies, threshold)[0]
            found[f"density at {threshold:g}"] = float(kept.float().mean())
        return found

    def run(self, stages: Sequence[str] = STAGES) -> bool:
        """Run what of these stages is not done yet; return whether all of it is."""
        with torch.inference_mode():
            try:
                if "layers" in stages:
                    self.main_layers()
                if "features" in stages:
                    self.features()
                if "orders" in stages:
                    self.token_orders()
            except OutOfTimeError as reached:
                print(f"out of time before {reached}; run again to go on", flush=True)
                return False
        return True
