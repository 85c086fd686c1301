"""Which batch to train with: sizes are really run, training and evaluation, until the memory, the data, the speed or
the time for the search ends it. What is chosen is always one of those that ran."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from newllm_lib.config import RunConfig, presets
from newllm_lib.config.fields import build
from newllm_lib.errors import ConfigError
from newllm_lib.system.files import file_errors
from newllm_lib.system.memory import GPUMemory, ProcessMemory, memory_of
from newllm_lib.training.estimates import memory_estimate_bytes
from newllm_lib.training.setup import Setup, largest_batch, make_setup, with_batch
from newllm_lib.tuning.cache import Store, digest, step_facts
from newllm_lib.tuning.execution import settle_execution
from newllm_lib.tuning.trial import ABOVE_LIMIT, RAN, Try, expected_seconds, run_try, warm_up

MEMORY_SHARE = 0.9
"""Of the usable memory that a batch may take: the rest is for what a probe cannot see."""
NEAR_BEST = 0.95
"""Share of the best speed that `fast` is content with."""
SEARCH_SECONDS = 60.0
_START = 8
"""Sequences of the first try."""
_FINENESS = 16
"""`fill` is searched to a sixteenth of the batch, but not finer than _GRAIN."""
_GRAIN = 8
_ESTIMATE_MARGIN = 1.25
"""The estimate of a step's memory is up to a quarter too high."""
_MORE_MEMORY = 1.1
"""A batch that memory had ended is sought anew when so many times the memory is usable."""


@dataclass(frozen=True, kw_only=True)
class BatchChoice:
    """A batch that was found, with the tries that led to it."""

    batch_size: int
    micro_batch_size: int | None
    """Sequences at a time; None = the whole batch."""
    policy: str
    tokens_per_second: float
    peak_bytes: int
    usable_bytes: int
    """Memory that could be used when the search began."""
    memory_share: float
    """Largest share of it that was allowed."""
    ended_by: str
    """What ended the search: memory, data, speed or time; recipe for policy recipe."""
    reason: str
    tries: tuple[Try, ...]
    cached: bool = False

    @property
    def peak_share(self) -> float:
        """Share of the usable memory that the batch takes."""
        return self.peak_bytes / self.usable_bytes

    def lines(self) -> list[str]:
        """For the reader."""
        pieces = f" in pieces of {self.micro_batch_size}" if self.micro_batch_size else ""
        peak, usable = self.peak_bytes / 2**30, self.usable_bytes / 2**30
        return [
            f"batch {self.batch_size}{pieces} ({self.policy}): {self.reason}",
            f"  {self.tokens_per_second:,.0f} tokens/s; {peak:.2f} of the {usable:.1f} GiB that can be used "
            f"({self.peak_share:.1%}; up to {self.memory_share:.0%} allowed)",
        ]


@file_errors()
def find_batch(
    config: str | RunConfig = "auto",
    *,
    policy: str = "fast",
    memory_share: float = MEMORY_SHARE,
    seconds: float = SEARCH_SECONDS,
    report: Callable[[str], None] = print,
    **overrides: Any,
) -> BatchChoice:
    """The batch for a preset's name or a configuration, by real steps of a throw-away copy on this machine.

    policy: fill = the largest that fits `memory_share` of the usable memory; fast = the smallest within 5 % of the
    best speed; recipe = the recipe's own batch, in the largest pieces that fit. About `seconds` long at most (recipe
    takes what it needs). report: what is told of each try. ConfigError for bad settings, or where nothing fits.
    """
    config = presets.get(config) if isinstance(config, str) else config
    setup = settle_execution(make_setup(config.replace(**overrides | {"batch_policy": policy})), {})
    return search_batch(setup, policy, memory_share, report, seconds=seconds)


def search_batch(
    setup: Setup,
    policy: str,
    memory_share: float = MEMORY_SHARE,
    report: Callable[[str], None] = print,
    *,
    seconds: float = SEARCH_SECONDS,
    memory: GPUMemory | ProcessMemory | None = None,
) -> BatchChoice:
    """As `find_batch`, for a setup whose every other decision is made.

    What an earlier search of the same configuration found on this machine is returned at once, as long as it still
    fits. memory: how it is measured (None = as the device needs it).
    """
    train = setup.config.train
    if not 0 < memory_share <= 1:
        raise ConfigError(f"memory_share = {memory_share!r}: must be a number above 0 to 1")
    if policy != "recipe" and train.micro_batch_size:
        raise ConfigError(
            f"micro_batch_size = {train.micro_batch_size}: must be none with batch_policy {policy}, which "
            "finds a batch that fits in one piece"
        )
    memory = memory or memory_of(setup.machine)
    cap = (
        train.batch_size if policy == "recipe" else largest_batch(setup.prepared.split("train", lanes=1), setup.config)
    )
    store, key = Store(setup.machine), _key(setup, policy, memory_share, seconds, cap)
    found = _kept(store.choice(key), memory.usable_bytes * memory_share, memory.usable_bytes)
    if found:
        report(f"batch {found.batch_size}: found earlier on this machine for this configuration ({store.path})")
        return found
    search = _Search(setup, memory, memory_share, report, seconds, store)
    choice = search.pieces(cap) if policy == "recipe" else search.size(policy, cap)
    store.keep_choice(key, dataclasses.asdict(choice))
    return choice


