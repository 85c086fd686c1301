"""What leaves the machine: a model folder with its card, and a run as one file that can be verified.

A bundle is a zip file: the run's record, history, curves and report, its model/ folder, and MANIFEST.json with the
sha256 and the size of each. Opening one checks all of it before anything is put in its place. No path of the machine
that it was made on is in it, and none that is in it is obeyed (see `config.portable`).
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from newllm_lib.config.places import user_path
from newllm_lib.config.portable import portable, portable_config, received
from newllm_lib.errors import BundleError, FileTakenError, NewLLMError, RunError
from newllm_lib.escaping import one_line
from newllm_lib.model.pretrained import load_exported
from newllm_lib.reporting import curves, report
from newllm_lib.reporting.model_card import model_card
from newllm_lib.reporting.record import (
    CARD,
    CHECKPOINTS,
    CURVES,
    HISTORY,
    MODEL,
    MODEL_CONFIG,
    PROTOCOL,
    RECORD,
    REPORT,
    TOKENIZER,
    WEIGHTS,
    damaged_record,
    history_rows,
    read_history,
    read_record,
    record_text,
    write_record,
)
from newllm_lib.runs.run import Run, check_validated, load_model
from newllm_lib.system.files import file_errors, make_folder, write_atomic
from newllm_lib.training.checkpoint import Checkpoints, load_checkpoint, save_checkpoint, sidecar, valid_step

MANIFEST = "MANIFEST.json"
BUNDLE_VERSION = 1
"""Version of the manifest; a reader refuses newer ones."""
MAX_BUNDLE_BYTES = 8 << 30
"""Most that a bundle may unpack to, unless told otherwise."""
_MAX_FILES = 1000
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_DEPTH = 3
ZIP_ERRORS = (zipfile.BadZipFile, EOFError, RuntimeError, zlib.error, struct.error, ValueError, LookupError)
"""What zipfile raises for bytes that it cannot read; RuntimeError where they are encrypted or packed in another way."""
_CHUNK = 1 << 20
_OLDEST_DATE = (1980, 1, 1, 0, 0, 0)
"""The date of every member, so that the same run gives the same file."""
_CARD, _PROTOCOL = f"{MODEL}/{CARD}", f"{MODEL}/{PROTOCOL}"
_REQUIRED = (RECORD, *(f"{MODEL}/{name}" for name in (WEIGHTS, MODEL_CONFIG, TOKENIZER)))
_OPTIONAL = (HISTORY, CURVES, REPORT, _CARD, _PROTOCOL)


@file_errors()
def bundle(run: Run | str | Path, out: str | Path | None = None, *, checkpoint: bool = False) -> Path:
    """Write a run as one zip file (default: beside its folder) and return its path.

    With `checkpoint` the newest training state goes along, so that the run can be continued elsewhere. Record, report,
    card and state are without this machine's paths. The file is replaced whole. FileMissingError, NoModelError or
    RunError when the run has no trained weights yet.
    """
    run = Run((run.folder if isinstance(run, Run) else user_path(run)).resolve())
    out = user_path(out) if out else run.folder.parent / f"{run.folder.name}.zip"
    missing = [name for name in _REQUIRED if not (run.folder / name).is_file()]
    if missing:
        check_validated(run)
        raise RunError(f"{run.folder}: has no {missing[0]} yet; a bundle needs a run with a validation behind it")
    load_exported(run.folder / MODEL)  # what cannot be read is not sent
    files = {name: run.folder / name for name in (*_REQUIRED, *_OPTIONAL) if (run.folder / name).is_file()}
    contents = {name: path.read_bytes() for name, path in files.items()} | _written_for_others(run)
    contents = {name: data for name, data in contents.items() if data is not None}
    if checkpoint:
        contents |= _newest_checkpoint(run)
    manifest: dict[str, Any] = {"format_version": BUNDLE_VERSION, "run": run.folder.name, "files": {}}

    def write(file) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in contents.items():
                manifest["files"][name] = _add(archive, name, data)
            _add(archive, MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())

    make_folder(out.parent)
    write_atomic(out, write)
    return out


def _written_for_others(run: Run) -> dict[str, bytes | None]:
    """The files of a bundle that could tell of this machine, or of an earlier state of the run; None = to be left out.

    That is the record, and what is written from it and from the history.
    """
    with damaged_record(run.folder):
        record = portable(run.record)
        texts = {RECORD: record_text(record), _CARD: model_card(record, run.config.model)}
        history = history_rows(run.folder)
        pictures, no_picture = {}, ""
        try:
            pictures = {} if curves.is_current(run.folder, history) else {CURVES: curves.curves_png(record, history)}
        except Exception as error:  # drawing fails no bundle, and one that tells of less than was trained stays here
            pictures, no_picture = {CURVES: None}, one_line(f"they could not be drawn ({type(error).__name__})")
        texts[REPORT] = report.report_text(record, history, no_picture)
    return {name: text.encode() for name, text in texts.items()} | pictures


def _newest_checkpoint(run: Run) -> dict[str, bytes]:
    checkpoints = Checkpoints.of(run.folder, run.record.run)
    newest = next(iter(checkpoints.files()), None)
    if newest is None:
        raise RunError(f"{run.folder}: has no checkpoint to take along")
    payload = load_checkpoint(newest, lambda text: None)  # verified, so that a damaged one is not sent
    configs = {part: portable_config(payload[part]) for part in ("config", "requested") if part in payload}
    with tempfile.TemporaryDirectory() as scratch:
        path = newest
        if any(payload[part] != config for part, config in configs.items()):
            path = Path(scratch) / newest.name
            save_checkpoint(path, payload | configs, payload["state"]["step"])
        found = (path, sidecar(path))
        return {f"{CHECKPOINTS}/{file.name}": file.read_bytes() for file in found if file.is_file()}


@file_errors()
def archive(folder: str | Path) -> Path:
    """The files of a study's or a comparison's own folder as `<folder>.zip`, which is returned; not the runs inside it.

    RunError where there is no file to take.
    """
    folder = user_path(folder).resolve()
    files = sorted(path for path in folder.glob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise RunError(f"{folder}: holds no files to take along")
    out = folder.parent / f"{folder.name}.zip"

    def write(file) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in files:
                _add(packed, f"{folder.name}/{path.name}", path.read_bytes())

    write_atomic(out, write)
    return out


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> dict[str, Any]:
    """Put a member into an archive; its entry of the manifest."""
    member = zipfile.ZipInfo(name, _OLDEST_DATE)
    member.compress_type = zipfile.ZIP_DEFLATED
    member.external_attr = (stat.S_IFREG | 0o644) << 16
    archive.writestr(member, data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


@file_errors()
def open_bundle(
    path: str | Path, results_dir: str | Path = "results", name: str | None = None, *, max_bytes: int = MAX_BUNDLE_BYTES
) -> Run:
    """Verify a bundle, unpack it to `results_dir/<its run>` (or `name`), and return the run.

    The paths in its record are dropped: to continue it, name its text as `data`, unless that is a named one.
    BundleError names what is wrong with the file; then nothing is left behind. FileTakenError where the folder is
    there already with other content.
    """
    path, results = user_path(path), user_path(results_dir)
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = _manifest(archive, path, max_bytes)
            folder = results / folder_name(name or manifest["run"], path)
            if folder.exists():
                return _already_there(folder, manifest, json.loads(archive.read(RECORD)))
            make_folder(results)
            with tempfile.TemporaryDirectory(prefix=".opening-", dir=results) as scratch:
                unpacked = Path(scratch) / "run"
                for member, entry in manifest["files"].items():
                    _extract(archive, member, entry, unpacked / member, path)
                _check_run(unpacked, path)
                write_record(unpacked, received(read_record(unpacked)))
                unpacked.rename(folder)
    except NewLLMError:
        raise
    except ZIP_ERRORS as error:
        raise BundleError(f"{path}: not a readable zip file ({error}): download it again") from error
    return Run(folder)


@file_errors()
def bundle_record(path: str | Path) -> dict[str, Any]:
    """The run.json in a bundle, without unpacking it; BundleError as of `open_bundle`."""
    try:
        with zipfile.ZipFile(path) as archive:
            _manifest(archive, Path(path), MAX_BUNDLE_BYTES)
            record = json.loads(archive.read(RECORD))
            return record | {"run": str(record["run"])}
    except NewLLMError:
        raise
    except (*ZIP_ERRORS, TypeError) as error:
        raise BundleError(f"{path}: not a readable bundle ({error})") from error


def _manifest(archive: zipfile.ZipFile, path: Path, max_bytes: int) -> dict[str, Any]:
    """The manifest, after the names and sizes of all members have been checked against it."""
    members = archive.infolist()
    names = [member.filename for member in members]
    if MANIFEST not in names:
        raise BundleError(f"{path}: not a bundle of newllm_lib (no {MANIFEST} in it)")
    if len(names) > _MAX_FILES or len(set(names)) != len(names):
        raise BundleError(f"{path}: holds {len(names)} members, or one twice: must be at most {_MAX_FILES}, each once")
    if archive.getinfo(MANIFEST).file_size > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: {MANIFEST} is larger than {_MAX_MANIFEST_BYTES:,} bytes")
    try:
        manifest = json.loads(archive.read(MANIFEST))
        version, _ = int(manifest["format_version"]), manifest["run"]
        sizes = {name: operator.index(entry["bytes"]) for name, entry in manifest["files"].items()}
        for entry in manifest["files"].values():
            bytes.fromhex(entry["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BundleError(f"{path}: {MANIFEST} cannot be read ({error})") from error
    if version > BUNDLE_VERSION:
        raise BundleError(f"{path}: bundle version {version}, this library reads up to {BUNDLE_VERSION}; upgrade it")
    for member in members:
        _check_member(member, path)
    if set(names) - {MANIFEST} != set(sizes):
        odd = sorted((set(names) - {MANIFEST}) ^ set(sizes))
        raise BundleError(f"{path}: members and {MANIFEST} differ: {', '.join(odd[:4])}")
    for name, size in sizes.items():
        if size != archive.getinfo(name).file_size:
            raise BundleError(f"{path}: {name} is {archive.getinfo(name).file_size:,} bytes, recorded are {size:,}")
    if (total := sum(sizes.values())) > max_bytes:
        raise BundleError(f"{path}: would unpack to {total:,} bytes, allowed are {max_bytes:,}")
    missing = [name for name in _REQUIRED if name not in sizes]
    if missing:
        raise BundleError(f"{path}: not a whole run, {missing[0]} is missing")
    return manifest


def _check_member(member: zipfile.ZipInfo, path: Path) -> None:
    """Nothing but plain files with plain relative names."""
    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
    parts = name.split("/")
    if len(parts) > _MAX_DEPTH or not all(map(_is_plain, parts)) or kind not in (0, stat.S_IFREG):
        raise BundleError(f"{path}: refused: it holds {name!r}, which is not a plain file inside the run's folder")


def _is_plain(part: str) -> bool:
    """Whether a part of a path means the same on every system: what a run may be called, and no hidden file."""
    return bool(re.fullmatch(r"[^\x00-\x1f\x7f/\\:*?\"<>|]+", part)) and not part.startswith(".")


def folder_name(name: str, path: Path) -> str:
    """A name that a file brings, if it can be that of a run's folder; BundleError for one that leads elsewhere."""
    if not _is_plain(str(name)):
        raise BundleError(f"{path}: refused: {name!r} is no name for a folder; give one as name (in the shell --name)")
    return str(name)


