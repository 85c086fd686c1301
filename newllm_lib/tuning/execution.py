"""How the steps of a run execute on this CPU: number format, threads and layout of the weights, by a short race.

Flags and product rates mislead: a processor may have bfloat16 products that are slower than its FP32 ones, and formats
whose products tie may differ by half in a whole step. So what is timed is a piece of a real step: the run's engine,
widths and batch, forward and backward, over two time steps and over ten. The eight between them are what a time step
costs, the rest is what a step costs once (casting and packing the weights): together the time of a whole step, by a
line. Eight time steps alone would count the second part eight times as heavily as a step of the published length does.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from newllm_lib.config import SPECIAL_TOKENS, ModelConfig
from newllm_lib.model.loss import token_losses
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import Dropout
from newllm_lib.model.recurrence.self_check import choose_engine
from newllm_lib.reporting.formatting import counted
from newllm_lib.system.buffer_pool import BUFFERS
from newllm_lib.system.hardware import DTYPES, Machine, Precision, cpu_threads, native_formats
from newllm_lib.system.memory import is_out_of_memory
from newllm_lib.training.rng import generator_states, restore_generators
from newllm_lib.training.setup import PACKED, PLAIN, Setup, kept_threads, with_execution
from newllm_lib.tuning.cache import Store, digest
from newllm_lib.tuning.products import product_rate

_FEW, _MORE = 2, 10
"""Time steps of the two pieces."""
_WARM_UPS, _ROUNDS = 2, 5
_SECONDS = 1.6
"""After which no further round begins; the product rate and the model take the rest of two seconds."""
_PIECE_SECONDS = 0.06
"""A piece that takes longer is made of fewer sequences, but not of fewer than `_LEAST_ROWS`."""
_LEAST_ROWS = 32
_HOPELESS = 1.25
"""So many times as slow as the best after the warm-up: not timed further."""
_GAIN = 1.03
"""How much faster anything must be than FP32, the packed layout and torch's own number of threads to replace them."""
_UNSTEADY = 0.2
"""Rounds that differ by a larger share of their median are not remembered."""
_RATE_SECONDS = 0.05
"""How long the product rate that the reason names is measured."""


