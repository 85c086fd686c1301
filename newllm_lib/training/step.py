"""One optimizer step, from a batch of ids to changed weights; and the object that holds what a step needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from newllm_lib.config import PAD
from newllm_lib.errors import PartialUpdateError, TrainingError
from newllm_lib.model.loss import softmax_less_target, summed_loss, token_losses
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import Dropout
from newllm_lib.system.hardware import Precision
from newllm_lib.system.memory import is_out_of_memory
from newllm_lib.training.batch_graph import BatchGraph
from newllm_lib.training.optimizers import make_optimizers, scale_lr
from newllm_lib.training.schedule import clip_norm
from newllm_lib.training.setup import Setup
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
    context: Tensor | None
    """(B, C) after the batch, detached; None where the step was that of a CUDA graph, of windows."""
    ids: Tensor
    """(B, S) int64: the batch."""


class TrainingStep:
    """A model with all that one update of it needs: call it with a batch.

    `optimizers`, `scaler`, `engine` and `precision` may be read at any time; `clip` (largest global norm of the
    gradient) and `micro_batch` (sequences computed at a time, None = the whole batch) may be set between steps.
    """

    def __init__(
        self,
        model: NewLLM,
        optimizers: list[torch.optim.Optimizer],
        precision: Precision,
        engine: Callable,
        *,
        clip: float = math.inf,
        micro_batch: int | None = None,
        init_scale: float = 65536.0,
    ):
        """engine: a function of `recurrence.ENGINES`; init_scale: the loss scale of the first step (FP16 only)."""
        self.model, self.optimizers, self.precision, self.engine = model, optimizers, precision, engine
        self.clip, self.micro_batch = clip, micro_batch
        self.scaler = precision.scaler(model.device.type, init_scale)
        self.graph: BatchGraph | None = None
        """Computes the gradients of whole batches of windows where there is one; `graph_choice` makes it."""
        self.ids_checked = False
        """Whether all ids that will come are known to be in the vocabulary."""
        self.lr_factor = 1.0
        """Of the peak learning rate."""

    @classmethod
    def for_run(cls, setup: Setup, model: NewLLM, init_scale: float = 65536.0) -> TrainingStep:
        """As a run trains in its first epoch, with new optimizers; the model is on the setup's device."""
        train = setup.config.train
        return cls(
            model,
            make_optimizers(model, train, setup.rate.value, setup.precision.name),
            setup.precision,
            setup.engine.run,
            clip=clip_norm(0, train),
            micro_batch=train.micro_batch_size,
            init_scale=init_scale,
        )

    def set_lr(self, factor: float) -> None:
        """From the next step on, every parameter group learns at `factor` times its peak learning rate."""
        scale_lr(self.optimizers, factor)
        self.lr_factor = factor

    def renew_scaler(self) -> None:
        """Forget the loss scale, and what the scaler holds of a step that was not finished."""
        self.scaler = self.precision.scaler(self.model.device.type)

    def __call__(self, ids: Tensor, *, dropout_seed: int = 0, context: Tensor | None = None) -> StepResult:
        """One update by ids (B, S) int64 on the model's device, from a context (B, C) or the empty one.

        TrainingError and PartialUpdateError as of `optimizer_step`.
        """
        if self.graph is not None and context is None and (self.micro_batch or len(ids)) >= len(ids):
            result = self._graph_step(ids, dropout_seed)
            if result is not None:
                return result
        return optimizer_step(
            self.model,
            self.optimizers,
            self.scaler,
            ids,
            engine=self.engine,
            precision=self.precision,
            clip=self.clip,
            micro_batch=self.micro_batch,
            dropout_seed=dropout_seed,
            context=context,
            ids_checked=self.ids_checked,
        )

    def _graph_step(self, ids: Tensor, dropout_seed: int) -> StepResult | None:
        """One update by the graph; None where the batch has more tokens at some step than the graph takes."""
        scale = self.scaler.scale(ids.new_ones((), dtype=torch.float32))
        totals = self.graph.compute(ids, dropout_seed, scale)
        if not totals.fits.item():
            return None
        sums = torch.stack([totals.nll, totals.tokens])
        return StepResult(*_update_or_partial(sums, self.model, self.optimizers, self.scaler, self.clip), None, ids)


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
    ids_checked: bool = False,
) -> StepResult:
    """One update from ids (B, S) int64: the mean loss over the batch's real targets, however it is cut up.

    `micro_batch` rows at a time go forward and backward, with the masks of dropout that the whole batch would have.
    ids_checked: whether all ids are known to be in the vocabulary; asking a GPU makes the step wait for it. A
    non-finite loss, or without a scaler a non-finite gradient, raises TrainingError before any weight changes.
    PartialUpdateError where memory runs out later than that; where it does before, the error as it is: then the same
    step can be done again.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    totals, context = eager_gradients(
        model,
        ids,
        engine=engine,
        precision=precision,
        scale=scaler.scale,
        micro_batch=micro_batch,
        dropout_seed=dropout_seed,
        context=context,
        ids_checked=ids_checked,
    )
    done = _update_or_partial(totals, model, optimizers, scaler, clip)
    return StepResult(*done, context, ids)  # after the update nothing may need memory


def eager_gradients(
    model: NewLLM,
    ids: Tensor,
    *,
    engine: Callable,
    precision: Precision,
    scale: Callable[[Tensor], Tensor],
    micro_batch: int | None = None,
    dropout_seed: int = 0,
    context: Tensor | None = None,
    ids_checked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add the gradients of the mean loss of ids (B, S), put through `scale`, to the parameters'.

    Returns the summed loss (nats) and the number of real targets, as (2,) float64 on the device, and the context
    (B, C) after them. Options as of `optimizer_step`.
    """
    rows, device = len(ids), ids.device
    tokens, targets = ids[:, :-1], ids[:, 1:]
    lengths = (targets != PAD).sum(1)
    num_targets = lengths.sum()
    nll_sum, contexts = torch.zeros((), dtype=torch.float64, device=device), []
    dropout_p = model.config.dropout
    dropout = Dropout(dropout_p, dropout_seed, device, rows) if dropout_p else None
    for start in range(0, rows, micro_batch or rows):
        part = slice(start, start + (micro_batch or rows))
        if dropout is not None:
            dropout.first_row = start
        before = None if context is None else context[part]
        with precision.autocast(device.type):
            hidden, after = model.hidden(tokens[part], before, lengths[part], dropout, engine, checked=ids_checked)
            nll = _summed_nll(model, hidden, targets[part], precision)
        scale(nll / num_targets).backward()
        nll_sum += nll.detach()
        contexts.append(after.detach())
        del hidden, after, nll  # or this part's activations would stay while the next part makes its own
    return torch.stack([nll_sum, num_targets.double()]), torch.cat(contexts)


