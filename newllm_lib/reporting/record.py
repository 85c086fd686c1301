"""The files of a run's folder by name, and two of them written and read: run.json and history.csv."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from newllm_lib.errors import FileMissingError, NewLLMError, RunError
from newllm_lib.escaping import csv_cell, read_csv
from newllm_lib.system.files import file_errors, read_json, write_text_atomic

HISTORY_COLUMNS = (
    "step",
    "epoch",
    "train_loss",
    "val_loss",
    "val_ppl",
    "val_accuracy",
    "val_ppl_known",
    "val_bits_per_byte",
    "val_word_ppl",
    "val_bits_per_byte_known",
    "lr",
    "clip",
    "train_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "skipped_steps",
)

RECORD, HISTORY, CURVES, REPORT = "run.json", "history.csv", "curves.png", "report.md"
MODEL, CHECKPOINTS = "model", "checkpoints"
WEIGHTS, MODEL_CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
PROTOCOL, CARD = "data.json", "README.md"
RUN_FILES = (RECORD, HISTORY, CURVES, REPORT)
"""What a run's folder holds: these files, MODEL with WEIGHTS, MODEL_CONFIG, TOKENIZER, PROTOCOL (how text is
read for it: DataConfig without the place of the text) and perhaps a CARD, and CHECKPOINTS, whose files
`training.checkpoint.Checkpoints` names."""


_NEEDED = {"needed": True}
"""Of a key without which run.json is not the record of a run."""


@dataclass(init=False, repr=False, eq=False)
class RunRecord(dict):
    """What run.json says: the dictionary in the file, and each key of it as an attribute.

    An attribute is None where its key is missing: older versions wrote fewer keys, and a file from elsewhere does not
    tell everything. Keys of newer versions stay in the dictionary, so nothing is lost when a record is written again.
    TypeError where it is made with a key that is not declared here; AttributeError where such an attribute is used.
    """

    run: str = field(metadata=_NEEDED)
    """Name of the folder when this was written; the names of its checkpoints contain it."""
    preset: str | None
    status: str = field(metadata=_NEEDED)
    """running, finished, stopped early, interrupted, failed or imported."""
    identity: str | None
    """`RunConfig.identity` of what was asked for; None where that is unknown, as of an imported run."""
    parameters: int | None
    published_protocol: bool | None
    """Whether the very ids were scored that the published series scored."""
    faithful: bool | None
    """Whether it re-creates a published run; None where its preset is none of those."""
    faithful_reason: str | None
    """Why it is not faithful."""
    decided: dict = field(metadata=_NEEDED)
    """What a run keeps when it continues (`training.setup.Setup.decided`), as far as it is known."""
    plan: list | None
    """(what, how much and why) of every decision: `training.plan.plan_lines`."""
    decay_steps: int | None
    """Step at which a decaying learning rate ends; None for a constant one."""
    warmup_steps: int | None
    """Steps of warm-up, as the run began; None where an earlier version wrote this."""
    model_step: int | None
    """Step of the weights in model/, where they are not the best ones."""
    data: dict | None
    """The text: name, fingerprint (sha256), training_sequences, training_tokens."""
    validation: dict | None
    """What was scored: tokens, unknown_share (of 1), digest (sha256 of the ids)."""
    peak_memory_meaning: str | None
    product_rate: float | None
    """FLOP a second of matrix products in the run's format, as this machine gave it when training began."""
    environment: dict | None
    """`system.hardware.environment`."""
    parts: list | None
    """Where the run was trained, a part for each change: from_step (updates before it), precision, environment."""
    config: dict = field(metadata=_NEEDED)
    """`RunConfig.to_dict`, every field decided."""
    requested: dict | None
    """The same as it was asked for, open fields left open."""
    commands: list | None
    """How each part of the run was started."""
    samples: list | None
    """Texts by the best weights, the prompt of each between two asterisks."""
    step: int | None
    """Updates done."""
    total_steps: int | None
    """Updates planned."""
    best: dict | None = field(metadata=_NEEDED)
    """Row of the history with the lowest validation loss; None before the first one."""
    peak_memory_bytes: int | None
    peak_memory_share: int | float | None
    """Of the machine's memory."""
    imported: dict | None
    """What an old file says of itself; None for every run of this library."""

    def __init__(self, **values: Any):
        unknown = values.keys() - KEYS.keys()
        if unknown:
            raise TypeError(f"run.json has no key {', '.join(sorted(unknown))}")
        super().__init__(values)

    def __getattr__(self, name: str) -> Any:  # called only for what a dictionary does not have itself
        if name not in KEYS:
            raise AttributeError(f"run.json has no key {name}")
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in KEYS:
            raise AttributeError(f"run.json has no key {name}")
        self[name] = value

    @classmethod
    def from_dict(cls, values: Any) -> RunRecord:
        """The record in what was read from run.json; RunError names what is missing or of another type."""
        missing = _REQUIRED - set(values if isinstance(values, dict) else ())
        if missing:
            raise RunError(f"not the record of a run, {', '.join(sorted(missing))} missing")
        damaged = _damaged(values, KEYS)
        for name, kinds in _WITHIN.items():
            if isinstance(values.get(name), dict):
                damaged += _damaged(values[name], kinds, f"{name}.")
        if isinstance(values["best"], dict):
            damaged += [f"best.{name}" for name in _ALWAYS if name not in values["best"]]
        if damaged:
            raise RunError(f"damaged, {', '.join(damaged)} not what a run writes")
        record = cls()
        record.update(values)
        return record

    @property
    def began_on(self) -> str:
        """The name of the device of the first step, as far as it is known; "" where it is not."""
        first = (self.parts or [{"environment": self.environment}])[0]
        known = first.get("environment") if self.step and isinstance(first, dict) else None
        name = known.get("device_name") if isinstance(known, dict) else None
        return name if isinstance(name, str) else ""

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, as JSON holds it: numbers that are not finite become None."""
        return finite(self)


KEYS: dict[str, Any] = get_type_hints(RunRecord)
"""The keys of run.json with their types, in the order in which a run writes them."""
_REQUIRED = {item.name for item in fields(RunRecord) if item.metadata}
_WITHIN: dict[str, dict[str, Any]] = {
    "best": dict.fromkeys(("step", "epoch", "val_loss", "val_ppl", "val_accuracy"), int | float | None),
    "data": {"name": str | None, "fingerprint": str | None},
    "validation": {"tokens": int | None, "unknown_share": int | float | None, "digest": str | None},
}
"""The types of what is read within some of the values, whatever else they hold."""
_ALWAYS = ("step", "val_loss", "val_ppl")
"""What the best row has at least."""


def holds_run(folder: Path) -> bool:
    """Whether a folder is that of a run: whether it has a record."""
    return (folder / RECORD).is_file()


def contents(folder: Path) -> str:
    """What a run's folder holds, for the reader: the report first."""
    there = [name for name in (*reversed(RUN_FILES), MODEL, CHECKPOINTS) if (folder / name).exists()]
    return ", ".join(name if name in RUN_FILES else f"{name}/" for name in there)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """run.json: everything about a run but its curve. Infinite and missing numbers become null."""
    write_text_atomic(folder / RECORD, record_text(record))


