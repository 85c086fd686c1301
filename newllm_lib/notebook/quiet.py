"""Widgets that are set by code: what listens to them must not take that for a user's change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CanBeQuiet:
    """A listener to widgets; while `_quiet` is True it ignores what they report."""

    _quiet = False

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False