def _extract(archive: zipfile.ZipFile, member: str, entry: dict[str, Any], target: Path, path: Path) -> None:
    """Write one member and compare its hash; zipfile never gives more than the size that the manifest agreed with."""
    make_folder(target.parent)
    digest = hashlib.sha256()
    with archive.open(member) as source, file_errors(target, f"cannot write {target}"), open(target, "wb") as file:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != entry["sha256"]:
        raise BundleError(f"{path}: {member} is damaged: its sha256 is not the recorded {entry['sha256'][:16]}…")


def _check_run(folder: Path, path: Path) -> None:
    """BundleError where the files cannot be used: their hashes match, so the fault is the sender's."""
    try:
        run = Run(folder)
        folder_name(run.record.run, path)  # the files of its checkpoints begin with it
        received(run.record)
        repr(run)  # what the command prints of it
        if (folder / HISTORY).is_file():
            read_history(folder)
        load_model(folder)
    except Exception as error:  # a record from elsewhere may be wrong in any way
        raise BundleError(f"{path}: its files are whole, but are no run ({type(error).__name__}: {error})") from error


def _already_there(folder: Path, manifest: dict[str, Any], sent: dict[str, Any]) -> Run:
    """The run in `folder` if it is the bundle's, whose record was `sent`; FileTakenError where it is another.

    Paths do not count: a run's own folder has those of this machine, a bundle of it has none.
    """
    for name, entry in manifest["files"].items():
        found = folder / name
        if name in (_CARD, _PROTOCOL) and not found.is_file():
            continue  # made for the bundle, or by a later version of this library
        same = found.is_file() and hashlib.sha256(found.read_bytes()).hexdigest() == entry["sha256"]
        if name == RECORD and found.is_file() and not same:
            same = portable(read_record(folder)) == portable(sent)
        elif name.startswith(f"{CHECKPOINTS}/"):
            same = found.is_file() and (not name.endswith(".pt") or valid_step(found) >= 0)
        if not same:
            raise FileTakenError(
                f"{folder}: is there already, with another {name}; give another name (in the shell --name)"
            )
    return Run(folder)
