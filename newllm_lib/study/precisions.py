"""The same run in two number formats: same seed, same batches, same initial weights, same dropout masks.

How far apart they end says little alone, for every difference grows while a network trains. Two yardsticks stand
beside it: a run in the first format with another seed, and the error of a single step at the same weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from newllm_lib import report as reports
from newllm_lib import runs
from newllm_lib.config import RunConfig
from newllm_lib.errors import ConfigError
from newllm_lib.escaping import csv_text, markdown_list, say, text_table
from newllm_lib.files import file_errors, make_folder, read_json, write_text_atomic
from newllm_lib.hardware import DTYPES, Machine, Precision, choose_precision, environment
from newllm_lib.model import NewLLM
from newllm_lib.planning import make_setup
from newllm_lib.portable import portable_config
from newllm_lib.progress import Progress
from newllm_lib.study import precisions_report
from newllm_lib.study.members import check_length, claim, failure_of, listed, train_member
from newllm_lib.study.rounding import rounding_errors
from newllm_lib.study.step_log import StepLog, Weights, read_steps
from newllm_lib.trainer import Setup, Trainer

if TYPE_CHECKING:
    from pandas import DataFrame

_BAND = 4.0
"""Curves part where they differ by more than so many standard errors of what another draw of batches would give."""

STEPS_FILE = "steps.csv"
"""The step log in the folder of a run, and all of them together in the folder of the study."""

_VERSION = 1
"""Of study.json; a finished study of another version is made again from its runs."""


@dataclass(frozen=True)
class PrecisionStudy:
    """Runs in several number formats beside each other, as `compare_precisions` leaves them in a folder."""

    folder: Path
    record: dict[str, Any]
    """Everything but the curves: runs, comparisons with the first, rounding errors, findings, environment."""
    steps: DataFrame
    """A row for each batch of each run: label, and the columns of `step_log`."""
    validations: DataFrame
    """A row for each validation of each run: label, and the columns of history.csv."""

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
        """A row for each run: how it ended, and how far it is from the first."""
        return text_table(precisions_report.table_rows(self.record))

    @property
    def rounding(self) -> DataFrame:
        """Errors of a single step: a row for each format, state of the weights and part of the model."""
        return text_table(self.record["rounding"])

    def write(self, folder: str | Path) -> Path:
        """study.json, steps.csv, validations.csv, precisions.png and precisions.md in a folder, which is returned."""
        folder = Path(folder)
        make_folder(folder)
        for name in ("steps", "validations"):
            write_text_atomic(folder / f"{name}.csv", csv_text(getattr(self, name), index=False))
        precisions_report.write_plot(folder / "precisions.png", self.record, self.steps, self.validations)
        write_text_atomic(folder / "precisions.md", precisions_report.text(self.record))
        write_text_atomic(folder / "study.json", json.dumps(self.record, indent=2) + "\n")  # last: now it is whole
        return folder

    @classmethod
    def read(cls, folder: str | Path) -> PrecisionStudy:
        """The finished study in a folder; FileMissingError where there is none, RunError where it is damaged."""
        folder = Path(folder)
        record = read_json(folder / "study.json")
        steps, validations = (reports.read_table(folder / f"{name}.csv") for name in ("steps", "validations"))
        return cls(folder, record, steps, validations)


class Member(NamedTuple):
    """One run of a study."""

    label: str
    """Name of its folder, and in tables and pictures."""
    precision: Precision
    config: RunConfig


@file_errors()
def compare_precisions(
    config: str | RunConfig = "quickstart",
    precisions: str | Sequence[str] = ("fp32", "fp16"),
    *,
    control_seed: bool = True,
    progress: Progress | None = None,
    report: Callable[[str], None] = say,
    **overrides: Any,
) -> PrecisionStudy:
    """Train the same run in each of `precisions`, compare each with the first, and leave all of it in a folder.

    config and overrides as for `train`; the folder is `name` under `results_dir`, its runs lie in it. A format that the
    hardware lacks gives way to the nearest 16-bit one, or is emulated (slowly) with `emulate_precision=True`, or where
    that is the only way to have two. control_seed: train a further run in the first format with another seed.
    progress: shows every run, None = as `train` does; report: gets a line before each run. The same call goes on where
    the last one stopped; what is finished is read. Raises ConfigError for formats that make no comparison, RunError for
    a folder of another study and for a run that somebody has trained for longer; KeyboardInterrupt when a run was
    interrupted (it is saved).
    """
    config, precisions = runs.resolve(config, **overrides), listed(precisions)
    setup = make_setup(config.replace(precision="fp32"))
    _check(config, precisions)
    formats = available_formats(precisions, setup.machine, config.train.emulate_precision)
    more = _more(setup, formats, control_seed)
    key = hashlib.sha256(json.dumps([setup.identity, *more.values()]).encode()).hexdigest()
    folder = Path(config.results_dir) / (config.name or f"precisions-{key[:6]}")
    claim([folder], key, setup, **more)
    if finished := _finished(folder):
        report(f"this study is finished: {folder}")
        return finished
    members = _members(config.replace(batch_size=setup.config.train.batch_size), formats, control_seed, folder)
    for member in members:
        check_length(folder / member.label, setup.total_steps)
    weights = Weights(folder / "weights")
    for number, member in enumerate(members, 1):
        report(f"run {number} of {len(members)}: {member.label} ({member.precision.reason})")
        _train(member, weights, setup, number == 1, progress)
    study = _study(folder, key, setup, members, precisions)
    study.write(folder)
    weights.remove()
    return study


def _check(config: RunConfig, precisions: Sequence[str]) -> None:
    """ConfigError for what makes no comparison."""
    names = list(DTYPES)
    if len(set(precisions)) < 2 or not set(precisions) <= set(names) or len(set(precisions)) < len(precisions):
        raise ConfigError(f"precisions = {tuple(precisions)!r}: must be two or more of {', '.join(names)}, each once")
    if config.train.batch_policy != "recipe":
        raise ConfigError(
            f"TrainConfig.batch_policy = {config.train.batch_policy!r}: must be recipe here, for all runs have to read "
            "the same batches; give the size with batch_size"
        )
    if config.mirror_dir:
        raise ConfigError(
            f"RunConfig.mirror_dir = {config.mirror_dir!r}: not for this study: what it records of each step is not "
            "copied; copy its folder when it is finished"
        )


def available_formats(precisions: Sequence[str], machine: Machine, emulate: bool = False) -> list[Precision]:
    """What a machine runs for the formats asked for, each once; ConfigError where that leaves nothing to compare."""
    chosen = [choose_precision(name, machine, emulate) for name in precisions]
    if len({found.name for found in chosen}) == 1:  # nothing of 16 bits: bfloat16 is what a CPU emulates fastest
        chosen = [
            found if name == "fp32" else choose_precision("bf16", machine, emulate=True)
            for name, found in zip(precisions, chosen, strict=True)
        ]
    distinct = list({found.name: found for found in chosen}.values())
    if len(distinct) == 1:
        raise ConfigError(
            f"precisions = {tuple(precisions)!r}: on {machine.name} they all come down to {distinct[0].name}; compare "
            "with fp32, or let them be emulated (emulate_precision=True, in the shell --emulate-precision)"
        )
    return distinct


def _more(setup: Setup, formats: list[Precision], control_seed: bool) -> dict[str, Any]:
    """What makes a study beside its first run's identity: how long that trains and is validated, the other runs."""
    names = ("validate_every_steps", "patience", "decay_steps")
    plan = {"steps": setup.total_steps} | {name: getattr(setup.config.train, name) for name in names}
    others = {"formats": [found.name for found in formats], "control_seed": control_seed}
    return plan | others | {"machine": setup.machine.kind}


