"""Learning-rate rules for larger batches, on a grid: rule x batch x initialisation, every cell a real run.

All cells read equally many sequences, so a larger batch makes fewer steps. Optimizer and schedule are those of the
configuration, the same in every cell.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from newllm_lib import runs
from newllm_lib.config import PAD, RunConfig, presets
from newllm_lib.config.places import user_path
from newllm_lib.config.portable import portable_config
from newllm_lib.config.presets import resolve
from newllm_lib.data.dataset import Split
from newllm_lib.errors import ConfigError
from newllm_lib.escaping import csv_text, markdown_list, text_table
from newllm_lib.evaluation import perplexity
from newllm_lib.reporting.formatting import counted, duration, ppl_text
from newllm_lib.reporting.record import finite
from newllm_lib.reporting.study_progress import LiveLine
from newllm_lib.studies.lr_scaling import findings as lr_scaling_findings
from newllm_lib.studies.lr_scaling.plots import write_plot
from newllm_lib.studies.study_runs import check_length, claim, failure_of, has_ended, listed, train_member
from newllm_lib.system.files import file_errors, make_folder, write_text_atomic
from newllm_lib.system.hardware import environment
from newllm_lib.training.schedule import peak_rate
from newllm_lib.training.setup import Setup, check_batch, make_setup
from newllm_lib.tuning import SharedExecution

if TYPE_CHECKING:
    from pandas import DataFrame


INITIALISATIONS: dict[str, dict[str, Any]] = {
    "published": {"init_std": 0.02, "embedding_std": 0.02, "forget_gate_bias": 0.0},
    "fan-in": {"init_std": None, "embedding_std": 1.0, "forget_gate_bias": 1.0},
}
"""What is set for each initialisation: the published one is N(0, 0.02^2) for every weight, biases 0; fan-in, as in the
tuned presets, scales weights by their fan-in, and changes embedding and forget gate with them. The rest, the output
head's 0.02 with it, is the same in both."""

VALIDATIONS = 8
"""Validations of a cell where the configuration does not say how many steps lie between them."""

PLATEAU = 0.1
"""A cell is on the unigram plateau while its perplexity is within a tenth of that of the word frequencies."""


class Grid(NamedTuple):
    """A study by name."""

    config: RunConfig
    """The cell at the base batch; its epochs or steps set how many sequences every cell reads."""
    batch_sizes: tuple[int, ...]
    rules: tuple[str, ...]


def small() -> Grid:
    """Minutes on a CPU: the built-in text, half the layers at half the width, ten times the published base rate.

    With the published shape and initialisation so short a training never leaves the unigram plateau.
    """
    config = presets.cpu_baseline().replace(data="builtin", precision="auto", epochs=None, max_steps=400)
    config = config.replace(num_layers=3, hidden_dim=256, lr_base=1e-3)
    return Grid(config, (32, 128, 512), ("none", "linear", "sqrt"))


def full() -> Grid:
    """For a GPU: the published model, data, batches and rates (linear from 512, square root from 32), 30 epochs."""
    config = presets.t4_fp16().replace(epochs=30)  # the published runs left the plateau at about the 17th
    return Grid(config, (512, 2048, 4096), ("none", "linear:512", "sqrt:32"))


GRIDS = {"small": small, "full": full}


class Cell(NamedTuple):
    """One run of the grid."""

    initialisation: str
    rule: str
    batch_size: int
    seed: int
    rate: float
    config: RunConfig


@dataclass(frozen=True)
class LrScalingStudy:
    """A grid of runs, as `lr_scaling` leaves it in a folder."""

    folder: Path
    record: dict[str, Any]
    """Everything but the curves: cells, findings, budget, environment."""
    histories: DataFrame
    """A row for each validation of each run: cell (its folder's name), and the columns of history.csv."""

    @property
    def findings(self) -> list[str]:
        """What came out, in sentences."""
        return self.record["findings"]

    @property
    def summary(self) -> str:
        """The findings as a list in Markdown, for a notebook to show."""
        return markdown_list(self.findings)

    @property
    def table(self) -> DataFrame:
        """A row for each cell; cells with the same rate share a run."""
        return text_table(self.record["cells"])

    def write(self, folder: str | Path) -> Path:
        """study.json, two tables as .csv, lr_scaling.png and lr_scaling.md in a folder, which is returned."""
        folder = user_path(folder)
        make_folder(folder)
        for name, frame in (("lr_scaling", self.table), ("histories", self.histories)):
            write_text_atomic(folder / f"{name}.csv", csv_text(frame, index=False))
        write_plot(folder / "lr_scaling.png", self.record, self.histories)
        write_text_atomic(folder / "lr_scaling.md", lr_scaling_findings.text(self.record, folder))
        write_text_atomic(folder / "study.json", json.dumps(self.record, indent=2, allow_nan=False) + "\n")
        return folder


