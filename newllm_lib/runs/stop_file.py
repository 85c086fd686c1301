"""A file in a run's folder that stops its training: for where no interrupt reaches it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from newllm_lib.training.observers import ObservedTrainer, Observer
from newllm_lib.training.step import StepResult

STOP = "stop"
"""Name of the file."""
_SECONDS = 0.5
"""Between two looks."""


class StopFile(Observer):
    """Stops and saves a training, as an interrupt does, once somebody creates the file; the file is then removed.

    One that lies there when training begins is of an earlier run, and is removed.
    """

    def __init__(self, folder: Path):
        self._path = folder / STOP
        self._next = 0.0
        self._remove()

    def on_step(self, trainer: ObservedTrainer, result: StepResult) -> None:
        """Looks for the file, at most twice a second."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _SECONDS
        if self._path.exists():
            self._remove()
            trainer.progress.message(f"{self._path} was there: stopping after this step, then saving")
            trainer.request_stop()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