def _finished(folder: Path) -> PrecisionStudy | None:
    """The study in a folder, if it is whole."""
    study = PrecisionStudy.read(folder) if (folder / "study.json").is_file() else None
    return study if study and study.record.get("version") == _VERSION else None


def _members(config: RunConfig, formats: list[Precision], control_seed: bool, folder: Path) -> list[Member]:
    """The run in each format, then the first once more with the next seed."""
    asked = [(found.name, found, config.train.seed) for found in formats]
    if control_seed:
        seed = config.train.seed + 1
        asked.append((f"{formats[0].name}-seed-{seed}", formats[0], seed))
    place = {"results_dir": str(folder), "emulate_precision": True}  # what it lacks was replaced already
    return [
        Member(label, found, config.replace(name=label, precision=found.name, seed=seed, **place))
        for label, found, seed in asked
    ]


def _train(member: Member, weights: Weights, setup: Setup, first: bool, progress: Progress | None) -> None:
    """Train, continue or read a run, its steps recorded."""
    beginning: list[NewLLM] = []

    def watch(trainer: Trainer) -> None:
        beginning.append(fresh_model(trainer.setup))
        log.watch(trainer)

    path = Path(member.config.results_dir) / member.label / STEPS_FILE
    log = StepLog(path, lambda model, batch: weights.measure(beginning[0], model, batch, first))
    with log.open():
        train_member(member.config, setup.prepared.fingerprint, setup.total_steps, progress, watch)


