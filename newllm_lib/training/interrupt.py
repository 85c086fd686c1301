"""Ctrl-C and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from newllm_lib.reporting.progress import STOPPING, Progress
from newllm_lib.system.console import in_kernel


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a flag, the second into KeyboardInterrupt."""

    def __init__(self, progress: Progress):
        self.requested = False
        self._progress = progress

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handlers of this object inside, those from before restored after; nothing outside the main thread."""
        self.requested = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        again = "interrupt" if in_kernel() else "press Ctrl-C"  # a notebook has a menu for it
        self._progress.message(f"{STOPPING}; {again} again to stop at once")
