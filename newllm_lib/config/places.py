"""Paths as a user writes them: `~` is the home, as in a shell."""

from __future__ import annotations

import os
from pathlib import Path

from newllm_lib.errors import ConfigError


def expanded(path: str) -> str:
    """A path whose first `~` or `~user` is that home; as it is where there is no such home.

    ConfigError for a path with a NUL character, which no system takes.
    """
    if "\0" in path:
        raise ConfigError(f"{path!r}: no path may hold a NUL character")
    return os.path.expanduser(path)


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path that a user gave, as `expanded` has it."""
    return Path(expanded(os.fspath(path)))
