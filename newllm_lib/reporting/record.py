"""run.json and history.csv of a run's folder, written and read."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


_REQUIRED = {"run": str, "status": str, "config": dict, "decided": dict, "best": dict | None}
_OPTIONAL = {
    "identity": str | None, "requested": dict | None, "data": dict | None, "validation": dict | None,
    "environment": dict | None, "commands": list | None, "plan": list | None, "samples": list | None,
    "step": int | None, "decay_steps": int | None,
}  # fmt: skip
_BEST = dict.fromkeys(("step", "epoch", "val_loss", "val_ppl", "val_accuracy"), int | float | None)
"""The types of what is read of run.json, by name; older records lack some of the optional ones."""


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """run.json: everything about a run but its curve. Infinite and missing numbers become null."""
    write_text_atomic(folder / "run.json", record_text(record))


def record_text(record: dict[str, Any]) -> str:
    """What run.json holds."""
    return json.dumps(finite(record), indent=2) + "\n"


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a run's folder; FileMissingError, FileError or RunError says what is wrong with it."""
    path = folder / "run.json"
    with file_errors(path):
        there = path.is_file()
    if not there:
        raise FileMissingError(f"{folder}: no run here (there is no run.json in it)")
    way_out = "move it away: the checkpoints beside it go on without it"
    record = read_json(path, way_out)
    missing = set(_REQUIRED) - set(record if isinstance(record, dict) else ())
    if missing:
        raise RunError(f"{path}: not the record of a run, {', '.join(sorted(missing))} missing; {way_out}")
    damaged = _damaged(record, _REQUIRED | _OPTIONAL)
    if isinstance(record["best"], dict):
        damaged += _damaged(record["best"], _BEST, "best.")
    if damaged:
        raise RunError(f"{path}: damaged, {', '.join(damaged)} not what a run writes; {way_out}")
    return record


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
    write_text_atomic(folder / "history.csv", text.getvalue())


def read_history(folder: Path):
    """history.csv as a DataFrame; errors as of `read_table`, and RunError where it is another table."""
    from pandas.api.types import is_numeric_dtype

    found = read_table(folder / "history.csv")
    missing = [name for name in ("step", "epoch", "val_loss", "val_ppl") if name not in found]
    wrong = [name for name in HISTORY_COLUMNS if name in found and len(found) and not is_numeric_dtype(found[name])]
    if missing or wrong:
        raise RunError(f"{folder / 'history.csv'}: damaged, no numbers in the columns {', '.join(missing + wrong)}")
    return found


def history_rows(folder: Path) -> list[dict[str, Any]]:
    """history.csv as the rows that `write_history` was given; none without the file, RunError for what is no number.

    A column that an older version did not write is None.
    """
    path = folder / "history.csv"
    if not path.is_file():
        return []
    with file_errors(path, f"cannot read {path}"):
        text = path.read_text(encoding="utf-8", errors="replace")
    rows = []
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=2):
        try:
            rows.append({name: _number(row.get(name)) for name in HISTORY_COLUMNS})
        except ValueError as error:
            raise RunError(f"{path}: line {number}: {error}; the file is damaged") from error
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
        raise RunError(f"{folder / 'run.json'}: damaged ({type(error).__name__}: {error})") from error
