"""What a number format alone does: loss and gradients of the same weights on the same batch, in two formats.

Two runs in two formats are apart by more than that, because every difference grows while they train.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm_lib.errors import RunError
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence.self_check import choose_engine
from newllm_lib.system.hardware import Precision, exact_products
from newllm_lib.training.batches import Batches, mix_seed
from newllm_lib.training.setup import Setup
from newllm_lib.training.step import TrainingStep

ALL = "all"
"""The name under which all parameters count together."""

_SCALE_TRIES = 32
"""A loss scale starts at 2^16 and is halved as long as a gradient overflows."""


class Gradients(NamedTuple):
    """Of one batch."""

    loss: float
    """Mean over its targets (nats)."""
    groups: dict[str, Tensor]
    """Flat gradients (n,) float32 on the CPU, by the part of the model, and all of them together."""


def rounding_errors(setup: Setup, model: NewLLM, format: Precision) -> list[dict[str, Any]]:
    """For each part of a model: how far its gradient in a format is from that in FP32, relative to the latter.

    Batch, weights and dropout masks are the same. "other_batch" is the yardstick: how far the FP32 gradient of the
    next batch is from that of the first. A row has "part", "gradient_error", "other_batch", and "loss_error" (of the
    loss, relative); a part whose gradient is 0 has None.
    """
    exact = Precision("fp32", "as the measure")
    first, second = batch_ids(setup, 0), batch_ids(setup, 1)
    measure, rounded = gradients(setup, model, first, exact), gradients(setup, model, first, format)
    other = gradients(setup, model, second, exact)
    loss_error = abs(rounded.loss - measure.loss) / measure.loss
    return [
        {
            "part": part,
            "loss_error": loss_error,
            "gradient_error": _relative(rounded.groups[part], gradient),
            "other_batch": _relative(other.groups[part], gradient),
        }
        for part, gradient in measure.groups.items()
    ]


@exact_products()
def gradients(setup: Setup, model: NewLLM, ids: Tensor, format: Precision) -> Gradients:
    """Loss and gradients of a batch of ids (B, S) in a format; the model stays as it is.

    FP16 with a loss scale, as in training. RunError where no scale makes them finite.
    """
    trial = copy.deepcopy(model).to(setup.machine.device).train()
    optimizer = torch.optim.SGD(trial.parameters(), lr=0.0)
    engine = choose_engine(setup.config.train.engine, format, setup.machine.device)
    micro_batch = setup.config.train.micro_batch_size
    training_step = TrainingStep(trial, [optimizer], format, engine.run, micro_batch=micro_batch)
    for _ in range(_SCALE_TRIES):
        result = training_step(ids, dropout_seed=mix_seed(setup.config.train.seed, 0, 0))
        if not result.skipped:
            return Gradients(result.nll / result.tokens, _by_part(trial))
    raise RunError(f"the gradients in {format.name} are not finite with any loss scale")


def batch_ids(setup: Setup, number: int) -> Tensor:
    """The ids (B, S) int64 of a batch of the first epoch, on the run's device."""
    batches = Batches(setup.train_split, setup.config.train.batch_size, setup.config.train.seed)
    return batches.read(0, number % batches.per_epoch).to(setup.machine.device)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, in words."""
    owner, *rest = name.split(".")
    if owner == "layers":
        return f"layer {int(rest[0]) + 2}"
    return {
        "embedding": "embedding",
        "from_token": "layer 1",
        "from_context": "layer 1",
        "context_heads": "context heads",
        "context_norm": "context norm",
        "output": "output head",
    }[owner]


def _by_part(model: NewLLM) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(part_of(name), []).append(parameter.grad.detach().float().cpu().flatten())
    flat = {part: torch.cat(found) for part, found in parts.items()}
    return {ALL: torch.cat(list(flat.values()))} | flat


def _relative(found: Tensor, measure: Tensor) -> float | None:
    size = float(measure.double().norm())
    return float((found.double() - measure.double()).norm()) / size if size else None
