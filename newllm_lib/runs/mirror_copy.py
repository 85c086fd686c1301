"""The copy of one run in another folder: brought back from there, and brought up to date.

The copy has the layout of a run's folder, fewer checkpoints, and a manifest with the sha256 of every file. A file is
copied whole under a temporary name, read back, and renamed; the manifest is written before (naming the old and the new
content) and after. So at whatever moment it ends, what the copy holds verifies, and a run goes on from nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from newllm_lib.errors import ChangedError, CheckpointError, FileMissingError
from newllm_lib.reporting.record import CHECKPOINTS, MODEL, RUN_FILES
from newllm_lib.system.files import copy_atomic, make_folder, read_json, sha256_of, write_text_atomic
from newllm_lib.training.checkpoint import (
    Checkpoints,
    copy_checkpoint,
    current_entry,
    load_checkpoint,
    sidecar,
    valid_step,
    verified_entry,
)

MANIFEST = "MIRROR.json"
FORMAT_VERSION = 1
"""Version of the manifest; a reader refuses newer ones."""
LAST_CHECKPOINTS = 2
"""Copied beside the best and the final one."""
_NAME = re.compile("|".join(map(re.escape, RUN_FILES)) + rf"|({MODEL}|{CHECKPOINTS})/[^./\\][^/\\]*")
"""What a manifest may name: nothing outside the run's folder."""

Entry = dict[str, Any]
"""A content that a file may have: "sha256", "bytes" and, of a checkpoint, "step"."""
NOTHING: Entry = {"sha256": "", "bytes": 0, "step": -1}
"""The content before the first one."""