@file_errors()
def lr_scaling(
    config: str | RunConfig = "small",
    batch_sizes: str | Sequence[int] | None = None,
    rules: str | Sequence[str] | None = None,
    initialisations: str | Sequence[str] = tuple(INITIALISATIONS),
    *,
    seeds: str | Sequence[int] | None = None,
    progress: LiveLine | None = None,
    **overrides: Any,
) -> LrScalingStudy:
    """Train every cell of a grid and leave table, pictures and findings in a folder, the runs beside them.

    config: "small" (minutes on a CPU), "full" (the published batches, for a GPU), or a preset or RunConfig, with
    overrides as for `train`. Its batch_size and lr_base are where the rules start, its epochs (or max_steps of that
    batch) what every cell reads. batch_sizes and rules: None = the grid's own; a rule is none, linear or sqrt, or
    "linear:512" to start from another batch. seeds: None = the configuration's; several show what a seed changes. Lists
    may be texts with commas.
    The same call goes on where the last one stopped; finished cells are read. A cell that breaks down is a result. The
    folder, `name` under `results_dir`, holds one grid: its key is made of the text, of every setting that makes a run's
    identity, and of epochs, max_steps, validate_every_steps and precision; None = named by that key. Other batches,
    rules, initialisations and seeds only add runs to it.
    Raises ConfigError for what makes no grid, RunError for a folder of another grid and for a cell that somebody has
    trained for longer than the grid plans; KeyboardInterrupt when a run was interrupted (it is saved).
    """
    grid = GRIDS[config]() if isinstance(config, str) and config in GRIDS else None
    config = (grid.config if grid else resolve(config)).replace(**overrides)
    batch_sizes = listed(batch_sizes or (grid.batch_sizes if grid else (32, 128, 512)), int)
    rules = listed(rules or (grid.rules if grid else ("none", "linear", "sqrt")))
    initialisations, seeds = listed(initialisations), listed(seeds or (config.train.seed,), int)
    _check(config, batch_sizes, rules, initialisations, seeds)
    setup = make_setup(config)
    for size in batch_sizes:  # now, not after the cells before it have been trained
        check_batch(setup.config.replace(batch_size=size), setup.train_split)
    key = _key(setup)
    folder = Path(config.results_dir) / (config.name or f"lr_scaling-{key[:6]}")
    places = [folder]
    if config.mirror_dir and Path(config.mirror_dir).is_dir():
        places.append(Path(config.mirror_dir) / folder.name)
    cells = grid_cells(setup, batch_sizes, rules, initialisations, seeds, folder)
    shared = claim(places, key, setup, **_more(setup))
    for place in places:
        for cell in cells:
            check_length(place / cell.config.name, cell_steps(setup, cell.batch_size))
    _train(cells, setup, progress or LiveLine(), shared)
    study = _study(folder, key, setup, cells)
    for place in places:
        study.write(place)
    return study


def _check(config: RunConfig, batch_sizes, rules, initialisations, seeds) -> None:
    named = {"batch_sizes": batch_sizes, "rules": rules, "initialisations": initialisations, "seeds": seeds}
    for name, values in named.items():
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{name} = {tuple(values)!r}: must be one or more, each once")
    if unknown := [name for name in initialisations if name not in INITIALISATIONS]:
        raise ConfigError(f"initialisations: {unknown[0]!r} is unknown: must be of {', '.join(INITIALISATIONS)}")
    if wrong := [size for size in batch_sizes if not (isinstance(size, int) and size > 0)]:
        raise ConfigError(f"batch_sizes: {wrong[0]!r}: must be whole numbers from 1 (sequences)")
    for rule in rules:
        parse_rule(rule, 1)
    train = config.train
    if train.lr is not None:
        raise ConfigError(f"lr = {train.lr:g}: the rules set the rate here; give lr_base, where they start")
    if train.batch_size is None or train.batch_policy != "recipe":
        raise ConfigError("batch_size must be a number here (batch_policy recipe): it is where the rules start")
    if config.data.layout != "windows":
        raise ConfigError(
            f"layout = {config.data.layout!r}: must be windows here: a stream has as many lanes as the "
            "batch has sequences, so that cells would not read the same sequences"
        )


