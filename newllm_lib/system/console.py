"""Where this process runs: a notebook's kernel, Colab, Kaggle; and warnings on standard error."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO

from newllm_lib.escaping import say, write_if_possible

KAGGLE_OUTPUT = Path("/kaggle/working")


def in_kernel() -> bool:
    """Whether this process is a notebook's kernel; False in a script and in IPython in a terminal."""
    ipython = sys.modules.get("IPython")  # a kernel has loaded it long before
    return getattr(ipython.get_ipython() if ipython else None, "kernel", None) is not None


def warn_on_stderr(text: str) -> None:
    """A warning where no run is shown that could tell it."""
    say(f"warning: {text}", err=True)


class UnfailingStream:
    """A text stream to which writing never fails; see `say`. None stands for one that is closed."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    @property
    def encoding(self) -> str:
        """Of the stream; ASCII where it has none."""
        return getattr(self._stream, "encoding", None) or "ascii"

    def write(self, text: str) -> int:
        """Write all of it, or lose it."""
        write_if_possible(text, self._stream)
        return len(text)

    def flush(self) -> None:
        """Nothing: `write` does."""

    def isatty(self) -> bool:
        """Whether a terminal shows it."""
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:  # closed since
            return False

    def fileno(self) -> int:
        """Of the stream; OSError where it has none."""
        if self._stream is None:
            raise OSError("no such stream")
        return self._stream.fileno()


def occupy_standard_streams() -> None:
    """Open the null device in the place of standard streams that are closed.

    Else the next file that is opened takes such a place, and what libraries print as errors is written into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def in_colab() -> bool:
    """Whether this is a Colab runtime."""
    try:
        import google.colab  # noqa: F401
    except ImportError:
        return False
    return True


def notebook_gpu() -> str:
    """The GPU that the notebook's file asks Colab for, such as T4; "" elsewhere, and where it asks for none.

    A kernel cannot read its notebook's metadata: the set-up cell, into which `notebooks/tidy.py` writes them, hands
    this on. Who chooses another GPU in Colab's menu is told that it is another.
    """
    return os.environ.get("NEWLLM_NOTEBOOK_GPU", "") if in_colab() else ""


def in_kaggle() -> bool:
    """Whether this is a Kaggle notebook."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ
