"""The runs that a study is made of: trained, continued, or read where they have ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from newllm_lib import runs
from newllm_lib.config import RunConfig
from newllm_lib.files import write_text_atomic
from newllm_lib.progress import Progress
from newllm_lib.report import read_record
from newllm_lib.step import TrainingError
from newllm_lib.trainer import Trainer

FAILURE = "failure.txt"
"""What a run leaves in its folder when training breaks down; it is not tried again while this is there."""


def listed(values: str | Iterable, kind: type = str) -> tuple:
    """What was given one by one, or as a text with commas; ValueError for a part that is no `kind`."""
    parts = [part.strip() for part in values.split(",")] if isinstance(values, str) else list(values)
    try:
        return tuple(kind(part) for part in parts)
    except ValueError:
        raise ValueError(f"{values!r}: must be whole numbers with commas between") from None


def train_member(
    config: RunConfig,
    fingerprint: str,
    progress: Progress | None = None,
    watch: Callable[[Trainer], None] = lambda trainer: None,
) -> runs.Run:
    """The run of a configuration with a name of its own, ended in one way or another.

    fingerprint: of the data. A run that breaks down is left as it is, which is a result too (`failure_of`). Raises
    KeyboardInterrupt where it was interrupted; it is saved, and the same call goes on with it.
    """
    folder = Path(config.results_dir) / config.name
    if has_ended(config, fingerprint):
        return runs.load(folder)
    try:
        run = runs.train(config, progress=progress, watch=watch)
    except TrainingError as error:
        write_text_atomic(folder / FAILURE, f"{error}\n")
        return runs.load(folder)
    if run.record["status"] == "interrupted":
        raise KeyboardInterrupt(f"{folder}: interrupted; the same call goes on from here")
    return run


def has_ended(config: RunConfig, fingerprint: str) -> bool:
    """Whether the folder holds this very run, to its planned end or broken down."""
    folder = Path(config.results_dir) / config.name
    if not (folder / "run.json").is_file():
        return False
    record, train = read_record(folder), config.train
    planned = record["config"]["train"]
    same = record.get("identity") == config.identity(fingerprint)
    same_length = (planned["epochs"], planned["max_steps"]) == (train.epochs, train.max_steps)
    ended = record["status"] in ("finished", "stopped early") or failure_of(folder) is not None
    return same and same_length and ended


def failure_of(folder: Path) -> str | None:
    """Why a run broke down; None where it did not."""
    path = folder / FAILURE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None
