"""Whether a run's steps are replayed as a CUDA graph: where it can be made, and agrees with the plain step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from newllm_lib.data.sequences import target_lengths
from newllm_lib.errors import ConfigError
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import get_engine
from newllm_lib.model.recurrence.kernels import Kernels
from newllm_lib.model.recurrence.static_packing import most_active
from newllm_lib.training.batch_graph import BatchGraph, best_kernels
from newllm_lib.training.batches import Batches, batches_per_epoch, epoch_order
from newllm_lib.training.setup import Setup
from newllm_lib.training.step import eager_gradients

_EPOCHS = 4
"""Whose batches decide how many rows a step takes; a later batch that does not fit is computed without the graph."""
_TOLERANCES = {"fp32": 1e-3, "bf16": 0.03, "fp16": 0.02}
"""Largest distance of all gradients from the plain step's, relative to their norm: the order of sums differs, and a
ReLU may flip where its input is next to zero. An H200 had less than a tenth of it."""
_SCALES = {"fp32": 1.0, "bf16": 1.0, "fp16": 1024.0}
"""Of the loss in that comparison: in FP16 its gradients would else vanish."""


@dataclass(frozen=True)
class GraphChoice:
    """The graph of a run, and the sentence that tells why it has one or not; "" where nobody would expect one."""

    graph: BatchGraph | None
    reason: str


def choose_graph(setup: Setup, model: NewLLM, batches: Batches) -> GraphChoice:
    """A graph for the run's batches, captured and checked; ConfigError where it is asked for and cannot be had.

    The model's weights stay as they are, its gradients do not.
    """
    asked = setup.config.train.cuda_graph
    obstacle = _obstacle(setup)
    if asked == "off" or (asked == "auto" and setup.machine.kind != "cuda"):
        return GraphChoice(None, "")
    if obstacle is None:
        try:
            return _captured(setup, model, batches)
        except Exception as error:  # whatever a GPU, its driver or a library cannot do must not stop a run
            obstacle = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        torch.cuda.empty_cache()  # outside of the except block, whose traceback held the tensors
    if asked == "on":
        raise ConfigError(f"cuda_graph = 'on': must be auto or off here: {obstacle}")
    return GraphChoice(None, f"no CUDA graph ({obstacle}): steps are launched operation by operation")


def _obstacle(setup: Setup) -> str | None:
    """Why a run can have no graph; None where nothing is known against one."""
    train = setup.config.train
    if setup.machine.kind != "cuda":
        return f"{setup.machine.name} is no CUDA GPU"
    if setup.train_split.carries_context:
        return "layout stream carries the context from step to step"
    if setup.engine.run is not get_engine("fused", setup.engine.packed)[1]:
        return f"the engine is {setup.engine.name}"
    if (train.micro_batch_size or train.batch_size) < train.batch_size:
        return f"a batch is computed {train.micro_batch_size} sequences at a time"
    return None


def _captured(setup: Setup, model: NewLLM, batches: Batches) -> GraphChoice:
    """A graph with the kernels, or with torch's operations where they cannot be had or fail; errors where both do."""
    kernels, why = best_kernels(model, setup.precision)
    if kernels is not None:
        try:
            return _checked(setup, model, batches, kernels, "its own kernels")
        except Exception as error:
            why = f"the kernels failed: {type(error).__name__}: {error}".splitlines()[0][:200]
    return _checked(setup, model, batches, None, f"torch's operations ({why})")


def _checked(setup: Setup, model: NewLLM, batches: Batches, kernels: Kernels | None, how: str) -> GraphChoice:
    train = setup.config.train
    active = most_active(first_lengths(setup), train.batch_size, setup.train_split.ids.shape[1] - 1)
    graph = BatchGraph(model, setup.precision, train.batch_size, active, kernels)
    ids = batches.read(0, 0)
    graph.capture(batches.read(0, batches.per_epoch - 1))
    distance = distance_from_plain(setup, model, graph, ids)
    tolerance = _TOLERANCES[setup.precision.name]
    if not distance <= tolerance:
        raise ValueError(f"its gradients are {distance:.2g} away from the plain step's, allowed is {tolerance:.2g}")
    torch.cuda.empty_cache()
    return GraphChoice(
        graph, f"steps are replayed as one CUDA graph with {how}; gradients within {distance:.1g} of the plain step's"
    )


def first_lengths(setup: Setup) -> Iterator[np.ndarray]:
    """The lengths of the rows of each batch in the first epochs of a run."""
    split, train = setup.train_split, setup.config.train
    lengths = target_lengths(split.ids)
    for epoch in range(_EPOCHS):
        order = epoch_order(train.seed, epoch, len(lengths)).numpy()
        for number in range(batches_per_epoch(split, train.batch_size)):
            yield lengths[order[number * train.batch_size :][: train.batch_size]]


def distance_from_plain(setup: Setup, model: NewLLM, graph: BatchGraph, ids: Tensor, seed: int = 1) -> float:
    """How far the graph's gradients for ids (B, S) are from the plain step's, relative to their norm.

    Infinite where the batch does not fit.
    """
    scale = torch.full((), _SCALES[setup.precision.name], device=ids.device)
    totals = graph.compute(ids, seed, scale)
    if not totals.fits.item():
        return float("inf")
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    how = {"engine": setup.engine.run, "precision": setup.precision, "scale": scale.mul}
    eager_gradients(model, ids, **how, dropout_seed=seed, ids_checked=True)
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    apart = sum(float((a - b).double().square().sum()) for a, b in zip(found, expected, strict=True))
    return (apart / sum(float(b.double().square().sum()) for b in expected)) ** 0.5
