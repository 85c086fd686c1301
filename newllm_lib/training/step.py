"""One optimizer step, from a batch of ids to changed weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from newllm_lib.config import PAD
from newllm_lib.errors import PartialUpdateError, TrainingError
from newllm_lib.model.loss import token_losses
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import Dropout
from newllm_lib.system.hardware import Precision
from newllm_lib.system.memory import is_out_of_memory
from newllm_lib.training.skips import listed


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    nll: float
    """Sum over the targets of the batch (nats)."""
    tokens: int
    """Real targets of the batch."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    skipped: bool
    """Whether the update was left out because a gradient was not finite (FP16 only)."""
    not_finite: tuple[str, ...]
    """The parameters whose gradient was not finite; empty unless skipped."""
    context: Tensor
    """(B, C) after the batch, detached."""
    ids: Tensor
    """(B, S) int64: the batch."""


def optimizer_step(
    model: NewLLM,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    ids: Tensor,
    *,
    engine: Callable,
    precision: Precision,
    clip: float,
    micro_batch: int | None = None,
    dropout_seed: int = 0,
    context: Tensor | None = None,
) -> StepResult:
    """One update from ids (B, S) int64: the mean loss over the batch's real targets, however it is cut up.

    `micro_batch` rows at a time go forward and backward, with the masks of dropout that the whole batch would have. A
    non-finite loss, or without a scaler a non-finite gradient, raises TrainingError before any weight changes.
    PartialUpdateError where memory runs out later than that; where it does before, the error as it is: then the same
    step can be done again.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    rows, device = len(ids), ids.device
    tokens, targets = ids[:, :-1], ids[:, 1:]
    lengths = (targets != PAD).sum(1)
    num_targets = int(lengths.sum())
    nll_sum, contexts = torch.zeros((), dtype=torch.float64, device=device), []
    rate = model.config.dropout
    dropout = Dropout(rate, dropout_seed, device, rows) if rate else None
    for start in range(0, rows, micro_batch or rows):
        part = slice(start, start + (micro_batch or rows))
        if dropout is not None:
            dropout.first_row = start
        before = None if context is None else context[part]
        with precision.autocast(device.type):
            hidden, after = model.hidden(tokens[part], before, lengths[part], dropout, engine)
            nll, _ = token_losses(hidden, model.head, targets[part])
        scaler.scale(nll.sum() / num_targets).backward()
        nll_sum += nll.detach().sum()
        contexts.append(after.detach())
        del hidden, after, nll  # or this part's activations would stay while the next part makes its own
    total, context = float(nll_sum), torch.cat(contexts)
    if not math.isfinite(total):
        raise TrainingError(
            f"the loss is {total}: the weights have left the range in which they can learn; a lower lr may help"
        )
    try:
        norm, not_finite = _update(model, optimizers, scaler, clip)
    except Exception as error:
        if is_out_of_memory(error):
            raise PartialUpdateError(str(error)) from error
        raise
    # from here on nothing may need memory
    return StepResult(total, num_targets, norm, bool(not_finite), not_finite, context, ids)


def _update(
    model: NewLLM, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, clip: float
) -> tuple[float, tuple[str, ...]]:
    """Unscale, clip and step; returns the norm before clipping, and the parameters for which the step was left out."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    norm, not_finite = float(total), ()
    if math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, total)
        for optimizer in optimizers:
            scaler.step(optimizer)
    else:
        not_finite = _not_finite(model)
        if not scaler.is_enabled():
            raise TrainingError(
                f"the gradient norm is {norm} though the loss is finite. Not finite is the gradient of "
                f"{listed(not_finite)}; a lower lr may help"
            )
    scaler.update()
    return norm, not_finite


def _not_finite(model: NewLLM) -> tuple[str, ...]:
    """The parameters whose gradient is not finite, by name; the one with the largest where only their norm is not."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    names = tuple(name for name, gradient in gradients.items() if not gradient.isfinite().all())
    return names or (max(gradients, key=lambda name: float(gradients[name].abs().max())),)
