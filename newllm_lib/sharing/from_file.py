"""A run to go on with, made from a file: a bundle with a checkpoint, or a checkpoint of this library."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from newllm_lib.config import RunConfig
from newllm_lib.config.places import user_path
from newllm_lib.config.portable import last_part, received_config
from newllm_lib.errors import BundleError, CheckpointError, FileMissingError, FileTakenError, NewLLMError
from newllm_lib.model.pretrained import export_model
from newllm_lib.reporting.diagnostics import best_row
from newllm_lib.reporting.record import MODEL, RECORD, RunRecord, read_record, write_history, write_record
from newllm_lib.runs.folder import decided_in
from newllm_lib.runs.lock import RunLock
from newllm_lib.runs.run import Loaded, Run, load_model
from newllm_lib.sharing.bundle import MANIFEST, ZIP_ERRORS, folder_name, open_bundle
from newllm_lib.sharing.legacy import read_old
from newllm_lib.system.console import warn_on_stderr
from newllm_lib.system.files import file_errors, make_folder, sha256_of
from newllm_lib.system.hardware import environment
from newllm_lib.training.checkpoint import (
    Checkpoints,
    check_payload,
    copy_checkpoint,
    damaged_payload,
    load_checkpoint,
    valid_step,
)
from newllm_lib.training.state import TrainState


@file_errors()
def adopt(path: str | Path, results_dir: str | Path = "results", name: str | None = None) -> Run:
    """Put a file's training state into the folder of a run, `results_dir/<its run>` (or `name`), and return the run.

    path: a bundle with a checkpoint, or one checkpoint file. `train(run.requested, epochs=..., data=...)` then goes on
    with it. A run that is there already keeps what it has, and is brought up to the state where that is newer. A file
    without the run's best weights leaves its own in model/, which is said, and in the record as "model_step".

    CheckpointError or BundleError when the file cannot be continued; FileTakenError where the folder holds another
    run. Then nothing is changed.
    """
    path, results = user_path(path), user_path(results_dir)
    if not path.is_file():
        raise FileMissingError(f"{path}: no such file")
    if not _is_bundle(path):
        payload = _load(path)
        folder = results / folder_name(name or payload["run"], path)
        made, model = _checked(path, payload, folder)
        with RunLock(warn_on_stderr) as lock:
            lock.take(folder)
            return _place(path, payload, folder, made, model)
    with _folder_that_stays_if_used(results), tempfile.TemporaryDirectory(prefix=".adopting-", dir=results) as scratch:
        opened = open_bundle(path, scratch)
        found = Checkpoints.of(opened.folder).newest_valid(warn_on_stderr)
        if found is None:
            raise BundleError(
                f"{path}: holds no checkpoint, so its run cannot be continued: it needs a bundle that was made with "
                "one (in the shell --checkpoint)"
            )
        folder = results / folder_name(name or opened.folder.name, path)
        with RunLock(warn_on_stderr) as lock:
            lock.take(folder)
            if folder.exists():
                payload = check_payload(found[1], found[0])
                made, _ = _checked(found[0], payload, folder)
                return _place(found[0], payload, folder, made, opened)
            opened.folder.rename(folder)
    return Run(folder)


def _is_bundle(path: Path) -> bool:
    """A checkpoint is a zip file too."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return MANIFEST in archive.namelist()
    except ZIP_ERRORS:
        return False


def _load(path: Path) -> dict[str, Any]:
    """The payload of a checkpoint; CheckpointError says more where it is one of the series' old files."""
    try:
        return check_payload(load_checkpoint(path, lambda text: None), path)
    except CheckpointError as error:
        try:
            read_old(path)
        except NewLLMError:
            raise error from None
        raise CheckpointError(
            f"{path}: a file of the published series: it has weights and histories, but no state of the optimizer or "
            "the random numbers to go on from. import_checkpoint (in the shell newllm import) brings its weights; a "
            "longer run starts anew, for example with the preset l4_fp16_extended"
        ) from error


@contextlib.contextmanager
def _folder_that_stays_if_used(folder: Path) -> Iterator[None]:
    """Make a folder; remove it again where what is done inside fails and leaves it empty."""
    existed = folder.exists()
    make_folder(folder)
    try:
        yield
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _checked(source: Path, payload: dict[str, Any], folder: Path) -> tuple[RunRecord, Loaded]:
    """The record that a checkpoint gives its run, and its model; CheckpointError before anything is written."""
    with damaged_payload(source):
        TrainState.from_dict(payload["state"])
        made = _record(payload, folder)
    return made, load_model(source)