class RunCopy:
    """A run's folder, and its copy `place`: first `restore`, then `update`. Not for several threads at once."""

    def __init__(
        self,
        folder: Path,
        place: Path,
        identity: str,
        alive: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ):
        """alive: called between the pieces of what is copied, and may raise to stop it. clock: seconds since 1970."""
        self.folder, self.place, self.identity, self._alive, self._clock = folder, place, identity, alive, clock
        self._listed: dict[str, list[Entry]] = {}  # what the manifest says of each file, the newest content first
        self._checked: set[str] = set()  # names whose content in the copy was written or read by this object
        self._begun = False  # whether the copy has been found or made

    # --- bringing a run back ------------------------------------------------------------------------------------

    def restore(self, tell: Callable[[str], None]) -> tuple[float, int] | None:
        """Bring the copy back where it is ahead of the run's folder; then its time (s since 1970) and step, else None.

        Damaged files are named through `tell` and passed over. CheckpointError, with nothing changed, when the copy is
        of another run or of a later version, or the folder holds no valid checkpoint and none there can be read.
        """
        manifest = self._read_manifest(tell)
        self._listed = manifest.get("files", {})
        there = self._checkpoints_there()
        if not there:
            return None
        self._check_identity(manifest.get("identity"), there)
        self._begun = bool(manifest)
        here = max(map(valid_step, Checkpoints.of(self.folder).files()), default=-1)
        if here >= max(entry["step"] for entries in there.values() for entry in entries):
            return None
        valid = sorted(self._verified(there, tell), key=lambda found: found[1]["step"])
        newest = valid[-1][1]["step"] if valid else -1
        if here < 0 and newest < 0:
            raise CheckpointError(
                f"{self.place}: a copy of this run, but none of its checkpoints can be read; to start over, move it "
                "away, or use fresh=True (in the shell --fresh), which keeps it under another name"
            )
        if newest <= here:
            return None
        self._restore_others(tell)
        for name, entry in valid:  # the newest last: after a stop in between it is missing, and all is done again
            current = current_entry(self.folder / name)
            if current is None or current["sha256"] != entry["sha256"] or valid_step(self.folder / name) < 0:
                copy_checkpoint(self.place / name, self.folder / name, entry, self._alive)
        return manifest.get("time", self._clock()), newest

    def _read_manifest(self, tell: Callable[[str], None]) -> dict[str, Any]:
        path = self.place / MANIFEST
        try:
            manifest = read_json(path)
            version, files = int(manifest["format_version"]), manifest["files"]
            sound = all(_NAME.fullmatch(name) and _sound(name, entries) for name, entries in files.items())
            sound = sound and isinstance(manifest["identity"], str) and isinstance(manifest["time"], float)
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            version, sound = FORMAT_VERSION, False
        if version > FORMAT_VERSION:
            raise CheckpointError(f"{path}: version {version}, this library reads up to {FORMAT_VERSION}; upgrade it")
        if not sound:
            tell(f"warning: {path}: damaged; passed over: the records beside the checkpoints stand in for it")
            return {}
        return manifest

    def _checkpoints_there(self) -> dict[str, list[Entry]]:
        """Name -> contents of the copy's checkpoints: by the manifest, and by the records beside them.

        Both, because a drive may bring files to light late, and in another order than they were written in.
        """
        there = {name: list(entries) for name, entries in self._listed.items() if name.endswith(".pt")}
        for name in _names(self.place, CHECKPOINTS):
            if name.endswith(".pt") and (entry := current_entry(self.place / name)):
                there.setdefault(name, []).append(entry)
        return {name: entries for name, entries in there.items() if entries}

    def _check_identity(self, found: str | None, there: dict[str, list[Entry]]) -> None:
        for name in there:
            if found is None:  # a folder without a manifest: a run's own, copied by hand
                with contextlib.suppress(CheckpointError):  # it is named when it is passed over
                    found = load_checkpoint(self.place / name, lambda text: None).get("identity")
        if found not in (None, self.identity):
            raise CheckpointError(of_another_run(self.place, found, self.identity))

    def _verified(self, there: dict[str, list[Entry]], tell: Callable[[str], None]) -> list[tuple[str, Entry]]:
        """(name, entry) of the copy's checkpoints whose content is as recorded; the others are named."""
        found = []
        for name, entries in there.items():
            if self._never_written(name, entries):
                continue
            try:
                entry = verified_entry(self.place / name, entries, self._alive)
            except CheckpointError as error:
                tell(f"warning: {error}; passed over")
                continue
            self._listed[name] = [entry]
            self._checked.add(name)
            found.append((name, entry))
        return found

    def _never_written(self, name: str, entries: list[Entry]) -> bool:
        """Whether a copy was cut off before it came to this file."""
        return NOTHING in entries and not (self.place / name).exists()

    def _restore_others(self, tell: Callable[[str], None]) -> None:
        """What is no checkpoint, as far as the manifest vouches for it; the run writes anew what is missing."""
        for name, entries in self._listed.items():
            if name.endswith(".pt") or self._never_written(name, entries):
                continue
            try:
                digest = sha256_of(self.place / name, self._alive)
            except OSError as error:
                tell(f"warning: {self.place / name}: cannot be read ({error.strerror}); passed over")
                continue
            if digest not in {entry["sha256"] for entry in entries}:
                tell(f"warning: {self.place / name}: damaged: its sha256 is not the recorded one; passed over")
                continue
            make_folder((self.folder / name).parent)
            copy_atomic(self.place / name, self.folder / name, digest, self._alive)

    # --- bringing the copy up to date ---------------------------------------------------------------------------

    def update(self) -> int:
        """Copy what has changed; returns the step of the newest checkpoint.

        ChangedError when a file was replaced meanwhile (try again); FileError or another OSError when the drive fails;
        CheckpointError when a file of the run is damaged, after all others were copied. The copy verifies in each case.
        """
        if self._begun and not (self.place / MANIFEST).is_file():
            raise FileMissingError(errno.ENOENT, "the copy is gone", str(self.place))
        kept = self._kept()
        step = max(kept.values(), default=0)
        others = [name for name in RUN_FILES if (self.folder / name).is_file()] + _names(self.folder, MODEL)
        new, damaged = {}, None
        for name in (*kept, *others):
            try:
                if entry := self._changed(name):
                    new[name] = entry
            except CheckpointError as error:  # what the copy has under this name may be the last that is whole
                damaged = damaged or error
        self.place.mkdir(exist_ok=True)
        if new:
            self._write_manifest(
                self._listed | {name: [new[name], *(self._listed.get(name) or [NOTHING])] for name in new}
            )
        for name, entry in new.items():
            self._copy(name, entry)
        superseded = self._superseded(kept, step)
        for name in superseded:
            self._listed.pop(name, None)
        self._write_manifest(self._listed)
        self._begun = True
        self._clean(superseded)
        if damaged:
            raise damaged
        return step

    def _kept(self) -> dict[str, int]:
        """Name -> step of the checkpoints to copy, the newest first: the last two, the best and the final one."""
        checkpoints = Checkpoints.of(self.folder)
        found = [(path, entry["step"]) for path in checkpoints.files() if (entry := current_entry(path))]
        always = (checkpoints.best, checkpoints.final)
        last = [path for path, _ in found if path not in always][:LAST_CHECKPOINTS]
        return {f"{CHECKPOINTS}/{path.name}": step for path, step in found if path in always or path in last}

    def _changed(self, name: str) -> Entry | None:
        """The entry of a file that the copy does not have as it is now; None where it does."""
        source = self.folder / name
        try:
            before = source.stat()
            if not name.endswith(".pt"):
                entry = {"sha256": sha256_of(source, self._alive), "bytes": before.st_size}
                return None if self._is_there(name, entry) else entry
            recorded = current_entry(source)
            return None if recorded and self._is_there(name, recorded) else verified_entry(source, alive=self._alive)
        except FileNotFoundError as error:
            raise ChangedError(f"{source}: was removed before it was copied") from error
        except CheckpointError as error:
            if not source.exists() or source.stat().st_mtime_ns != before.st_mtime_ns:
                raise ChangedError(f"{source}: was replaced before it was copied") from error
            raise

    def _is_there(self, name: str, entry: Entry) -> bool:
        """Whether the copy has a file with this content; what is there was read once, then its size tells."""
        target = self.place / name
        if name not in self._checked:
            digest = ""
            with contextlib.suppress(OSError):  # not there, or not readable: it is written anew
                digest = sha256_of(target, self._alive)
            self._listed[name] = [known for known in (entry, *self._listed.get(name, [])) if known["sha256"] == digest]
            self._checked.add(name)
        known = next(iter(self._listed[name]), None)
        same = known is not None and known["sha256"] == entry["sha256"]
        return same and target.is_file() and target.stat().st_size == entry["bytes"]

    def _copy(self, name: str, entry: Entry) -> None:
        source, target = self.folder / name, self.place / name
        target.parent.mkdir(exist_ok=True)
        if name.endswith(".pt"):
            copy_checkpoint(source, target, entry, self._alive)
        else:
            copy_atomic(source, target, entry["sha256"], self._alive)
        self._listed[name] = [entry]

    def _superseded(self, kept: dict[str, int], step: int) -> list[str]:
        """Checkpoints of the copy that are older than the newest and not kept; newer ones, of another machine, stay."""
        found = []
        for name in {name.removesuffix(".json") for name in _names(self.place, CHECKPOINTS)} - set(kept):
            entry = next(iter(self._listed.get(name, [])), None) or current_entry(self.place / name)
            if name.endswith(".pt") and (entry is None or entry["step"] < step):
                found.append(name)
        return found

    def _write_manifest(self, files: dict[str, list[Entry]]) -> None:
        manifest = {
            "format_version": FORMAT_VERSION,
            "run": self.folder.name,
            "identity": self.identity,
            "time": float(self._clock()),
            "files": {name: entries for name, entries in files.items() if entries},
        }
        write_text_atomic(self.place / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    def _clean(self, superseded: list[str]) -> None:
        """Remove what the manifest no longer names, and what a copy that was cut off left; else the next time."""
        for name in superseded:
            with contextlib.suppress(OSError):
                sidecar(self.place / name).unlink(missing_ok=True)
                _remove(self.place / name)
        for folder in (self.place, self.place / CHECKPOINTS, self.place / MODEL):
            for path in folder.glob(".*.tmp"):
                with contextlib.suppress(OSError):
                    _remove(path)


def of_another_run(place: Path, found: str, identity: str) -> str:
    """Why a run cannot use a copy."""
    return (
        f"{place}: the copy of a run with other settings or other data (identity {found[:12]}, here {identity[:12]}). "
        "Give another name or mirror_dir; or fresh=True (in the shell --fresh), which keeps it under another name"
    )


def _sound(name: str, entries: list[Entry]) -> bool:
    """Whether a manifest's entries have what is read of them."""
    kinds = {"sha256": str, "bytes": int} | ({"step": int} if name.endswith(".pt") else {})
    return all(isinstance(entry[key], kind) for entry in entries for key, kind in kinds.items())


def _remove(path: Path) -> None:
    """Empty a file, then remove it: Google Drive moves it to a bin, where it would take its space for weeks."""
    with open(path, "wb"):
        pass
    path.unlink()


def _names(folder: Path, part: str) -> list[str]:
    """The files of a part of a run's folder, sorted, hidden ones left out; empty where it is missing."""
    try:
        return sorted(f"{part}/{path.name}" for path in (folder / part).iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []
