"""Checkpoint files: atomic, with a recorded hash, loaded as data only; and the folder one downloads.

Beside `X.pt` stands `X.pt.json` with the sha256 and the step of the file. It is written before the file is renamed
into place and names the old and the new content, so a stop between the two leaves a file that still verifies.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from newllm_lib.config import RunConfig
from newllm_lib.data.tokenizer import Tokenizer, tokenizer_from_dict
from newllm_lib.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NewerCheckpointError,
    NoModelError,  # noqa: F401, nl.checkpoint has it
)
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.pretrained import export_model, load_exported, load_weights, not_finite  # noqa: F401, nl.checkpoint has them
from newllm_lib.reporting.record import CHECKPOINTS
from newllm_lib.system.files import copy_atomic, make_folder, read_json, sha256_of, write_atomic, write_text_atomic
from newllm_lib.system.memory import is_out_of_memory

FORMAT_VERSION = 1
"""Version of the payload; a reader refuses newer ones and reads all older ones."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint files of one run."""

    folder: Path
    run: str

    @classmethod
    def of(cls, run_folder: Path, run: str | None = None) -> Checkpoints:
        """Those in a run's folder; run: the name that theirs contain (None = the folder's)."""
        return cls(run_folder / CHECKPOINTS, run or run_folder.name)

    @property
    def best(self) -> Path:
        """The state at the lowest validation loss."""
        return self.folder / f"best_{self.run}.pt"

    @property
    def final(self) -> Path:
        """The state at the end of the run."""
        return self.folder / f"{self.run}_final.pt"

    def epoch(self, number: int) -> Path:
        """The state after `number` epochs, kept."""
        return self.folder / f"{self.run}_epoch_{number}.pt"

    def step(self, number: int) -> Path:
        """The state after `number` steps, kept until two newer ones exist."""
        return self.folder / f"{self.run}_step_{number}.pt"

    def files(self) -> list[Path]:
        """Every checkpoint of the run, the one with the most steps first."""
        return sorted(self.folder.glob("*.pt"), key=recorded_step, reverse=True)

    def take_over(self, run: str) -> None:
        """Rename the files of a run that had another name, so that its best and its final one are found."""
        old = Checkpoints(self.folder, run)
        kept = re.compile(re.escape(run) + r"_((final|epoch_\d+|step_\d+)\.pt)")
        for path in self.folder.glob("*.pt"):
            match = kept.fullmatch(path.name)
            target = self.best if path == old.best else self.folder / f"{self.run}_{match[1]}" if match else path
            if target.exists():
                continue
            if sidecar(path).exists():  # first: a file without its record could not be verified
                _record(target, _recorded(path))
            path.rename(target)
            sidecar(path).unlink(missing_ok=True)

    def prune_steps(self, newest: int, keep: int = 2) -> None:
        """Of the files that guard against a lost machine, remove all but that of step `newest` and the ones before it.

        `keep` files stay. Their steps decide, since a clock may have been wrong. Files of later steps go first: the run
        went back behind them, because they could not be read.
        """
        pattern = re.compile(re.escape(self.run) + r"_step_(\d+)\.pt")
        found = {path: int(match[1]) for path in self.folder.glob("*.pt") if (match := pattern.fullmatch(path.name))}
        order = sorted(found, key=lambda path: (found[path] <= newest, found[path]), reverse=True)
        for path in order[keep:]:
            path.unlink(missing_ok=True)
            sidecar(path).unlink(missing_ok=True)

    def newest_valid(self, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest file that verifies, with its payload; each damaged one before it is named through `warn`.

        None where there is no file. CheckpointError where there are files but none can be read, or the newest is of a
        later version: starting over would overwrite them.
        """
        files = self.files()
        for path in files:
            try:
                return path, _with_finite_weights(load_checkpoint(path, warn), path)
            except NewerCheckpointError:
                raise
            except CheckpointError as error:
                warn(f"{error}; trying the checkpoint before it")
        if files:
            raise CheckpointError(
                f"{self.folder}: none of its checkpoints can be read; fresh=True (in the shell --fresh) keeps them "
                "under another name and starts over"
            )
        return None


def _with_finite_weights(payload: dict[str, Any], path: Path) -> dict[str, Any]:
    """The payload itself; CheckpointError where an earlier version saved weights that are of no use."""
    model = payload.get("model")
    tensors = model if isinstance(model, dict) else {}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    if broken := not_finite(tensors):
        raise CheckpointError(f"{path}: its weights are not finite ({', '.join(broken[:4])})")
    return payload


def sidecar(path: Path) -> Path:
    """The file that records the hash and the step of a checkpoint."""
    return path.with_name(path.name + ".json")


def save_checkpoint(path: Path, payload: dict[str, Any], step: int) -> None:
    """Write a payload of tensors and plain values; FileError names the path and leaves the old file intact."""
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **payload}, buffer)
    data = buffer.getbuffer()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "step": step, "bytes": len(data)}
    make_folder(path.parent)
    previous = _current(path)
    _record(path, [entry, *previous])
    write_atomic(path, lambda file: file.write(data))
    if previous:
        _record(path, [entry])


def _record(path: Path, entries: list[dict[str, Any]]) -> None:
    write_text_atomic(sidecar(path), json.dumps({"contents": entries}) + "\n")


def _recorded(path: Path) -> list[dict[str, Any]]:
    """The contents that the sidecar names, the newest first; empty without a readable sidecar."""
    try:
        entries = read_json(sidecar(path))["contents"]
        kinds = {"sha256": str, "step": int, "bytes": int}
        return [entry for entry in entries if all(isinstance(entry.get(name), kind) for name, kind in kinds.items())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _current(path: Path) -> list[dict[str, Any]]:
    """The record of what the file really holds: after a stop between record and rename, that is the older entry."""
    entries = _recorded(path) if path.exists() else []
    if len(entries) < 2:
        return entries
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return [entry for entry in entries if entry["sha256"] == digest]


def recorded_step(path: Path) -> int:
    """The step of a checkpoint by its sidecar, else by its own content; -1 where neither can be read."""
    entries = _current(path)
    if entries:
        return int(entries[0]["step"])
    try:
        return int(_read(path.read_bytes(), path)["state"]["step"])
    except NewerCheckpointError:
        return sys.maxsize  # so that it is met first, and refused
    except (OSError, CheckpointError, KeyError, TypeError):
        return -1


def current_entry(path: Path) -> dict[str, Any] | None:
    """What the sidecar records of a checkpoint ("sha256", "step", "bytes"); None without a record."""
    return next(iter(_current(path)), None)


def verified_entry(
    path: Path, recorded: Sequence[dict[str, Any]] = (), alive: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The entry of the sidecar, or of `recorded`, that a checkpoint's content matches; CheckpointError where none.

    alive: as for `sha256_of`.
    """
    entries = [*_recorded(path), *recorded]
    try:
        digest = sha256_of(path, alive)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    for entry in entries:
        if entry["sha256"] == digest:
            return entry
    if not entries:
        raise CheckpointError(f"{path}: no recorded hash, so its content cannot be verified")
    raise _damaged(path, digest, entries)


def _damaged(path: Path, digest: str, entries: list[dict[str, Any]]) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged: sha256 is {digest[:16]}…, recorded was {entries[0]['sha256'][:16]}… "
        f"({path.stat().st_size} of {entries[0]['bytes']} bytes)"
    )


def valid_step(path: Path) -> int:
    """The step of a checkpoint whose content verifies, or can be read where nothing is recorded; -1 otherwise."""
    try:
        return int(verified_entry(path)["step"])
    except CheckpointError:
        return -1 if sidecar(path).exists() else recorded_step(path)


def copy_checkpoint(
    source: Path, target: Path, entry: dict[str, Any], alive: Callable[[], None] = lambda: None
) -> None:
    """Copy a checkpoint with the record of its content, as `verified_entry` gives it; until then the old one stands.

    `alive`, ChangedError and FileError as for `copy_atomic`.
    """
    make_folder(target.parent)
    previous = _current(target)
    _record(target, [entry, *previous])
    copy_atomic(source, target, entry["sha256"], alive)
    if previous:
        _record(target, [entry])


def load_checkpoint(path: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """The payload of a checkpoint on the CPU, its hash verified; CheckpointError names the file and the reason.

    Only tensors and plain values are rebuilt (`weights_only=True`); nothing in the file can run.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    entries = _recorded(path)
    digest = hashlib.sha256(data).hexdigest()
    if entries and digest not in {entry["sha256"] for entry in entries}:
        raise _damaged(path, digest, entries)
    payload = _read(data, path)
    if not entries:
        warn(f"{path}: no recorded hash beside it ({sidecar(path).name}), so its content cannot be verified")
    return payload


def _read(data: bytes, path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(io.BytesIO(data)):  # as every file of torch.save is
        raise CheckpointError(f"{path}: not a readable checkpoint ({len(data)} bytes)")
    try:
        payload = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused: it holds more than tensors and plain values") from error
    except MemoryError:
        raise
    except Exception as error:  # torch raises a dozen unrelated classes for bytes that make no sense
        raise CheckpointError(f"{path}: not a readable checkpoint ({len(data)} bytes)") from error
    if not isinstance(payload, dict) or not isinstance(payload.get("format_version"), int):
        raise CheckpointError(f"{path}: not a checkpoint of newllm_lib")
    if payload["format_version"] > FORMAT_VERSION:
        raise NewerCheckpointError(
            f"{path}: format version {payload['format_version']}, this library reads up to {FORMAT_VERSION}; upgrade it"
        )
    return payload


_PARTS = {
    "run": str, "identity": str, "config": dict, "data_fingerprint": str, "tokenizer": dict, "model": dict,
    "optimizers": list, "scaler": dict, "generators": dict, "state": dict,
}  # fmt: skip
"""What a run's checkpoint holds at least."""


def check_payload(payload: dict[str, Any], path: Path) -> dict[str, Any]:
    """The payload itself; CheckpointError where it lacks a part of what a run's has."""
    missing = [name for name, kind in _PARTS.items() if not isinstance(payload.get(name), kind)]
    if missing:
        raise CheckpointError(f"{path}: not the checkpoint of a run: {', '.join(missing)} missing or damaged")
    return payload


@contextlib.contextmanager
def damaged_payload(path: Path) -> Iterator[None]:
    """CheckpointError where what is inside meets a payload that does not hold what a run writes."""
    try:
        yield
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: its training state is damaged, or of another version ({type(error).__name__}: {error})"
        ) from error


def load_trained(path: Path, warn: Callable[[str], None]) -> tuple[NewLLM, Tokenizer, RunConfig, str]:
    """The model of a run's checkpoint, its tokenizer, its configuration, and the sha256 of its text.

    CheckpointError as of `load_checkpoint`, and where a part is missing or cannot be used.
    """
    payload = check_payload(load_checkpoint(path, warn), path)
    try:
        config, tokenizer = RunConfig.from_dict(payload["config"]), tokenizer_from_dict(payload["tokenizer"])
    except (ConfigError, DataError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path}: its configuration or tokenizer cannot be read ({error})") from error
    model = NewLLM(config.model)
    load_weights(model, payload, path)
    return model, tokenizer, config, payload["data_fingerprint"]
