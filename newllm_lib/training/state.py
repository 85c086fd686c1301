"""How far a run is: every number that a checkpoint keeps beside tensors, and the row that a validation adds to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from newllm_lib.evaluation import Metrics
from newllm_lib.training import skips
from newllm_lib.training.step import StepResult


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
    """Validation loss that the next one must undercut by min_delta (see `EarlyStopping`)."""
    stale_validations: int = 0
    nll_since_row: float = 0.0
    tokens_since_row: int = 0
    seconds_since_row: float = 0.0
    decay_steps: int = 0
    """Step at which a decaying learning rate reaches its end, fixed when the run starts."""
    warmup_steps: int | None = None
    """Steps of warm-up, fixed when the run starts; None where an earlier version began it, which had all of them."""
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The state that a checkpoint holds; ValueError names what is missing, unknown or of another type.

        What an older version did not keep has its default.
        """
        kinds = get_type_hints(cls)
        wrong = [name for name in ("step", "history") if name not in values]
        wrong += [name for name, value in values.items() if name not in kinds or not _is_of(value, kinds[name])]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} not what this version writes")
        return cls(**values)

    def count(self, result: StepResult, seconds: float, max_skipped_steps: int) -> None:
        """Add a step that took `seconds`; max_skipped_steps: of TrainConfig, how many skips are remembered."""
        self.train_seconds += seconds
        self.seconds_since_row += seconds
        self.nll_since_row += result.nll
        self.tokens_since_row += result.tokens
        self.batch += 1
        self.recent_skips = skips.remembered(self.recent_skips, result.skipped, max_skipped_steps)
        if result.skipped:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
        else:
            self.step += 1
            self.skipped_in_a_row = 0

    def epochs(self, steps_per_epoch: int) -> float:
        """Epochs read so far, with the part of the current one."""
        return self.epoch + self.batch / steps_per_epoch

    @property
    def tokens_per_second(self) -> float:
        """Real targets a second of training since the last row."""
        return self.tokens_since_row / self.seconds_since_row

    def add_row(
        self, scores: Metrics, *, steps_per_epoch: int, lr: float, clip: float, peak_memory_bytes: int
    ) -> dict[str, Any]:
        """Add a validation to the history and return its row, which has HISTORY_COLUMNS of `reporting.record`.

        lr, clip: of the last step; peak_memory_bytes: of training so far. The means since the last row start again.
        """
        row = {
            "step": self.step,
            "epoch": round(self.epochs(steps_per_epoch), 4),
            "train_loss": self.nll_since_row / self.tokens_since_row,
            "val_loss": scores.loss,
            "val_ppl": scores.perplexity,
            "val_accuracy": scores.accuracy,
            "val_ppl_known": scores.perplexity_known,
            "val_bits_per_byte": scores.bits_per_byte,  # None for a tokenizer that loses text, as the next
            "val_word_ppl": scores.word_perplexity,
            "val_bits_per_byte_known": scores.bits_per_byte_known,
            "lr": lr,
            "clip": clip,
            "train_seconds": round(self.train_seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "peak_memory_bytes": peak_memory_bytes,
            "skipped_steps": self.skipped_steps,
        }
        self.nll_since_row, self.tokens_since_row, self.seconds_since_row = 0.0, 0, 0.0
        self.history.append(row)
        return row

    def keep_best(self, loss: float) -> bool:
        """Whether a validation loss is the lowest so far, which is then remembered with its step; NaN never is."""
        improved = loss < self.best_loss
        if improved:
            self.best_loss, self.best_step = loss, self.step
        return improved


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type: whole numbers, which are counts, are not negative."""
    if get_origin(kind) is list:
        item, *_ = get_args(kind)
        return isinstance(value, list) and all(_is_of(each, item) for each in value)
    if kind == int | None:
        return value is None or _is_of(value, int)
    if kind is int:
        return type(value) is int and value >= 0
    return isinstance(value, (int, float) if kind is float else get_origin(kind) or kind)
