"""A run with every decision made, before any time is spent."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from newllm_lib.config import RunConfig, TrainConfig
from newllm_lib.data.dataset import Prepared, Split, prepare
from newllm_lib.errors import ConfigError
from newllm_lib.model.recurrence.self_check import EngineChoice, choose_engine
from newllm_lib.system.hardware import (
    Machine,
    Precision,
    choose_precision,
    default_batch_size,
    default_eval_batch_size,
    detect,
)
from newllm_lib.training import schedule
from newllm_lib.training.batches import batches_per_epoch

PACKED, PLAIN = "packed", "plain"
"""How a CPU's products hold the weights: in oneDNN's layout, where it has one for the format, or as they are."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run with every decision made: what `plan` shows and `Trainer` carries out."""

    config: RunConfig
    """Every field decided, as far as it matters for this run."""
    requested: RunConfig
    """What was asked for, with what it leaves open; `train` continues a run that is asked for in the same way."""
    prepared: Prepared
    identity: str
    machine: Machine
    precision: Precision
    engine: EngineChoice
    train_split: Split
    validation_split: Split
    rate: schedule.Rate
    batch_reason: str = ""
    """Why this batch, or why in these pieces, where it was not simply asked for."""

    @property
    def decided(self) -> dict[str, Any]:
        """What a later part of the run keeps: run.json has it under this name, and `make_setup` takes it."""
        return {
            "batch_size": self.config.train.batch_size,
            "micro_batch_size": self.config.train.micro_batch_size,
            "precision": self.precision.name,
            "engine": self.engine.name,
            "threads": self.machine.threads,
            "layout": PACKED if self.engine.packed else PLAIN,
            "device": self.machine.kind,
        }

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the last one possibly smaller."""
        return batches_per_epoch(self.train_split, self.config.train.batch_size)

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return schedule.run_steps(self.config.train, self.steps_per_epoch)


def make_setup(config: RunConfig, decided: dict[str, Any] | None = None, prepared: Prepared | None = None) -> Setup:
    """Read the data (if they are not `prepared` yet, for a run of the same text) and decide what is left open.

    `decided` holds what an earlier part of the same run recorded, as `Setup.decided` gives it; it is kept, so that a
    run continues as it began. Nothing is measured or searched here: a batch that a policy has yet to find starts as
    the recipe's, or the machine's; the number format, the threads and the layout that nothing has decided yet are those
    of the processor's flags and of torch (`runs.folder.resolve_run` asks `tuning` for all of these). ConfigError when
    the configuration does not fit the data or the machine.
    """
    decided = decided or {}
    requested, train = config, config.train
    machine = detect(train.device, train.threads or kept_threads(decided))
    precision = _precision(train, decided.get("precision"), machine)
    wanted = decided.get("engine", "auto") if train.engine == "auto" else train.engine
    engine = choose_engine(wanted, precision, machine.device, decided.get("layout") != PLAIN)
    prepared = prepared.under(config) if prepared else prepare(config)
    identity = config.identity(prepared.fingerprint)  # of what was asked for: what is left open stays open in it
    config = prepared.config
    if train.eval_batch_size is None:
        config = config.replace(eval_batch_size=default_eval_batch_size(machine.kind))
    found = "batch_size" in decided and train.batch_policy != "recipe"
    if train.batch_size is None or train.batch_policy != "recipe":
        most = largest_batch(prepared.split("train", lanes=1), config)
        start = min(most, train.batch_size or default_batch_size(machine))
        config = config.replace(batch_size=decided.get("batch_size", start))
    if train.micro_batch_size is None:
        config = config.replace(micro_batch_size=decided.get("micro_batch_size"))
    train_split = prepared.split("train", config.train.batch_size)
    check_batch(config, train_split)
    return Setup(
        config=config,
        requested=requested,
        prepared=prepared,
        identity=identity,
        machine=machine,
        precision=precision,
        engine=engine,
        train_split=train_split,
        validation_split=prepared.split("validation"),
        rate=schedule.peak_rate(config.train, config.model.num_parameters),
        batch_reason=f"{train.batch_policy}: as this run began" if found else "",
    )


def with_batch(setup: Setup, batch_size: int, micro_batch_size: int | None = None, reason: str = "") -> Setup:
    """The same run with another batch: its rate by the rule, its stream in as many lanes."""
    config = setup.config.replace(batch_size=batch_size, micro_batch_size=micro_batch_size)
    split = setup.train_split
    if split.carries_context and split.ids.shape[1] != batch_size:
        split = setup.prepared.split("train", batch_size)
    rate = schedule.peak_rate(config.train, config.model.num_parameters)
    return dataclasses.replace(setup, config=config, train_split=split, rate=rate, batch_reason=reason)


def with_execution(setup: Setup, precision: Precision, threads: int, packed: bool) -> Setup:
    """The same run with its steps computed in another way."""
    machine = dataclasses.replace(setup.machine, threads=threads)
    engine = choose_engine(setup.engine.name, precision, machine.device, packed)
    return dataclasses.replace(setup, machine=machine, precision=precision, engine=engine)


def kept_threads(decided: dict[str, Any]) -> int | None:
    """The threads that an earlier part of a run used, as far as this machine has so many processors; else None."""
    threads = decided.get("threads")
    return threads if type(threads) is int and 1 <= threads <= (os.cpu_count() or 1) else None


def _precision(train: TrainConfig, decided: str | None, machine: Machine) -> Precision:
    """What an earlier part of the run used, or what was asked for, or the best of the machine."""
    requested, emulate = train.precision, train.emulate_precision
    chosen = choose_precision(decided or requested, machine, emulate)
    if decided is None or chosen.substituted:
        return chosen
    wanted = choose_precision(requested, machine, emulate)
    if wanted.substituted and wanted.name == decided:
        return wanted
    if requested in ("auto", decided):
        return Precision(decided, "as this run began")
    return Precision(decided, f"as this run began, not {requested}", substituted=True)


def largest_batch(split: Split, config: RunConfig) -> int:
    """Sequences of the training split, or lanes that each have a full sequence of the stream."""
    if config.data.layout == "windows":
        return len(split.ids)
    return max(1, split.num_tokens // (config.data.sequence_length - 1))


def check_batch(config: RunConfig, split: Split) -> None:
    """ConfigError when a batch holds more than the data has."""
    batch, most = config.train.batch_size, largest_batch(split, config)
    if batch > most:
        unit = "training sequences" if config.data.layout == "windows" else "full sequences for a lane each"
        raise ConfigError(f"batch_size = {batch}: must be at most {most}, the number of {unit}")
