"""Calibration of the pipeline, and our plans of each density, kept as files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fidelity_study.methods import FORMS, GAMMA, ORDERED
from fidelity_study.plans import Form, Recording
from fidelity_study.setting import Setting

from calibatt_compiler.calibration import CalibrationConfig, calibrate
from calibatt_compiler.plan import Plan


@dataclass
class OurPlans:
    """Makes plans from one calibration a token order; what is on disk is not made again."""

    pipe: Any
    setting: Setting
    folder: Path
    _recordings: dict[str, Recording] = field(default_factory=dict)

    def plan(self, method: str, density: float) -> Plan:
        """Return the plan of one of our methods."""
        order = self.setting.token_order if method == ORDERED else "raster"
        assert order is not None
        path = self.folder / f"{method}-{order}-{density:g}.calibatt"
        if not path.exists():
            form = FORMS.get(method, Form())
            self._recording(order).plan(density, form).save(path)
        return Plan.load(path)

    def _recording(self, order: str) -> Recording:
        if order not in self._recordings:
            setting = self.setting
            out = self.folder / f"calibrated-{order}.calibatt"
            # The plan is written last: without it the run goes on from its last finished input.
            if not out.exists():
                config = CalibrationConfig(
                    block=(setting.block, setting.block),
                    C=setting.C,
                    k=setting.k,
                    rho=setting.rho,
                    token_order=order,
                    gamma=GAMMA,
                    keep_energies=True,
                    inductor=setting.inductor,
                )
                calibrate(
                    self.pipe,
                    [case.prompt for case in setting.calibration],
                    [case.seed for case in setting.calibration],
                    out=out,
                    config=config,
                    **setting.arguments,
                )
            folder = Path(f"{out}.calibration")
            self._recordings[order] = Recording(folder, C=setting.C, k=setting.k, rho=setting.rho)
        return self._recordings[order]