def parse_rule(text: str, batch_base: int) -> tuple[str, int]:
    """A rule and the batch that it starts from: ("linear", 512) for "linear:512", else `batch_base`."""
    name, colon, base = text.partition(":")
    if name not in ("none", "linear", "sqrt") or (colon and not (base.isdecimal() and int(base))):
        raise ConfigError(
            f'rules: {text!r}: must be none, linear or sqrt, or with the batch to start from: "linear:512"'
        )
    return name, int(base or batch_base)


def _key(setup: Setup) -> str:
    """Hash of what all cells have in common."""
    return hashlib.sha256(json.dumps([setup.identity, *_more(setup).values()]).encode()).hexdigest()


def _more(setup: Setup) -> dict[str, Any]:
    """What makes a grid beside the identity of its configuration."""
    train = setup.config.train
    names = ("epochs", "max_steps", "validate_every_steps")
    return {name: getattr(train, name) for name in names} | {"precision": setup.precision.name}


def grid_cells(setup: Setup, batch_sizes, rules, initialisations, seeds, folder: Path) -> list[Cell]:
    """Every cell, by initialisation, batch, rule and seed; those of equal rate carry the same configuration."""
    cells, known = [], {}
    for initialisation in initialisations:
        for size in batch_sizes:
            for rule in rules:
                for seed in seeds:
                    config = _cell_config(setup, initialisation, size, rule, seed, folder)
                    rate = peak_rate(config.train, setup.config.model.num_parameters).value
                    shared = known.setdefault((initialisation, size, float(f"{rate:.6g}"), seed), config)
                    cells.append(Cell(initialisation, rule, size, seed, rate, shared))
    return cells


