"""The learning-rate range test (Smith 2017, arXiv 1506.01186): the loss while the rate rises a little each step."""

from __future__ import annotations

import copy
import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newllm_lib.config import RunConfig
from newllm_lib.config.fields import plain_number
from newllm_lib.config.places import user_path
from newllm_lib.config.presets import resolve
from newllm_lib.data.dataset import prepare
from newllm_lib.data.tokenizer import Tokenizer
from newllm_lib.errors import ConfigError, TrainingError
from newllm_lib.model.newllm import NewLLM
from newllm_lib.reporting.curves import draw_or_warn, own_style
from newllm_lib.system.buffer_pool import BUFFERS
from newllm_lib.system.files import file_errors, make_folder, write_atomic, write_text_atomic
from newllm_lib.system.hardware import cpu_threads
from newllm_lib.training.batches import Batches, mix_seed
from newllm_lib.training.rng import generator_states, restore_generators
from newllm_lib.training.setup import Setup, make_setup
from newllm_lib.training.step import TrainingStep
from newllm_lib.tuning.execution import settle_execution

_SMOOTHING = 0.9
"""Decay of the running mean of the loss."""
_DIVERGED = 2.0
"""The test ends where the smoothed loss is this many times its lowest so far."""
_LEAST_STEPS = 10


@dataclass(frozen=True)
class RangeTest:
    """What a range test saw, and what it suggests."""

    rates: list[float]
    """Peak rate of each step, that of Adam or AdamW; Muon's own rate rises in proportion."""
    losses: list[float]
    """Loss of each step before its update (nats a token)."""
    smoothed: list[float]
    """Running mean of the losses, corrected for its start."""
    suggestion: float | None
    """The rate at which the smoothed loss falls fastest per decade; None where it never falls."""
    reason: str
    muon_ratio: float | None = None
    """Muon's rate over the other one at every step; None without Muon."""

    @property
    def muon_rates(self) -> list[float] | None:
        """Rate of the matrices that Muon updated at each step; None without Muon."""
        return None if self.muon_ratio is None else [rate * self.muon_ratio for rate in self.rates]

    @property
    def suggested(self) -> dict[str, float]:
        """The fields of a run that trains with the suggested rates; empty where there is no suggestion."""
        if not self.suggestion:
            return {}
        return {"lr": self.suggestion} | ({"muon_lr": self.suggestion * self.muon_ratio} if self.muon_ratio else {})

    def write(self, folder: str | Path) -> Path:
        """lr_find.csv and lr_find.png in a folder, which is returned."""
        folder = user_path(folder)
        make_folder(folder)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = {"rate": self.rates, "loss": self.losses, "smoothed": self.smoothed}
        if self.muon_rates is not None:
            columns["muon_rate"] = self.muon_rates
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        write_text_atomic(folder / "lr_find.csv", text.getvalue())
        picture = folder / "lr_find.png"
        draw_or_warn(picture, lambda: _plot(picture, self))
        return folder


@file_errors()
def lr_find(
    config: str | RunConfig = "auto",
    *,
    model: NewLLM | None = None,
    tokenizer: Tokenizer | None = None,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
    report: Callable[[int, float, float], None] | None = None,
    **overrides: Any,
) -> RangeTest:
    """Train a throw-away copy for `steps` steps while the rate rises from `low` to `high`, evenly in its logarithm.

    config and overrides as for `train`; model: weights to start from instead of new ones, with the tokenizer that they
    belong to (both stay as they are, as do all random number generators). Ends early where the loss runs away.
    report(step, rate, loss) after each step.
    ConfigError for a range that is empty or too few steps.
    """
    low, high = plain_number(low), plain_number(high)
    for name, rate in (("low", low), ("high", high)):
        if not 0 < rate < math.inf:
            raise ConfigError(f"{name} = {rate!r}: must be a number above 0")
    if low >= high:
        raise ConfigError(f"low = {low!r}: must be below high = {high!r}")
    if (model is None) != (tokenizer is None):
        raise ConfigError("a model needs the tokenizer that it was trained with, and the other way round: give both")
    if steps < _LEAST_STEPS:
        raise ConfigError(f"steps = {steps!r}: must be a whole number from {_LEAST_STEPS}")
    states = generator_states()
    try:
        config = resolve(config, **overrides)
        setup = settle_execution(make_setup(config, prepared=prepare(config, tokenizer)), {})
        with BUFFERS.kept():
            return _sweep(setup, _copy(setup, model), low, high, steps, report)
    finally:
        restore_generators(states)


