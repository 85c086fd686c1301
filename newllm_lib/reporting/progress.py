"""How a run reports its progress: one observer, silent or as plain lines in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

from newllm_lib.escaping import say
from newllm_lib.reporting.diagnostics import Row, Spell, follow
from newllm_lib.reporting.formatting import COLUMNS, duration, named_lines, ppl_text
from newllm_lib.reporting.sync_status import SyncStatus
from newllm_lib.system.console import UnfailingStream

STOPPING = "stopping after this step, then saving"
"""How the message begins that answers the first interrupt."""


class Progress:
    """What a trainer reports. This one is silent; derive from it to show more."""

    def begin(self, record: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """A run begins or goes on: its record, which is kept up to date as run.json is, and the rows so far."""

    def message(self, text: str) -> None:
        """A line that the user should read: a decision, a warning, how to go on."""

    def plan(self, lines: list[tuple[str, str]]) -> None:
        """(what, how much and why) of each decision of a run that begins; here each is a message."""
        for line in named_lines(lines):
            self.message(line)

    def step(self, step: int, total_steps: int, epoch: float, loss: float, tokens_per_second: float) -> None:
        """One optimizer step has ended."""

    def evaluating(self) -> None:
        """A validation begins, during which no step ends."""

    def validating(self, share: float) -> None:
        """So much of a validation is done, above 0 to 1."""

    def time_left(self, seconds: float | None) -> None:
        """How long the run will still take, validation and saving included; None where that is not known."""

    def validated(self, row: dict[str, Any], best: bool) -> None:
        """A row was added to the history."""

    def watch(self, safety: Callable[[], SyncStatus] | None) -> None:
        """Of a run that begins: `safety` tells at any time how safe the work is; None = no copy of it is kept."""

    def close(self) -> None:
        """The run has ended, in whatever way."""


_WIDTHS = {
    "step": 9, "epoch": 7, "val_ppl": 11, "val_accuracy": 9, "val_loss": 16, "train_loss": 14, "train_seconds": 9,
}  # fmt: skip
HEADER = " ".join(f"{COLUMNS[name]:>{width}}" for name, width in _WIDTHS.items())


def rows_before(history: list[Row], row: Row) -> list[Row]:
    """The rows of a history that a new one comes after: a run that goes back to a checkpoint validates again."""
    return [earlier for earlier in history if (earlier["epoch"], earlier["step"]) < (row["epoch"], row["step"])]


def table_line(row: dict[str, Any], best: bool) -> str:
    """A row of the history under HEADER; the best one so far is marked."""
    cells = {
        "step": f"{row['step']:,d}", "epoch": f"{row['epoch']:.2f}", "val_ppl": ppl_text(row["val_ppl"]),
        "val_accuracy": f"{row['val_accuracy']:.2%}", "val_loss": f"{row['val_loss']:.4f}",
        "train_loss": f"{row['train_loss']:.4f}", "train_seconds": f"{row['train_seconds']:,.1f}",
    }  # fmt: skip
    return " ".join(f"{cells[name]:>{width}}" for name, width in _WIDTHS.items()) + (" *" if best else "")


class TerminalProgress(Progress):
    """A bar where there is a terminal, a line every ten seconds where there is none (a log file, CI)."""

    def __init__(self, stream: TextIO | None = None, line_seconds: float = 10.0):
        self._stream = UnfailingStream(stream or sys.stderr)
        self._line_seconds = line_seconds
        self._bar: tqdm | None = None
        self._last_line: float | None = None
        self._header_shown = False
        self._unknown_share: float | None = None
        self._history: list[dict[str, Any]] = []
        self._spells: dict[str, Spell] = {}
        self._left: float | None = None
        self._safety: Callable[[], SyncStatus] | None = None
        self._told_safety: list[SyncStatus] = []

    def begin(self, record: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Print what the rows so far warn of at their end."""
        self._unknown_share = record["validation"]["unknown_share"]
        self._follow(history)
        for spell in self._spells.values():
            if spell.active:
                self.message(f"warning: {spell}")

    def _follow(self, history: list[Row]) -> None:
        """What a history has warned of so far, from its first row."""
        self._history, self._spells = [], {}
        for row in history:
            self._history.append(row)
            self._spells = follow(self._spells, self._history, self._unknown_share)

    def message(self, text: str) -> None:
        """Print above the bar."""
        if self._bar is not None:
            self._bar.clear()
        say(text, self._stream)

    def step(self, step: int, total_steps: int, epoch: float, loss: float, tokens_per_second: float) -> None:
        """Move the bar, or print a line when the last one is old enough."""
        self._tell_safety()
        now = time.monotonic()
        if self._last_line is None:
            self._last_line = now
        left = "" if self._left is None else f", {duration(self._left)} left"
        detail = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s{left}"
        if self._stream.isatty():
            self._move_bar(step, total_steps, epoch, detail)
        elif now - self._last_line >= self._line_seconds:
            self.message(f"step {step:,} of {total_steps:,} (epoch {epoch:.2f}): {detail}")
            self._last_line = now

    def _move_bar(self, step: int, total_steps: int, epoch: float, detail: str) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=total_steps,
                initial=step - 1,
                unit="step",
                bar_format="{l_bar}{bar}| {n:,} of {total:,} [{elapsed}, {rate_fmt}{postfix}]",
                mininterval=0.5,
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
            )
        self._bar.set_postfix_str(f"epoch {epoch:.2f}, {detail}", refresh=False)
        self._bar.update(step - self._bar.n)

    def evaluating(self) -> None:
        """Say so in the bar."""
        self._show_validation("validating")

    def validating(self, share: float) -> None:
        """Move the share in the bar."""
        self._show_validation(f"validating, {share:.0%}")

    def _show_validation(self, text: str) -> None:
        if self._bar is not None:
            left = "" if self._left is None else f", {duration(self._left)} left"
            self._bar.set_postfix_str(text + left, refresh=True)

    def time_left(self, seconds: float | None) -> None:
        """Shown with the next step."""
        self._left = seconds

    def validated(self, row: dict[str, Any], best: bool) -> None:
        """Print the row, the first time under its heading; and what it warns of, unless the row before did too."""
        if not self._header_shown:
            self.message(HEADER)
            self._header_shown = True
        self.message(table_line(row, best))
        kept = rows_before(self._history, row)
        if len(kept) < len(self._history):
            self._follow(kept)
        self._history.append(row)
        before, self._spells = self._spells, follow(self._spells, self._history, self._unknown_share)
        for kind, spell in self._spells.items():
            was_active = kind in before and before[kind].active
            if spell.active and not was_active:
                self.message(f"warning: {spell.text}")
            elif was_active and not spell.active and kind == "plateau":
                self.message(f"the plateau of epochs {spell.first_epoch:.2f} to {spell.last_epoch:.2f} is over")

    def watch(self, safety: Callable[[], SyncStatus] | None) -> None:
        """Print how safe the work is when that changes: the first copy, each kind of trouble once, and its end."""
        self._safety, self._told_safety = safety, []

    def _tell_safety(self) -> None:
        safety, told = self._safety() if self._safety else None, self._told_safety
        if safety is None or safety.kind in ("local", "copying"):
            return
        known = told[-1:] if safety.safe else told
        if safety.kind not in {before.kind for before in known}:
            told.append(safety)
            self.message(f"{'' if safety.safe else 'warning: '}copy: {safety.text}")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