def fresh_model(setup: Setup) -> NewLLM:
    """A run's weights before its first step, on the CPU."""
    model = NewLLM(setup.config.model)
    model.initialise(torch.Generator().manual_seed(setup.config.train.seed))
    return model


# --- what the runs say -------------------------------------------------------------------------------------------


def _study(folder: Path, key: str, setup: Setup, members: list[Member], asked: Sequence[str]) -> PrecisionStudy:
    """Everything from the folders of runs that have ended."""
    import pandas

    found = [runs.load(folder / member.label) for member in members]
    steps = [read_steps(run.folder / STEPS_FILE) for run in found]
    histories = [run.history for run in found]
    window = smoothing_window(len(steps[0]))
    record = {
        "version": _VERSION,
        "key": key,
        "preset": setup.config.preset,
        "precisions_asked": list(asked),
        "data": setup.prepared.corpus_name,
        "config": portable_config(members[0].config.to_dict()),
        "window": window,
        "runs": [
            run_facts(member, run, log) for member, run, log in zip(members, found, steps, strict=True)
        ],
        "comparisons": [
            {"label": members[n].label} | compare_runs(steps[0], steps[n], histories[0], histories[n], window)
            for n in range(1, len(members))
        ],
        "rounding": _rounding(setup, members, found[0]),
        "environment": environment(setup.machine),
    }  # fmt: skip
    record = json.loads(json.dumps(reports.finite(record)))  # as it will be read back
    record["findings"] = precisions_report.findings(record)
    labels = [member.label for member in members]
    joined = [pandas.concat(frames, keys=labels, names=["label"]).reset_index("label") for frames in (steps, histories)]
    return PrecisionStudy(folder, record, *(frame.reset_index(drop=True) for frame in joined))


def run_facts(member: Member, run: runs.Run, log: DataFrame) -> dict[str, Any]:
    """A run's own facts, without the others."""
    history = run.history
    scales = log["loss_scale"].dropna()
    return {
        "label": member.label,
        "precision": member.precision.name,
        "reason": member.precision.reason,
        "substituted": member.precision.substituted,
        "seed": member.config.train.seed,
        "engine": run.record["decided"]["engine"],
        "status": run.record["status"],
        "failure": failure_of(run.folder),
        "batches": len(log),
        "skipped_steps": int(log["skipped"].sum()),
        "loss_scale": [float(scales.iloc[0]), float(scales.iloc[-1])] if len(scales) else None,
        "moved": _last(log["moved"].dropna()),
        "best_ppl": run.best["val_ppl"] if run.best else None,
        "final_ppl": _last(history["val_ppl"]),
        "train_seconds": _last(history["train_seconds"]),
    }


def _last(values: Any) -> float | None:
    return float(values.iloc[-1]) if len(values) else None


