"""Stopwatches that wait for the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from newllm_lib.system.hardware import Machine


def timed(call: Callable[[], Any], machine: Machine) -> float:
    """Seconds of one call."""
    wait(machine)
    started = time.perf_counter()
    call()
    wait(machine)
    return time.perf_counter() - started


def wait(machine: Machine) -> None:
    """Until a GPU has done what it was given."""
    if machine.kind == "cuda":
        torch.cuda.synchronize(machine.device)
