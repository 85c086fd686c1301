"""One try of a batch: real optimizer steps and a real evaluation in a throw-away copy, with its memory and its time."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from newllm_lib.config import SPECIAL_TOKENS
from newllm_lib.data.dataset import Split
from newllm_lib.evaluation import evaluate_split
from newllm_lib.model.newllm import NewLLM
from newllm_lib.system.buffer_pool import BUFFERS
from newllm_lib.system.hardware import cpu_threads
from newllm_lib.system.memory import GPUMemory, ProcessMemory, is_out_of_memory
from newllm_lib.system.timing import wait
from newllm_lib.training.batches import Batches
from newllm_lib.training.checkpoint import save_checkpoint
from newllm_lib.training.estimates import memory_estimate_bytes
from newllm_lib.training.graph_choice import choose_graph
from newllm_lib.training.rng import generator_states, restore_generators
from newllm_lib.training.setup import Setup
from newllm_lib.training.step import StepResult, TrainingStep

RAN, OUT_OF_MEMORY, ABOVE_LIMIT = "ran", "out of memory", "above the limit"
"""How a try ends."""

_FEW_ROWS = 8
"""Enough for a step that makes the optimizer's state, so that the full step after it is measured beside that."""
_STEPS, _SECONDS, _LONG_SECONDS = 3, 0.5, 5.0
"""Timed steps go on until there are so many in so much time, or after the first that takes this long."""


@dataclass(frozen=True, kw_only=True)
class Try:
    """What a batch gave."""

    batch_size: int
    micro_batch_size: int | None
    outcome: str
    """RAN, OUT_OF_MEMORY or ABOVE_LIMIT."""
    tokens_per_second: float | None = None
    """Real targets of the run's own text (median of some steps)."""
    step_seconds: float | None = None
    full_seconds: float | None = None
    """Of the one step on sequences without padding."""
    peak_bytes: int | None = None
    """Of a step on sequences without padding, or of the evaluation."""
    seconds: float = 0.0
    """Of the whole try."""
    reason: str = ""
    """What the system said, or what was expected; '' where all went well and the memory was measured."""

    def line(self) -> str:
        """For the reader."""
        pieces = f" in pieces of {self.micro_batch_size}" if self.micro_batch_size else ""
        facts = [] if self.outcome == RAN else [self.outcome]
        if self.tokens_per_second:
            facts += [f"{self.tokens_per_second:,.0f} tokens/s", f"{self.step_seconds:.3g} s a step"]
        if self.peak_bytes is not None and self.outcome != OUT_OF_MEMORY:
            facts.append(f"{self.peak_bytes / 2**30:.2f} GiB")
        return f"batch {self.batch_size}{pieces}: " + ", ".join(facts) + (f" ({self.reason})" if self.reason else "")


def run_try(setup: Setup, memory: GPUMemory | ProcessMemory, limit_bytes: float) -> Try:
    """Train a throw-away copy for a few steps of the setup's batch and evaluate it once.

    Memory that runs out, in any wording, is an outcome; other errors are raised. The process stays as it was.
    """
    batch, micro = setup.config.train.batch_size, setup.config.train.micro_batch_size
    started = time.perf_counter()
    memory.start()
    taken, said = None, ""
    try:
        taken = _measure(setup)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    # only here is the error gone, and with its traceback the tensors of the failed step
    peak = memory.peak_bytes()
    memory.clear()
    facts = {"batch_size": batch, "micro_batch_size": micro, "seconds": time.perf_counter() - started}
    if taken is None:
        return Try(**facts, outcome=OUT_OF_MEMORY, reason=said)
    facts |= {"tokens_per_second": taken[0], "step_seconds": taken[1], "full_seconds": taken[2]}
    if peak is None:
        peak, facts["reason"] = memory_estimate_bytes(setup), "memory estimated from the shapes"
    return Try(**facts, peak_bytes=peak, outcome=RAN if peak <= limit_bytes else ABOVE_LIMIT)


def _measure(setup: Setup) -> tuple[float, float, float]:
    """Tokens a second and seconds a step on the run's own rows, after steps and an evaluation on full ones; the
    seconds of the full step."""
    with _undisturbed(setup):
        copy = _Copy(setup)
        copy.few_rows_step()
        ids = copy.full_rows(setup.config.train.batch_size)
        full_seconds = copy.timed_step(ids)[1]
        copy.evaluate()
        return *copy.timed(), full_seconds


def time_steps(setup: Setup) -> tuple[float, float]:
    """As `run_try`, without full rows and evaluation; errors are raised, memory that runs out too."""
    with _undisturbed(setup):
        copy = _Copy(setup)
        copy.few_rows_step()
        ids = copy.batches.read_repeating(0)
        copy.step(ids)  # kernels are compiled when a shape is first met: up to twice the time
        return copy.timed()