def compare_runs(
    first: DataFrame, other: DataFrame, first_rows: DataFrame, other_rows: DataFrame, window: int
) -> dict[str, Any]:
    """A run beside the first: whether they read the same batches, where they part and by how much (other - first)."""
    both = first.merge(other, on="batch", suffixes=("", "_other"))
    rows = first_rows.merge(other_rows, on="step", suffixes=("", "_other"))
    losses, other_losses = both["loss"].to_numpy(), both["loss_other"].to_numpy()
    parted, band = parting(losses, other_losses, window)
    gaps, sizes = trailing_means(other_losses - losses, window), np.abs(other_losses - losses)
    val = (rows["val_loss_other"] - rows["val_loss"]).to_numpy()
    return {
        "batches": len(both),
        "same_batches": int((both["digest"] == both["digest_other"]).sum()),
        "band": band,
        "parted_at": None if parted is None else int(both["batch"].iloc[parted]),
        "rejoined_at": None if parted is None else _rejoined_at(both["batch"], np.abs(gaps) > band),
        "train_largest": _largest(gaps),
        "gap_first": float(sizes[0]) if len(sizes) else None,
        "gap_last": float(np.median(sizes[-window:])) if len(sizes) else None,
        **around_the_first_skip(both, sizes, window),
        "validations": len(val),
        "val_last": float(val[-1]) if len(val) else None,
        "val_mean": float(np.abs(val).mean()) if len(val) else None,
        "distance": _last(other["distance"].dropna()),
    }


def _rejoined_at(batches: Any, beyond: np.ndarray) -> int | None:
    """The batch from which curves stay together to the end; beyond (n,): whether they are apart, for the last n."""
    if beyond[-1]:
        return None
    return int(batches.iloc[len(batches) - 1 - int(beyond[::-1].argmax()) + 1])


def around_the_first_skip(both: DataFrame, sizes: np.ndarray, window: int) -> dict[str, Any]:
    """Where the other run first skipped a step, and the mean difference (n,) over a window before and after."""
    skips = np.flatnonzero(both["skipped_other"])
    if not len(skips):
        return {"first_skip": None, "gap_before_skip": None, "gap_after_skip": None}
    first = int(skips[0])
    before, after = sizes[max(0, first - window + 1) : first + 1], sizes[first + 1 :][:window]
    return {
        "first_skip": int(both["batch"].iloc[first]),
        "gap_before_skip": float(before.mean()),  # its own loss too: that was before the update
        "gap_after_skip": float(after.mean()) if len(after) else None,
    }


def _largest(values: np.ndarray) -> float | None:
    """The value with the largest size, with its sign."""
    return float(values[np.abs(values).argmax()]) if len(values) else None


def parting(first: np.ndarray, other: np.ndarray, window: int) -> tuple[int | None, float]:
    """The index from which two curves of losses (n,) stay apart, None where they never do, and what counts as apart.

    The means of `window` steps up to a step must differ by more than the band there and for a window of steps on. The
    band is four standard errors of what two draws of batches would differ by: 4 sqrt(2 / window) times the spread of
    the first curve's losses from step to step, the trend left out. Curves that read the same batches share that spread,
    so a smaller difference is real too; but nobody could see it in the curves.
    """
    band = _BAND * math.sqrt(2 / window) * spread(first)
    beyond = np.abs(trailing_means(other - first, window)) > band
    if len(beyond) < window:
        return None, band
    stays = np.lib.stride_tricks.sliding_window_view(beyond, window).all(axis=1)
    return (int(stays.argmax()) + window - 1 if stays.any() else None), band


def spread(losses: np.ndarray) -> float:
    """Standard deviation of losses (n,) around their trend, from the median size of a change between two steps."""
    changes = np.abs(np.diff(losses))
    return float(np.median(changes)) / (0.6745 * math.sqrt(2)) if len(changes) else 0.0


def trailing_means(values: np.ndarray, window: int) -> np.ndarray:
    """(n - window + 1,): the mean of the `window` values up to each, from the first that has so many."""
    if len(values) < window:
        return np.empty(0)
    return np.lib.stride_tricks.sliding_window_view(values, window).mean(axis=1)


def smoothing_window(steps: int) -> int:
    """Steps that curves are smoothed over: a twentieth of them, at least five."""
    return max(5, round(steps / 20))


def _rounding(setup: Setup, members: list[Member], run: runs.Run) -> list[dict[str, Any]]:
    """Errors of a single step in each other format, before training and with the first run's best weights."""
    models = {"untrained": fresh_model(setup)}
    if run.best:
        models["trained"] = run.model
    formats = {member.precision.name: member.precision for member in members if member.precision.name != "fp32"}
    return [
        {"precision": found.name, "weights": name} | row
        for found in formats.values()
        for name, model in models.items()
        for row in rounding_errors(setup, model, found)
    ]
