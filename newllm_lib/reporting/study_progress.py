"""Progress of many runs in a row: one line that moves while a run trains, and a line that stays for each."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from newllm_lib.escaping import one_line, say, terminal_text
from newllm_lib.reporting.progress import STOPPING, Progress
from newllm_lib.system.console import UnfailingStream, in_kernel

_PAUSE_SECONDS = 0.5


class LiveLine(Progress):
    """In a terminal the last line is rewritten while a run trains; in a notebook all of them are one display.

    `label` says which run it is; warnings are shown once each, and that a run is about to stop; other messages not at
    all. `clock` gives seconds.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self.label = ""
        self._page = _Page() if stream is None and in_kernel() else None
        self._stream = UnfailingStream(stream or sys.stderr)
        self._clock, self._last, self._width = clock, float("-inf"), 0
        self._warnings: set[str] = set()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._page:
            self._page.lines.append(text)
            self._page.show("")
            return
        self._erase()
        say(text, self._stream)

    def message(self, text: str) -> None:
        """Let a warning stay, the first time, and what an interrupt is answered with."""
        if text.startswith("warning") and text not in self._warnings:
            self._warnings.add(text)
            self.say(text)
        elif text.startswith(STOPPING):
            self.say(text)

    def step(self, step: int, total_steps: int, epoch: float, loss: float, tokens_per_second: float) -> None:
        """Rewrite the moving line."""
        self._move(f"step {step:,} of {total_steps:,}, loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s")

    def evaluating(self) -> None:
        """Say so in the moving line."""
        self._move("validating")

    def close(self) -> None:
        """Remove the moving line."""
        if self._page:
            self._page.show("")
        self._erase()

    def _move(self, text: str) -> None:
        now = self._clock()
        if now - self._last < _PAUSE_SECONDS:
            return
        self._last, text = now, f"{self.label}: {text}"
        if self._page:
            self._page.show(text)
        elif self._stream.isatty():
            text = one_line(text)[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be rewritten
            self._stream.write("\r" + text.ljust(self._width))
            self._stream.flush()
            self._width = len(text)

    def _erase(self) -> None:
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0


class _Page:
    """All lines so far in one display of a cell."""

    def __init__(self):
        self.lines: list[str] = []
        self._handle: Any = None
        self._showing = False

    def show(self, moving: str) -> None:
        if self._showing:  # a signal brought a line in the middle of this: the next time shows it
            return
        self._showing = True
        try:
            self._show(moving)
        finally:
            self._showing = False

    def _show(self, moving: str) -> None:
        from IPython.display import display

        data = {"text/plain": terminal_text("\n".join([*self.lines, moving]).rstrip("\n"))}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)
