"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed over it.

And what the system says of files, in words that name the path and what would help (`file_errors`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from newllm_lib.errors import (
    ChangedError,
    FileError,
    FileMissingError,
    FilePermissionError,
    FileTakenError,
    NewLLMError,
    NotAFileError,
    NotAFolderError,
    RunError,
)

_CHUNK = 1 << 20
_CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
"""What file systems answer that do not know how to: some network shares and FUSE drives. The rename stands."""

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_REMEDIES = {
    **dict.fromkeys(DISK_FULL, "the disk is full: free some space, or choose another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change the permissions, or choose another folder"),
    errno.EROFS: "nothing can be written there: choose another folder",
    errno.EISDIR: "this is a folder, and a file is needed",
    errno.ENOTDIR: "this is a file, or lies below one, and a folder is needed",
    errno.EEXIST: "another name is needed, or move that away",
    errno.ENAMETOOLONG: "a shorter name is needed",
    **dict.fromkeys((errno.EIO, errno.ENOTCONN, errno.ESTALE), "is the drive still connected?"),
}
_KINDS = (FileMissingError, FileTakenError, FilePermissionError, NotAFileError, NotAFolderError)


def file_error(error: OSError, path: Path | str | None = None, opening: str = "", ending: str = "") -> FileError:
    """What the system said of a file, as a FileError that names it and what would help.

    path: what was to be read or written (None = what the error names). opening: what the sentence begins with instead
    of the path; ending: what it ends with.
    """
    name = str(error.filename if path is None else path)
    said = error.strerror or str(error) or type(error).__name__  # NumPy's "n requested and m written" has no number
    kind = next((kind for kind in _KINDS if isinstance(error, kind.__bases__[1])), FileError)
    made = kind(error.errno, said, name)
    remedy = f" ({_REMEDIES[error.errno]})" if error.errno in _REMEDIES else ""
    made.sentence = f"{opening or name}: {said}{remedy}{ending}"
    return made


@contextlib.contextmanager
def file_errors(path: Path | str | None = None, opening: str = "", ending: str = "") -> Iterator[None]:
    """Let an OSError of what is inside become a FileError, as `file_error` makes it; one of ours stays as it is.

    Without a path only those that name a file, as those of opening, listing and renaming do. Also a decorator.
    """
    try:
        yield
    except NewLLMError:
        raise
    except OSError as error:
        if path is None and error.filename is None:
            raise
        raise file_error(error, path, opening, ending) from error


def make_folder(path: Path) -> None:
    """Make a folder with those above it, where it is not there yet; FileError names what stands in its way."""
    with file_errors(path, f"cannot make the folder {path}"):
        path.mkdir(parents=True, exist_ok=True)


def read_json(path: Path, way_out: str = "") -> Any:
    """What a JSON file of this library holds; FileError where it cannot be read, RunError where it is damaged.

    way_out: what would help then.
    """
    with file_errors(path, f"cannot read {path}"):
        raw = path.read_bytes()
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: not readable as JSON ({error}){way_out and f'; {way_out}'}") from error


def write_atomic(
    path: Path, write: Callable[[BinaryIO], None], check: Callable[[Path], None] = lambda temporary: None
) -> None:
    """Let `write` fill a temporary file in the same folder, then rename it to `path`.

    Until the rename the old file stays as it was; `check` sees the temporary file before it. FileError (disk full,
    read-only folder) names the path, and no temporary file is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with file_errors(path, f"cannot write {path}", "; what was there is unchanged"):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            check(temporary)
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """`write_atomic` for text, as UTF-8; bytes of a file's name that are no character become escapes."""
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path, alive: Callable[[], None] = lambda: None) -> str:
    """The hash of a file's content, in hex; `alive` is called between its pieces, and may stop the reading."""
    digest = hashlib.sha256()
    with file_errors(path, f"cannot read {path}"), open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            alive()
    return digest.hexdigest()


def copy_atomic(source: Path, target: Path, sha256: str, alive: Callable[[], None] = lambda: None) -> None:
    """Copy a file whose hash is known; what was written is read back before it takes its place.

    `alive` is called between the pieces, and may stop the copying. ChangedError when the source no longer has that
    content; FileError, with the target as it was, when it cannot be written or reads back differently.
    """

    def piece() -> bytes:
        with file_errors(source, f"cannot read {source}"):
            return opened.read(_CHUNK)

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        while chunk := piece():
            digest.update(chunk)
            file.write(chunk)
            file.flush()  # piece by piece, so that little is left for the end, where no piece tells that it goes on
            alive()
        if digest.hexdigest() != sha256:
            raise ChangedError(f"{source}: was replaced while it was being copied")

    def check(temporary: Path) -> None:
        _forget_cached(temporary)
        if sha256_of(temporary, alive) != sha256:
            raise OSError(errno.EIO, "it reads back differently from what was written")

    try:
        opened = open(source, "rb")  # noqa: SIM115
    except FileNotFoundError as error:
        raise ChangedError(f"{source}: was removed before it was copied") from error
    except OSError as error:
        raise file_error(error, source, f"cannot read {source}") from error
    with opened:
        write_atomic(target, write, check)


def _forget_cached(path: Path) -> None:
    """Let the next reading come from the drive, where the system can do that."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # advice only
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
