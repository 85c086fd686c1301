"""One optimizer step, from a batch of ids to changed weights; its optimizers, the order of the batches, its seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from newllm_lib.config import PAD, TrainConfig
from newllm_lib.errors import PartialUpdateError, TrainingError
from newllm_lib.hardware import Machine, Precision, is_out_of_memory, peak_memory_bytes
from newllm_lib.metrics import fewer_rows, token_losses
from newllm_lib.model import NewLLM
from newllm_lib.recurrence import Dropout
from newllm_lib.skips import listed

TornUpdate = PartialUpdateError
"""Its former name."""


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


@dataclass
class Portion:
    """How many sequences are computed at a time: fewer each time that memory has run out."""

    rows: int
    work: str
    whole: str
    """What does not change with `rows`."""
    field: str
    """Which one sets `rows`."""
    machine: Machine
    tell: Callable[[str], None]

    def halve(self, rows: int, failure: str) -> int:
        """Half of `rows` from here on, said to the user; TrainingError where it is one. As `metrics.fewer_rows`."""
        try:
            self.rows = fewer_rows(rows, failure)
        except MemoryError as error:
            used, there = (size / 2**30 for size in (peak_memory_bytes(self.machine), self.machine.memory_bytes))
            raise TrainingError(
                f"{self.work}: {error}. At most {used:.1f} GiB were in use, of {there:.1f} GiB of {self.machine.name}"
            ) from None
        self.tell(
            f"warning: memory ran out in {self.work}: {self.whole} stays as it is, computed {self.rows} sequences at a "
            f"time; {self.field} = {self.rows} begins that way"
        )
        return self.rows


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


@lru_cache(maxsize=2)  # asked for at every batch of an epoch
def epoch_order(seed: int, epoch: int, rows: int) -> Tensor:
    """The order (rows,) in which an epoch reads its sequences: a function of seed and epoch alone."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(mix_seed(seed, epoch, -1)))


def mix_seed(*parts: int) -> int:
    """One seed below 2^62 from several numbers (an FNV-1a hash), so that no two uses share a generator's stream."""
    value = 0xCBF29CE484222325
    for part in parts:
        for byte in part.to_bytes(9, "little", signed=True):
            value = ((value ^ byte) * 0x100000001B3) & (2**64 - 1)
    return value >> 2