def record_text(record: dict[str, Any]) -> str:
    """What run.json holds."""
    return json.dumps(finite(record), indent=2, allow_nan=False) + "\n"


def read_record(folder: Path) -> RunRecord:
    """run.json of a run's folder; FileMissingError, FileError or RunError says what is wrong with it."""
    path = folder / RECORD
    with file_errors(path):
        there = path.is_file()
    if not there:
        raise FileMissingError(f"{folder}: no run here (there is no run.json in it)")
    way_out = "move it away: the checkpoints beside it go on without it"
    values = read_json(path, way_out)
    try:
        return RunRecord.from_dict(values)
    except RunError as error:
        raise RunError(f"{path}: {error}; {way_out}") from None


def _damaged(values: dict[str, Any], kinds: dict[str, Any], prefix: str = "") -> list[str]:
    """The names of values that are there and of another type than a run writes."""
    return [prefix + name for name, kind in kinds.items() if name in values and not isinstance(values[name], kind)]


def finite(value: Any) -> Any:
    """Dictionaries and lists as JSON holds them: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """history.csv: a row a validation, rewritten whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, HISTORY_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in history)
    write_text_atomic(folder / HISTORY, text.getvalue())


def read_history(folder: Path):
    """history.csv as a DataFrame; errors as of `read_table`, and RunError where it is another table."""
    from pandas.api.types import is_numeric_dtype

    found = read_table(folder / HISTORY)
    missing = [name for name in ("step", "epoch", "val_loss", "val_ppl") if name not in found]
    wrong = [name for name in HISTORY_COLUMNS if name in found and len(found) and not is_numeric_dtype(found[name])]
    if missing or wrong:
        raise RunError(f"{folder / HISTORY}: damaged, no numbers in the columns {', '.join(missing + wrong)}")
    return found


def history_rows(folder: Path) -> list[dict[str, Any]]:
    """history.csv as the rows that `write_history` was given; none without the file, RunError for what is no number.

    A column that an older version did not write is None.
    """
    path = folder / HISTORY
    if not path.is_file():
        return []
    with file_errors(path, f"cannot read {path}"):
        text = path.read_text(encoding="utf-8", errors="replace")
    rows = []
    try:
        for row in csv.DictReader(io.StringIO(text)):
            rows.append({name: _number(row.get(name)) for name in HISTORY_COLUMNS})
    except (ValueError, csv.Error) as error:
        raise RunError(f"{path}: line {len(rows) + 2}: {error}; the file is damaged") from error
    return rows


def _number(text: str | None) -> float | None:
    if not text:
        return None
    return int(text) if text.lstrip("-").isdecimal() else float(text)


def read_table(path: Path):
    """A .csv file of this library as a DataFrame; FileError where it cannot be read, RunError where it is damaged."""
    try:
        with file_errors(path, f"cannot read {path}"):
            return read_csv(path)
    except ValueError as error:  # as pandas says it of a file that is no table, or not UTF-8
        raise RunError(f"{path}: damaged, not a table that can be read ({error})") from error


@contextlib.contextmanager
def damaged_record(folder: Path) -> Iterator[None]:
    """RunError where what is inside meets a run.json that does not hold what it should."""
    try:
        yield
    except NewLLMError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{folder / RECORD}: damaged ({type(error).__name__}: {error})") from error
