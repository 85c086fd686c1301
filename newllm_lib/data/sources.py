"""Which files a source of text stands for: a path, or a pattern such as 'src/**/*.py'; each real file once."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from newllm_lib.config.configs import NAMED_TEXTS
from newllm_lib.errors import ConfigError, DataError, FileMissingError


def real_files(sources: Iterable[str]) -> tuple[list[Path], int]:
    """The files that some sources stand for, and how many paths to files that are in the list already were left out.

    A path that several sources name counts as one. FileMissingError for a source without a file, ConfigError for a
    folder, DataError for a pipe.
    """
    paths = list(dict.fromkeys(path for source in sources for path in _files_of(source)))
    first: dict[str, Path] = {}
    for path in paths:
        first.setdefault(os.path.realpath(path), path)
    return list(first.values()), len(paths) - len(first)


def dangling(path: Path) -> bool:
    """Whether a path is a link to something that is not there."""
    return path.is_symlink() and not path.exists()


def refuse_dangling(path: Path) -> None:
    """DataError for a link to something that is not there."""
    if dangling(path):
        raise DataError(f"data {path}: is a link to {os.readlink(path)}, which is not there; mend or remove the link")


def _files_of(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise ConfigError(f"data {source}: a folder stands alone; several sources must be files or patterns")
    refuse_dangling(path)
    if path.exists():
        raise DataError(
            f"data {source}: is a pipe or a device, which can be read once only, and a run that continues reads its "
            "text again; write the text to a file first"
        )
    matches = [Path(name) for name in _matches(source)]
    found = sorted(match for match in matches if match.is_file())
    if not found:
        for match in matches:
            refuse_dangling(match)
        raise FileMissingError(
            f"data {source}: no such folder, file or pattern. Give a folder with train.txt and valid.txt, text files, "
            f"or one of: {', '.join(NAMED_TEXTS)}"
        )
    return found


def _matches(pattern: str) -> Iterator[str]:
    """What `glob.glob(pattern, recursive=True)` finds, but a link to a folder that it lies in is not followed."""
    head, *tails = re.split(r"(?<![^/])\*\*(?:/|$)", pattern)
    if not tails:
        yield from glob.iglob(pattern)
        return
    places = glob.glob(head) if head else [""]
    for tail in (*tails[:-1], tails[-1] or "*"):
        below = dict.fromkeys(folder for place in places for folder in _folders(place))
        places = [place for folder in below for place in (_within(folder, tail) if tail else [folder])]
    yield from places


def _within(folder: str, pattern: str) -> list[str]:
    return [os.path.join(folder, name) for name in glob.glob(pattern, root_dir=folder or None)]


def _folders(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """A folder and all below it that are not hidden, in the order of their names."""
    real = os.path.realpath(folder or ".")
    if real in above or not os.path.isdir(real):
        return
    yield folder
    try:
        names = sorted(entry.name for entry in os.scandir(folder or ".") if entry.is_dir())
    except OSError:  # as glob has it: what may not be listed holds nothing
        return
    for name in names:
        if not name.startswith("."):
            yield from _folders(os.path.join(folder, name), above | {real})
