"""How a run tells what it is doing: one observer, silent or as plain lines in a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """What a trainer reports. This one is silent; derive from it to show more."""

    def begin(self, record: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """A run begins or goes on: its record, which is kept up to date as run.json is, and the rows so far."""

    def message(self, text: str) -> None:
        """A line that the user should read: a decision, a warning, how to go on."""

    def step(self, step: int, total_steps: int, epoch: float, loss: float, tokens_per_second: float) -> None:
        """One optimizer step has ended."""

    def evaluating(self) -> None:
        """A validation begins, during which no step ends."""

    def validated(self, row: dict[str, Any], best: bool) -> None:
        """A row was added to the history."""

    def close(self) -> None:
        """The run has ended, in whatever way."""


HEADER = f"{'epoch':>7} {'step':>7} {'train loss':>11} {'val loss':>9} {'val PPL':>9} {'accuracy':>9} {'seconds':>8}"


def table_line(row: dict[str, Any], best: bool) -> str:
    """A row of the history under HEADER; the best one so far is marked."""
    return (
        f"{row['epoch']:7.2f} {row['step']:7d} {row['train_loss']:11.4f} {row['val_loss']:9.4f} {row['val_ppl']:9.2f} "
        f"{row['val_accuracy']:9.2%} {row['train_seconds']:8.1f}" + (" *" if best else "")
    )


class TerminalProgress(Progress):
    """A bar where there is a terminal, a line every ten seconds where there is none (a log file, CI)."""

    def __init__(self, stream: TextIO | None = None, line_seconds: float = 10.0):
        self._stream = stream or sys.stderr
        self._line_seconds = line_seconds
        self._bar: tqdm | None = None
        self._started: tuple[float, int] | None = None
        self._last_line = 0.0
        self._header_shown = False

    def message(self, text: str) -> None:
        """Print above the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=self._stream, flush=True)

    def step(self, step: int, total_steps: int, epoch: float, loss: float, tokens_per_second: float) -> None:
        """Move the bar, or print a line when the last one is old enough."""
        now = time.monotonic()
        if self._started is None:
            self._started, self._last_line = (now, step - 1), now
        detail = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
        if self._stream.isatty():
            self._move_bar(step, total_steps, epoch, detail)
        elif now - self._last_line >= self._line_seconds:
            begun, first = self._started
            left = (now - begun) / (step - first) * (total_steps - step)
            self.message(f"step {step}/{total_steps} (epoch {epoch:.2f}): {detail}, {_duration(left)} left")
            self._last_line = now

    def _move_bar(self, step: int, total_steps: int, epoch: float, detail: str) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=total_steps,
                initial=step - 1,
                unit="step",
                mininterval=0.5,
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
            )
        self._bar.set_postfix_str(f"epoch {epoch:.2f}, {detail}", refresh=False)
        self._bar.update(step - self._bar.n)

    def evaluating(self) -> None:
        """Say so in the bar, which stands still meanwhile."""
        if self._bar is not None:
            self._bar.set_postfix_str("validating", refresh=True)

    def validated(self, row: dict[str, Any], best: bool) -> None:
        """Print the row, the first time under its heading."""
        if not self._header_shown:
            self.message(HEADER)
            self._header_shown = True
        self.message(table_line(row, best))

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
