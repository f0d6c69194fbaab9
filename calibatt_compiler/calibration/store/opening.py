"""Opening a run folder, by one process or by all ranks of a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibatt_compiler.calibration.config import CalibrationConfig
from calibatt_compiler.calibration.store.ranks import Ranks
from calibatt_compiler.calibration.store.run_folder import RunStore
from calibatt_compiler.errors import CalibrationError

OWN_TO_A_RANK = {"progress", "run_folder", "inductor"}
"""Settings that may differ between ranks."""


@contextmanager
def opened(
    config: CalibrationConfig, identity: Mapping[str, Any], ranks: Ranks, task: object
) -> Iterator[tuple[RunStore, tuple[str, ...]]]:
    """Open the run folder on all ranks; without one in the settings, a temporary one.

    Args:
        config: settings.
        identity: all that the run depends on.
        ranks: that open it.
        task: what else all ranks must have in common, as JSON values.

    Yields:
        The folder and the names of the inputs that were finished before, the same on all ranks.

    Raises:
        CalibrationError: the folder is in use or belongs to another run, or the ranks don't agree.
    """
    settings = {name: v for name, v in asdict(config).items() if name not in OWN_TO_A_RANK}
    task = json.loads(json.dumps([task, settings], default=str))
    with ExitStack() as stack:
        store: RunStore | None = None

        def lead() -> dict[str, Any]:
            nonlocal store
            folder = config.run_folder
            if folder is None:
                temporary = tempfile.TemporaryDirectory(prefix="calibatt-")
                folder = Path(stack.enter_context(temporary)) / "run"
            store = RunStore(Path(folder).absolute())
            stack.callback(store.close)
            store.open(identity, restart=config.restart, shared=ranks.size > 1)
            stack.enter_context(ranks.working_in(store.folder))
            return {"folder": str(store.folder), "finished": store.names(), "task": task}

        def join(said: Mapping[str, Any]) -> None:
            nonlocal store
            if said["task"] != task:
                raise CalibrationError(
                    "the ranks of a calibration were asked for different things",
                    expected=said["task"],
                    got=task,
                    remedy="make the same call, with the same prompts and settings, on every rank",
                )
            store = RunStore(said["folder"])
            stack.callback(store.close)
            store.join(identity)
            stack.enter_context(ranks.working_in(store.folder))

        said = ranks.meet(lead, join)
        assert store is not None
        yield store, tuple(said["finished"])
