"""Who is told of what happens while a Trainer trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from newllm_lib.model.newllm import NewLLM
from newllm_lib.reporting.progress import Progress
from newllm_lib.training.setup import Setup
from newllm_lib.training.state import TrainState
from newllm_lib.training.step import StepResult


class ObservedTrainer(Protocol):
    """What an observer may read of a `Trainer`."""

    setup: Setup
    state: TrainState
    model: NewLLM
    progress: Progress
    on_step: Callable[[StepResult], None]
    on_validation: Callable[[bool], None]
    on_save: Callable[[], None]
    request_stop: Callable[[], None]


class Observer:
    """Told of each event of a training; every method does nothing until a subclass overrides it.

    Add one with `trainer.observers.append(observer)`. All are called in order, in the thread that trains, which waits
    for them. What one raises ends the training like any other error.
    """

    def on_step(self, trainer: ObservedTrainer, result: StepResult) -> None:
        """A batch was read and counted; its update was made, or skipped (FP16 only)."""

    def on_validation_start(self, trainer: ObservedTrainer) -> None:
        """A validation begins; until `on_validation` no step ends."""

    def on_validation(self, trainer: ObservedTrainer, row: dict[str, Any], improved: bool) -> None:
        """A row was added to the history; `improved`: its loss is the lowest so far, and the checkpoint is saved."""

    def on_save(self, trainer: ObservedTrainer) -> None:
        """One or more checkpoints were saved after a step; not called for the last one, with which `fit` returns."""


class ReportProgress(Observer):
    """Passes the events on to `trainer.progress`."""

    def on_step(self, trainer: ObservedTrainer, result: StepResult) -> None:
        """Step, epochs, loss (nats a token) and tokens a second."""
        state, setup = trainer.state, trainer.setup
        epochs, loss = state.epochs(setup.steps_per_epoch), result.nll / result.tokens
        trainer.progress.step(state.step, setup.total_steps, epochs, loss, state.tokens_per_second)

    def on_validation_start(self, trainer: ObservedTrainer) -> None:
        """The bar stands still from now on."""
        trainer.progress.evaluating()

    def on_validation(self, trainer: ObservedTrainer, row: dict[str, Any], improved: bool) -> None:
        """The new row."""
        trainer.progress.validated(row, improved)


class CallFunctions(Observer):
    """Calls the plain functions that were set as `trainer.on_step`, `.on_validation` and `.on_save`."""

    def on_step(self, trainer: ObservedTrainer, result: StepResult) -> None:
        """With the result."""
        trainer.on_step(result)

    def on_validation(self, trainer: ObservedTrainer, row: dict[str, Any], improved: bool) -> None:
        """With whether the loss is the lowest so far."""
        trainer.on_validation(improved)

    def on_save(self, trainer: ObservedTrainer) -> None:
        """Without anything."""
        trainer.on_save()