def _summed_nll(model: NewLLM, hidden: Tensor, targets: Tensor, precision: Precision) -> Tensor:
    """The losses of hidden (B, T, H) for targets (B, T), added up (nats).

    On a GPU without asking it where the padding is, and without keeping anything of (tokens x V), which for a large
    vocabulary is more than all the rest.
    """
    if hidden.device.type != "cuda":
        return token_losses(hidden, model.head, targets)[0].sum()
    with torch.autocast(hidden.device.type, enabled=False):
        rows = hidden.reshape(-1, hidden.shape[-1]).to(precision.dtype)
        return summed_loss(rows, model.head, targets.reshape(-1), softmax_less_target)


class _Update(NamedTuple):
    """The fields of a `StepResult` up to its context."""

    nll: float
    tokens: int
    grad_norm: float
    skipped: bool
    not_finite: tuple[str, ...]


def _update_or_partial(totals: Tensor, model: NewLLM, *rest) -> _Update:
    """As `_update`; PartialUpdateError where memory runs out."""
    try:
        return _update(totals, model, *rest)
    except Exception as error:
        if is_out_of_memory(error):
            raise PartialUpdateError(str(error)) from error
        raise


def _update(
    totals: Tensor,
    model: NewLLM,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    clip: float,
) -> _Update:
    """Unscale, clip and step by the gradients of a pass whose `totals` (2,) are its summed loss and real targets.

    Everything that the host must know is read at once, since each reading waits for the device.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    nll, tokens, norm = torch.cat([totals, total.double().reshape(1)]).tolist()
    if not math.isfinite(nll):
        raise TrainingError(
            f"the loss is {nll}: the weights have left the range in which they can learn; a lower lr may help"
        )
    not_finite: tuple[str, ...] = ()
    if math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, total)
        for optimizer in optimizers:
            optimizer.step()  # not scaler.step, which waits for the device to learn what the norm says already
    else:
        not_finite = _not_finite(model)
        if not scaler.is_enabled():
            raise TrainingError(
                f"the gradient norm is {norm} though the loss is finite. Not finite is the gradient of "
                f"{listed(not_finite)}; a lower lr may help"
            )
    scaler.update()
    return _Update(nll, round(tokens), norm, bool(not_finite), not_finite)


def _not_finite(model: NewLLM) -> tuple[str, ...]:
    """The parameters whose gradient is not finite, by name; the one with the largest where only their norm is not."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    names = tuple(name for name, gradient in gradients.items() if not gradient.isfinite().all())
    return names or (max(gradients, key=lambda name: float(gradients[name].abs().max())),)
