"""What this machine is and how fast it multiplies matrices, measured."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from newllm_lib.model.recurrence.packed_linear import Product
from newllm_lib.model.recurrence.self_check import choose_engine
from newllm_lib.system.hardware import (
    Machine,
    Precision,
    choose_precision,
    cpu_threads,
    default_batch_size,
    detect,
    environment,
)
from newllm_lib.system.memory import free_memory_bytes
from newllm_lib.system.timing import wait

_SECONDS = 0.5
"""How long each product rate is measured, about."""
_ENTRIES, _REPEATS = 5, 20
"""A median of so many entries at least, of so many products each at most: fewer where one takes long."""
_WIDTH = 512
"""Hidden width of the baseline model: the shape of most of its products."""


def probe(device: str = "auto", threads: int | None = None) -> dict[str, Any]:
    """The machine, the precision and engine that `auto` takes and why, and the product rate of each format.

    A rate is that of (batch x 512) by (512 x 512) products, as the recurrence makes them, in FLOP a second.
    """
    machine = detect(device, threads)
    chosen = choose_precision("auto", machine)
    engine = choose_engine("auto", chosen, machine.device)
    batch = default_batch_size(machine)
    found = environment(machine)
    return {
        "device": machine.device,
        "device_name": machine.name,
        "threads": machine.threads,
        "memory_bytes": machine.memory_bytes,
        "free_memory_bytes": free_memory_bytes(machine),
        "precision": chosen.name,
        "precision_reason": chosen.reason,
        "engine": engine.name,
        "engine_reason": engine.reason,
        "batch_size": batch,
        "product_rate": {name: product_rate(machine, name, batch) for name in _formats(machine)},
        "versions": found["versions"],
    }


def _formats(machine: Machine) -> list[str]:
    """FP32 and those 16-bit formats that the machine runs natively."""
    native = [name for name in ("bf16", "fp16") if not choose_precision(name, machine).substituted]
    return ["fp32", *native]


def product_rate(machine: Machine, precision: str, rows: int) -> float:
    """FLOP a second of the median (rows x 512) by (512 x 512) product."""
    kind = {"dtype": Precision(precision, "measured").dtype, "device": machine.device}
    generator = torch.Generator(machine.device).manual_seed(0)
    weight, x = (torch.randn(count, _WIDTH, generator=generator, **kind) for count in (_WIDTH, rows))

    def seconds(repeats: int) -> float:
        wait(machine)
        started = time.perf_counter()
        for _ in range(repeats):
            product(x)
        wait(machine)
        return time.perf_counter() - started

    with cpu_threads(machine.threads), torch.no_grad():
        product = Product(weight, rows=rows)
        seconds(1)  # pays for kernels and memory
        fitting = _SECONDS / _ENTRIES / max(seconds(1), 1e-9)
        repeats = max(1, min(_REPEATS, int(fitting)))
        taken: list[float] = []
        while sum(taken) < _SECONDS or len(taken) < _ENTRIES:
            taken.append(seconds(repeats))
    return 2 * rows * _WIDTH * _WIDTH * repeats / statistics.median(taken)


def probe_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, how much and why), ready to print."""
    free = found["free_memory_bytes"]
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in found["product_rate"].items())
    return [
        ("device", f"{found['device_name']} ({found['device']}, {found['threads']} threads)"),
        ("memory", f"{found['memory_bytes'] / 2**30:.1f} GiB" + (f", {free / 2**30:.1f} free" if free else "")),
        ("precision", f"{found['precision']}: {found['precision_reason']}"),
        ("engine", f"{found['engine']}: {found['engine_reason']}"),
        ("batch", f"{found['batch_size']} sequences where the preset leaves it open"),
        ("products", f"{rates} (batch {found['batch_size']}, width {_WIDTH})"),
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
    ]
