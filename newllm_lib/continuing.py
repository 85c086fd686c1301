"""Runs that go on: found on this machine, in a copy or in a file, and carried on further than they were planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from newllm_lib import report
from newllm_lib.adopting import adopt, check_same_run
from newllm_lib.config import RunConfig, flat_fields
from newllm_lib.errors import ConfigError, NewLLMError
from newllm_lib.escaping import say
from newllm_lib.fetching import fetch
from newllm_lib.files import file_errors
from newllm_lib.mirror import Mirror
from newllm_lib.planning import make_setup
from newllm_lib.runs import Run


@file_errors()
def find_run(
    place: str | Path = "",
    *,
    results_dir: str | Path = "results",
    mirror_dir: str | Path | None = None,
    sha256: str | None = None,
    tell: Callable[[str], None] = say,
) -> Run | None:
    """A run to continue, brought to `results_dir` if it lies elsewhere.

    place: a run's folder, or its name in `results_dir` or `mirror_dir`; a bundle with a checkpoint, a checkpoint file,
    or the id of such a file on Google Drive (`sha256` is then what its content must be); empty = the newest run of
    `results_dir` and of its copies in `mirror_dir`, None where there is none. Errors as of `fetch` and `adopt`;
    FileTakenError where a copy's run would replace another one.
    """
    wheres = [Path(where) for where in (results_dir, mirror_dir) if where]
    if place:
        folders = [
            path for path in (Path(place), *(where / place for where in wheres)) if (path / "run.json").is_file()
        ]
        if not folders:
            return adopt(fetch(place, Path(results_dir) / "downloads", sha256, tell=tell), results_dir)
        found = folders[0]
    else:
        folders = [folder for where in wheres for folder in _runs_in(where, tell)]
        if not folders:
            return None
        found = max(folders, key=lambda folder: (folder / "run.json").stat().st_mtime)
    here = Path(results_dir) / found.name
    if mirror_dir and found.resolve().parent in (here.resolve().parent, Path(mirror_dir).resolve()):
        identity = report.read_record(found).get("identity")
        check_same_run(here, identity)
        Mirror(here, mirror_dir, identity).restore(tell)
        return Run(here)
    return Run(found)


def _runs_in(where: Path, tell: Callable[[str], None]) -> list[Path]:
    """Folders with runs that can go on: those that have checkpoints, and a record that can be read."""
    found = []
    for path in where.glob("*/run.json"):
        try:
            report.read_record(path.parent)
        except NewLLMError as error:
            tell(f"left out: {error}")
            continue
        if any((path.parent / "checkpoints").glob("*.pt")):
            found.append(path.parent)
    return found


def extended(run: Run, *, epochs: int | None = None, max_steps: int | None = None, **changes) -> RunConfig:
    """The configuration with which `train` carries a run on, to a new total of epochs or of steps (None = its own end).

    A rate that decays to an end gets the new end of the run as its own. changes: fields that define no result
    (patience, mirror_dir, ...), and `data` where the same text now lies in another place. ConfigError where the run is
    longer already, or a change would make another run of it.
    """
    if epochs is not None and max_steps is not None:
        raise ConfigError(f"epochs = {epochs}, max_steps = {max_steps}: give the new total as one of them")
    _check_same_run(run, changes)
    asked = run.requested
    if epochs is None and max_steps is None:
        return asked.replace(**changes)
    config = asked.replace(**changes, epochs=epochs, max_steps=max_steps)
    if asked.train.lr_schedule != "constant" and "decay_steps" not in changes:
        config = config.replace(decay_steps=None)
    setup = make_setup(config, run.record.get("decided"))  # its batch may be what a policy or another machine gave
    done = run.record.get("step", 0)
    if setup.total_steps < done:
        asked_for = f"epochs = {epochs}" if epochs else f"max_steps = {max_steps}"
        raise ConfigError(
            f"{asked_for}: {run.folder.name} has already trained {done:,} steps "
            f"({done / setup.steps_per_epoch:.2f} epochs): must be as much or more"
        )
    if config.train.lr_schedule != "constant" and config.train.decay_steps is None:
        config = config.replace(decay_steps=setup.total_steps)
    return config


def _check_same_run(run: Run, changes: dict) -> None:
    fields = flat_fields()
    for name, value in changes.items():
        if name not in fields:
            continue  # `replace` names it
        item = fields[name]
        section = run.requested if item.section == "run" else getattr(run.requested, item.section)
        now = getattr(section, name)
        if name != "data" and item.metadata["identity"] and value != now:
            raise ConfigError(f"{name} = {value!r}: is {now!r} in {run.folder.name}; another value makes another run")
