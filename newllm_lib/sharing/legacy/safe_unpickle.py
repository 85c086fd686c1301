"""An old file's content, without anything in it being run.

Such a file is a pickle that names a configuration class which is not installed here. Before it is opened, every name
in it is compared with a short list: tensors, ordered dictionaries and one class of the package `src`, in whose place
an inert record stands. A file with any other name is refused.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from newllm_lib.errors import CheckpointError, FileMissingError

_KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED = frozenset(
    {"collections.OrderedDict"}
    | {f"torch._utils._rebuild_{what}" for what in ("tensor", "tensor_v2", "parameter")}
    | {f"torch.{kind}Storage" for kind in _KINDS}
)
"""Full names that a file may hold, beside one configuration class."""
_CONFIG_CLASS = re.compile(r"src(\.\w+)+")
_OTHER_NAMING = frozenset({"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})
"""Opcodes that name a global in other ways than torch.save does."""
_ZIP_START = b"PK\x03\x04"
_LEGACY_PICKLES = 5
"""What torch.save wrote before it wrote zip files: magic number, version, system, the object, the keys of its storages;
a pickle each, then the numbers."""


class Content(NamedTuple):
    """What a file holds."""

    payload: Any
    config_class: str | None
    """Full name of the one class of the package `src` that the file names."""
    sha256: str


class _CalledError(Exception):
    """The file wanted its configuration class to be called with arguments."""


class Record:
    """Stands for the configuration class of a file: keeps what was stored and does nothing.

    It has no `__dict__`, so that no attribute from the file can take the place of a method.
    """

    __slots__ = ("state",)

    def __new__(cls, *arguments):
        """An empty record; a pickle that passes arguments wants something done with them."""
        if arguments:
            raise _CalledError
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read(path: Path) -> Content:
    """The content of a file of torch.save (zip or older), tensors on the CPU.

    FileMissingError where there is none; CheckpointError for one that is refused, with the name in it that is not
    allowed, or that cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileMissingError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    config_class = None
    try:
        config_class = _check_names(data, path)
        payload = _unpickle(data, config_class)
    except CheckpointError:
        raise
    except _CalledError:
        raise CheckpointError(
            f"{path}: refused: it calls {config_class!r} with arguments; only stored attributes are read"
        ) from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it holds more than tensors, plain values and one configuration's attributes"
        ) from error
    except Exception as error:  # torch and pickletools raise a dozen unrelated classes for bytes that make no sense
        raise CheckpointError(
            f"{path}: not a file of torch.save that can be read ({len(data):,} bytes): truncated, damaged or of "
            f"another kind [{type(error).__name__}: {str(error)[:80]}]"
        ) from error
    return Content(payload, config_class, hashlib.sha256(data).hexdigest())


def _check_names(data: bytes, path: Path) -> str | None:
    """The full name of the configuration class, if the file names one; CheckpointError for any other name."""
    found: str | None = None
    for name in _names(data):
        if name in ALLOWED:
            continue
        if not _CONFIG_CLASS.fullmatch(name):
            raise CheckpointError(
                f"{path}: refused: it names {name!r}; only tensors, plain values and the attributes of one class of "
                "the package src are read. If you trust the file, save it again where it was written, with plain "
                "numbers and config=vars(config)"
            )
        if found not in (None, name):
            raise CheckpointError(
                f"{path}: refused: it names two classes, {found!r} and {name!r}; the attributes of one are read"
            )
        found = name
    return found


def _names(data: bytes) -> Iterator[str]:
    """The full name of every class and function in a file of torch.save, found without carrying out its pickles.

    These are the very bytes that torch.load carries out: of a zip file, those that its own reader finds.
    """
    if data.startswith(_ZIP_START):
        damaged = zipfile.ZipFile(io.BytesIO(data)).testzip()  # torch does not look at the checksums
        if damaged:
            raise ValueError(f"{damaged} does not have its recorded checksum")
        stream, count = io.BytesIO(torch._C.PyTorchFileReader(io.BytesIO(data)).get_record("data.pkl")), 1
    else:
        stream, count = io.BytesIO(data), _LEGACY_PICKLES
    for _ in range(count):
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                yield argument.replace(" ", ".", 1)
            elif opcode.name in _OTHER_NAMING:
                yield f"a class or function by {opcode.name}"


def _unpickle(data: bytes, config_class: str | None) -> Any:
    """torch.load with its own list of safe names, and the record in place of the configuration class.

    What this process has declared safe for other files is set aside meanwhile: it might hold the class itself.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals([(Record, config_class)] if config_class else [])
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
