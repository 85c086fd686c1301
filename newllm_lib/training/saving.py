"""What a checkpoint holds of a run in training, how a run takes it up again, and when one is written."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from newllm_lib.errors import CheckpointError, TrainingError
from newllm_lib.model.pretrained import load_weights, not_finite
from newllm_lib.training.checkpoint import Checkpoints, check_payload, damaged_payload, save_checkpoint
from newllm_lib.training.compatibility import difference, needs_new_end
from newllm_lib.training.rng import generator_states, restore_generators
from newllm_lib.training.setup import Setup
from newllm_lib.training.skips import listed
from newllm_lib.training.state import TrainState
from newllm_lib.training.step import TrainingStep

LATER = ("recent_skips", "warmup_steps")
"""Fields of TrainState that later versions added: kept beside "state", where earlier versions pass over them."""


def make_payload(
    run: str, setup: Setup, training_step: TrainingStep, state: TrainState, context: Tensor | None
) -> dict[str, Any]:
    """Everything that `restore_payload` needs to continue as if nothing had happened; its tensors are the live ones.

    run: the run's name; context (B, C): of a stream's lanes, None where the next batch starts from the empty one.
    """
    progress = dataclasses.asdict(state)
    later = {name: progress.pop(name) for name in LATER}
    return {
        "run": run,
        "identity": setup.identity,
        "config": setup.config.to_dict(),
        "decided": setup.decided,
        "requested": setup.requested.to_dict(),
        "data_fingerprint": setup.prepared.fingerprint,
        "tokenizer": setup.prepared.tokenizer.to_dict(),
        "model": training_step.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in training_step.optimizers],
        "scaler": training_step.scaler.state_dict(),
        "generators": generator_states(),
        "context": context,
        "state": progress,
        **later,
    }


def restore_payload(
    payload: dict[str, Any], path: Path, setup: Setup, training_step: TrainingStep
) -> tuple[TrainState, Tensor | None]:
    """Put weights, optimizers, loss scale and random generators back; returns the state and the context (B, C).

    path: of the payload, for messages. CheckpointError when it belongs to another run, is damaged, or its learning rate
    decays to an end that lies before the end of the setup.
    """
    if check_payload(payload, path)["identity"] != setup.identity:
        raise CheckpointError(f"{path}: {difference(payload, setup)}")
    with damaged_payload(path):
        state = TrainState.from_dict(payload["state"] | {name: payload[name] for name in LATER if name in payload})
        context = payload["context"]
        if state.batch >= setup.steps_per_epoch:
            raise ValueError(f"batch {state.batch} of an epoch of {setup.steps_per_epoch}")
        context = None if context is None else context.to(setup.machine.device)
        load_weights(training_step.model, payload, path)
        for optimizer, saved in zip(training_step.optimizers, payload["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        training_step.renew_scaler()
        if training_step.scaler.is_enabled() and payload["scaler"]:  # empty where it continued in another precision
            training_step.scaler.load_state_dict(payload["scaler"])
        restore_generators(payload["generators"])
    state.decay_steps = _decay_end(state.decay_steps, setup, path)
    if state.warmup_steps is None:  # an earlier version began it
        state.warmup_steps = setup.config.train.warmup_steps
    return state, context


def _decay_end(decay_steps: int, setup: Setup, path: Path) -> int:
    """The step at which the learning rate ends; CheckpointError where a longer run needs a new one."""
    train, total = setup.config.train, setup.total_steps
    if train.decay_steps is not None:
        return train.decay_steps
    if train.lr_schedule == "constant":
        return total
    if total > decay_steps:
        raise CheckpointError(f"{path}: {needs_new_end(decay_steps, total)}")
    return decay_steps


class Saver:
    """Writes the checkpoints of a training, and finds its newest saved state again.

    As long as there is no file, that is the state in which the training began: it is kept in memory.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._beginning: bytes | None = None
        self._last_save = time.monotonic()
        self.saves = 0
        """Files written."""

    def begin(self, payload: Callable[[], dict[str, Any]]) -> None:
        """A training begins: keep its payload where no checkpoint does; the time to the next save counts from now."""
        if not self._checkpoints.files():
            buffer = io.BytesIO()
            torch.save(payload(), buffer)
            self._beginning = buffer.getvalue()
        self._last_save = time.monotonic()

    def save(self, path: Path, payload: dict[str, Any]) -> None:
        """Write a checkpoint; FileError as of `save_checkpoint`, TrainingError where its weights are not finite."""
        if broken := not_finite(payload["model"]):
            raise TrainingError(f"the weights are no longer finite and are not saved: {listed(tuple(broken))}")
        save_checkpoint(path, payload, payload["state"]["step"])
        self._beginning = None
        self._last_save = time.monotonic()
        self.saves += 1

    def save_step(self, payload: dict[str, Any]) -> None:
        """Write a checkpoint that guards against a lost machine; the two newest of this kind are kept."""
        step = payload["state"]["step"]
        self.save(self._checkpoints.step(step), payload)
        self._checkpoints.prune_steps(newest=step)

    def minutes_since_save(self) -> float:
        """Since the last file, or the beginning."""
        return (time.monotonic() - self._last_save) / 60

    def newest(self, log: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest valid checkpoint, else the beginning, else None: (path for messages, payload).

        log: is told of damaged files.
        """
        found = self._checkpoints.newest_valid(log)
        if found is None and self._beginning:
            return Path("the beginning"), torch.load(io.BytesIO(self._beginning), "cpu", weights_only=True)
        return found
