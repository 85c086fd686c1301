"""`Trainer.fit`: batch after batch, validations and checkpoints between them, stopped and continued at any step."""

from __future__ import annotations

import dataclasses
import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from newllm_lib.errors import CheckpointError, PartialUpdateError, TrainingError
from newllm_lib.evaluation import evaluate_split
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.pretrained import load_weights
from newllm_lib.reporting.progress import Progress
from newllm_lib.system.buffer_pool import BUFFERS
from newllm_lib.system.hardware import cpu_threads
from newllm_lib.system.memory import is_out_of_memory, peak_memory_bytes, reset_peak_memory
from newllm_lib.training import schedule, skips
from newllm_lib.training.batches import epoch_order, mix_seed
from newllm_lib.training.checkpoint import Checkpoints, check_payload, save_checkpoint
from newllm_lib.training.compatibility import difference, needs_new_end
from newllm_lib.training.interrupt import StopRequest
from newllm_lib.training.micro_batches import Portion
from newllm_lib.training.optimizers import make_optimizers, set_rates
from newllm_lib.training.rng import generator_states, restore_generators
from newllm_lib.training.setup import Setup
from newllm_lib.training.step import StepResult, optimizer_step


@dataclass
class TrainState:
    """Everything about a run's progress that is not a tensor of the model or an optimizer."""

    step: int = 0
    """Updates made; a skipped one does not count."""
    epoch: int = 0
    """Epochs ended."""
    batch: int = 0
    """Batches of the current epoch that were read."""
    train_seconds: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    recent_skips: list[int] = field(default_factory=list)
    """Of the last attempts, 1 for each that was skipped: what `skips.diagnosis` looks at."""
    best_loss: float = math.inf
    best_step: int = 0
    patience_loss: float = math.inf
    """Validation loss that the next one must undercut by min_delta."""
    stale_validations: int = 0
    nll_since_row: float = 0.0
    tokens_since_row: int = 0
    seconds_since_row: float = 0.0
    decay_steps: int = 0
    """Step at which a decaying rate reaches its end, fixed when the run starts."""
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains a model as a Setup says, keeps checkpoints, and can be stopped and continued at any step."""

    def __init__(self, setup: Setup, model: NewLLM, checkpoints: Checkpoints, progress: Progress | None = None):
        self.setup, self.model, self.checkpoints = setup, model, checkpoints
        self.progress = progress or Progress()
        self.on_validation: Callable[[bool], None] = lambda best: None
        self.on_step: Callable[[StepResult], None] = lambda result: None
        self.on_save: Callable[[], None] = lambda: None
        train = setup.config.train
        self.optimizers = make_optimizers(model, train, setup.rate.value)
        enabled = setup.precision.name == "fp16"
        self.scaler = torch.amp.GradScaler(setup.machine.kind, enabled=enabled)
        self.state = TrainState(decay_steps=train.decay_steps or setup.total_steps)
        self.context: Tensor | None = None
        self._ids = torch.from_numpy(setup.train_split.ids).to(setup.machine.device)
        self._stop = StopRequest(self.progress)
        self._last_save = time.monotonic()
        self._torn = False  # whether an exception may have left a step half done
        at_once = {"machine": setup.machine, "tell": self.progress.message}
        whole, rows = f"the batch of {train.batch_size}", train.micro_batch_size or train.batch_size
        self._portion = Portion(rows, "training", whole, "micro_batch_size", **at_once)
        self._validation_portion = Portion(
            train.eval_batch_size, "validation", "what is scored", "eval_batch_size", **at_once
        )
        self._beginning: bytes | None = None  # what a checkpoint would hold, until there is one

    def fit(self) -> str:
        """Train to the end of the plan; returns 'finished', 'stopped early' or 'interrupted'.

        Ctrl-C or SIGTERM ends the step, saves and returns; a second Ctrl-C stops at once. Where memory runs out, the
        same batch comes again in smaller parts. Raises TrainingError when the loss is no longer finite, or memory does
        not suffice for one sequence.
        """
        self._beginning = None
        if self._torn:
            self._restore_newest()
        if not self.checkpoints.files():
            torch.save(self.payload(), buffer := io.BytesIO())
            self._beginning = buffer.getvalue()
        self.model.train()
        reset_peak_memory(self.setup.machine)
        self._last_save = time.monotonic()
        self._torn = True
        with self._stop.listening(), cpu_threads(self.setup.machine.threads), BUFFERS.kept():
            while not (ended := self.ended()) and not self._stop.requested:
                self._train_batch()
            self._torn = False
            if not ended:
                self._save_step()
                return "interrupted"
        self._save(self.checkpoints.final)
        return ended

    def _restore_newest(self) -> None:
        """Back to the newest checkpoint, or to the beginning: what is in memory may be half of a step."""
        found = self.checkpoints.newest_valid(self.progress.message)
        if found is None and self._beginning:
            found = Path("the beginning"), torch.load(io.BytesIO(self._beginning), "cpu", weights_only=True)
        if found is None:
            raise TrainingError("an earlier fit ended within a step and left no checkpoint: make a new Trainer")
        path, payload = found
        self.scaler = torch.amp.GradScaler(self.setup.machine.kind, enabled=self.scaler.is_enabled())
        self.restore(payload, path)

    def request_stop(self) -> None:
        """Let `fit` end after the step it is in, as Ctrl-C does."""
        self._stop.requested = True

    def ended(self) -> str:
        """'finished' or 'stopped early' when nothing is left to train, else ''."""
        train, state = self.setup.config.train, self.state
        if state.step >= self.setup.total_steps or (train.epochs and state.epoch >= train.epochs):
            return "finished"  # by epochs where skipped steps leave fewer updates than planned
        return "stopped early" if train.patience and state.stale_validations >= train.patience else ""

    def _train_batch(self) -> None:
        """One batch, and whatever is due after it: a validation, a checkpoint."""
        train, state, setup = self.setup.config.train, self.state, self.setup
        factor = schedule.rate_factor(state.step, train, state.decay_steps)
        clip = schedule.clip_norm(state.epoch, train)
        last_save, started = self._last_save, time.perf_counter()
        set_rates(self.optimizers, factor)
        result = self._step(clip)
        if result is None:
            return
        seconds = time.perf_counter() - started
        epoch_ended = self._count(result, seconds)
        self.on_step(result)
        done = epoch_ended or state.step >= setup.total_steps
        if done or (train.validate_every_steps and state.step % train.validate_every_steps == 0 and not result.skipped):
            self._validate(setup.rate.value * factor, clip)
        if epoch_ended and state.epoch % train.checkpoint_every_epochs == 0:
            self._save(self.checkpoints.epoch(state.epoch))
        elif time.monotonic() - self._last_save >= 60 * train.checkpoint_every_minutes:
            self._save_step()
        if self._last_save != last_save:  # with all that was due
            self.on_save()

    def _step(self, clip: float) -> StepResult | None:
        """One update by the next batch; None where memory ran out, and the batch is to come again in smaller parts."""
        train, state, setup = self.setup.config.train, self.state, self.setup
        try:
            return optimizer_step(
                self.model,
                self.optimizers,
                self.scaler,
                self._batch(),
                engine=setup.engine.run,
                precision=setup.precision,
                clip=clip,
                micro_batch=self._portion.rows,
                dropout_seed=mix_seed(train.seed, state.epoch, state.batch),
                context=self.context,
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure, torn = str(error), isinstance(error, PartialUpdateError)
        self.model.zero_grad(set_to_none=True)
        self._portion.halve(min(self._portion.rows, train.batch_size), failure)
        if torn:
            self._restore_newest()
            self.progress.message(f"the weights were being changed just then: going on from step {self.state.step:,}")
        return None

    def _batch(self) -> Tensor:
        """The ids (B, S) int64 of the next batch: one index into the split."""
        if self.setup.train_split.carries_context:
            return self._ids[self.state.batch].long()
        train, start = self.setup.config.train, self.state.batch * self.setup.config.train.batch_size
        order = epoch_order(train.seed, self.state.epoch, len(self._ids))
        return self._ids[order[start : start + train.batch_size].to(self._ids.device)].long()

    def _count(self, result: StepResult, seconds: float) -> bool:
        """Add a step to the state; True when it ended an epoch. TrainingError where skips leave no hope."""
        state, train = self.state, self.setup.config.train
        state.train_seconds += seconds
        state.seconds_since_row += seconds
        state.nll_since_row += result.nll
        state.tokens_since_row += result.tokens
        state.batch += 1
        state.recent_skips = skips.remembered(state.recent_skips, result.skipped, train.max_skipped_steps)
        if result.skipped:
            state.skipped_steps += 1
            state.skipped_in_a_row += 1
            loss_scale = (
                self.scaler.get_scale() / self.scaler.get_backoff_factor()
            )  # of this step: it was lowered since
            if why := skips.diagnosis(state.recent_skips, train.max_skipped_steps, loss_scale, result.not_finite):
                raise TrainingError(why)
        else:
            state.step += 1
            state.skipped_in_a_row = 0
        self.context = result.context if self.setup.train_split.carries_context else None
        if ended := state.batch == self.setup.steps_per_epoch:
            state.epoch, state.batch, self.context = state.epoch + 1, 0, None
        speed = state.tokens_since_row / state.seconds_since_row
        self.progress.step(state.step, self.setup.total_steps, self._epochs(), result.nll / result.tokens, speed)
        return ended

    def _epochs(self) -> float:
        return self.state.epoch + self.state.batch / self.setup.steps_per_epoch

    def _validate(self, rate: float, clip: float) -> None:
        """Score the validation split, add a row to the history, keep the best weights."""
        state, setup, train = self.state, self.setup, self.setup.config.train
        self.progress.evaluating()
        scores = evaluate_split(
            self.model,
            setup.validation_split,
            precision=setup.precision,
            batch_size=self._validation_portion.rows,
            engine=setup.engine.run,
            fewer=self._validation_portion.halve,
        )
        row = {
            "step": state.step,
            "epoch": round(self._epochs(), 4),
            "train_loss": state.nll_since_row / state.tokens_since_row,
            "val_loss": scores.loss,
            "val_ppl": scores.perplexity,
            "val_accuracy": scores.accuracy,
            "val_ppl_known": scores.perplexity_known,
            "val_bits_per_byte": scores.bits_per_byte,  # None for a tokenizer that loses text, as the next
            "val_word_ppl": scores.word_perplexity,
            "val_bits_per_byte_known": scores.bits_per_byte_known,
            "lr": rate,
            "clip": clip,
            "train_seconds": round(state.train_seconds, 3),
            "tokens_per_second": round(state.tokens_since_row / state.seconds_since_row, 1),
            "peak_memory_bytes": peak_memory_bytes(setup.machine),
            "skipped_steps": state.skipped_steps,
        }
        state.nll_since_row, state.tokens_since_row, state.seconds_since_row = 0.0, 0, 0.0
        state.history.append(row)
        improved = scores.loss < state.best_loss  # False for NaN
        if improved:
            state.best_loss, state.best_step = scores.loss, state.step
        if scores.loss < state.patience_loss - train.min_delta:
            state.patience_loss, state.stale_validations = scores.loss, 0
        else:
            state.stale_validations += 1
        if improved:
            self._save(self.checkpoints.best)
        self.progress.validated(row, improved)
        self.on_validation(improved)

    # --- saving and continuing ----------------------------------------------------------------------------------

    def _save_step(self) -> None:
        self._save(self.checkpoints.step(self.state.step))
        self.checkpoints.prune_steps()

    def _save(self, path: Path) -> None:
        save_checkpoint(path, self.payload(), self.state.step)
        self._beginning = None
        self._last_save = time.monotonic()

    def payload(self) -> dict[str, Any]:
        """Everything that `restore` needs to go on as if nothing had happened."""
        setup = self.setup
        return {
            "run": self.checkpoints.run,
            "identity": setup.identity,
            "config": setup.config.to_dict(),
            "requested": setup.requested.to_dict(),
            "data_fingerprint": setup.prepared.fingerprint,
            "tokenizer": setup.prepared.tokenizer.to_dict(),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "generators": generator_states(),
            "context": self.context,
            "state": dataclasses.asdict(self.state),
        }

    def restore(self, payload: dict[str, Any], path: Path) -> None:
        """Go on from a payload of the same run; CheckpointError when it belongs to another one."""
        if check_payload(payload, path)["identity"] != self.setup.identity:
            raise CheckpointError(f"{path}: {difference(payload, self.setup)}")
        load_weights(self.model, payload, path)
        for optimizer, saved in zip(self.optimizers, payload["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.scaler.is_enabled() and payload["scaler"]:  # empty where the run went on in another precision
            self.scaler.load_state_dict(payload["scaler"])
        context = payload["context"]
        self.context = None if context is None else context.to(self.setup.machine.device)
        self.state = TrainState(**payload["state"])
        self._extend_decay(path)
        restore_generators(payload["generators"])

    def _extend_decay(self, path: Path) -> None:
        """A rate that decays to an end needs a new end when the run gets longer."""
        train, state, total = self.setup.config.train, self.state, self.setup.total_steps
        if train.decay_steps is not None:
            state.decay_steps = train.decay_steps
        elif train.lr_schedule == "constant":
            state.decay_steps = total
        elif total > state.decay_steps:
            raise CheckpointError(f"{path}: {needs_new_end(state.decay_steps, total)}")
