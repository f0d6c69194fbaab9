"""Trains the model of `examples/tiny_wan` that a comparison is to use, by its own scripts.

One call does as much as its time allows: footage, then autoencoder, then transformer, then the
pipeline's folder. The next call goes on from the checkpoints. What a machine without network needs
to go on is below `examples/tiny_wan/work/<size>`: `clips`, `vae`, `dit`; latents are made anew if
they are not there.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny_wan"
LEAST_SECONDS = 20.0
"""With less left a stage is not begun."""

if str(EXAMPLE) not in sys.path:
    sys.path.append(str(EXAMPLE))  # its modules import one another by plain names

from checkpoint import read_meta  # noqa: E402
from settings import SIZES, ModelSize  # noqa: E402


class Training:
    """One run, limited in time.

    Args:
        size: name of the model's size.
        run_seconds: of this run.
        vae_seconds: training time of the autoencoder over all runs; default: the size's.
        seconds: training time of the transformer over all runs; default: the size's.
        extra: further arguments of both trainings.
        least: seconds with less of which no stage is begun.
    """

    def __init__(
        self,
        size: str,
        run_seconds: float,
        *,
        vae_seconds: float | None = None,
        seconds: float | None = None,
        extra: tuple[str, ...] = (),
        least: float = LEAST_SECONDS,
    ) -> None:
        self.size: ModelSize = SIZES[size]
        self._vae_seconds = self.size.vae_seconds if vae_seconds is None else vae_seconds
        self._seconds = self.size.seconds if seconds is None else seconds
        self._end = time.monotonic() + run_seconds
        self._extra = extra
        self._least = least

    @property
    def left(self) -> float:
        """Seconds of this run."""
        return self._end - time.monotonic()

    def run(self) -> bool:
        """Do what there is time for; return whether the pipeline is there."""
        size = self.size
        if not size.clips.exists():
            self._script("prepare_data.py")
        stages = (
            ("train_vae.py", size.vae_dir, self._vae_seconds),
            ("train.py", size.dit_dir, self._seconds),
        )
        for script, folder, seconds in stages:
            done = trained(folder, seconds)
            if done and (size.latents.exists() or script != "train_vae.py"):
                continue
            if self.left >= self._least:
                limits = ("--run-seconds", f"{self.left:.0f}", "--seconds", f"{seconds:g}")
                self._script(script, *limits, *self._extra)
            if not trained(folder, seconds):
                print(f"{size.name}: there is more to do; run the same command again")
                return False
        if not (size.model_dir / "model_index.json").exists():
            self._script("export.py")
        print(f"{size.name}: finished, the pipeline is {size.model_dir}")
        return True

    def _script(self, name: str, *arguments: str) -> None:
        command = [sys.executable, str(EXAMPLE / name), "--size", self.size.name, *arguments]
        subprocess.run(command, check=True)


def trained(folder: Path, seconds: float) -> bool:
    """Whether a checkpoint has had its training time."""
    meta = read_meta(folder)
    return meta is not None and meta["seconds"] >= seconds
