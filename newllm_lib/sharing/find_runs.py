"""Runs wherever they are: folders, bundles, copies, checkpoint files, Google Drive."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from newllm_lib.config import RunConfig
from newllm_lib.config.places import user_path
from newllm_lib.errors import FileMissingError, FileTakenError, NewLLMError
from newllm_lib.escaping import say
from newllm_lib.reporting.record import CHECKPOINTS, RECORD, holds_run, read_record
from newllm_lib.runs.mirror import Mirror
from newllm_lib.runs.run import Run
from newllm_lib.sharing.bundle import bundle_record, folder_name, open_bundle
from newllm_lib.sharing.from_file import adopt, check_same_run
from newllm_lib.sharing.google_drive import fetch
from newllm_lib.system.files import file_errors, make_folder


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
    `results_dir` and of its copies in `mirror_dir`, None where there is none. Of a run that cannot be written to a copy
    is made. Errors as of `fetch` and `adopt`; FileTakenError where a copy's run would replace another one.
    """
    results_dir, mirror_dir = user_path(results_dir), user_path(mirror_dir) if mirror_dir else None
    wheres = [where for where in (results_dir, mirror_dir) if where]
    if place:
        folders = [path for path in (user_path(place), *(where / place for where in wheres)) if holds_run(path)]
        if not folders and user_path(place).is_dir():
            raise FileMissingError(f"{place}: no run here (there is no run.json in it)")
        if not folders:
            return adopt(fetch(place, results_dir / "downloads", sha256, tell=tell), results_dir)
        found = folders[0]
    else:
        folders = [folder for where in wheres for folder in _runs_in(where, tell)]
        if not folders:
            return None
        found = max(folders, key=lambda folder: (folder / RECORD).stat().st_mtime)
    here = results_dir / found.name
    if mirror_dir and found.resolve().parent in (here.resolve().parent, mirror_dir.resolve()):
        identity = read_record(found).identity
        check_same_run(here, identity)
        Mirror(here, mirror_dir, identity).restore(tell)
        return Run(here)
    return Run(found) if os.access(found, os.W_OK) else _writable_copy(found, results_dir, tell)


def _writable_copy(found: Path, results_dir: Path, tell: Callable[[str], None]) -> Run:
    """A run that cannot be written to, such as an input on Kaggle, as a copy that can; the copy of before where it is.

    FileTakenError where another run has its place.
    """
    if not os.access(results_dir if results_dir.exists() else results_dir.parent, os.W_OK):
        results_dir = Path(RunConfig().results_dir)
    here = results_dir / found.name
    if here.exists():
        check_same_run(here, read_record(found).identity)
        tell(f"{found}: cannot be written to; continuing its copy {here}")
        return Run(here)
    make_folder(results_dir)
    with tempfile.TemporaryDirectory(prefix=".copying-", dir=results_dir) as scratch:
        whole = Path(scratch) / found.name
        shutil.copytree(found, whole, copy_function=shutil.copyfile)
        whole.rename(here)
    tell(f"{found}: cannot be written to; continuing a copy of it, {here}")
    return Run(here)


def _runs_in(where: Path, tell: Callable[[str], None]) -> list[Path]:
    """Folders with runs that can go on: those that have checkpoints, and a record that can be read."""
    found = []
    for path in where.glob(f"*/{RECORD}"):
        try:
            read_record(path.parent)
        except NewLLMError as error:
            tell(f"left out: {error}")
            continue
        if any((path.parent / CHECKPOINTS).glob("*.pt")):
            found.append(path.parent)
    return found


@file_errors()
def gather(
    places: str | Path | Iterable[str | Path],
    *,
    results_dir: str | Path = "results",
    report: Callable[[str], None] = say,
) -> list[Run]:
    """The trained runs in folders and bundles, each once, in the order of `places`; bundles go to `results_dir`.

    A run that is also there as a copy counts once, as the one that is further. A bundle whose name is taken by
    something else gets a free one, which `report` tells. A place with `*`, `?` or `[` is a pattern: of what it finds,
    only runs and bundles count, and `report` tells what is left out and why. A place that is named must be a run:
    FileMissingError or another NewLLMError if not.
    """
    results_dir = user_path(results_dir)
    places = [places] if isinstance(places, (str, Path)) else places
    found: dict[tuple, Run] = {}

    def add(run: Run) -> None:
        key = run.folder.name, run.record.identity or run.folder.resolve()
        if key not in found or (run.record.step or 0) > (found[key].record.step or 0):
            found[key] = run

    for place in places:
        if not glob.has_magic(str(place)):
            run = _run_at(user_path(place), results_dir, report)
            if run is None:
                raise FileMissingError(f"{place}: no run's folder and no bundle")
            add(run)
            continue
        for path in map(Path, sorted(glob.glob(str(user_path(place))))):
            try:
                run = _run_at(path, results_dir, report)
            except NewLLMError as error:
                report(f"left out: {error}")
                continue
            if run is not None and run.best is None:
                report(f"left out: {path}: has no validation behind it yet")
            elif run is not None:
                add(run)
    return list(found.values())


@file_errors()
def _run_at(path: Path, results_dir: str | Path, report: Callable[[str], None]) -> Run | None:
    """The run of a folder or a bundle, None where the path is neither."""
    if holds_run(path):
        return Run(path)
    if path.suffix == ".zip" and path.is_file():
        return _opened(path, results_dir, report)
    return None


def _opened(path: Path, results_dir: str | Path, report: Callable[[str], None]) -> Run:
    """The run of a bundle: in a folder of its own, unless it is an earlier state of the run that has its name."""
    make_folder(user_path(results_dir))  # or what stands in its way would look like a run of that name
    try:
        return open_bundle(path, results_dir)
    except FileTakenError as taken:
        reason = str(taken).partition(";")[0]
    sent = bundle_record(path)
    with contextlib.suppress(NewLLMError):  # no run, or one that cannot be read: it stays as it is
        here = Run(user_path(results_dir) / folder_name(sent["run"], path))
        sent_step, step = (record.get("step") or 0 for record in (sent, here.record))
        if here.record.identity == sent.get("identity") and step >= sent_step:
            report(f"{path}: holds step {sent_step:,} of {here.folder}, which is at {step:,}: left out")
            return here
    for number in itertools.count(2):
        with contextlib.suppress(FileTakenError):
            run = open_bundle(path, results_dir, f"{path.stem}-{number}")
            report(f"{path}: opened as {run.folder}, because {reason}")
            return run