def _place(source: Path, payload: dict[str, Any], folder: Path, made: RunRecord, model: Run | Loaded) -> Run:
    """Copy a checkpoint into a run's folder, where that does not have it or a newer one, and bring the rest up to it.

    made: the record of a folder that has none; model: the bundle that it came in, which has a model too, else its own.
    """
    checkpoints, state = Checkpoints.of(folder), payload["state"]
    check_same_run(folder, payload["identity"])
    record = read_record(folder) if (folder / RECORD).exists() else None
    if max(map(valid_step, checkpoints.files()), default=-1) < state["step"]:
        is_best = state["best_step"] == state["step"]
        entry = {"sha256": sha256_of(source), "step": state["step"], "bytes": source.stat().st_size}
        copy_checkpoint(source, checkpoints.best if is_best else checkpoints.step(state["step"]), entry)
        model_step = _place_model(source, state, checkpoints, model) if state["history"] else None
        record = record or made
        record.status, record.step, record.best = "interrupted", state["step"], best_row(state["history"])
        record.model_step = model_step
    elif record is None:
        record = made
    else:
        return Run(folder)
    write_history(folder, state["history"])
    write_record(folder, record)
    return Run(folder)


def _place_model(source: Path, state: dict[str, Any], checkpoints: Checkpoints, model: Run | Loaded) -> int | None:
    """Put the best weights into model/, or the checkpoint's own where there are no others; then their step."""
    target, best = checkpoints.folder.parent / MODEL, checkpoints.best
    if valid_step(best) == state["best_step"]:
        loaded = load_model(best)
        export_model(target, loaded.model, loaded.tokenizer, protocol=loaded.protocol)
        return None
    if isinstance(model, Run):
        with file_errors(target, f"cannot write {target}"):
            shutil.copytree(model.folder / MODEL, target, dirs_exist_ok=True)
        return model.record.model_step
    export_model(target, model.model, model.tokenizer, protocol=model.protocol)
    warn_on_stderr(
        f"{source.name} is of step {state['step']:,}, its run's best weights were those of step "
        f"{state['best_step']:,}: they are not in it, and model/ holds those of the file until a better validation"
    )
    return state["step"]


def check_same_run(folder: Path, identity: str) -> None:
    """FileTakenError where a folder holds another run than that of an identity."""
    if (folder / RECORD).exists():
        found = read_record(folder).identity
    else:
        newest = Checkpoints.of(folder).newest_valid(warn_on_stderr)
        found = newest[1].get("identity") if newest else identity
    if found != identity:
        raise FileTakenError(
            f"{folder}: is there already, and is another run: give another name or results_dir, or rename that folder"
        )


def _record(payload: dict[str, Any], folder: Path) -> RunRecord:
    """run.json as far as a checkpoint tells; the rest is None until the run continues."""
    here = {"name": folder.name, "results_dir": str(folder.parent)}
    config = RunConfig.from_dict(received_config(payload["config"]) | here)
    state = payload["state"]
    return RunRecord(
        run=folder.name,
        preset=config.preset,
        status="interrupted",
        identity=payload["identity"],
        parameters=config.model.num_parameters,
        published_protocol=False,
        faithful=None,
        faithful_reason=None,
        decided=decided_in(payload | {"config": config.to_dict()}),
        plan=[],
        decay_steps=state["decay_steps"],
        warmup_steps=payload.get("warmup_steps"),
        data={"name": _name_of_data(config), "fingerprint": payload["data_fingerprint"]},
        validation={"tokens": None, "unknown_share": None, "digest": None},
        peak_memory_meaning="on the machine that it was trained on",
        environment=environment(None),
        config=config.to_dict(),
        requested=received_config(payload.get("requested", payload["config"])) | here,
        commands=[],
        samples=[],
        step=state["step"],
        total_steps=None,
        best=best_row(state["history"]),
    )


def _name_of_data(config: RunConfig) -> str:
    """What the text may be called, which the file of a state does not tell."""
    sources = config.data.data if isinstance(config.data.data, tuple) else (config.data.data,)
    return "+".join(map(last_part, sources))