def _copy(setup: Setup, model: NewLLM | None) -> NewLLM:
    if model is not None:
        if model.config.vocab_size != setup.config.model.vocab_size:
            raise ConfigError(
                f"the model has {model.config.vocab_size} ids, the data's tokenizer {setup.config.model.vocab_size}"
            )
        return copy.deepcopy(model).to(setup.machine.device)
    return NewLLM.fresh(setup.config.model, setup.config.train.seed, setup.machine.device)


def _sweep(
    setup: Setup, model: NewLLM, low: float, high: float, steps: int, report: Callable[[int, float, float], None] | None
) -> RangeTest:
    train = setup.config.train
    training_step = TrainingStep.for_run(setup, model)
    batches = Batches(setup.train_split, train.batch_size, train.seed, setup.machine.device)
    rates, losses, smoothed, mean = [], [], [], 0.0
    model.train()
    with cpu_threads(setup.machine.threads):
        for step in range(steps):
            lr = low * (high / low) ** (step / (steps - 1))
            training_step.set_lr(lr / setup.rate.value)
            ids = batches.read(*divmod(step, batches.per_epoch))  # epoch after epoch; no context is carried
            try:
                result = training_step(ids, dropout_seed=mix_seed(train.seed, 0, step))
            except TrainingError:
                break
            loss = result.nll / result.tokens
            mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
            rates.append(lr)
            losses.append(loss)
            smoothed.append(mean / (1 - _SMOOTHING ** (step + 1)))
            if report:
                report(step + 1, lr, loss)
            if step >= _LEAST_STEPS and smoothed[-1] > _DIVERGED * min(smoothed):
                break
    ratio = train.muon_lr / setup.rate.value if train.optimizer == "muon" else None
    return RangeTest(rates, losses, smoothed, *suggest(rates, smoothed), ratio)


def suggest(rates: list[float], smoothed: list[float]) -> tuple[float | None, str]:
    """The rate where the smoothed loss falls fastest per decade of the rate, before its lowest point."""
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
    slopes = [
        ((smoothed[k + 1] - smoothed[k - 1]) / math.log10(rates[k + 1] / rates[k - 1]), k) for k in range(1, lowest)
    ]
    if not slopes or min(slopes)[0] >= 0:
        return None, "the loss never falls: try a wider range or more steps"
    slope, best = min(slopes)
    return rates[best], (
        f"the loss falls fastest there, by {-slope:.2f} nats a decade; it is lowest at {rates[lowest]:.2g}"
    )


@own_style()
def _plot(path: Path, test: RangeTest) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(test.rates, test.losses, color="#9ec3e6", linewidth=1, label="loss of each step")
    axes.plot(test.rates, test.smoothed, color="#1f6fb4", linewidth=2, label="smoothed")
    if test.suggestion:
        axes.axvline(test.suggestion, color="#d9701e", linestyle="--", label=f"suggestion: {test.suggestion:.2g}")
    axes.set_xscale("log")
    start = test.smoothed[0] if test.smoothed else 1.0
    low = min(test.losses, default=0.0)
    axes.set_ylim(low - 0.2, 1.15 * start)  # where it runs away is seen; how far does not matter
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss (nats a token)")
    axes.set_title("Learning-rate range test", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    write_atomic(path, lambda file: file.write(image.getvalue()))
