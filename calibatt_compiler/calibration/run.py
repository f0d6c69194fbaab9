"""Calibration of any module: `with calibration(module, config) as run`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch

from calibatt_compiler.arguments import require
from calibatt_compiler.calibration.config import (
    AUTO,
    CalibrationConfig,
    SelectionConfig,
    checked_config,
)
from calibatt_compiler.calibration.observe.observation import Branch
from calibatt_compiler.calibration.observe.observer import ObservedModel
from calibatt_compiler.calibration.observe.pipelines import FirstStepDone
from calibatt_compiler.calibration.observe.recorder import AttentionRecorder
from calibatt_compiler.calibration.observe.zone_recorder import ZoneRecorder
from calibatt_compiler.calibration.order_search.search import Surveyor, settled
from calibatt_compiler.calibration.select.derive import derive_plan
from calibatt_compiler.calibration.select.zones.plans import derive_zone_plan
from calibatt_compiler.calibration.store import identity
from calibatt_compiler.calibration.store.energies import EnergyBuffer
from calibatt_compiler.calibration.store.opening import opened
from calibatt_compiler.calibration.store.ranks import Ranks
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.calibration.store.zone_sums import ZoneSums
from calibatt_compiler.errors import CalibrationError, OptionError
from calibatt_compiler.logs import logger
from calibatt_compiler.model.families import unwrap
from calibatt_compiler.plan import Plan
from calibatt_compiler.plan.schema import CfgMode

log = logger("calibration")


class CalibrationRun:
    """A calibration under way; made by `calibration`, not by hand.

    Attributes:
        config: its settings.
        folder: where finished inputs are kept.
        begun_with: names of the inputs that were stored before; equal on all ranks.
    """

    def __init__(
        self,
        config: CalibrationConfig,
        store: RunStore,
        recorder: AttentionRecorder,
        begun_with: tuple[str, ...] = (),
        *,
        cfg: CfgMode = "none",
        arguments: object = None,
    ) -> None:
        self.config = config
        self.folder = store.folder
        self.begun_with = begun_with
        self._store = store
        self._recorder = recorder
        self._cfg: CfgMode = cfg
        self._arguments = arguments
        self._inside = False
        self._unnamed = 0
        # What counts is what was there at the start and what was observed since, whatever else
        # becomes of the folder.
        self._finished = set(begun_with)

    @property
    def finished(self) -> tuple[str, ...]:
        """Names of the inputs that are stored, of earlier processes too."""
        return tuple(sorted(self._finished))

    def has(self, name: str) -> bool:
        """Whether an input of this name is stored: its model calls can be left out."""
        return name in self._finished

    def written(self, name: str) -> bool:
        """Whether the file of an input is there, by this or another rank."""
        return self._store.has(name)

    @contextmanager
    def input(
        self,
        name: str | None = None,
        *,
        about: Mapping[str, Any] | None = None,
        samples: int | None = None,
        scored: bool | None = None,
    ) -> Iterator[None]:
        """Observe one input: run the module over all its steps within this context.

        The input is stored when the context ends; if it ends by an exception, nothing is. An
        input that is stored already is not observed again.

        Args:
            name: of the input; default a running number.
            about: JSON values that say what it is, part of the plan's digest of inputs.
            samples: videos generated at once; a call with twice as many is taken for both
                branches of guidance where the branch says so. Each sample votes on its own.
            scored: measure spatial repetition too, if the settings have a `gamma`. Default: as
                long as fewer than `similarity_inputs` inputs of the run were.

        Raises:
            CalibrationError: within another input; nothing or not all was observed; sizes or
                timesteps other than those of the inputs before.
        """
        if self._inside:
            raise CalibrationError(
                "an input can't begin within another",
                expected="one `with run.input():` after the other",
                got="nested ones",
                remedy="end the first before the second",
            )
        if name is None:
            name, self._unnamed = f"{self._unnamed:05d}", self._unnamed + 1
        about = {"name": name} if about is None else identity.describe(about)
        self._inside = True
        try:
            if self._already(name, about):
                yield
                return
            self._recorder.begin(name, about, samples, scored=self._scores(scored))
            with torch.no_grad():
                yield
            record, arrays = self._recorder.finish()
            self._store.write(record, arrays)
            self._finished.add(name)
            if self._recorder.reference is None:
                self._recorder.reference = record
        finally:
            self._recorder.abandon()
            self._inside = False

    def _scores(self, wanted: bool | None) -> bool:
        if self.config.gamma is None:
            return False
        if wanted is not None:
            return wanted
        scored = sum(self._store.record(name).anchor_rows > 0 for name in self._finished)
        return scored < self.config.similarity_inputs

    def _already(self, name: str, about: Mapping[str, Any]) -> bool:
        if name not in self._finished:
            if not self._store.has(name):
                return False
            raise CalibrationError(
                f"a file of input {name} came into the run folder while the run was under way",
                expected="nobody else to write there",
                got=f"a file in {self.folder} that this run did not write",
                remedy="remove it, and run the same command again",
            )
        stored = self._store.record(name).about
        if stored != about:
            raise CalibrationError(
                f"input {name} of this run was something else",
                expected=stored,
                got=dict(about),
                remedy="keep prompts, seeds and their order when a run goes on; restart the run "
                "(--restart, CalibrationConfig(restart=True)) to change them",
            )
        return True

    @contextmanager
    def branch(self, branch: Branch) -> Iterator[None]:
        """Say which branch of classifier-free guidance the calls within are.

        Args:
            branch: `conditional`, `unconditional`, or `batched` (unconditional samples first,
                conditional ones second). Outside of this context every sample counts.
        """
        with self._recorder.calls_are(branch):
            yield

    def learn_sizes(self, first_step: Callable[[], None], samples: int | None = None) -> None:
        """Take the sizes of the attention calls from an input that another rank observes.

        All masks are stored for the text length of the run's first input. Models whose text
        stands apart from the video have no such length, and nothing is done; nor is it if an
        input is stored.

        Args:
            first_step: runs the first step of that input; may raise `FirstStepDone`.
            samples: see `input`.
        """
        if not self._recorder.joint or self._recorder.reference is not None:
            return
        self._recorder.begin("first", {}, samples)
        try:
            with torch.no_grad(), suppress(FirstStepDone):
                first_step()
        finally:
            self._recorder.abandon()

    def discard(self) -> None:
        """Delete the run folder: nothing can be resumed or selected again."""
        self._store.remove()

    def plan(
        self,
        *,
        raised: Mapping[str, float] | None = None,
        names: tuple[str, ...] | None = None,
        **settings: Any,
    ) -> Plan:
        """Make the plan from the stored inputs; may be called several times.

        A run for zones takes the settings of zones alone.

        Args:
            raised: by site, what is added to its threshold, see `plan_from_run`, or of zones the
                factor of its energies, see `zone_plan_from_run`.
            names: the inputs that count; default all.
            **settings: of `SelectionConfig`, by name, in the place of the configured ones. Other
                `A`, `C` and `k` need `keep_energies`, `gamma` a run that recorded repetition.

        Raises:
            CalibrationError: nothing stored, or energies were not kept.
            OptionError: a value out of range.
        """
        names = self.finished if names is None else names
        selection = SelectionConfig.of(self.config, **settings)
        about: dict[str, Any] = {"cfg": self._cfg, "arguments": self._arguments}
        if selection.zoned:
            zones = selection.zones()
            return derive_zone_plan(self._store, names, zones, raised=raised, **about)
        return derive_plan(self._store, names, selection, raised=raised, **about)


@contextmanager
def calibration(
    module: torch.nn.Module, config: CalibrationConfig | None = None
) -> Iterator[CalibrationRun]:
    """Calibrate any module whose attention is `scaled_dot_product_attention`.

    The module is compiled in recording mode while the context lasts and is left as it was.
    Without `config.run_folder`, what was recorded is lost with the context; with it, a killed run
    goes on: inputs that `run.has(name)` need not be run again.

    Args:
        module: takes a `timestep`, as diffusers' transformers do.
        config: settings; default `CalibrationConfig()`.

    Yields:
        The run: call the module within `run.input()`, then ask for `run.plan()`.

    Raises:
        CalibrationError: the run folder is in use or belongs to another calibration.
        OptionError: the token order is `auto`; `calibration.survey` chooses one beforehand.
    """
    require(isinstance(module, torch.nn.Module), "module", module, "a torch.nn.Module")
    config = checked_config(config)
    if config.token_order == AUTO:
        raise OptionError(
            "a bare module's token order can't be chosen on the way",
            expected="the name of an order, such as raster or 2x8xall",
            got=repr(AUTO),
            remedy="choose it before: config = replace(config, token_order="
            "calibatt_compiler.calibration.survey(module, run_first_input, config).chosen)",
        )
    model = ObservedModel(module=unwrap(module), config=config)
    about = {"kind": "module", "weights": identity.weights_fingerprint(model.module)}
    with recording(model, about) as run:
        yield run


@contextmanager
def recording(
    model: ObservedModel,
    about: Mapping[str, Any],
    *,
    cfg: CfgMode = "none",
    arguments: object = None,
    ranks: Ranks | None = None,
    task: object = None,
    surveyor: Surveyor | None = None,
) -> Iterator[CalibrationRun]:
    """Open the run folder, compile the module in recording mode, undo both at the end.

    Args:
        model: what is observed.
        about: JSON values that the run depends on beside model and settings.
        cfg: how the sampler runs guidance.
        arguments: JSON values common to all inputs.
        ranks: that calibrate together; None: this process alone.
        task: JSON values that all ranks must have in common beside what the run depends on.
        surveyor: measures token orders if one is to be chosen.
    """
    ranks = ranks or Ranks()
    config = model.config
    whole = identity.of_run(model.module, config, about, cfg, arguments)
    with opened(config, whole, ranks, task) as (store, finished):
        if config.token_order == AUTO:
            assert surveyor is not None
            survey = settled(store.folder, surveyor, ranks, finished)
            config = replace(config, token_order=survey.chosen)
            model = replace(model, config=config)
        # Ranks that buffer side by side must not meet.
        waiting = store.folder / (f"spool-{ranks.rank}" if ranks.rank else "spool")
        buffer = EnergyBuffer(waiting)
        recorder = (
            ZoneRecorder(model, buffer, ZoneSums(store.folder, ranks.rank))
            if config.zoned
            else AttentionRecorder(model, buffer)
        )
        if finished:
            recorder.reference = store.record(finished[0])
        with model.shown_to(recorder):
            yield CalibrationRun(config, store, recorder, finished, cfg=cfg, arguments=arguments)
