"""One optimizer step, from a batch of ids to changed weights, and the optimizers that it uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from newllm_lib.config import PAD, TrainConfig
from newllm_lib.hardware import Precision
from newllm_lib.metrics import token_losses
from newllm_lib.model import NewLLM
from newllm_lib.recurrence import Dropout


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and that the last good checkpoint stays."""


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
    context: Tensor
    """(B, C) after the batch, detached."""


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

    `micro_batch` rows at a time go forward and backward. A non-finite loss, or without a scaler a non-finite
    gradient, raises TrainingError before any weight changes.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    rows, device = len(ids), ids.device
    tokens, targets = ids[:, :-1], ids[:, 1:]
    lengths = (targets != PAD).sum(1)
    num_targets = int(lengths.sum())
    nll_sum, contexts = torch.zeros((), dtype=torch.float64, device=device), []
    for start in range(0, rows, micro_batch or rows):
        part = slice(start, start + (micro_batch or rows))
        rate = model.config.dropout
        dropout = Dropout(rate, dropout_seed + start, device) if rate else None
        before = None if context is None else context[part]
        with precision.autocast(device.type):
            hidden, after = model.hidden(tokens[part], before, lengths[part], dropout, engine)
            nll, _ = token_losses(hidden, model.head, targets[part])
        scaler.scale(nll.sum() / num_targets).backward()
        nll_sum += nll.detach().sum()
        contexts.append(after.detach())
    if not math.isfinite(nll_sum):
        raise TrainingError(f"the loss is {float(nll_sum)}: the weights have left the range in which they can learn")
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    skipped = not math.isfinite(norm)
    if skipped and not scaler.is_enabled():
        raise TrainingError(f"the gradient norm is {norm} though the loss is finite")
    if not skipped:
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    return StepResult(float(nll_sum), num_targets, norm, skipped, torch.cat(contexts))


def make_optimizers(model: NewLLM, train: TrainConfig, peak_rate: float) -> list[torch.optim.Optimizer]:
    """Adam, AdamW, or Muon with AdamW; each group keeps its peak rate under `peak_lr`.

    Muon (Jordan et al. 2024; torch.optim.Muon) orthogonalises the update of a matrix, so it takes the hidden
    matrices: both halves of the first layer, the other layers and the context heads. Embedding, output head, biases
    and LayerNorm stay with AdamW.
    """
    adam = {"lr": peak_rate, "betas": (train.beta1, train.beta2), "weight_decay": train.weight_decay}
    if train.optimizer == "adam":
        optimizers = [torch.optim.Adam(model.parameters(), **adam)]
    elif train.optimizer == "adamw":
        optimizers = [torch.optim.AdamW(model.parameters(), **adam)]
    else:
        hidden = (model.from_token, model.from_context, *model.layers, model.context_heads)
        matrices = [layer.weight for layer in hidden]
        taken = {id(matrix) for matrix in matrices}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        muon = {"lr": train.muon_lr, "momentum": train.muon_momentum, "weight_decay": train.weight_decay}
        optimizers = [torch.optim.Muon(matrices, **muon), torch.optim.AdamW(rest, **adam)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Let every group learn at `factor` times its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
