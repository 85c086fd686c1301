"""The runs that a study is made of: trained, continued, or read where they have ended."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from newllm_lib import runs
from newllm_lib.config import RunConfig, flat_fields
from newllm_lib.errors import ConfigError, RunError, TrainingError
from newllm_lib.reporting.formatting import counted
from newllm_lib.reporting.progress import Progress
from newllm_lib.reporting.record import holds_run, read_record
from newllm_lib.runs.launch import launch
from newllm_lib.system.files import file_errors, make_folder, read_json, write_text_atomic
from newllm_lib.training.setup import Setup
from newllm_lib.training.trainer import Trainer
from newllm_lib.tuning import SharedExecution, settle_execution

SETTINGS = "settings.json"
"""What makes a study, in its folder before the first run, so that no other one is mixed into it."""

_EXECUTION = "execution"
"""In SETTINGS: how all runs compute their steps. It makes no other study of one that is asked for again."""

FAILURE = "failure.txt"
"""What a run leaves in its folder when training breaks down; it is not tried again while this is there."""


class StudyInterrupted(KeyboardInterrupt):
    """A study was interrupted while it trained one of its runs; what is done is saved."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows."""
        return ["interrupted; what is done is saved: run this cell again to go on"]


def listed(values: str | Iterable, kind: type = str) -> tuple:
    """What was given one by one, or as a text with commas; ConfigError for a part that is no `kind`."""
    parts = [part.strip() for part in values.split(",")] if isinstance(values, str) else list(values)
    try:
        return tuple(kind(part) for part in parts)
    except ValueError:
        raise ConfigError(f"{values!r}: must be whole numbers with commas between") from None


def claim(places: Sequence[Path], key: str, setup: Setup, **more: Any) -> SharedExecution:
    """Make folders those of the study of a key; RunError, and nothing written, where one is another study's.

    more: what makes the key beside the text and the settings that make a run's identity; both are named where they
    differ. Returns how the study's runs compute their steps: as it began, by the old rules where an earlier version
    began it, measured now where it is new.
    """
    fields = {
        name: getattr(getattr(setup.requested, item.section), name)
        for name, item in flat_fields().items()
        if item.metadata["identity"] and name != "data"
    }
    data = f"{setup.prepared.corpus_name} (sha256 {setup.prepared.fingerprint[:16]}…)"
    mine = json.loads(json.dumps({"key": key, "data": data} | fields | more))  # as it will be read back
    shared = None
    for place in places:
        earlier = _claimed(place)
        if earlier:
            shared = shared or SharedExecution.from_dict(earlier.get(_EXECUTION)) or SharedExecution.of(setup)
        if earlier.get("key") not in (None, key):
            found = [(name, earlier[name], mine[name]) for name in mine if name != "key" and name in earlier]
            changed = "; ".join(f"{name} {old!r} there, {new!r} here" for name, old, new in found if old != new)
            raise RunError(
                f"{place}: holds a study with other settings{changed and f': {changed}'}. Give this one another name, "
                "or move that folder away"
            )
    shared = shared or SharedExecution.of(settle_execution(setup, {}))
    for place in places:
        if not _claimed(place):
            make_folder(place)
            settings = mine | {_EXECUTION: dataclasses.asdict(shared)}
            write_text_atomic(place / SETTINGS, json.dumps(settings, indent=2) + "\n")
    return shared


def _claimed(place: Path) -> dict[str, Any]:
    """What makes the study in a folder; of one from before SETTINGS its key, None where it was not kept either."""
    for name in (SETTINGS, "study.json"):
        if (place / name).is_file():
            found = read_json(place / name)
            if not isinstance(found, dict):
                raise RunError(f"{place / name}: not what a study writes: must be a dictionary")
            return found if name == SETTINGS else {"key": found.get("key")}
    return {}


def check_length(folder: Path, total_steps: int) -> None:
    """RunError where a run has more steps than its study plans: its figures would come from more training."""
    step = read_record(folder).step if holds_run(folder) else None
    if step is not None and step > total_steps:
        raise RunError(
            f"{folder}: has trained {counted(step, 'step')}, and this study plans {total_steps:,}: it was continued on "
            "its own, and would be compared with runs that trained less. Move that folder out of the study, which then "
            "trains this run again"
        )


def train_member(
    config: RunConfig,
    fingerprint: str,
    total_steps: int,
    progress: Progress | None = None,
    watch: Callable[[Trainer], None] = lambda trainer: None,
    *,
    shared: SharedExecution,
) -> runs.Run:
    """The run of a configuration with a name of its own, ended in one way or another.

    fingerprint: of the data; total_steps: what the study plans for it; shared: as `claim` returned it. A run that
    breaks down is left as it is, which is a result too (`failure_of`). Raises StudyInterrupted where it was interrupted
    (it is saved, and the same call goes on with it), RunError as `check_length`.
    """
    folder = Path(config.results_dir) / config.name
    if not has_ended(config, fingerprint):
        interrupted = f"{folder}: interrupted; the same call goes on from here"
        try:
            run = launch(config, False, progress, watch, shared)
        except TrainingError as error:
            write_text_atomic(folder / FAILURE, f"{error}\n")
        except KeyboardInterrupt as error:  # for the second time, or before the first step
            raise StudyInterrupted(interrupted) from error
        else:
            if run.record.status == "interrupted":
                raise StudyInterrupted(interrupted)
    check_length(folder, total_steps)  # again: a copy or a checkpoint may have been further than its record
    return runs.load(folder)


def has_ended(config: RunConfig, fingerprint: str) -> bool:
    """Whether the folder holds this very run, to its planned end or broken down."""
    folder = Path(config.results_dir) / config.name
    if not holds_run(folder):
        return False
    record, train = read_record(folder), config.train
    planned = record.config["train"]
    same = record.identity == config.identity(fingerprint)
    same_plan = all(planned[name] == getattr(train, name) for name in ("epochs", "max_steps", "patience"))
    ended = record.status in ("finished", "stopped early") or failure_of(folder) is not None
    return same and same_plan and ended


def failure_of(folder: Path) -> str | None:
    """Why a run broke down; None where it did not."""
    path = folder / FAILURE
    with file_errors(path):
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None
