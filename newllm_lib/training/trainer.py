"""`Trainer.fit`: batch after batch, validations and checkpoints between them, stopped and continued at any step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.amp import GradScaler

from newllm_lib.errors import PartialUpdateError, TrainingError
from newllm_lib.evaluation import evaluate_split
from newllm_lib.model.newllm import NewLLM
from newllm_lib.reporting.progress import Progress
from newllm_lib.system.buffer_pool import BUFFERS
from newllm_lib.system.hardware import cpu_threads
from newllm_lib.system.memory import is_out_of_memory, peak_memory_bytes, reset_peak_memory
from newllm_lib.training import schedule, skips
from newllm_lib.training.batches import Batches, ids_are_below, mix_seed
from newllm_lib.training.checkpoint import Checkpoints
from newllm_lib.training.early_stopping import EarlyStopping
from newllm_lib.training.estimates import FAR_APART
from newllm_lib.training.graph_choice import choose_graph
from newllm_lib.training.interrupt import StopRequest
from newllm_lib.training.micro_batches import AdaptiveMicroBatch
from newllm_lib.training.observers import CallFunctions, Observer, ReportProgress
from newllm_lib.training.saving import Saver, make_payload, restore_payload
from newllm_lib.training.setup import Setup
from newllm_lib.training.state import TrainState
from newllm_lib.training.step import StepResult, TrainingStep
from newllm_lib.training.time_left import TimeLeft


@dataclass
class ValidationTime:
    """What a validation took, in seconds."""

    scoring: float
    saving: float = 0.0
    """The best checkpoint, and what observers write."""


class Trainer:
    """Trains a model as a Setup says, keeps checkpoints, and can be stopped and continued at any step.

    `observers` are told of each step, validation and save, in order. `on_step(result)`, `on_validation(improved)` and
    `on_save()` are one plain function for each of these events; setting one again replaces it.
    """

    def __init__(self, setup: Setup, model: NewLLM, checkpoints: Checkpoints, progress: Progress | None = None):
        """model: on the setup's device; it is trained in place."""
        self.setup, self.model, self.checkpoints = setup, model, checkpoints
        self.progress = progress or Progress()
        self.time_left = TimeLeft()
        self.observers: list[Observer] = [self.time_left, ReportProgress(), CallFunctions()]
        self.on_step: Callable[[StepResult], None] = lambda result: None
        self.on_validation: Callable[[bool], None] = lambda improved: None
        self.on_save: Callable[[], None] = lambda: None
        train = setup.config.train
        self.training_step = TrainingStep.for_run(setup, model)
        self.training_step.ids_checked = ids_are_below(setup.train_split, setup.config.model.vocab_size)
        self.optimizers = self.training_step.optimizers
        decay_steps = train.decay_steps or setup.total_steps
        self.state = TrainState(decay_steps=decay_steps, warmup_steps=schedule.warmup_of(train, decay_steps))
        self.context: Tensor | None = None
        self._batches = Batches(setup.train_split, train.batch_size, train.seed, setup.machine.device)
        self._early_stopping = EarlyStopping(train.patience, train.min_delta)
        self._saver = Saver(checkpoints)
        self._stop = StopRequest(self.progress)
        self.validation_times: deque[ValidationTime] = deque(maxlen=64)
        """What the last validations of this process took."""
        self._scored_at = 0.0
        self._mid_step = False  # whether an exception may have left a step half done
        common = {"machine": setup.machine, "log": self.progress.message}
        rows, whole = train.micro_batch_size or train.batch_size, f"the batch of {train.batch_size}"
        self._micro_batch = AdaptiveMicroBatch(rows, "training", whole, "micro_batch_size", **common)
        rows, whole = train.eval_batch_size, "what is scored"
        self._eval_batch = AdaptiveMicroBatch(rows, "validation", whole, "eval_batch_size", **common)

    @property
    def scaler(self) -> GradScaler:
        """The loss scale of FP16; disabled in other formats."""
        return self.training_step.scaler

    def fit(self) -> str:
        """Train to the end of the plan; returns 'finished', 'stopped early' or 'interrupted'.

        Ctrl-C, SIGTERM or SIGHUP ends the step, saves and returns; a second Ctrl-C stops at once. Where memory runs
        out, the same batch comes again in smaller parts. Raises TrainingError when the loss or the weights are no
        longer finite, or memory does not suffice for one sequence.
        """
        self._saver = Saver(self.checkpoints)
        if self._mid_step:
            self._restore_newest()
        self._saver.begin(self.payload)
        self.model.train()
        reset_peak_memory(self.setup.machine)
        if self.training_step.graph is None:
            chosen = choose_graph(self.setup, self.model, self._batches)
            self.training_step.graph = chosen.graph
            if chosen.reason:
                self.progress.message(chosen.reason)
        self._mid_step = True
        with self._stop.listening(), cpu_threads(self.setup.machine.threads), BUFFERS.kept():
            while not (ended := self.ended()) and not self._stop.requested:
                self._train_batch()
            self._mid_step = False
            if not ended:
                self._save_step()
                return "interrupted"
        self._save(self.checkpoints.final)
        return ended

    def request_stop(self) -> None:
        """Let `fit` end after the step it is in, as Ctrl-C does."""
        self._stop.requested = True

    def ended(self) -> str:
        """'finished' or 'stopped early' when nothing is left to train, else ''."""
        train, state = self.setup.config.train, self.state
        if state.step >= self.setup.total_steps or (train.epochs and state.epoch >= train.epochs):
            return "finished"  # by epochs where skipped steps leave fewer updates than planned
        return "stopped early" if self._early_stopping.is_due(state) else ""

    def _train_batch(self) -> None:
        """One batch, and whatever is due after it: a validation, a checkpoint."""
        saves, started = self._saver.saves, time.perf_counter()
        self._follow_schedule()
        result = self._step()
        if result is None:
            return
        epoch_ended = self._count(result, time.perf_counter() - started)
        self._notify("on_step", result)
        validated = self._validation_is_due(result, epoch_ended)
        if validated:
            self._validate()
        self._save_if_due(epoch_ended)
        if self._saver.saves > saves:
            self._notify("on_save")
        if validated:
            self.validation_times[-1].saving = time.perf_counter() - self._scored_at

    def _follow_schedule(self) -> None:
        """Learning rate and clipping of the next step."""
        state, train = self.state, self.setup.config.train
        self.training_step.set_lr(schedule.rate_factor(state.step, train, state.decay_steps, state.warmup_steps))
        self.training_step.clip = schedule.clip_norm(state.epoch, train)

    def _step(self) -> StepResult | None:
        """One update by the next batch; None where memory ran out, and the batch is to come again in smaller parts."""
        train, state = self.setup.config.train, self.state
        self.training_step.micro_batch = self._micro_batch.rows
        try:
            ids = self._batches.read(state.epoch, state.batch)
            seed = mix_seed(train.seed, state.epoch, state.batch)
            return self.training_step(ids, dropout_seed=seed, context=self.context)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure, partial_update = str(error), isinstance(error, PartialUpdateError)
        # only here is the error gone, and with its traceback the tensors of the failed step
        self.model.zero_grad(set_to_none=True)
        self.training_step.graph = None  # and with it the memory of its pass
        self._micro_batch.halve(min(self._micro_batch.rows, train.batch_size), failure)
        if partial_update:
            self._restore_newest()
            self.progress.message(f"memory ran out during the update: resumed from step {self.state.step:,}")
        return None

    def _count(self, result: StepResult, seconds: float) -> bool:
        """Add a step to the state; True when it ended an epoch. TrainingError where skips leave no hope."""
        state, limit = self.state, self.setup.config.train.max_skipped_steps
        state.count(result, seconds, limit)
        if result.skipped:
            # of this step: it was lowered since
            loss_scale = self.scaler.get_scale() / self.scaler.get_backoff_factor()
            if why := skips.diagnosis(state.recent_skips, limit, loss_scale, result.not_finite):
                raise TrainingError(why)
        self.context = result.context if self.setup.train_split.carries_context else None
        if epoch_ended := state.batch == self.setup.steps_per_epoch:
            state.epoch, state.batch, self.context = state.epoch + 1, 0, None
        return epoch_ended

    def _validation_is_due(self, result: StepResult, epoch_ended: bool) -> bool:
        """At the end of an epoch and of the run, and every so many updates, but not a step before or after another."""
        setup, step, every = self.setup, self.state.step, self.setup.config.train.validate_every_steps
        if epoch_ended or step >= setup.total_steps:
            return True
        if not every or step % every or result.skipped:
            return False
        to_the_end = min(setup.total_steps - step, setup.steps_per_epoch - self.state.batch)
        since = step - self.state.history[-1]["step"] if self.state.history else step
        return every < FAR_APART or min(to_the_end, since) > 1

    def _validate(self) -> None:
        """Score the validation split, add a row to the history, keep the best weights."""
        setup, state, training_step = self.setup, self.state, self.training_step
        self._notify("on_validation_start")
        started = time.perf_counter()
        scores = evaluate_split(
            self.model,
            setup.validation_split,
            precision=setup.precision,
            batch_size=self._eval_batch.rows,
            engine=setup.engine.run,
            fewer=self._eval_batch.halve,
            each=self.progress.validating,
        )
        self._scored_at = time.perf_counter()
        self.validation_times.append(ValidationTime(self._scored_at - started))
        row = state.add_row(
            scores,
            steps_per_epoch=setup.steps_per_epoch,
            lr=setup.rate.value * training_step.lr_factor,
            clip=training_step.clip,
            peak_memory_bytes=peak_memory_bytes(setup.machine),
        )
        self._early_stopping.observe(state, scores.loss)
        improved = state.keep_best(scores.loss)
        if improved:
            self._save(self.checkpoints.best)
        self._notify("on_validation", row, improved)

    def _notify(self, event: str, *details: Any) -> None:
        """Call the method of this name of every observer."""
        for observer in tuple(self.observers):  # one may add or remove others
            getattr(observer, event)(self, *details)

    def _save_if_due(self, epoch_ended: bool) -> None:
        """After so many epochs, and where the last save is so many minutes ago."""
        train = self.setup.config.train
        if epoch_ended and self.state.epoch % train.checkpoint_every_epochs == 0:
            self._save(self.checkpoints.epoch(self.state.epoch))
        elif self._saver.minutes_since_save() >= train.checkpoint_every_minutes:
            self._save_step()

    def _save(self, path: Path) -> None:
        self._saver.save(path, self.payload())

    def _save_step(self) -> None:
        self._saver.save_step(self.payload())

    def payload(self) -> dict[str, Any]:
        """Everything that `restore` needs to continue as if nothing had happened."""
        return make_payload(self.checkpoints.run, self.setup, self.training_step, self.state, self.context)

    def restore(self, payload: dict[str, Any], path: Path) -> None:
        """Continue from a payload of the same run; CheckpointError as of `restore_payload`."""
        self.state, self.context = restore_payload(payload, path, self.setup, self.training_step)

    def _restore_newest(self) -> None:
        """Back to the newest checkpoint, or to the beginning: what is in memory may be half of a step."""
        found = self._saver.newest(self.progress.message)
        if found is None:
            raise TrainingError("an earlier fit ended within a step and left no checkpoint: make a new Trainer")
        path, payload = found
        self.restore(payload, path)
