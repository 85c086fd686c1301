"""How fast a training step is and what memory it takes: in turn, in one run, medians, beside what it is compared with.

Slots count every place of a batch, tokens only the real ones. The share of the product rate counts the work on real
tokens only (6 FLOP a matrix parameter), against the rate at which this machine multiplies matrices of the same shapes.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from newllm_lib.config import PAD, ModelConfig, RunConfig, TrainConfig
from newllm_lib.config.portable import last_part
from newllm_lib.data.dataset import prepare
from newllm_lib.data.sequences import target_lengths
from newllm_lib.errors import ConfigError, TrainingError
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence.packed_linear import Product
from newllm_lib.model.recurrence.self_check import choose_numerics
from newllm_lib.model.recurrence.static_packing import most_active
from newllm_lib.reporting.record import finite
from newllm_lib.studies.bench.baselines import LSTMModel, PublishedLoop, plain_step
from newllm_lib.studies.bench.execution_choice import measure_choice
from newllm_lib.studies.bench.inference_speed import measure_inference
from newllm_lib.studies.bench.report import GROWTH, table_text, write_plot
from newllm_lib.system.cuda_graph import recorded
from newllm_lib.system.files import file_errors, make_folder, write_text_atomic
from newllm_lib.system.hardware import Machine, choose_precision, cpu_threads, detect, environment, native_formats
from newllm_lib.system.memory import peak_memory_bytes, reset_peak_memory
from newllm_lib.system.timing import timed
from newllm_lib.training.batch_graph import BatchGraph, best_kernels
from newllm_lib.training.estimates import matrix_parameters
from newllm_lib.training.optimizers import make_optimizers
from newllm_lib.training.step import TrainingStep
from newllm_lib.tuning.execution import Work, fastest_way

SUBJECTS = ("published", "reference", "fused", "lstm")
"""The published loop, the engines, and an LSTM of equal parameters."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement: a subject at one size."""

    subject: str
    batch: int = 256
    length: int = 64
    """Ids a sequence; the model reads all but the last."""
    hidden_dim: int = 512
    num_layers: int = 6
    dropout: float = 0.1
    precision: str = "auto"

    @property
    def model(self) -> ModelConfig:
        """The published shape with this case's sizes."""
        return ModelConfig(hidden_dim=self.hidden_dim, num_layers=self.num_layers, dropout=self.dropout)


def make_step(
    model: NewLLM, sequences: Tensor, engine: str = "auto", precision: str = "auto", train: TrainConfig | None = None
) -> Callable[[], float]:
    """A callable that performs one optimizer step of the trainer on sequences (B, S) int64 and returns the mean loss.

    The recipe is `train` (Adam as published by default); each call draws other dropout masks.
    """
    train = train or TrainConfig()
    chosen, chosen_engine = choose_numerics(model.device, precision, engine)
    optimizers = make_optimizers(model, train, train.lr or train.lr_base, chosen.name)
    training_step = TrainingStep(model, optimizers, chosen, chosen_engine.run, clip=0.5)
    calls = iter(range(1 << 62))

    def step() -> float:
        model.train()
        result = training_step(sequences, dropout_seed=next(calls))
        return result.nll / result.tokens

    return step


def graph_step(model: NewLLM, sequences: Tensor, precision: str) -> Callable[[], float]:
    """As `make_step`, replayed as one CUDA graph that is made for these very sequences."""
    chosen, engine = choose_numerics(model.device, precision, "fused")
    train = TrainConfig()
    training_step = TrainingStep(
        model, make_optimizers(model, train, train.lr_base, chosen.name), chosen, engine.run, clip=0.5
    )
    lengths = target_lengths(sequences.cpu().numpy())
    active = most_active([lengths], len(sequences), sequences.shape[1] - 1)
    training_step.graph = BatchGraph(model, chosen, len(sequences), active, best_kernels(model, chosen)[0])
    training_step.graph.capture(sequences)
    calls = iter(range(1 << 62))

    def step() -> float:
        result = training_step(sequences, dropout_seed=next(calls))
        return result.nll / result.tokens

    return step


