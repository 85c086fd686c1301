"""A stopwatch that waits for the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from newllm_lib.hardware import Machine


def timed(call: Callable[[], Any], machine: Machine) -> float:
    """Seconds of one call."""
    if machine.kind == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if machine.kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
