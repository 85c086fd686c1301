"""Whether the short measurement before a run picks well: whole steps in every way, and in the one that it picks."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from newllm_lib.config import ModelConfig, presets
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence.self_check import choose_engine
from newllm_lib.system.hardware import Machine, Precision, cpu_threads, native_formats
from newllm_lib.system.timing import timed
from newllm_lib.training.optimizers import make_optimizers
from newllm_lib.training.step import TrainingStep
from newllm_lib.tuning.execution import Way, Work, fastest_way

BATCHES = (32, 128, 512)
_CHOICES = 3
"""How often the choice is made; the median counts."""
_RECIPE = "quickstart"
"""Whose optimizer and rates the steps have."""


def measure_choice(
    rows_of: Callable[[int], Tensor], machine: Machine, rounds: int, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """For each batch the seconds of a whole step in every way, the ways chosen, and their share of the best speed.

    rows_of: ids (B, S) int64 of real text for a batch B. A way is (format, packed layout, threads); the medians are
    over `rounds` steps, all ways in turn after two rounds to warm up. Empty on a GPU, where nothing is chosen so.
    """
    if machine.kind != "cpu":
        return []
    return [_measure_batch(rows_of(batch), batch, machine, rounds, report) for batch in BATCHES]


def _measure_batch(
    ids: Tensor, batch: int, machine: Machine, rounds: int, report: Callable[[str], None]
) -> dict[str, Any]:
    model = ModelConfig(dropout=0.1)
    work, formats = Work(model, batch, ids.shape[1], "fused", machine), native_formats(machine)
    found = [fastest_way(work, work.ways(formats), remeasure=True) for _ in range(_CHOICES)]
    chosen = [choice.way for choice in found if choice]
    counts = [machine.threads // 2**power for power in range(machine.threads.bit_length())]
    ways = [way._replace(threads=threads) for threads in counts for way in work.ways(formats, any_threads=False)]
    report(f"batch {batch}: chosen {', '.join(map(str, chosen))}; a step in each of {len(ways)} ways")
    steps = {way: _step(model, ids, way, machine) for way in ways}
    taken: dict[Way, list[float]] = {way: [] for way in ways}
    for turn in range(-2, rounds):
        for way, step in steps.items():
            with cpu_threads(way.threads):
                seconds = timed(step, machine)
            if turn >= 0:
                taken[way].append(seconds)
    medians = {way: statistics.median(seconds) for way, seconds in taken.items()}
    best = min(medians, key=medians.get)
    return {
        "batch": batch,
        "ways": [{"way": str(way), "seconds": seconds} for way, seconds in medians.items()],
        "best": str(best),
        "chosen": [str(way) for way in chosen],
        "reasons": [choice.reason for choice in found if choice],
        "chosen_by_best": statistics.median(medians[best] / medians[way] for way in chosen),
    }


def _step(model: ModelConfig, ids: Tensor, way: Way, machine: Machine) -> Callable[[], Any]:
    """One optimizer step in a way."""
    torch.manual_seed(0)
    train, precision = presets.get(_RECIPE).train, Precision(way.precision, "measured")
    network = NewLLM(model).to(machine.device).train()
    optimizers = make_optimizers(network, train, train.lr or train.lr_base, way.precision)
    engine = choose_engine("fused", precision, machine.device, way.packed)
    step = TrainingStep(network, optimizers, precision, engine.run, clip=0.5)
    return lambda: step(ids)


def choice_text(rows: list[dict[str, Any]]) -> str:
    """Markdown: the table of `measure_choice`."""
    names = sorted({way["way"] for row in rows for way in row["ways"]})
    lines = ["| batch | " + " | ".join(f"{name}, ms" for name in names) + " | chosen | chosen / best |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for row in rows:
        seconds = {way["way"]: way["seconds"] for way in row["ways"]}
        cells = [f"{1000 * seconds[name]:,.0f}" for name in names]
        chosen = ", ".join(dict.fromkeys(row["chosen"]))
        lines.append(f"| {row['batch']} | " + " | ".join(cells) + f" | {chosen} | {row['chosen_by_best']:.3f} |")
    lines += [
        "",
        f"A whole step of the {_RECIPE} recipe in every format, layout and number of threads, in turn; the way that "
        f"the measurement before a run chose in {_CHOICES} tries, and its share of the best speed (the median of the "
        "tries).",
    ]
    return "\n".join(lines) + "\n"
