"""Runs wherever they lie: folders, bundles and patterns, found and put beside each other."""

from __future__ import annotations

import contextlib
import glob
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from newllm_lib.errors import ConfigError, FileMissingError, FileTakenError, NewLLMError
from newllm_lib.escaping import say, text_table
from newllm_lib.files import file_errors, make_folder
from newllm_lib.runs import Run
from newllm_lib.sharing import bundle_record, folder_name, open_bundle
from newllm_lib.writing import generate_texts


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
    places = [places] if isinstance(places, (str, Path)) else places
    found: dict[tuple, Run] = {}

    def add(run: Run) -> None:
        key = run.folder.name, run.record.get("identity") or run.folder.resolve()
        if key not in found or run.record.get("step", 0) > found[key].record.get("step", 0):
            found[key] = run

    for place in places:
        if not glob.has_magic(str(place)):
            run = _run_at(Path(place), results_dir, report)
            if run is None:
                raise FileMissingError(f"{place}: no run's folder and no bundle")
            add(run)
            continue
        for path in map(Path, sorted(glob.glob(str(place)))):
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
    if (path / "run.json").is_file():
        return Run(path)
    if path.suffix == ".zip" and path.is_file():
        return _opened(path, results_dir, report)
    return None


def _opened(path: Path, results_dir: str | Path, report: Callable[[str], None]) -> Run:
    """The run of a bundle: in a folder of its own, unless it is an earlier state of the run that has its name."""
    make_folder(Path(results_dir))  # or what stands in its way would look like a run of that name
    try:
        return open_bundle(path, results_dir)
    except FileTakenError as taken:
        reason = str(taken).partition(";")[0]
    sent = bundle_record(path)
    with contextlib.suppress(NewLLMError):  # no run, or one that cannot be read: it stays as it is
        here = Run(Path(results_dir) / folder_name(sent["run"], path))
        sent_step, step = (record.get("step") or 0 for record in (sent, here.record))
        if here.record.get("identity") == sent.get("identity") and step >= sent_step:
            report(f"{path}: holds step {sent_step:,} of {here.folder}, which is at {step:,}: left out")
            return here
    for number in itertools.count(2):
        with contextlib.suppress(FileTakenError):
            run = open_bundle(path, results_dir, f"{path.stem}-{number}")
            report(f"{path}: opened as {run.folder}, because {reason}")
            return run


def side_by_side(runs: Sequence[Run], prompts: Sequence[str], *, seed: int = 0, **options):
    """How each run's best model continues the same prompts: a pandas DataFrame, a row a prompt, a column a run.

    A notebook shows it as text, through its `.style` too: the words of a model from elsewhere may be anything.
    Options as for `generate_texts`; every model draws from the same seed. ConfigError where there is no run or prompt.
    """
    import pandas

    if not runs or isinstance(prompts, str) or not prompts:
        raise ConfigError("side_by_side(runs, prompts) needs at least one run and a list of at least one prompt")
    names = [run.folder.name for run in runs]
    columns = {
        name if names.count(name) == 1 else str(run.folder): [
            text.prompt + text.text for text in generate_texts(run.model, run.tokenizer, prompts, seed, **options)
        ]
        for name, run in zip(names, runs, strict=True)
    }
    return text_table(columns, index=pandas.Index(prompts, name="prompt"))
