"""Where this process runs: a notebook's kernel, Colab, Kaggle; and warnings on standard error."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from newllm_lib.escaping import say

KAGGLE_OUTPUT = Path("/kaggle/working")


def in_kernel() -> bool:
    """Whether this process is a notebook's kernel; False in a script and in IPython in a terminal."""
    ipython = sys.modules.get("IPython")  # a kernel has loaded it long before
    return getattr(ipython.get_ipython() if ipython else None, "kernel", None) is not None


def warn_on_stderr(text: str) -> None:
    """A warning where no run is shown that could tell it."""
    say(f"warning: {text}", sys.stderr)


def in_colab() -> bool:
    """Whether this is a Colab runtime."""
    try:
        import google.colab  # noqa: F401
    except ImportError:
        return False
    return True


def in_kaggle() -> bool:
    """Whether this is a Kaggle notebook."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ
