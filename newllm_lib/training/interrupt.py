"""Ctrl-C, SIGTERM and SIGHUP as a request to stop after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from newllm_lib.reporting.progress import STOPPING, Progress
from newllm_lib.system.console import in_kernel


def _heard() -> list[signal.Signals]:
    """The signals that end a training; a SIGHUP that is ignored stays so, as nohup wants it."""
    heard = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        heard.append(hangup)
    return heard


class StopRequest:
    """Turns Ctrl-C, SIGTERM and SIGHUP (a closed terminal) into a flag, a second Ctrl-C into KeyboardInterrupt."""

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
        before = {number: signal.signal(number, self._handle) for number in _heard()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # a closed terminal may send two, of the system and of the shell
        self.requested = True
        again = "interrupt" if in_kernel() else "press Ctrl-C"  # a notebook has a menu for it
        self._progress.message(f"{STOPPING}; {again} again to stop at once")
