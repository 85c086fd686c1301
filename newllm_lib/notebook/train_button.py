"""The button of a panel that trains: the same call as in the notebook's next cell, shown below the button."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from newllm_lib.config import RunConfig
from newllm_lib.errors import NewLLMError
from newllm_lib.escaping import html_text
from newllm_lib.notebook.field_widgets import PILL, RED
from newllm_lib.reporting.notebook_progress import NotebookProgress
from newllm_lib.runs.api import train
from newllm_lib.runs.run import Run

NO_INTERRUPT = (
    "In this notebook an interrupt cannot stop a training run that this button starts. Run the next cell instead: it "
    "trains with these settings."
)


class TrainButton:
    """Trains what a panel describes, in the kernel's main thread, where an interrupt stops and saves it.

    Some kernels hear clicks in other threads, also while a cell runs; they are passed on to the main one. A click that
    was made while a run trained is dropped: it was meant for that run.
    """

    def __init__(self, config: Callable[[], RunConfig], ended: Callable[[], None]):
        """config: of the run to train, ConfigError where it cannot be; ended: called when a training has ended."""
        import ipywidgets

        self._config, self._ended = config, ended
        self.run: Run | None = None
        """The last run that was trained by the button."""
        self._busy = False
        self._until: datetime | None = None  # by the page's clock, when the last training ended
        with contextlib.suppress(RuntimeError):  # outside of a kernel there is no loop
            self._loop: asyncio.AbstractEventLoop | None = None
            self._loop = asyncio.get_running_loop()
        self.button = ipywidgets.Button(description="Train", button_style="primary", layout={"width": "auto"})
        self.button.on_click(lambda button: self._clicked())
        self.page = ipywidgets.HTML()
        """Where the run is shown."""

    def _clicked(self) -> None:
        clicked = _click_time()
        if threading.current_thread() is threading.main_thread():
            self._start(clicked)
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._start, clicked)
        elif not self._busy:
            self.page.value = alert(NO_INTERRUPT)

    def _start(self, clicked: datetime | None) -> None:
        """Train, in the main thread, unless the click is one of those to drop; clicked: by the page's clock."""
        if self._busy or (clicked and self._until and clicked <= self._until):
            return
        self._busy, self.button.disabled, started = True, True, time.monotonic()
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a kernel sets for cells only
        try:
            self._train()
        finally:
            signal.signal(signal.SIGINT, before)
            self._busy, self.button.disabled = False, False
            if clicked:
                self._until = clicked + timedelta(seconds=time.monotonic() - started)
            self._ended()

    def _train(self) -> None:
        try:
            self.run = train(self._config(), progress=PageProgress(self.page))
        except NewLLMError as error:
            self.page.value += alert(str(error))
        except KeyboardInterrupt:
            self.page.value += alert("interrupted")


class PageProgress(NotebookProgress):
    """The live page of a run in an HTML widget: a button's callback has no cell to show it in."""

    def __init__(self, page: Any):
        super().__init__()
        self._page = page

    def _put(self, data: dict[str, str]) -> None:
        self._page.value = data["text/html"]


def _click_time() -> datetime | None:
    """When the click that is handled now was made, by the clock of the page; None where the message does not tell."""
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    header = kernel.get_parent("shell").get("header", {}) if kernel else {}
    date = header.get("date")
    return date if isinstance(date, datetime) else None


def alert(text: str) -> str:
    """A sentence in red, as HTML."""
    look = f"{PILL};background:{RED};padding:6px 10px;margin:4px 0;font-size:13px;line-height:1.4;white-space:pre-wrap"
    return f'<div role="alert" style="{look}">{html_text(text)}</div>'
