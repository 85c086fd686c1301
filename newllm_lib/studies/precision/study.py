"""The same run in two number formats: same seed, same batches, same initial weights, same dropout masks.

How far apart they end says little alone, for every difference grows while a network trains. Two yardsticks stand
beside it: a run in the first format with another seed, and the error of a single step at the same weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from newllm_lib import runs
from newllm_lib.config import RunConfig
from newllm_lib.config.places import user_path
from newllm_lib.config.portable import portable_config
from newllm_lib.config.presets import resolve
from newllm_lib.errors import ConfigError
from newllm_lib.escaping import csv_text, markdown_list, say, text_table
from newllm_lib.model.newllm import NewLLM
from newllm_lib.reporting.curves import without_missing_picture
from newllm_lib.reporting.progress import Progress
from newllm_lib.reporting.record import finite, read_table
from newllm_lib.studies.precision import findings as precision_findings
from newllm_lib.studies.precision.compare import compare_runs, last_value, smoothing_window
from newllm_lib.studies.precision.plots import write_plot
from newllm_lib.studies.precision.rounding import rounding_errors
from newllm_lib.studies.precision.step_log import StepLog, Weights, read_steps
from newllm_lib.studies.study_runs import check_length, claim, failure_of, listed, train_member
from newllm_lib.system.files import file_errors, make_folder, read_json, write_text_atomic
from newllm_lib.system.hardware import DTYPES, Machine, Precision, choose_precision, environment
from newllm_lib.training.setup import Setup, make_setup
from newllm_lib.training.trainer import Trainer
from newllm_lib.tuning import SharedExecution

if TYPE_CHECKING:
    from pandas import DataFrame


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
        return text_table(precision_findings.table_rows(self.record))

    @property
    def rounding(self) -> DataFrame:
        """Errors of a single step: a row for each format, state of the weights and part of the model."""
        return text_table(self.record["rounding"])

    def write(self, folder: str | Path) -> Path:
        """study.json, steps.csv, validations.csv, precisions.png and precisions.md in a folder, which is returned."""
        folder = user_path(folder)
        make_folder(folder)
        for name in ("steps", "validations"):
            write_text_atomic(folder / f"{name}.csv", csv_text(getattr(self, name), index=False))
        write_plot(folder / "precisions.png", self.record, self.steps, self.validations)
        text = without_missing_picture(precision_findings.text(self.record), folder)
        write_text_atomic(folder / "precisions.md", text)
        record = json.dumps(self.record, indent=2, allow_nan=False) + "\n"
        write_text_atomic(folder / "study.json", record)  # last: now it is whole
        return folder

    @classmethod
    def read(cls, folder: str | Path) -> PrecisionStudy:
        """The finished study in a folder; FileMissingError where there is none, RunError where it is damaged."""
        folder = user_path(folder)
        record = read_json(folder / "study.json")
        steps, validations = (read_table(folder / f"{name}.csv") for name in ("steps", "validations"))
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
    config, precisions = resolve(config, **overrides), listed(precisions)
    setup = make_setup(config.replace(precision="fp32"))
    _check(config, precisions)
    formats = available_formats(precisions, setup.machine, config.train.emulate_precision)
    more = _more(setup, formats, control_seed)
    key = hashlib.sha256(json.dumps([setup.identity, *more.values()]).encode()).hexdigest()
    folder = Path(config.results_dir) / (config.name or f"precisions-{key[:6]}")
    shared = claim([folder], key, setup, **more)
    if finished := _finished(folder):
        report(f"this study is finished: {folder}")
        return finished
    members = _members(config.replace(batch_size=setup.config.train.batch_size), formats, control_seed, folder)
    for member in members:
        check_length(folder / member.label, setup.total_steps)
    weights = Weights(folder / "weights")
    for number, member in enumerate(members, 1):
        report(f"run {number} of {len(members)}: {member.label} ({member.precision.reason})")
        _train(member, weights, setup, number == 1, progress, shared)
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
            f"batch_policy = {config.train.batch_policy!r}: must be recipe here, for all runs have to read "
            "the same batches; give the size with batch_size"
        )
    if config.mirror_dir:
        raise ConfigError(
            f"mirror_dir = {config.mirror_dir!r}: not for this study: what it records of each step is not "
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


def _train(
    member: Member, weights: Weights, setup: Setup, first: bool, progress: Progress | None, shared: SharedExecution
) -> None:
    """Train, continue or read a run, its steps recorded."""
    beginning: list[NewLLM] = []

    def watch(trainer: Trainer) -> None:
        beginning.append(NewLLM.fresh(trainer.setup.config.model, trainer.setup.config.train.seed))
        log.watch(trainer)

    path = Path(member.config.results_dir) / member.label / STEPS_FILE
    log = StepLog(path, lambda model, batch: weights.measure(beginning[0], model, batch, first))
    with log.open():
        train_member(member.config, setup.prepared.fingerprint, setup.total_steps, progress, watch, shared=shared)


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
    record = json.loads(json.dumps(finite(record)))  # as it will be read back
    record["findings"] = precision_findings.findings(record)
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
        "moved": last_value(log["moved"].dropna()),
        "best_ppl": run.best["val_ppl"] if run.best else None,
        "final_ppl": last_value(history["val_ppl"]),
        "train_seconds": last_value(history["train_seconds"]),
    }


def _rounding(setup: Setup, members: list[Member], run: runs.Run) -> list[dict[str, Any]]:
    """Errors of a single step in each other format, before training and with the first run's best weights."""
    models = {"untrained": NewLLM.fresh(setup.config.model, setup.config.train.seed)}
    if run.best:
        models["trained"] = run.model
    formats = {member.precision.name: member.precision for member in members if member.precision.name != "fp32"}
    return [
        {"precision": found.name, "weights": name} | row
        for found in formats.values()
        for name, model in models.items()
        for row in rounding_errors(setup, model, found)
    ]