def time_validation(setup: Setup) -> tuple[float, float]:
    """Targets that a validation scores in a second, and the seconds of saving what it found to be the best."""
    with _undisturbed(setup):
        copy = _Copy(setup)
        copy.evaluate()  # kernels are compiled when a shape is first met
        started = time.perf_counter()
        tokens = copy.evaluate()
        return tokens / (time.perf_counter() - started), copy.saving_seconds()


def warm_up(setup: Setup) -> None:
    """Pay what a process pays once, before anything is measured: imports, kernels, the engine's compilation.

    Memory that runs out here does so in the try that follows, which says it.
    """
    try:
        with _undisturbed(setup):
            _Copy(setup).few_rows_step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise


def expected_seconds(ran: Try, batch: int) -> float:
    """How long a try of `batch` sequences will take, from one that ran.

    A step takes as long for each sequence, and there are as many as `_Copy.timed` then makes; what is left (the copy,
    the evaluation) takes as long as it did.
    """

    def in_steps(scale: float) -> float:
        each = scale * ran.step_seconds
        count = min(max(_STEPS, math.ceil(_SECONDS / each)), math.ceil(_LONG_SECONDS / each))
        return scale * ran.full_seconds + count * each

    return max(0.0, ran.seconds - in_steps(1.0)) + in_steps(batch / ran.batch_size)


def _no_fewer(rows: int, failure: str) -> int:
    """In place of the evaluation's own way out."""
    raise MemoryError(f"in the evaluation of {rows} sequences at once: {failure}")


@contextmanager
def _undisturbed(setup: Setup) -> Iterator[None]:
    """Training as `Trainer` does it, whatever mode the caller is in; its generators and threads are put back."""
    states = generator_states()
    try:
        with torch.inference_mode(False), torch.enable_grad(), cpu_threads(setup.machine.threads), BUFFERS.kept():
            yield
    finally:
        restore_generators(states)


class _Copy:
    """A model of the run's shape with its training step and batches, on the run's device.

    Its learning rate is 0: the work is the same.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        train, self.device = setup.config.train, setup.machine.device
        self.model = NewLLM(setup.config.model).to(self.device).train()
        # at a scale of 1 no step is skipped: one that is makes no optimizer state and shows too little memory
        self.step = TrainingStep.for_run(setup, self.model, init_scale=1.0)
        self.step.set_lr(0.0)
        self.batches = Batches(setup.train_split, train.batch_size, train.seed, self.device)
        self.step.graph = choose_graph(setup, self.model, self.batches).graph

    def full_rows(self, rows: int) -> Tensor:
        """Ids (rows, S) of random words, none of them padding: as much work and memory as a batch can take."""
        shape = (rows, self.setup.config.data.sequence_length)
        return torch.randint(len(SPECIAL_TOKENS), self.setup.config.model.vocab_size, shape).to(self.device)

    def few_rows_step(self) -> None:
        """A step that makes the optimizer's state."""
        self.step(self.full_rows(min(self.setup.config.train.batch_size, _FEW_ROWS)))

    def timed_step(self, ids: Tensor, context: Tensor | None = None) -> tuple[StepResult, float]:
        """A step and its seconds."""
        wait(self.setup.machine)
        started = time.perf_counter()
        result = self.step(ids, context=context)
        wait(self.setup.machine)
        return result, time.perf_counter() - started

    def saving_seconds(self) -> float:
        """Of a checkpoint and of the model alone, in the folder for temporary files; 0 where it cannot be written."""
        weights = self.model.state_dict()
        payload = {"model": weights, "optimizers": [optimizer.state_dict() for optimizer in self.step.optimizers]}
        started = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                save_checkpoint(Path(folder, "all.pt"), payload, 0)
                save_checkpoint(Path(folder, "model.pt"), {"model": weights}, 0)
        except OSError:
            return 0.0
        return time.perf_counter() - started

    def evaluate(self) -> int:
        """One pass of the evaluation, over as many full rows as it takes at once; how many targets it scored."""
        held = self.setup.validation_split
        if held.carries_context:
            ids = self.full_rows(held.ids.shape[1])[None]
        else:
            ids = self.full_rows(min(len(held.ids), self.setup.config.train.eval_batch_size))
        evaluate_split(
            self.model,
            Split(ids.cpu().numpy(), held.carries_context),
            precision=self.setup.precision,
            batch_size=self.setup.config.train.eval_batch_size,
            engine=self.setup.engine.run,
            fewer=_no_fewer,
        )
        return ids.numel() - ids.numel() // ids.shape[-1]

    def timed(self) -> tuple[float, float]:
        """The medians of tokens a second and seconds a step, over the first batches of the training data."""
        taken: list[tuple[float, float]] = []
        context = None
        for number in itertools.count():
            result, seconds = self.timed_step(self.batches.read_repeating(number), context)
            taken.append((result.tokens / seconds, seconds))
            context = result.context if self.setup.train_split.carries_context else None
            spent = sum(one for _, one in taken)
            if spent >= _LONG_SECONDS or (len(taken) >= _STEPS and spent >= _SECONDS):
                break
        speeds, seconds = zip(*taken, strict=True)
        return statistics.median(speeds), statistics.median(seconds)
