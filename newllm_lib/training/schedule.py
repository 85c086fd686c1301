"""Learning rate and gradient clipping as pure functions of numbers, so that tests can check them by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from newllm_lib.config import TrainConfig

BASELINE_PARAMETERS = 2_739_432
"""Parameters of the published baseline, to which `scale_lr_by_model_size` relates a model."""


@dataclass(frozen=True)
class Rate:
    """A peak learning rate and the words that say where it comes from."""

    value: float
    reason: str


def batch_factor(rule: str, batch_size: int, batch_base: int) -> float:
    """Factor on the rate when the batch grows from `batch_base` to `batch_size` sequences.

    `linear` is Goyal et al. 2017 (arXiv 1706.02677), `sqrt` is Krizhevsky 2014 (arXiv 1404.5997) and, for Adam,
    Malladi et al. 2022 (arXiv 2205.10287).
    """
    ratio = batch_size / batch_base
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[rule]


def peak_rate(train: TrainConfig, num_parameters: int) -> Rate:
    """The peak learning rate of a recipe for a model of `num_parameters`, with its reason."""
    value = train.lr_base * batch_factor(train.lr_rule, train.batch_size, train.batch_base)
    reason = f"{train.lr_base:g} at batch {train.batch_base}"
    if train.lr_rule == "none":
        reason += ", not scaled by the batch"
    else:
        reason += f", {train.lr_rule} rule to batch {train.batch_size}"
    if train.scale_lr_by_model_size:
        ratio = num_parameters / BASELINE_PARAMETERS
        value /= ratio
        reason += f", divided by the model size ratio {ratio:.3f}"
    if train.lr is not None:
        return Rate(train.lr, f"set directly ({reason} would give {value:.3g})")
    return Rate(value, reason)


def warmup_of(train: TrainConfig, decay_steps: int) -> int:
    """Steps of warm-up that a run begins with: `warmup_steps`, but at most a tenth of a decay.

    Without a limit the rate of a short run would still be rising where its plan says that it has fallen to its end.
    """
    return train.warmup_steps if train.lr_schedule == "constant" else min(train.warmup_steps, decay_steps // 10)


def rate_factor(step: int, train: TrainConfig, decay_steps: int, warmup_steps: int | None = None) -> float:
    """Share of the peak rate that optimizer step `step` (from 0) uses; warmup_steps: None = those of `train`.

    Linear warm-up to 1 at step `warmup_steps - 1`, then constant, or half a cosine from 1 at step `warmup_steps` to
    `lr_final_fraction` at step `decay_steps`, the first that is not taken (Loshchilov & Hutter 2016, arXiv
    1608.03983); later steps stay there.
    """
    warmup = train.warmup_steps if warmup_steps is None else warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if train.lr_schedule == "constant":
        return 1.0
    span = max(1, decay_steps - warmup)
    progress = min(1.0, (step - warmup) / span)
    final = train.lr_final_fraction
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def clip_norm(epoch: int, train: TrainConfig) -> float:
    """Largest global gradient norm in `epoch` (from 0)."""
    return next(norm for start, norm in reversed(train.clip_by_epoch) if epoch >= start)


def run_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: its epochs or `max_steps`, whichever ends first."""
    by_epochs = train.epochs * steps_per_epoch if train.epochs is not None else None
    return min(limit for limit in (by_epochs, train.max_steps) if limit is not None)