class Way(NamedTuple):
    """One way to compute a step."""

    precision: str
    packed: bool
    threads: int

    def __str__(self) -> str:
        return f"{self.precision}{'' if self.packed else ' unpacked'} on {counted(self.threads, 'thread')}"


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The way that won, and what it was chosen from."""

    way: Way
    rates: dict[Way, float]
    """Targets a second of a whole step in each way that was timed."""
    rows: int
    """Sequences of the pieces."""
    product_rate: float
    """FLOP a second of matrix products in the winner's format."""
    steady: bool
    """Whether the rounds were even enough for the answer to be remembered."""

    @property
    def reason(self) -> str:
        """For the reader: the rates, the fastest first."""
        order = sorted(self.rates, key=self.rates.get, reverse=True)
        rates = ", ".join(f"{way} {self.rates[way]:,.0f}" for way in order)
        products = f"{self.way.precision} products {self.product_rate / 1e9:,.0f} GFLOP/s"
        return (
            f"measured here, tokens/s by short pieces of a step ({counted(self.rows, 'sequence')}): {rates}; {products}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As the cache keeps it."""
        rates = [[*way, rate] for way, rate in self.rates.items()]
        return {"way": list(self.way), "rates": rates, "rows": self.rows, "product_rate": self.product_rate}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Execution:
        """From what the cache kept; KeyError, TypeError or ValueError for anything else."""
        rates = {Way(*way): float(rate) for *way, rate in found["rates"]}
        way = Way(*found["way"])
        if way not in rates:
            raise ValueError(f"{way} was not timed")
        return cls(
            way=way, rates=rates, rows=int(found["rows"]), product_rate=float(found["product_rate"]), steady=True
        )


@dataclass(frozen=True)
class Work:
    """What a step computes: a model, so many sequences at a time, by an engine, on a CPU."""

    model: ModelConfig
    rows: int
    length: int
    """Ids of a sequence; the model reads all but the last."""
    engine: str
    machine: Machine

    @classmethod
    def of(cls, setup: Setup) -> Work:
        """That of a run."""
        train = setup.config.train
        rows = min(train.micro_batch_size or train.batch_size, train.batch_size)
        return cls(setup.config.model, rows, setup.config.data.sequence_length, setup.engine.name, setup.machine)

    def ways(self, formats: Sequence[str], any_threads: bool = True) -> list[Way]:
        """Every way with these formats, the usual one first; with fewer threads than torch's only that of FP32."""
        formats = sorted(formats, key=lambda name: name != "fp32")
        layouts = [True] if self.engine == "reference" else [True, False]
        most = self.machine.threads
        ways = [Way(name, packed, most) for name in formats for packed in layouts if packed or name != "fp16"]
        fewer = [most // 2**power for power in range(1, most.bit_length())] if any_threads else []
        return ways + [ways[0]._replace(threads=threads) for threads in fewer]

    def facts(self, ways: Sequence[Way]) -> dict[str, Any]:
        """What the answer depends on, besides the machine.

        Sizes count by their nearest power of two: moving a slider must not measure at every position.
        """
        model = self.model
        sizes = {"rows": self.rows, "length": self.length} | {
            name: getattr(model, name) for name in ("vocab_size", "embed_dim", "hidden_dim", "context_dim")
        }
        return {
            "ways": [list(way) for way in ways],
            "engine": self.engine,
            "has_dropout": model.dropout > 0,
            **{name: round(math.log2(size)) for name, size in sizes.items()},
        }


_MEASURED: dict[str, Execution] = {}
"""What this process has measured, also where it was too unsteady for the cache: a plan and its run must agree."""


@dataclass(frozen=True)
class SharedExecution:
    """What a study decides for all of its runs, so that none of them differs from another by how it was computed."""

    precision: str
    threads: int
    layout: str

    @classmethod
    def of(cls, setup: Setup) -> SharedExecution:
        """That of a setup."""
        return cls(setup.precision.name, setup.machine.threads, setup.decided["layout"])

    @classmethod
    def from_dict(cls, found: Any) -> SharedExecution | None:
        """What `dataclasses.asdict` gave; None for anything else, and where this machine has fewer processors."""
        if not isinstance(found, dict) or found.get("precision") not in DTYPES:
            return None
        if found.get("layout") not in (PACKED, PLAIN) or not kept_threads(found):
            return None
        return cls(found["precision"], found["threads"], found["layout"])


def settle_execution(
    setup: Setup, decided: dict[str, Any], remeasure: bool = False, shared: SharedExecution | None = None
) -> Setup:
    """The setup with the number format, the threads and the layout that are fastest for it on this CPU.

    What the configuration says stays, and all that `decided` (of an earlier part of the run) holds, or stands for: a
    run of an earlier version continues by the rules of that version. Nothing is measured where both format and threads
    are given, nor on a GPU. remeasure: time again what is known already. shared: what takes the place of a measurement.
    """
    if decided or setup.machine.kind != "cpu":
        return setup
    requested, work = setup.requested.train, Work.of(setup)
    is_open = requested.precision == "auto" or setup.precision.substituted
    if shared:
        precision = setup.precision
        if is_open:
            precision = Precision(shared.precision, "as every run of this study", precision.substituted)
        return with_execution(setup, precision, requested.threads or shared.threads, shared.layout == PACKED)
    formats = native_formats(setup.machine) if is_open else [setup.precision.name]
    ways = work.ways(formats, any_threads=requested.threads is None)
    if len({(way.precision, way.threads) for way in ways}) == 1:
        return setup
    found = fastest_way(work, ways, remeasure)
    if found is None:
        return setup
    reason = found.reason
    if setup.precision.substituted:
        reason = f"{requested.precision} is not native to {setup.machine.name}; {reason}"
    elif requested.precision != "auto":
        reason = f"as requested; {reason}"
    precision = Precision(found.way.precision, reason, setup.precision.substituted)
    return with_execution(setup, precision, found.way.threads, found.way.packed)


def fastest_way(work: Work, ways: Sequence[Way], remeasure: bool = False) -> Execution | None:
    """The way to compute some work: known in this process or in the cache, or measured now; None without the memory.

    ways: as `Work.ways` gives them. remeasure: time again what is known already.
    """
    store, key = Store(work.machine), "execution " + digest(work.facts(ways))
    if not remeasure:
        if key in _MEASURED:
            return _MEASURED[key]
        try:
            return Execution.from_dict(store.choice(key) or {})
        except (KeyError, TypeError, ValueError):
            pass  # nothing there, or nothing that this version wrote
    try:
        found = measure(work, ways)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    _MEASURED[key] = found
    if found.steady:
        store.keep_choice(key, found.to_dict())
    return found


# --- the race -----------------------------------------------------------------------------------------------------


def measure(work: Work, ways: Sequence[Way]) -> Execution:
    """Time pieces of a step in every way, in turn, and choose; the process stays as it was."""
    states = generator_states()
    try:
        with torch.inference_mode(False), torch.enable_grad(), BUFFERS.kept():
            return _measure(_Piece(work), ways, time.perf_counter() + _SECONDS)
    finally:
        restore_generators(states)


def _measure(piece: _Piece, ways: Sequence[Way], end: float) -> Execution:
    most = ways[0].threads
    piece.time(ways[0])  # pays for kernels and memory
    piece.shrink(_PIECE_SECONDS / sum(piece.time(ways[0])))
    rounds = race([way for way in ways if way.threads == most], piece.time, end)
    seconds = {way: piece.step_seconds(times) for way, times in rounds.items()}
    best = preferred(seconds, ways[0])
    for threads in [way.threads for way in ways if way.threads < most]:
        fewer = best._replace(threads=threads)
        again = race([best, fewer], piece.time, end)
        compared = {way: piece.step_seconds(times) for way, times in again.items()}
        rounds |= again
        seconds |= {fewer: compared[fewer]}
        if preferred(compared, best) != fewer:
            break
        best = fewer
    machine = dataclasses.replace(piece.work.machine, threads=best.threads)
    return Execution(
        way=best,
        rates={way: piece.targets / each for way, each in seconds.items()},
        rows=piece.rows,
        product_rate=product_rate(machine, best.precision, piece.rows, _RATE_SECONDS),
        steady=is_steady(rounds),
    )


Times = tuple[float, float]
"""Seconds of the two pieces."""


def race(ways: Sequence[Way], time_pieces: Callable[[Way], Times], end: float) -> dict[Way, list[Times]]:
    """The times of each way in every round, all ways in turn; what the warm-up shows to be hopeless has one.

    No further round begins after `end` (of time.perf_counter), once there was one: then the warm-up has to do.
    """
    warm = {way: time_pieces(way) for way in ways}
    for _ in range(_WARM_UPS - 1):
        if time.perf_counter() < end:
            warm = {way: time_pieces(way) for way in ways}
    limit = _HOPELESS * min(map(sum, warm.values()))
    taken: dict[Way, list[Times]] = {way: [] for way in ways if sum(warm[way]) <= limit}
    for _ in range(_ROUNDS):
        if time.perf_counter() > end:
            break
        for way, times in taken.items():
            times.append(time_pieces(way))
    return {way: taken.get(way) or [warm[way]] for way in ways}


def is_steady(rounds: dict[Way, list[Times]]) -> bool:
    """Whether every round was timed, and the rounds of no way differ by more than 20 %."""
    sums = [list(map(sum, times)) for times in rounds.values() if len(times) > 1]
    spread = [(max(each) - min(each)) / statistics.median(each) for each in sums]
    return bool(sums) and all(len(each) == _ROUNDS for each in sums) and max(spread) <= _UNSTEADY


def preferred(seconds: dict[Way, float], usual: Way) -> Way:
    """The usual way, unless others are at least 3 % faster: than it, and than all that change less."""
    chosen = usual
    for way in sorted(seconds, key=lambda way: (way.precision != usual.precision, way.precision, not way.packed)):
        if seconds[way] * _GAIN <= seconds[chosen]:
            chosen = way
    return chosen


class _Piece:
    """A few time steps of some work, forward and backward, on random words."""

    def __init__(self, work: Work):
        self.work, self.rows = work, work.rows
        self._model = NewLLM(work.model).to(work.machine.device).train()

    @property
    def targets(self) -> int:
        """Of a whole step of these sequences."""
        return self.rows * (self.work.length - 1)

    def shrink(self, share: float) -> None:
        """Take a share of the sequences, unless that is more than there are or leaves too few."""
        self.rows = min(self.rows, max(_LEAST_ROWS, int(self.rows * share)))

    def step_seconds(self, rounds: list[Times]) -> float:
        """How long a whole step would take, on a line through the medians of both pieces."""
        few, more = (statistics.median(times) for times in zip(*rounds, strict=True))
        each = max(0.0, more - few) / (_MORE - _FEW)
        return few + each * max(0, self.work.length - 1 - _FEW)

    def time(self, way: Way) -> Times:
        """The seconds of `_FEW` and of `_MORE` time steps."""
        return self._time(way, _FEW), self._time(way, _MORE)

    def _time(self, way: Way, steps: int) -> float:
        machine, model, p = self.work.machine, self._model, self.work.model.dropout
        precision = Precision(way.precision, "measured")
        engine = choose_engine(self.work.engine, precision, machine.device, way.packed).run
        scaler = precision.scaler(machine.kind, 1.0)
        generator = torch.Generator().manual_seed(0)
        shape = (self.rows, steps + 1)
        ids = torch.randint(len(SPECIAL_TOKENS), model.config.vocab_size, shape, generator=generator)
        with cpu_threads(way.threads):
            started = time.perf_counter()
            dropout = Dropout(p, 0, ids.device, self.rows) if p else None
            with precision.autocast(machine.kind):
                hidden, _ = model.hidden(ids[:, :-1], dropout=dropout, engine=engine)
                nll, _ = token_losses(hidden, model.head, ids[:, 1:])
            scaler.scale(nll.mean()).backward()
            model.zero_grad(set_to_none=True)
            return time.perf_counter() - started