def settle_batch(setup: Setup, decided: dict[str, Any], report: Callable[[str], None]) -> Setup:
    """The setup with the batch that its policy finds, or with its own in pieces that memory has room for.

    What `decided` (of an earlier part of the run) or the configuration says stays. A recipe's pieces come from the
    estimate of a plan; training itself makes them smaller where that was wrong.
    """
    train, limit = setup.config.train, MEMORY_SHARE * memory_of(setup.machine).usable_bytes
    if train.batch_policy != "recipe" and "batch_size" in decided:
        limit *= (
            _ESTIMATE_MARGIN  # it fitted where it was found, whatever the estimate says; a smaller machine is not that
        )
    elif train.batch_policy != "recipe":
        choice = search_batch(setup, train.batch_policy, report=report)
        own, steps = setup.requested.train.batch_size, setup.requested.train.max_steps
        instead = read = ""
        if own not in (None, choice.batch_size):
            instead = f" (the recipe has {own})"
            if steps:
                read = (
                    f"; max_steps = {steps} counts steps, so {choice.batch_size / own:.3g} times as much text is read"
                )
        return with_batch(setup, choice.batch_size, reason=f"{choice.policy}{instead}: {choice.reason}{read}")
    if train.micro_batch_size or decided.get("micro_batch_size"):
        return setup
    whole, micro = memory_estimate_bytes(setup), None
    while micro != 1 and memory_estimate_bytes(with_batch(setup, train.batch_size, micro)) > limit:
        micro = -(-(micro or train.batch_size) // 2)
    why = f"all at once would take about {whole / 2**30:.1f} GiB, and there is room for {limit / 2**30:.1f}"
    return with_batch(setup, train.batch_size, micro, why) if micro else setup


def _key(setup: Setup, policy: str, memory_share: float, seconds: float, cap: int) -> str:
    held = setup.validation_split
    rows = held.ids.shape[1] if held.carries_context else min(len(held.ids), setup.config.train.eval_batch_size)
    asked = {"policy": policy, "memory_share": memory_share, "seconds": seconds, "cap": cap, "evaluated": rows}
    if policy == "recipe":
        asked["pieces"] = setup.config.train.micro_batch_size
    return digest(step_facts(setup) | asked)


def _kept(stored: dict[str, Any] | None, limit_bytes: float, usable_bytes: int) -> BatchChoice | None:
    """A stored choice, if it is whole, fits what is usable now, and would not be larger now."""
    try:
        tries = tuple(build(Try, one) for one in stored["tries"])
        choice = build(BatchChoice, stored | {"tries": tries, "cached": True})
        if choice.peak_bytes > limit_bytes:
            return None
        grown = choice.ended_by == "memory" and usable_bytes > _MORE_MEMORY * choice.usable_bytes
    except (TypeError, ValueError, KeyError):
        return None
    return None if grown else choice


class _Search:
    """The tries of one search."""

    def __init__(self, setup, memory, memory_share: float, report: Callable[[str], None], seconds: float, store: Store):
        self.setup, self.memory, self.share, self.report, self.store = setup, memory, memory_share, report, store
        self.limit = memory_share * memory.usable_bytes
        self.ends, self.seconds = time.monotonic() + seconds, seconds
        self.tries: list[Try] = []
        self.warm = False

    def size(self, policy: str, cap: int) -> BatchChoice:
        """The batch for `fill` or `fast`, of at most `cap` sequences."""
        ended_by, largest, too_large = self._double(cap, until_slow=policy == "fast")
        if policy == "fill" and ended_by == "memory":
            ended_by = self._refine(largest, too_large)
        chosen = fastest_small(self.tries) if policy == "fast" else largest_that_ran(self.tries)
        return self._choice(chosen, policy, ended_by, self._reason(chosen, policy, ended_by))

    def _double(self, cap: int, until_slow: bool) -> tuple[str, int, int]:
        """Doubled sizes up to what ends it: that, the largest that ran, and one above it that did not (or the cap)."""
        size = min(_START, cap)
        while self._attempt(size).outcome != RAN:
            if size == 1:
                raise self._nothing_fits()
            size = max(1, size // 2)
        if self.tries[:-1]:
            return "memory", size, 2 * size
        while size < cap:
            following = min(2 * size, cap)
            if until_slow and has_stalled(self.tries):
                return "speed", size, following
            if not self._in_time(following):
                return "time", size, following
            if self._attempt(following).outcome != RAN:
                return "memory", size, following
            size = following
        return "data", size, cap

    def _refine(self, fits: int, too_large: int) -> str:
        """Halve what lies between a size that fits and one that does not; what ended it."""
        grain = max(_GRAIN, (1 << fits.bit_length() - 1) // _FINENESS)
        while too_large - fits > grain:
            middle = (fits + too_large) // 2 // grain * grain
            middle = middle if middle > fits else fits + grain
            if not self._in_time(middle):
                return "time"
            if self._attempt(middle).outcome == RAN:
                fits = middle
            else:
                too_large = middle
        return "memory"

    def pieces(self, batch: int) -> BatchChoice:
        """The largest pieces of a batch that fit: all of it, a half, a quarter ..."""
        micro = self.setup.config.train.micro_batch_size
        while (tried := self._attempt(batch, micro)).outcome != RAN:
            if micro == 1 or batch == 1:
                raise self._nothing_fits()
            micro = -(-(micro or batch) // 2)
        limit = f"{self.share:.0%} of the {self.memory.usable_bytes / 2**30:.1f} GiB that can be used"
        fits = f"fits {limit}" if micro is None else f"in the largest pieces that fit {limit}, gradients accumulated"
        return self._choice(tried, "recipe", "recipe", f"the recipe's batch {fits}")

    def _attempt(self, batch: int, micro: int | None = None) -> Try:
        setup = with_batch(self.setup, batch, micro)
        expected = self._expected_bytes(setup) if self.memory.overcommits else 0
        if expected > self.limit:  # such a system would kill this process instead of refusing
            reason = f"not run: about {expected / 2**30:.1f} GiB expected, {self.limit / 2**30:.1f} allowed"
            tried = Try(batch_size=batch, micro_batch_size=micro, outcome=ABOVE_LIMIT, reason=reason)
        else:
            if not self.warm:  # what a process pays only once would be taken for the first try's time and memory
                warm_up(setup)
                self.memory.clear()
                self.warm = True
            tried = run_try(setup, self.memory, self.limit)
        if tried.tokens_per_second:
            self.store.keep_speed(setup, tried.tokens_per_second)
        self.tries.append(tried)
        self.report(tried.line())
        return tried

    def _expected_bytes(self, setup: Setup) -> float:
        """From the two largest tries that ran, along a line; before there are two, from the shapes."""
        train = setup.config.train
        ran = sorted((t.batch_size, t.peak_bytes) for t in self.tries if t.peak_bytes is not None)[-2:]
        if len(ran) < 2 or train.micro_batch_size:
            return memory_estimate_bytes(setup)
        (small, less), (large, more) = ran
        return more + max(0, more - less) / (large - small) * (train.batch_size - large)

    def _in_time(self, batch: int) -> bool:
        """Whether a try would end in time, going by the largest so far."""
        return time.monotonic() + expected_seconds(largest_that_ran(self.tries), batch) <= self.ends

    def _nothing_fits(self) -> ConfigError:
        last = self.tries[-1]
        return ConfigError(
            f"not even one sequence at a time fits {self.share:.0%} of the {self.memory.usable_bytes / 2**30:.1f} GiB "
            f"that can be used ({last.reason or last.line()}): a smaller model, a shorter sequence_length or a smaller "
            "eval_batch_size may"
        )

    def _reason(self, chosen: Try, policy: str, ended_by: str) -> str:
        ran = [t for t in self.tries if t.outcome == RAN]
        largest = max(t.batch_size for t in ran)
        ended = {
            "memory": f"larger ones take more than {self.share:.0%} of the memory",
            "data": "all that the data have" if policy == "fill" else "up to all that the data have",
            "speed": f"tried up to {largest}: no faster over two doublings",
            "time": f"tried up to {largest}: the {self.seconds:.0f} s for the search, not the memory, ended it",
        }[ended_by]
        if policy == "fill":
            return f"the largest that was tried and fits; {ended}"
        best = max(ran, key=lambda t: t.tokens_per_second)
        return (
            f"the smallest within {1 - NEAR_BEST:.0%} of the best speed, {best.tokens_per_second:,.0f} tokens/s at "
            f"batch {best.batch_size}; {ended}"
        )

    def _choice(self, chosen: Try, policy: str, ended_by: str, reason: str) -> BatchChoice:
        return BatchChoice(
            batch_size=chosen.batch_size,
            micro_batch_size=chosen.micro_batch_size,
            policy=policy,
            tokens_per_second=chosen.tokens_per_second,
            peak_bytes=chosen.peak_bytes,
            usable_bytes=self.memory.usable_bytes,
            memory_share=self.share,
            ended_by=ended_by,
            reason=reason,
            tries=tuple(self.tries),
        )


def fastest_small(tries: Sequence[Try]) -> Try:
    """The smallest batch that ran whose speed is within 5 % of the best of those that ran."""
    ran = [one for one in tries if one.outcome == RAN]
    enough = NEAR_BEST * max(one.tokens_per_second for one in ran)
    return min((one for one in ran if one.tokens_per_second >= enough), key=lambda one: one.batch_size)


def largest_that_ran(tries: Sequence[Try]) -> Try:
    """The largest batch that ran."""
    return max((one for one in tries if one.outcome == RAN), key=lambda one: one.batch_size)


def has_stalled(tries: Sequence[Try]) -> bool:
    """Whether the last two sizes that ran are not 5 % faster than the best before them."""
    speeds = [one.tokens_per_second for one in tries if one.outcome == RAN]
    return len(speeds) > 2 and max(speeds[-2:]) * NEAR_BEST < max(speeds[:-2])