def _cell_config(setup: Setup, initialisation: str, size: int, rule: str, seed: int, folder: Path) -> RunConfig:
    config, base = setup.requested, setup.requested.train
    name, batch_base = parse_rule(rule, base.batch_size)
    steps, every = cell_steps(setup, size), base.validate_every_steps
    validations = max(1, setup.total_steps // every) if every else VALIDATIONS
    return config.replace(
        **INITIALISATIONS[initialisation],
        batch_size=size,
        lr_rule=name,
        batch_base=batch_base,
        seed=seed,
        epochs=base.epochs if base.max_steps is None else None,
        max_steps=None if base.max_steps is None else steps,
        decay_steps=None,
        patience=None,  # equal budgets
        validate_every_steps=max(1, steps // validations),
        preset="lr_scaling",  # a cell re-creates no published run, whatever its grid started from
        checkpoint_every_epochs=1_000_000,  # the best and the last weights of each cell are enough
        results_dir=str(folder),
        mirror_dir=config.mirror_dir and str(Path(config.mirror_dir) / folder.name),
        name=f"{initialisation}-batch-{size}-{name}" + (f"-from-{batch_base}" if ":" in rule else "") + f"-seed-{seed}",
    )


def cell_steps(setup: Setup, batch_size: int) -> int:
    """Updates of a cell: as many epochs, or as many sequences, as the configuration's own."""
    base = setup.requested.train
    if base.max_steps is None:
        rows = setup.train_split.ids.shape[0]
        return base.epochs * -(-rows // batch_size)
    return max(1, round(setup.total_steps * base.batch_size / batch_size))


def _train(cells: list[Cell], setup: Setup, progress: LiveLine, shared: SharedExecution) -> None:
    """Train what is left of the grid, a line for each run; the time left by what runs of that batch took."""
    fingerprint = setup.prepared.fingerprint
    sharing: dict[str, list[Cell]] = {}
    for cell in cells:
        sharing.setdefault(cell.config.name, []).append(cell)
    todo = [cells[0] for cells in sharing.values()]
    done, folder = sum(has_ended(cell.config, fingerprint) for cell in todo), Path(todo[0].config.results_dir)
    progress.say(
        f"{counted(len(todo), 'run')} for {counted(len(cells), 'cell')} (equal rates share one) in {folder}"
        + (f"; {done} have ended already" if done else "")
    )
    if setup.precision.substituted:
        progress.say(f"precision {setup.precision.name}: {setup.precision.reason}")
    seconds: dict[int, list[float]] = {}
    for number, cell in enumerate(todo, 1):
        known, started = has_ended(cell.config, fingerprint), time.monotonic()
        progress.label = f"{number} of {len(todo)}  {run_title(sharing[cell.config.name])}"
        run = train_member(cell.config, fingerprint, cell_steps(setup, cell.batch_size), progress, shared=shared)
        if known:
            continue
        seconds.setdefault(cell.batch_size, []).append(time.monotonic() - started)
        left = _seconds_left(todo[number:], seconds, fingerprint)
        result = f"PPL {ppl_text(run.best['val_ppl'])}" if run.best else "no validation"
        if failure_of(run.folder):
            result += ", broke down"
        progress.say(f"{progress.label}: {result}" + (f"; about {duration(left)} left" if left else ""))


def run_title(cells: list[Cell]) -> str:
    """Which run it is, in words, by the cells that share it."""
    first, rules = cells[0], "/".join(cell.rule for cell in cells)
    return f"{first.initialisation}, batch {first.batch_size}, {rules} ({first.rate:.3g}), seed {first.seed}"


def _seconds_left(todo: list[Cell], seconds: dict[int, list[float]], fingerprint: str) -> float:
    """By the mean of the runs of the same batch, or of all so far where there is none."""
    everything = [value for values in seconds.values() for value in values]
    return sum(
        float(np.mean(seconds.get(cell.batch_size, everything)))
        for cell in todo
        if not has_ended(cell.config, fingerprint)
    )


# --- what the runs say -------------------------------------------------------------------------------------------


def _study(folder: Path, key: str, setup: Setup, cells: list[Cell]) -> LrScalingStudy:
    import pandas

    unigram = unigram_perplexity(setup.train_split, setup.validation_split, setup.config.model.vocab_size)
    found = {cell.config.name: runs.load(folder / cell.config.name) for cell in cells}
    histories = {name: run.history for name, run in found.items()}
    record = {
        "key": key,
        "preset": setup.config.preset,
        "data": setup.prepared.corpus_name,
        "sequences": setup.total_steps * setup.config.train.batch_size
        if setup.config.train.max_steps is not None
        else setup.config.train.epochs * len(setup.train_split.ids),
        "epochs": setup.total_steps / setup.steps_per_epoch,
        "unigram_ppl": unigram,
        "parameters": setup.config.model.num_parameters,
        "precision": setup.precision.name,
        "precision_reason": setup.precision.reason,
        "initialisations": {cell.initialisation: INITIALISATIONS[cell.initialisation] for cell in cells},
        "config": portable_config(setup.requested.to_dict()),
        "cells": [cell_facts(cell, found[cell.config.name], histories[cell.config.name], unigram) for cell in cells],
        "environment": environment(setup.machine),
    }
    record = json.loads(json.dumps(finite(record)))  # as it will be read back
    record["findings"] = lr_scaling_findings.findings(record)
    joined = pandas.concat(histories.values(), keys=histories, names=["cell"]).reset_index("cell")
    return LrScalingStudy(folder, record, joined.reset_index(drop=True))


def cell_facts(cell: Cell, run: runs.Run, history: DataFrame, unigram: float) -> dict[str, Any]:
    """A row of the table."""
    best = run.best or {}
    last = history.iloc[-1] if len(history) else {}
    return {
        "initialisation": cell.initialisation,
        "batch": cell.batch_size,
        "rule": cell.rule,
        "lr": cell.rate,
        "seed": cell.seed,
        "steps": run.record["step"],
        "status": "broke down" if failure_of(run.folder) else run.record["status"],
        "best_ppl": best.get("val_ppl"),
        "final_ppl": float(last.get("val_ppl", math.nan)),
        "accuracy": best.get("val_accuracy"),
        "plateau": plateau(best.get("val_ppl"), unigram),
        "train_seconds": float(last.get("train_seconds", math.nan)),
        "run": run.folder.name,
    }


def plateau(ppl: float | None, unigram: float) -> str:
    """Where the best perplexity stands to that of the word frequencies: above the plateau, on it, or below."""
    if ppl is None or ppl > (1 + PLATEAU) * unigram:
        return "above"
    return "on" if ppl > (1 - PLATEAU) * unigram else "below"


def unigram_perplexity(train: Split, validation: Split, vocab_size: int) -> float:
    """Of the validation targets under the frequencies of the training targets, one added to each count.

    A model that sees no input reaches it by its output bias alone; the published runs stayed there for 16 epochs.
    """
    counts = np.bincount(_targets(train), minlength=vocab_size) + 1
    scored = _targets(validation)
    nll = math.log(counts.sum()) * len(scored) - np.log(counts)[scored].sum()
    return perplexity(float(nll), len(scored))


def _targets(split: Split) -> np.ndarray:
    targets = split.ids[..., 1:]
    return targets[targets != PAD]
