"""Train or continue one run: its setup, its folder, its recorder, its copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from newllm_lib.config import RunConfig
from newllm_lib.errors import CheckpointError, TrainingError
from newllm_lib.model.newllm import NewLLM
from newllm_lib.reporting.diagnostics import best_row
from newllm_lib.reporting.formatting import duration, ppl_text
from newllm_lib.reporting.progress import Progress, TerminalProgress
from newllm_lib.reporting.record import RunRecord, write_history
from newllm_lib.reporting.report import pages_are_current
from newllm_lib.runs.folder import RunPlace, checkpoints_gone, earlier_record, has_saved, resolve_run, set_aside
from newllm_lib.runs.lock import RunLock, refuse_several_processes
from newllm_lib.runs.mirror import Mirror
from newllm_lib.runs.recorder import Recorder, command, write_pages
from newllm_lib.runs.run import Run
from newllm_lib.runs.stop_file import STOP, StopFile
from newllm_lib.system.console import in_kernel
from newllm_lib.training.observers import Observer
from newllm_lib.training.trainer import Trainer
from newllm_lib.tuning import SharedExecution, estimate_speed


def launch(
    requested: RunConfig,
    fresh: bool,
    progress: Progress | None,
    watch: Callable[[Trainer], None],
    shared: SharedExecution | None = None,
) -> Run:
    """Train or continue the run that was asked for; arguments and errors as of `newllm_lib.train`.

    shared: how a new run computes its steps, where it belongs to a study whose runs all do it in one way.
    """
    refuse_several_processes()
    progress = progress or default_progress()
    try:
        with RunLock(progress.message) as lock:
            return _launch(requested, fresh, progress, watch, shared, lock)
    finally:
        progress.close()  # however it ends, and also where nothing begins


def _launch(
    requested: RunConfig,
    fresh: bool,
    progress: Progress,
    watch: Callable[[Trainer], None],
    shared: SharedExecution | None,
    lock: RunLock,
) -> Run:
    def claim(place: RunPlace) -> Mirror | None:
        return _claim(place, requested.mirror_dir, fresh, lock, progress.message)

    resolved = resolve_run(requested, claim=claim, shared=shared, log=progress.message)
    setup, earlier, mirror = resolved.setup, resolved.earlier, resolved.mirror
    folder, checkpoints = resolved.place.folder, resolved.place.checkpoints
    checkpoints.take_over(earlier.run or folder.name)
    progress.watch(mirror.safety if mirror else None)
    model = NewLLM.fresh(setup.config.model, setup.config.train.seed, setup.machine.device)
    trainer = Trainer(setup, model, checkpoints, progress)
    _continue(trainer, earlier, progress)
    if trainer.ended() and (earlier.status, earlier.step) == (trainer.ended(), trainer.state.step):
        progress.message(f"this run has already {trainer.ended()}: {folder} ({_how_to_extend(trainer)})")
        progress.begin(earlier, trainer.state.history)
        _renew_pages(folder, earlier, trainer.state.history, progress)
        if mirror:
            mirror.close(progress.message)
        return Run(folder)
    recorder = Recorder(trainer, folder, earlier)
    if not trainer.state.step:
        progress.plan(recorder.record.plan)
    elif setup.precision.substituted:
        progress.message(f"warning: precision {setup.precision.name}: {setup.precision.reason}")
    if reason := recorder.record.faithful_reason:
        progress.message(f"warning: not faithful to the published run: {reason}")
    progress.begin(recorder.record, trainer.state.history)
    if in_kernel():
        progress.message(f"to stop and save: interrupt the kernel, or create the file {folder / STOP}")
    trainer.observers += [recorder, StopFile(folder), *([_RequestCopy(mirror)] if mirror else [])]
    watch(trainer)
    return _fit(trainer, recorder, progress, mirror)


def _renew_pages(folder: Path, record: RunRecord, history: list[dict[str, Any]], progress: Progress) -> None:
    """Report and picture of a run that has ended, where they are missing or tell of an earlier state."""
    if not pages_are_current(folder, record, history):
        progress.message(f"writing the report of {folder} again: it was missing or older than the run")
        write_history(folder, history)
        write_pages(folder, record, history, progress.message)


class _RequestCopy(Observer):
    """Has each save copied."""

    def __init__(self, mirror: Mirror):
        self._mirror = mirror

    def on_save(self, trainer: Trainer) -> None:
        """Returns at once."""
        self._mirror.request()


def default_progress() -> Progress:
    """Live in the cell of a notebook, lines elsewhere."""
    if not in_kernel():
        return TerminalProgress()
    from newllm_lib.reporting.notebook_progress import (
        NotebookProgress,  # imported here: a terminal run must not load the notebook page
    )

    return NotebookProgress()


def _claim(
    place: RunPlace, mirror_dir: str | None, fresh: bool, lock: RunLock, log: Callable[[str], None]
) -> Mirror | None:
    """Make a run's folder ours, to be read and trained in: set aside what `fresh` replaces, bring the copy back.

    Returns what keeps the copy, if there is one; ConfigError where it cannot be kept in `mirror_dir`.
    """
    mirror = Mirror(place.folder, mirror_dir, place.identity) if mirror_dir else None
    lock.take(place.folder)
    for folder in (place.folder, place.copy):
        if fresh and folder and folder.exists():
            log(f"starting over; the old run is kept as {set_aside(folder)}")
    if mirror and earlier_record(place.folder, place.identity).get("identity", place.identity) == place.identity:
        mirror.restore(log)
    return mirror


def _continue(trainer: Trainer, earlier: RunRecord, progress: Progress) -> None:
    """Restore the newest valid checkpoint, if there is one, and say where the run goes on.

    CheckpointError where the folder holds a model whose checkpoints are gone: starting over would replace it.
    """
    found = trainer.checkpoints.newest_valid(lambda text: progress.message(f"warning: {text}"))
    if found is None:
        if has_saved(trainer.checkpoints.folder.parent):
            raise CheckpointError(checkpoints_gone(trainer.checkpoints.folder, earlier.step or 0))
        if earlier.step:
            progress.message(
                f"{trainer.checkpoints.folder.parent}: ended at step {earlier.step:,} before anything was saved; "
                "starting from the beginning"
            )
        return
    path, payload = found
    trainer.restore(payload, path)
    state, setup = trainer.state, trainer.setup
    total, epoch, best = setup.total_steps, setup.steps_per_epoch, best_row(state.history)
    text = f"step {state.step:,} of {total:,} (epoch {state.step / epoch:.2f} of {total / epoch:.2f})"
    if state.step > total:
        text = f"step {state.step:,}, which is more than the {total:,} asked for"
    if best:
        text += f", best PPL so far {ppl_text(best['val_ppl'])}"
    if trainer.ended() and state.step <= total:
        return  # which is told instead
    speed = estimate_speed(setup, measure=False)
    if speed and state.step < total:
        text += f", about {duration(speed.total_seconds(setup, state.step))} left"
    progress.message(f"continuing {trainer.checkpoints.run} from {path.name}: {text}")


def _how_to_extend(trainer: Trainer) -> str:
    if trainer.ended() == "stopped early":
        return "to train longer, raise patience; to start over, pass fresh=True (--fresh)"
    decays = trainer.setup.config.train.lr_schedule != "constant"
    longer = "raise epochs, or max_steps" + (" together with decay_steps" if decays else "")
    if in_kernel():  # whose notebook has its own words for its own fields
        return "to start over, pass fresh=True"
    return f"to train longer, {longer}; to start over, pass fresh=True (--fresh)"


def _fit(trainer: Trainer, recorder: Recorder, progress: Progress, mirror: Mirror | None) -> Run:
    """Train to the end and write what the run leaves behind, however it ends."""
    recorder.write("running")
    status = "failed"
    try:
        status = trainer.fit()
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except TrainingError as error:
        newest = next(iter(trainer.checkpoints.files()), None)
        where = f"the newest checkpoint is {newest.name}" if newest else "there is no checkpoint yet"
        raise TrainingError(f"{error}. Stopped at step {trainer.state.step:,}; {where}") from error
    finally:
        progress.close()
        try:
            recorder.write(status)
            if status == "interrupted":
                _tell_how_to_continue(trainer, progress)
        finally:  # a full disk here is one more reason to have the copy there
            if mirror:
                mirror.close(progress.message)
    return Run(recorder.folder)


def _tell_how_to_continue(trainer: Trainer, progress: Progress) -> None:
    newest = next(iter(trainer.checkpoints.files()), None)
    if newest is None:
        text = f"interrupted at step {trainer.state.step:,}, before the first checkpoint; to start again"
    else:
        text = f"interrupted; {newest.name} is saved; to go on"
    progress.message(f"{text}: {_again()}")


def _again() -> str:
    """What the user does to make this call once more."""
    if in_kernel():
        return "run this cell again"
    text = command(without=("--fresh",))
    return text if text.startswith("newllm ") else "the same call again"