def subject_step(case: Case, ids: Tensor, machine: Machine) -> Callable[[], float]:
    """The step of a case. The published loop runs in FP32 on a CPU and under AMP on a GPU, as it did."""
    torch.manual_seed(0)
    if case.subject in ("reference", "fused"):
        return make_step(NewLLM(case.model).to(machine.device), ids, case.subject, case.precision)
    if case.subject == "graph":
        return graph_step(NewLLM(case.model).to(machine.device), ids, case.precision)
    model = (PublishedLoop if case.subject == "published" else LSTMModel)(case.model).to(machine.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    published = "fp16" if machine.kind == "cuda" else "fp32"
    precision = choose_precision(published if case.subject == "published" else case.precision, machine)
    return lambda: plain_step(model, optimizer, ids, precision.autocast(machine.kind))


def batches(data: str, cases: list[Case], machine: Machine) -> dict[tuple[int, int], Tensor]:
    """Real rows of the data protocol for each (batch, length) in use, the same for every subject."""
    found = {}
    for length in {case.length for case in cases}:
        split = prepare(RunConfig().replace(data=data, sequence_length=length, stride=max(1, length // 2))).split(
            "train"
        )
        order = torch.randperm(len(split.ids), generator=torch.Generator().manual_seed(0))
        for batch in {case.batch for case in cases if case.length == length}:
            rows = order[torch.arange(batch) % len(order)]
            found[batch, length] = torch.from_numpy(split.ids)[rows].long().to(machine.device)
    return found


def measure(
    cases: list[Case], data: str, rounds: int = 5, report: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """A row for each case: the median step of `rounds`, taken in turn (A B C, A B C, ...), after one to warm up.

    The products of each case are timed right after its step, so that both see the machine in the same mood.
    """
    machine = detect()
    cases = [with_format(case, machine) for case in cases]
    rows = batches(data, cases, machine)
    with cpu_threads(machine.threads):
        made = [made_step(case, rows[case.batch, case.length], machine) for case in cases]
        steps = [step for step, _ in made]
        products = [case_products(case, machine) for case in cases]
        times: list[list[tuple[float, float]]] = [[] for _ in cases]
        peaks: list[dict[str, int]] = [{} for _ in cases]
        for turn in range(rounds + 1):
            for number, (step, product) in enumerate(zip(steps, products, strict=True)):
                held = reset_gpu_peak(machine)
                taken = (timed(step, machine), timed(product, machine))
                if turn:
                    times[number].append(taken)
                    if held is not None:
                        peaks[number] = {"memory_bytes": made[number][1] + peak_memory_bytes(machine) - held}
            report(f"round {turn} of {rounds}" + (" (warm-up)" if not turn else ""))
    return [
        describe(case, rows[case.batch, case.length], taken) | peak
        for case, taken, peak in zip(cases, times, peaks, strict=True)
    ]


def made_step(case: Case, ids: Tensor, machine: Machine) -> tuple[Callable[[], float], int]:
    """The step of a case, and what it holds of a GPU before its first call, the model aside: a graph's memory."""
    if machine.kind != "cuda":
        return subject_step(case, ids, machine), 0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(machine.device)
    step = subject_step(case, ids, machine)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(machine.device) - before
    return step, max(0, held - 4 * case.model.num_parameters)


def reset_gpu_peak(machine: Machine) -> int | None:
    """Bytes that tensors hold on a GPU, where a new peak begins with this call; None on a CPU, whose peak stays."""
    if machine.kind != "cuda":
        return None
    reset_peak_memory(machine)
    return peak_memory_bytes(machine)


def with_format(case: Case, machine: Machine) -> Case:
    """A case whose format is left to the machine, in the one that a run of its size would take."""
    if case.precision != "auto":
        return case
    found = None
    if machine.kind == "cpu":
        work = Work(case.model, case.batch, case.length, "fused", machine)
        found = fastest_way(work, work.ways(native_formats(machine), any_threads=False))
    chosen = found.way.precision if found else choose_precision("auto", machine).name
    return dataclasses.replace(case, precision=chosen)


def describe(case: Case, ids: Tensor, taken: list[tuple[float, float]]) -> dict[str, Any]:
    """What a case gave, in slots and tokens a second and as a share of the product rate (the median of the ratios).

    taken: seconds of a step and of `case_products`, round by round.
    """
    seconds = [step for step, _ in taken]
    median = statistics.median(seconds)
    product_flops = 3 * 2 * case.batch * (case.length - 1) * case.hidden_dim**2
    slots, tokens = ids[:, 1:].numel(), int((ids[:, 1:] != PAD).sum())
    flops = 6 * matrix_parameters(case.model) * tokens
    share = None
    if case.subject != "lstm":
        share = statistics.median(flops / step / (product_flops / product) for step, product in taken)
    return {
        "subject": case.subject,
        "batch": case.batch,
        "length": case.length,
        "hidden_dim": case.hidden_dim,
        "num_layers": case.num_layers,
        "dropout": case.dropout,
        "precision": case.precision,
        "seconds": median,
        "seconds_least": min(seconds),
        "seconds_most": max(seconds),
        "slots_per_second": slots / median,
        "tokens_per_second": tokens / median,
        "product_rate": product_flops / statistics.median(product for _, product in taken),
        "product_share": share,
    }


def case_products(case: Case, machine: Machine) -> Callable[[], None]:
    """The hidden layer's three products at this batch: forward, backward, and the weight's gradient.

    The first two are (batch x H x H) at every step, in the layout that the engine uses; the third is one product over
    all slots. On a GPU as one graph, so that the rate is that of its arithmetic and not of launching it.
    """
    precision = choose_precision(case.precision, machine)
    h, steps = case.hidden_dim, case.length - 1
    kind = {"dtype": precision.dtype, "device": machine.device}
    weight, x = torch.randn(h, h, **kind), torch.randn(case.batch, h, **kind)
    long = torch.randn(case.batch * steps, h, **kind)
    product = Product(weight, rows=case.batch)

    def once() -> None:
        for _ in range(2 * steps):
            product(x)
        long.t() @ long

    return recorded(once, machine.device) if machine.kind == "cuda" else once


# --- memory: each case in a process of its own, since a process's peak never falls -------------------------------


def memory_bytes(case: Case, data: str) -> int:
    """Peak memory of two steps above what the process held before them (on a GPU: of tensors)."""
    request = json.dumps({"case": dataclasses.asdict(case), "data": data})
    command = [sys.executable, "-m", "newllm_lib.studies.bench.training_speed", request]
    try:
        return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    except subprocess.CalledProcessError as error:
        raise TrainingError(
            f"the process that measures the memory of {case.subject} at batch {case.batch} ended with status "
            f"{error.returncode}; memory=False (in the shell --no-memory) leaves this out"
        ) from error


def _memory_child(request: str) -> int:
    values = json.loads(request)
    case, machine = Case(**values["case"]), detect()
    ids = batches(values["data"], [case], machine)[case.batch, case.length]
    step = subject_step(case, ids, machine)
    before = peak_memory_bytes(machine)
    step(), step()
    return peak_memory_bytes(machine) - before


# --- what `newllm bench` runs --------------------------------------------------------------------------------------


PARTS: dict[str, list[Case]] = {
    "batch": [Case(subject=name, batch=batch) for batch in (32, 128, 256, 512) for name in SUBJECTS],
    "fp32": [Case(subject=name, precision="fp32") for name in SUBJECTS],
    "length": [
        Case(subject=name, batch=64, length=length) for length in (64, 127, 253, 505) for name in ("fused", "lstm")
    ],
    "hidden_dim": [Case(subject="fused", batch=128, hidden_dim=width) for width in (256, 512, 1024, 2048)],
    "num_layers": [Case(subject="fused", batch=128, num_layers=layers) for layers in (2, 6, 12)],
    "gpu": [
        Case(subject=name, batch=batch, precision=precision)
        for batch in (256, 2048, 4096)
        for name, precision in (
            ("published", "fp16"),
            ("reference", "fp16"),
            ("fused", "fp16"),
            ("graph", "fp16"),
            ("graph", "bf16"),
            ("graph", "fp32"),
        )
    ],
}
"""Each part is one comparison, its cases taken in turn."""
GPU_PARTS = ("gpu",)
"""Parts for a GPU: on a CPU they would take hours, and are left out unless they are asked for."""
INFERENCE, EXECUTION = "inference", "execution"
"""The parts that compare no subjects: generation, and how well a run's format, threads and layout are chosen."""

MEMORY = [Case(subject=name, batch=batch) for name, batch in (("published", 512), ("fused", 512), ("fused", 2048))]
"""Cases whose peak memory is measured, each in a process of its own."""


def default_parts() -> list[str]:
    """The parts that this machine measures unless some are asked for."""
    left_out = () if detect().kind == "cuda" else GPU_PARTS
    return [*(part for part in PARTS if part not in left_out), EXECUTION, INFERENCE]


@file_errors()
def run_bench(
    data: str,
    folder: Path,
    parts: list[str],
    rounds: int = 5,
    memory: bool = True,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure the parts and write bench.json, bench.md and bench.png to a folder; returns what bench.json holds."""
    unknown = sorted(set(parts) - {*PARTS, INFERENCE, EXECUTION})
    if unknown:
        raise ConfigError(f"unknown part {unknown[0]!r}: must be one of {', '.join((*PARTS, INFERENCE, EXECUTION))}")
    make_folder(folder)  # before minutes of measuring
    rows = []
    for part in [part for part in parts if part in PARTS]:
        report(f"part {part}: {len(PARTS[part])} cases")
        rows += [{"part": part, **row} for row in measure(PARTS[part], data, rounds, report)]
    for case in MEMORY if memory else []:
        report(f"memory of {case.subject} at batch {case.batch}")
        row = {"part": "memory", **measure([case], data, 1, lambda text: None)[0]}
        rows.append(row | {"memory_bytes": memory_bytes(case, data)})
    result = {"environment": environment(detect()), "data": last_part(data), "rounds": rounds, "rows": rows}
    if EXECUTION in parts:
        result[EXECUTION] = measure_choice(lambda batch: _rows_of(data, batch), detect(), rounds, report)
    if INFERENCE in parts:
        result[INFERENCE] = measure_inference(rounds, report)
    write_text_atomic(folder / "bench.json", json.dumps(finite(result), indent=2, allow_nan=False) + "\n")
    write_text_atomic(folder / "bench.md", table_text(result))
    if set(parts) & set(GROWTH):
        write_plot(folder / "bench.png", result)
    return result


def _rows_of(data: str, batch: int) -> Tensor:
    """Ids (B, S) of a batch of the data, at the published length."""
    case = Case(subject="fused", batch=batch)
    return batches(data, [case], detect())[batch, case.length]


if __name__ == "__main__":
    print(_memory_child(sys.argv[1]))
