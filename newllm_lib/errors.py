"""Every exception that a user may catch, under one base class, `NewLLMError`.

Each of them means that something outside the library is wrong: a setting, a text, a file, the disk, the network. Its
message names the thing and says what would be right. Each is also a built-in exception of the same kind, so that
`except ValueError` or `except OSError` catches it too. Any other exception is a bug of the library, or a wrong call.
"""

from __future__ import annotations

from pathlib import Path

from newllm_lib.escaping import impersonal, terminal_text

__all__ = [
    "BundleError",
    "ChangedError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DownloadError",
    "FileError",
    "FileMissingError",
    "FilePermissionError",
    "FileTakenError",
    "MissingPackageError",
    "NetworkError",
    "NewLLMError",
    "NewerCheckpointError",
    "NoModelError",
    "NotAFileError",
    "NotAFolderError",
    "PartialUpdateError",
    "RunError",
    "RunInUseError",
    "TrainingError",
]


class NewLLMError(Exception):
    """Base of every exception that this library raises on purpose; its message is one that a user can act on.

    `str` shows paths under the home as ~/... and no token: tracebacks are shared.
    """

    def __str__(self) -> str:
        return impersonal(super().__str__())

    def _render_traceback_(self) -> list[str]:
        """What IPython and notebooks show: the message alone, in red. Every other exception is a bug, shown whole."""
        return [f"\x1b[31m{terminal_text(self)}\x1b[0m"]


# --- what a user asks for ---------------------------------------------------------------------------------------


class ConfigError(NewLLMError, ValueError):
    """A setting or an option has a value that it cannot have, alone or together with others or on this machine."""


class DataError(NewLLMError, ValueError):
    """A text cannot be used: it is empty, too short, not UTF-8, lacks a split, or its tokenizer is damaged."""


class RunError(NewLLMError, ValueError):
    """The folder of a run or of a study cannot be used: a file in it is damaged, or it holds something else."""


class RunInUseError(RunError):
    """Another process, or another thread of this one, writes to the run's folder."""


class TrainingError(NewLLMError, RuntimeError):
    """Training cannot continue; the message says why, and the last good checkpoint stays."""


class PartialUpdateError(NewLLMError, MemoryError):
    """Memory ran out during an update: weights, optimizers and loss scale may be half changed."""


class MissingPackageError(NewLLMError, ImportError):
    """An optional package is not installed; the message says how to install it."""


# --- files of the library's own formats -------------------------------------------------------------------------


class CheckpointError(NewLLMError, ValueError):
    """A checkpoint that is damaged, newer than this library, not a checkpoint, or of another run."""


class NewerCheckpointError(CheckpointError):
    """A checkpoint of a later version: intact, and so never passed over."""


class NoModelError(CheckpointError):
    """A run that has no best model yet."""

    def __init__(self, folder: Path, why: str = "no validation is behind this run yet"):
        super().__init__(
            f"{folder}: {why}, so there is no model: train it on (the same call; in a notebook that cell again)"
        )


class BundleError(NewLLMError, ValueError):
    """A bundle that is damaged, not a bundle, newer than this library, or dangerous to unpack."""


class ChangedError(NewLLMError, ValueError):
    """A file was replaced or removed while it was being copied."""


# --- files, folders, disks, the network -------------------------------------------------------------------------


class FileError(NewLLMError, OSError):
    """A file, a folder or a disk does not allow what has to be done.

    `errno`, `strerror` and `filename` are the system's, None where the library itself found the fault; `str` is a
    sentence that names the path. The subclasses are what `open` would raise for the same reason.
    """

    sentence = ""
    """The message, where the system's own words are only a part of it."""

    def __str__(self) -> str:
        return impersonal(self.sentence) or super().__str__()


class FileMissingError(FileError, FileNotFoundError):
    """There is no such file, folder or run."""


class FileTakenError(FileError, FileExistsError):
    """Something else already has this name."""


class FilePermissionError(FileError, PermissionError):
    """Reading or writing is not permitted there."""


class NotAFileError(FileError, IsADirectoryError):
    """A folder stands where a file is needed."""


class NotAFolderError(FileError, NotADirectoryError):
    """A file stands where a folder is needed."""


class NetworkError(NewLLMError, ConnectionError):
    """Something cannot be downloaded now: there is no network, or the server does not answer. Try again later."""


class DownloadError(NewLLMError, ValueError):
    """A server refuses a file, or the file is not the one that was asked for (its sha256 differs)."""
