"""The stages of the comparison; each result is kept as soon as it is there."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from fidelity_study.methods import FLOOR, FORMS, GAMMA, ORDERED, OURS, MethodInputs, make
from fidelity_study.ours import OurPlans
from fidelity_study.patterns import Choices, Family, families
from fidelity_study.perceptual import Perceptual
from fidelity_study.plans import NoPlanError
from fidelity_study.profile import Profile
from fidelity_study.serve import Switch
from fidelity_study.setting import Setting
from fidelity_study.videos import OutOfTimeError, Videos

from calibatt_compiler.calibration.observe.attach import observed
from calibatt_compiler.calibration.pipeline import about_pipeline
from calibatt_compiler.evaluation.cases import Case
from calibatt_compiler.evaluation.quality import measure
from calibatt_compiler.files import write_text
from calibatt_compiler.plan import Plan

Result = Mapping[str, float | None]


@dataclass
class Study(Videos):
    """One pipeline, and the folder where results are kept.

    Attributes:
        pipe: a diffusers pipeline on its device.
        setting: what is compared.
        folder: where everything goes.
        perceptual: the distance by features; None leaves it out.
        deadline: of `time.monotonic`, after which no video is begun.
        absent: why a method has nothing to compare at a density, by `method|density`.
        results: by `Setting.key`: psnr (dB, None for equal videos), ssim, flicker, perceptual
            (None if it was left out), density (measured) and seconds of the video.
    """

    pipe: Any
    setting: Setting
    folder: Path
    perceptual: Perceptual | None = None
    deadline: float = math.inf
    results: dict[str, Result] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_identity(self.folder, self._identity())
        self.results = _read(self.folder / "results.json")
        self.absent = _read(self.folder / "absent.json")
        self.switch = Switch()

    def run(self) -> bool:
        """Do what is not done yet; return whether all of it is."""
        if not self.missing():
            return True
        self.pipe.set_progress_bar_config(disable=True)
        try:
            plans = self._our_plans()
            peers = families(plans[self.setting.densities[0], OURS].grid, self.setting.block)
            with observed(self.pipe.transformer, self.switch, self.setting.inductor):
                by_density = self._inputs(plans, peers)
                for case in self.setting.held_out:
                    self._compare(case, by_density)
        except OutOfTimeError as reached:
            print(f"out of time before {reached}; run again to go on", flush=True)
        return not self.missing()

    def missing(self) -> list[str]:
        """Keys of the results that are not there."""
        keys = [
            self.setting.key(name, density, case)
            for case in self.setting.held_out
            for density in self.setting.densities
            for name in self.methods(density)
        ]
        return [name for name in keys if name not in self.results]

    def methods(self, density: float) -> list[str]:
        """Names of what is compared at a density; the floor has none and stands at the first."""
        return [
            name
            for name in self.setting.methods
            if f"{name}|{density:g}" not in self.absent
            and (name != FLOOR or density == self.setting.densities[0])
        ]

    def _our_plans(self) -> dict[tuple[float, str], Plan]:
        ours = OurPlans(self.pipe, self.setting, self.folder)
        plans = {}
        for density in self.setting.densities:
            # The plan that all budgets come from is made in any case.
            wanted = {OURS, *self.methods(density)}
            for name in (name for name in (*FORMS, ORDERED) if name in wanted):
                try:
                    plans[density, name] = ours.plan(name, density)
                except NoPlanError as why:
                    if name == OURS:
                        raise SystemExit(str(why)) from why
                    self.absent[f"{name}|{density:g}"] = str(why)
                    write_text(self.folder / "absent.json", json.dumps(self.absent, indent=1))
                    print(f"{name} is left out: {why}", flush=True)
        return plans

    def _inputs(
        self, plans: Mapping[tuple[float, str], Plan], peers: Mapping[str, Family]
    ) -> dict[float, MethodInputs]:
        """Put together what methods are made from, with the variants that heads have chosen."""
        even = self.setting.even
        by_density = {
            density: MethodInputs(
                {n: p for (d, n), p in plans.items() if d == density}, peers, {}, even
            )
            for density in self.setting.densities
        }
        ending = "-even.json" if even else ".json"
        files = {density: self.folder / f"choices-{density:g}{ending}" for density in by_density}
        if not set(peers) & set(self.setting.methods):
            return by_density
        missing = {d: inputs.budget for d, inputs in by_density.items() if not files[d].exists()}
        if missing:
            self._check_time("the choice of variants")
            profile = Profile(peers, missing, plans[self.setting.densities[0], OURS])
            self._video(self.setting.calibration[0], profile)
            for density in missing:
                chosen = {name: profile.choices(density, name) for name in peers}
                write_text(files[density], json.dumps(chosen))
            print("variants of the peers' patterns are chosen", flush=True)
        for density, inputs in by_density.items():
            read: dict[str, Choices] = json.loads(files[density].read_text("utf-8"))
            by_density[density] = replace(inputs, choices=read)
        return by_density

    def _compare(self, case: Case, by_density: Mapping[float, MethodInputs]) -> None:
        """Measure all methods on one prompt and seed."""
        wanted = [
            (density, name)
            for density in by_density
            for name in self.methods(density)
            if self.setting.key(name, density, case) not in self.results
        ]
        if not wanted:
            return
        dense = self._dense(case)
        features = None if self.perceptual is None else self.perceptual.features(dense)
        for density, name in wanted:
            self._check_time(self.setting.key(name, density, case))
            method = make(name, by_density[density])
            began = time.monotonic()
            frames = self._video(case, method)
            seconds = time.monotonic() - began
            quality = measure(dense, frames, torch.device(self.pipe._execution_device))
            distance = None
            if self.perceptual is not None and features is not None:
                distance = self.perceptual.distance(features, self.perceptual.features(frames))
            self.results[self.setting.key(name, density, case)] = {
                "psnr": quality.psnr if math.isfinite(quality.psnr) else None,
                "ssim": quality.ssim,
                "flicker": quality.flicker,
                "perceptual": distance,
                "density": method.density(),
                "seconds": seconds,
            }
            write_text(self.folder / "results.json", json.dumps(self.results, indent=1))
            what = self.setting.key(name, density, case)
            print(f"{what}: {quality.psnr:.2f} dB, {seconds:.0f} s", flush=True)

    def _identity(self) -> dict[str, Any]:
        setting = asdict(self.setting)
        # Further densities, prompts, orders, budgets and methods can be added to what is there.
        for name in ("densities", "held_out", "token_order", "even", "only"):
            del setting[name]
        return {
            **about_pipeline(self.pipe),
            "dtype": str(self.pipe.transformer.dtype),
            "device": torch.device(self.pipe._execution_device).type,
            "perceptual": self.perceptual is not None,
            "gamma": GAMMA,
            **setting,
        }


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def check_identity(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Note down what the folder is of, or check that it is of the same.

    Raises:
        SystemExit: it holds results of something else.
    """
    path = folder / "run.json"
    text = json.dumps(wanted, indent=1, sort_keys=True, default=str)
    if not path.exists():
        write_text(path, text)
        return
    found, now = json.loads(path.read_text("utf-8")), json.loads(text)
    differing = sorted(name for name in {*found, *now} if found.get(name) != now.get(name))
    if differing:
        raise SystemExit(
            f"{folder} holds results of other settings ({', '.join(differing)}): choose another "
            "--out, or delete it"
        )
