"""What this machine is and how fast it multiplies matrices, measured."""

from __future__ import annotations

from typing import Any

from newllm_lib.config import DataConfig, ModelConfig
from newllm_lib.model.recurrence.self_check import choose_engine
from newllm_lib.reporting.formatting import counted
from newllm_lib.system.hardware import (
    Machine,
    Precision,
    choose_precision,
    default_batch_size,
    detect,
    environment,
    native_formats,
)
from newllm_lib.system.memory import free_memory_bytes
from newllm_lib.tuning.execution import Work, fastest_way
from newllm_lib.tuning.products import WIDTH, product_rate


def probe(device: str = "auto", threads: int | None = None) -> dict[str, Any]:
    """The machine, the precision and engine that `auto` takes and why, and the product rate of each format.

    A rate is that of (batch x 512) by (512 x 512) products, as the recurrence makes them, in FLOP a second.
    """
    machine = detect(device, threads)
    engine = choose_engine("auto", choose_precision("auto", machine), machine.device)
    batch, formats = default_batch_size(machine), native_formats(machine)
    chosen, used = _execution(machine, engine.name, batch, formats, threads)
    found = environment(machine)
    return {
        "device": machine.device,
        "device_name": machine.name,
        "threads": used,
        "memory_bytes": machine.memory_bytes,
        "free_memory_bytes": free_memory_bytes(machine),
        "precision": chosen.name,
        "precision_reason": chosen.reason,
        "engine": engine.name,
        "engine_reason": engine.reason,
        "batch_size": batch,
        "product_rate": {name: product_rate(machine, name, batch) for name in sorted(formats)},
        "versions": found["versions"],
    }


def _execution(
    machine: Machine, engine: str, batch: int, formats: list[str], threads: int | None
) -> tuple[Precision, int]:
    """The format and threads in which the published model would train, with the reason."""
    if machine.kind == "cpu":
        work = Work(ModelConfig(), batch, DataConfig().sequence_length, engine, machine)
        if found := fastest_way(work, work.ways(formats, any_threads=threads is None)):
            return Precision(found.way.precision, found.reason), found.way.threads
    return choose_precision("auto", machine), machine.threads


def probe_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, how much and why), ready to print."""
    free = found["free_memory_bytes"]
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in found["product_rate"].items())
    return [
        ("device", f"{found['device_name']} ({found['device']}, {counted(found['threads'], 'thread')})"),
        ("memory", f"{found['memory_bytes'] / 2**30:.1f} GiB" + (f", {free / 2**30:.1f} free" if free else "")),
        ("precision", f"{found['precision']}: {found['precision_reason']}"),
        ("engine", f"{found['engine']}: {found['engine_reason']}"),
        ("batch", f"{counted(found['batch_size'], 'sequence')} where the preset leaves it open"),
        ("products", f"{rates} (batch {found['batch_size']}, width {WIDTH})"),
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
    ]
