"""How fast this machine multiplies matrices in a number format, measured."""

from __future__ import annotations

import statistics
import time
from functools import lru_cache

import torch

from newllm_lib.model.recurrence.packed_linear import Product
from newllm_lib.system.cuda_graph import recorded
from newllm_lib.system.hardware import Machine, Precision, cpu_threads
from newllm_lib.system.timing import wait

_SECONDS = 0.5
"""How long each product rate is measured, about."""
_ENTRIES, _REPEATS = 5, 20
"""A median of so many entries at least, of so many products each at most: fewer where one takes long."""
_USUAL_ROWS, _BRIEF_SECONDS = {"cpu": 128, "cuda": 2048}, 0.05
WIDTH = 512
"""Hidden width of the baseline model: the shape of most of its products."""


@lru_cache(maxsize=64)
def usual_rate(machine: Machine, precision: str) -> float:
    """`product_rate` at a usual batch, measured once a process, in a twentieth of a second: what goes with a speed."""
    return product_rate(machine, precision, _USUAL_ROWS[machine.kind], _BRIEF_SECONDS)


def product_rate(machine: Machine, precision: str, rows: int, budget: float | None = None) -> float:
    """FLOP a second of the median (rows x 512) by (512 x 512) product; budget: about how long that takes (s).

    On a GPU the products are replayed as a graph: launched one by one, it is the launches that would be measured.
    """
    budget = budget or _SECONDS
    kind = {"dtype": Precision(precision, "measured").dtype, "device": machine.device}
    generator = torch.Generator(machine.device).manual_seed(0)
    weight, x = (torch.randn(count, WIDTH, generator=generator, **kind) for count in (WIDTH, rows))

    def seconds(repeats: int) -> float:
        wait(machine)
        started = time.perf_counter()
        for _ in range(repeats):
            multiply()
        wait(machine)
        return time.perf_counter() - started

    with cpu_threads(machine.threads), torch.no_grad():
        product = Product(weight, rows=rows)
        products, multiply = 1, lambda: product(x)
        if machine.kind == "cuda":
            products = _REPEATS
            multiply = recorded(lambda: [product(x) for _ in range(_REPEATS)], machine.device)
        seconds(1)  # pays for kernels and memory
        fitting = budget / _ENTRIES / max(seconds(1), 1e-9)
        repeats = max(1, min(_REPEATS, int(fitting)))
        taken: list[float] = []
        while sum(taken) < budget or len(taken) < _ENTRIES:
            taken.append(seconds(repeats))
    return 2 * rows * WIDTH * WIDTH * products * repeats / statistics.median(taken)
