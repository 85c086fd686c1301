"""When a run stops because its validation loss no longer falls."""

from __future__ import annotations

from dataclasses import dataclass

from newllm_lib.training.state import TrainState


@dataclass(frozen=True)
class EarlyStopping:
    """Stops a run after `patience` validations in a row without progress.

    Progress is a loss more than `min_delta` (nats) below the loss at the last progress. A loss of NaN is no progress.
    What is remembered lies in a TrainState, with which it is saved.
    """

    patience: int | None
    """None never stops a run."""
    min_delta: float = 0.0

    def observe(self, state: TrainState, loss: float) -> None:
        """Count one validation with its loss (nats a token)."""
        if loss < state.patience_loss - self.min_delta:
            state.patience_loss, state.stale_validations = loss, 0
        else:
            state.stale_validations += 1

    def is_due(self, state: TrainState) -> bool:
        """Whether the run stops now."""
        return bool(self.patience) and state.stale_validations >= self.patience
