"""What a notebook adds: `NotebookProgress` shows a run live, where a kernel runs this."""

from __future__ import annotations

import base64
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from newllm_lib.reporting.diagnostics import Row, follow
from newllm_lib.reporting.notebook_page import View, curves_pngs, page, summary
from newllm_lib.reporting.progress import Progress, TerminalProgress, rows_before
from newllm_lib.reporting.sync_status import SyncStatus, unsaved
from newllm_lib.system.console import in_kernel


class NotebookProgress(Progress):
    """Shows a run in one display of the cell that trains; as plain lines where no notebook is, or once drawing fails.

    At most two updates a second, fewer in a long run; the end is always shown. The curves are drawn again after a
    validation only, and take about a twentieth of the time at most. `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._plain = None if in_kernel() else TerminalProgress()
        self._safety: Callable[[], SyncStatus | None] = unsaved
        self._start()

    def _start(self) -> None:
        self._view = View()
        self._handle = None
        self._drawing = False
        self._begun = self._clock()
        self._updates: deque[float] = deque(maxlen=2)
        self._followed = 0  # rows of the history
        self._plotted = (0, 0)  # rows and step losses
        self._next_curves = -math.inf
        self._unshown: list[tuple[str, tuple]] = []  # what plain lines would have to say first

    def begin(self, record: dict[str, Any], history: list[Row]) -> None:
        """A run begins or goes on: its record, as in run.json, and the rows that it has so far.

        The record is kept, not copied: its status at the end is what `close` shows.
        """
        if self._view.ended:
            self._start()
        view = self._view
        view.record, view.rows = record, list(history)
        if record.get("status") != "running":  # it has ended, and is only shown
            view.step, view.total_steps = record.get("step") or 0, record.get("total_steps") or 0
            view.epoch = history[-1]["epoch"] if history else 0.0
        self._hand_over("begin", record, history)
        self._show(important=True)

    def plan(self, lines: list[tuple[str, str]]) -> None:
        """Show the plan, until there is a validation to look at; from then on it can be opened."""
        self._view.plan = list(lines)
        self._hand_over("plan", lines)
        self._show()

    def message(self, text: str) -> None:
        """Show a line above the table."""
        view = self._view
        view.messages.append(text)
        self._hand_over("message", text)
        self._show(always=view.ended)

    def step(self, step: int, total_steps: int, epoch: float, loss: float, tokens_per_second: float) -> None:
        """Move the bar."""
        view = self._view
        view.status, view.step, view.total_steps = "training", step, total_steps
        view.epoch, view.loss, view.tokens_per_second = epoch, loss, tokens_per_second
        view.losses.add(epoch, loss)
        self._hand_over("step", step, total_steps, epoch, loss, tokens_per_second)
        self._show()

    def evaluating(self) -> None:
        """Say so, as the bar stands still meanwhile."""
        self._view.status, self._view.validated_share = "validating", 0.0
        self._hand_over("evaluating")
        self._show(important=True)

    def validated(self, row: Row, best: bool) -> None:
        """Add the row to the table and to the curves; rows that a run has gone back behind are taken out."""
        view = self._view
        view.status = "training"
        kept = rows_before(view.rows, row)
        if len(kept) < len(view.rows):
            self._followed, view.spells = 0, {}
            self._plotted = (0, 0)
        view.rows = [*kept, row]
        self._hand_over("validated", row, best)
        self._show(important=True)

    def validating(self, share: float) -> None:
        """Move the share that the status tells."""
        self._view.validated_share = share
        self._hand_over("validating", share)
        self._show()

    def time_left(self, seconds: float | None) -> None:
        """Shown with the next step."""
        self._view.seconds = seconds
        self._hand_over("time_left", seconds)

    def watch(self, safety: Callable[[], SyncStatus] | None) -> None:
        """Show from here on how safe the work is."""
        self._safety = safety or unsaved
        self._hand_over("watch", safety)

    def close(self) -> None:
        """Show how it ended, as far as is known: by the record, once that says so. What is shown stays."""
        view = self._view
        status = (view.record or {}).get("status", "running")
        if status == "running":
            status = "finished" if 0 < view.total_steps <= view.step else "ended"
        if status != view.status:
            view.status = status
            self._hand_over("close")
            self._show(always=True)

    def _hand_over(self, event: str, *details: Any) -> None:
        """To the plain lines, if it has come to that; else keep what they would have to repeat."""
        if self._plain is not None:
            getattr(self._plain, event)(*details)
        elif event in ("plan", "message", "validated"):
            self._unshown.append((event, details))

    def _show(self, important: bool = False, always: bool = False) -> None:
        """Bring the page up to date where the time has come."""
        now = self._clock()
        # a signal may bring a message in the middle of a drawing: the next one shows it
        if self._plain is None and not self._drawing and (always or self._due(now, important)):
            self._drawing = True
            self._updates.append(now)
            try:
                self._draw()
            except Exception as error:  # whatever it is, the training goes on
                self._fall_back(error)
            finally:
                self._drawing = False

    def _due(self, now: float, important: bool) -> bool:
        """Steps leave one of the two updates of a second to what comes without another step soon: a validation."""
        if important:
            return len(self._updates) < 2 or now - self._updates[0] >= 1
        pause = min(2.0, max(1.0, (now - self._begun) / 120))
        return not self._updates or now - self._updates[-1] >= pause

    def _draw(self) -> None:
        view, now = self._view, self._clock()
        share = view.record["validation"]["unknown_share"] if view.record else None
        while self._followed < len(view.rows):
            self._followed += 1
            view.spells = follow(view.spells, view.rows[: self._followed], share)
        drawn = (len(view.rows), len(view.losses.points))
        if drawn != self._plotted and any(drawn) and (view.ended or now >= self._next_curves):
            self._plotted = drawn
            view.curves = [
                base64.b64encode(image).decode() for image in curves_pngs(view.record, view.rows, view.losses)
            ]
            self._next_curves = now + min(10.0, 20 * (self._clock() - now))
        if view.ended:
            view.seconds = now - self._begun if view.losses.points else None
        view.safety = self._safety()
        self._put({"text/html": page(view), "text/plain": summary(view)})
        self._unshown.clear()

    def _put(self, data: dict[str, str]) -> None:
        """Show a page in the place of the one before: MIME type -> text."""
        if self._handle is None:
            from IPython.display import display

            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)

    def _fall_back(self, error: Exception) -> None:
        """Plain lines from here on, beginning with what the page does not show."""
        self._plain = TerminalProgress(sys.stdout)
        self._plain.message(f"warning: the live display failed ({type(error).__name__}: {error}); plain lines instead")
        if self._view.record is not None:
            unshown = [id(details[0]) for event, details in self._unshown if event == "validated"]
            self._plain.begin(self._view.record, [row for row in self._view.rows if id(row) not in unshown])
        if self._safety is not unsaved:
            self._plain.watch(self._safety)
        for event, details in self._unshown:
            getattr(self._plain, event)(*details)
