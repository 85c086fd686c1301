"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed over it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 20
_CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
"""What file systems answer that do not know how to: some network shares and FUSE drives. The rename stands."""


class ChangedError(ValueError):
    """A file was replaced or removed while it was being copied."""


def write_atomic(
    path: Path, write: Callable[[BinaryIO], None], check: Callable[[Path], None] = lambda temporary: None
) -> None:
    """Let `write` fill a temporary file in the same folder, then rename it to `path`.

    Until the rename the old file stays as it was; `check` sees the temporary file before it. OSError (disk full,
    read-only folder) names the path, and no temporary file is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        check(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error  # NumPy's "n requested and m written" has no number
        raise OSError(error.errno, f"cannot write {path}: {reason}; what was there is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """`write_atomic` for text, as UTF-8."""
    write_atomic(path, lambda file: file.write(text.encode()))


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
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            alive()
    return digest.hexdigest()


def copy_atomic(source: Path, target: Path, sha256: str, alive: Callable[[], None] = lambda: None) -> None:
    """Copy a file whose hash is known; what was written is read back before it takes its place.

    `alive` is called between the pieces, and may stop the copying. ChangedError when the source no longer has that
    content; OSError, with the target as it was, when it cannot be written or reads back differently.
    """

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        while chunk := opened.read(_CHUNK):
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
