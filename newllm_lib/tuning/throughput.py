"""How fast a run will train: known from tries of its very configuration, or scaled from others measured here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from newllm_lib.system.memory import is_out_of_memory, memory_of
from newllm_lib.training.estimates import Speed, memory_estimate_bytes
from newllm_lib.training.setup import Setup, with_batch
from newllm_lib.tuning.cache import Store, step_facts
from newllm_lib.tuning.trial import time_steps, time_validation

_CPU_ROWS = (32, 128)
"""Sequences of the short measurements on a CPU: two, for the time of a step is a line over them."""
_LONG_SECONDS = 0.3
"""A step of the first so long leaves the second out."""
_MOST_GROWTH = 2.0
"""Beyond the largest batch measured, the speed is believed to rise at most so many times."""
_MOST_WORK_APART = 4.0
"""Times that a token's work may differ from that of the model measured: in a small model, what is not work decides."""


def estimate_speed(setup: Setup, measure: bool = True, anew: bool = False) -> Speed | None:
    """Tokens a second of a run on this machine, and how that is known.

    measure: whether a model of which nothing is known yet may be measured for some seconds (it is then remembered).
    Without, the answer takes milliseconds, and is None where nothing comparable was measured yet. anew: measure in any
    case; what was known of the sizes that are measured is replaced.
    """
    train, facts, store = setup.config.train, step_facts(setup), Store(setup.machine)
    rows = min(train.micro_batch_size or train.batch_size, train.batch_size)
    known = [entry for entry in store.speeds() if entry["facts"].keys() == facts.keys()]
    own = [entry for entry in known if entry["facts"] == facts]
    if anew or (measure and not own):
        _measure(setup, store, rows)
        own = [entry for entry in store.speeds() if entry["facts"] == facts]
    validation = _validation_seconds(setup, own)
    for entry in own:
        if (entry["batch_size"], entry["rows"]) == (train.batch_size, rows):
            return Speed(entry["tokens_per_second"], "measured here for this very configuration", validation)
    if own:
        sizes = " and ".join(str(size) for size in sorted({entry["rows"] for entry in own})[:4])
        return Speed(at_rows(own, rows), f"scaled from batch {sizes} measured here", validation)
    alike = [entry for entry in known if all(entry["facts"][name] == facts[name] for name in ("precision", "engine"))]
    if not alike:
        return None
    nearest = min(alike, key=lambda entry: _distance(entry["facts"], facts))["facts"]
    work = nearest["matrix_parameters"] / facts["matrix_parameters"]
    if not 1 / _MOST_WORK_APART <= work <= _MOST_WORK_APART:
        return None
    there = [entry for entry in alike if entry["facts"] == nearest]
    validation = _validation_seconds(setup, there, work)
    basis = "scaled by the work for a token from another model measured here"
    return Speed(at_rows(there, rows) * work, basis, validation)


def _validation_seconds(setup: Setup, entries: list[dict[str, Any]], work: float = 1.0) -> float | None:
    """Of one validation and the saving after it, by the newest entry that knows; work: as for a model's speed."""
    for entry in reversed(entries):
        if "validation_tokens_per_second" in entry:
            speed = entry["validation_tokens_per_second"] * work
            return setup.validation_split.num_tokens / speed + entry["saving_seconds"]
    return None


def at_rows(entries: list[dict[str, Any]], rows: int) -> float:
    """Tokens a second with `rows` sequences at a time, from speeds of the same model at other sizes.

    The time of a step is taken as a line over the rows: a part that each step costs, and a part for each row.
    """
    speeds = {entry["rows"]: entry["tokens_per_second"] for entry in entries}
    near = sorted(speeds, key=lambda size: abs(math.log(size / rows)))[:2]
    if near[0] == rows or len(near) == 1:
        return speeds[near[0]]
    low, high = sorted(near)
    times = {size: size / speeds[size] for size in near}  # of a step, in the time of a row's tokens
    slope = max(0.0, (times[high] - times[low]) / (high - low))
    each_step = times[near[0]] - slope * near[0]
    if each_step < 0:  # measured too unevenly for a line
        return speeds[near[0]]
    speed = rows / (each_step + slope * rows)
    return min(speed, _MOST_GROWTH * speeds[high]) if rows > high else speed


def _distance(there: dict[str, Any], here: dict[str, Any]) -> float:
    """How little one model says about another: by the work for a token first, then by what else differs."""
    others = sum(there[name] != here[name] for name in here)
    return abs(math.log2(there["matrix_parameters"] / here["matrix_parameters"])) + 0.1 * others


def _measure(setup: Setup, store: Store, rows: int) -> None:
    """A few steps of one or two sizes, remembered; smaller ones where memory runs out, none where none fits."""
    validation = _unless_out_of_memory(time_validation, setup)
    sizes = [rows] if setup.machine.kind == "cuda" else sorted({min(rows, size) for size in _CPU_ROWS})
    memory = memory_of(setup.machine)
    for most in sizes:
        size, taken = most, None
        while taken is None and size:
            small = with_batch(setup, size)
            fits = not memory.overcommits or memory_estimate_bytes(small) < memory.usable_bytes
            taken = _unless_out_of_memory(time_steps, small) if fits else None
            memory.clear()
            size //= 2
        if taken is None:
            return
        store.keep_speed(small, taken[0], validation)
        if taken[1] > _LONG_SECONDS:
            return


def _unless_out_of_memory(measure: Callable[[Setup], tuple[float, float]], setup: Setup) -> tuple[float, float] | None:
    """What was measured; None where memory runs out."""
    try:
        return measure(setup)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None
