"""How long a run will still take, by the steps and validations that it has made."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from newllm_lib.training.estimates import validations_left
from newllm_lib.training.observers import ObservedTrainer, Observer
from newllm_lib.training.step import StepResult


class TimeLeft(Observer):
    """Tells the trainer's progress after each step how long the rest will take: steps, validations and saving.

    `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._steps: deque[float] = deque(maxlen=64)
        self._validations: deque[float] = deque(maxlen=64)
        self._last: float | None = None
        self._validated = False
        self.expected_validation: float | None = None
        """Seconds of a validation with its saving, until one has been made; None where that is not known."""

    def on_validation_start(self, trainer: ObservedTrainer) -> None:
        """The time until the next step ends is of this too."""
        self._validated = True

    def on_step(self, trainer: ObservedTrainer, result: StepResult) -> None:
        """The time since the step before, and what it says of the rest."""
        now = self._clock()
        if self._last is not None:
            taken = now - self._last
            if not self._validated:
                self._steps.append(taken)
            elif self._steps:
                self._validations.append(max(0.0, taken - statistics.median(self._steps)))
        self._last, self._validated = now, False
        trainer.progress.time_left(self._seconds(trainer))

    def _seconds(self, trainer: ObservedTrainer) -> float | None:
        if not self._steps:
            return None
        setup, step = trainer.setup, trainer.state.step
        validation = statistics.median(self._validations) if self._validations else self.expected_validation or 0.0
        training = max(0, setup.total_steps - step) * statistics.median(self._steps)
        return training + validations_left(setup, step) * validation
