"""Output layer and cross entropy together, chunk by chunk, so that all logits never exist at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from newllm_lib.config import PAD
from newllm_lib.model.recurrence.gradient_sums import bias_gradient, weight_gradient
from newllm_lib.system.buffer_pool import BUFFERS

_CHUNK_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Logits that exist in FP32 at one time: on a CPU 2 MiB, which stay in its cache between the passes over them; on a GPU
enough that starting the passes costs nothing beside them."""
_ROW_STEP = 256
"""Rows are padded to a multiple of it: every new shape costs the CPU's bf16 library a compiled kernel of about 1 MiB,
and the number of real targets differs from batch to batch."""


def token_losses(hidden: Tensor, head: tuple[Tensor, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each real target, and whether it was the likeliest.

    hidden (B, T, H); head = weight (V, H) and bias (V,); targets (B, T) int64, PAD where there is none. Returns nll
    (N,) float32 (float64 for float64 input) in nats and correct (N,) bool, over the N targets that are not PAD in
    row-major order. Logits are made in chunks, so (tokens x V) never exists whole in FP32; what the gradient needs is
    kept in the type of the products.
    """
    real = targets != PAD
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        places = real.reshape(-1).nonzero().squeeze(1)
        count = len(places)
        # with the first row, whose extra losses are cut off again; at least once, for there may be no target at all
        places = pad(places, (0, -count % _ROW_STEP if count else _ROW_STEP))
        rows, wanted = (
            hidden.reshape(-1, hidden.shape[-1]).to(dtype).index_select(0, places),
            targets.reshape(-1)[places],
        )
        nll, correct = _TokenLosses.apply(rows, *head, wanted)
    return nll[:count], correct[:count]


class _TokenLosses(torch.autograd.Function):
    """Linear layer and cross entropy together: nll = logsumexp(logits) - logits[target].

    The gradient d nll / d logits = softmax - onehot is made in the forward pass, chunk by chunk while the logits are
    at hand, and kept in the type of the products, which is that of `hidden`; the backward pass is two large products.
    Weight and bias are cast here and not by the caller, so that their gradients, sums over all targets, never pass
    through 16 bits.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """nll (N,) and correct (N,) for hidden (N, H), weight (V, H), bias (V,) and targets (N,)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        ctx.types = weight.dtype, bias.dtype
        weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
        nll = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        correct = torch.empty_like(nll, dtype=torch.bool)
        grad_logits = BUFFERS.empty(len(hidden), len(weight), like=hidden) if any(ctx.needs_input_grad) else None
        for part in _chunks(len(hidden), weight):
            wanted = targets[part, None]
            logits = linear(hidden[part], weight, bias)  # (n, V)
            log_probs = logits.log_softmax(1, dtype=wide)
            correct[part] = _is_first_largest(log_probs, targets[part])
            nll[part] = -log_probs.gather(1, wanted).squeeze(1)
            if grad_logits is not None:
                probs = log_probs.exp_()
                grad_logits[part] = probs.scatter_add_(1, wanted, probs.new_full(wanted.shape, -1.0))
        ctx.save_for_backward(hidden, weight, grad_logits)
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll: Tensor, _grad_correct: Tensor):
        """With s = d nll / d logits (N, V) and g the gradient of nll: g s W, (g s)^T h and (g s)^T 1."""
        hidden, weight, grad_logits = ctx.saved_tensors
        largest = grad_nll.abs().amax().clamp(min=torch.finfo(grad_nll.dtype).tiny)  # keeps FP16 in its range
        scaled_grad = (grad_nll / largest).to(hidden.dtype)[:, None]  # (N, 1), at most 1
        with torch.autocast(hidden.device.type, enabled=False):  # the caller's, if `backward` is called under it
            grad_hidden = (grad_logits @ weight).mul_(scaled_grad).mul_(largest)
            grad_weight = weight_gradient(grad_logits, hidden * scaled_grad).mul_(largest)
            grad_bias = weight_gradient(scaled_grad, grad_logits).squeeze(0).mul_(largest)
        weight_type, bias_type = ctx.types
        return grad_hidden, grad_weight.to(weight_type), grad_bias.to(bias_type), None


def summed_loss(
    hidden: Tensor, head: tuple[Tensor, Tensor], targets: Tensor, losses: Callable[[Tensor, Tensor, Tensor], None]
) -> Tensor:
    """The sum of the negative log-likelihoods (nats), a float32 scalar (float64 for float64 input).

    hidden (N, H) in the type of the products; head = weight (V, H) and bias (V,); targets (N,) int64, PAD where there
    is none. losses: `softmax_less_target` or another of its kind. Call it with autocast disabled. All gradients are
    made in the forward pass, chunk by chunk, so that nothing of (N x V) is kept.
    """
    return _LossSum.apply(hidden, *head, targets, losses)


def softmax_less_target(logits: Tensor, targets: Tensor, nll: Tensor) -> None:
    """Replace logits (n, V) by softmax - onehot of targets (n,) int64, and fill nll (n,); both are 0 where PAD is."""
    wanted, real = targets[:, None], (targets != PAD)[:, None]
    log_probs = logits.log_softmax(1, dtype=nll.dtype)
    nll.copy_(torch.where(real, -log_probs.gather(1, wanted), 0).squeeze(1))
    probs = log_probs.exp_()
    logits.copy_(probs.scatter_add_(1, wanted, probs.new_full(wanted.shape, -1.0)).masked_fill_(~real, 0))


class _LossSum(torch.autograd.Function):
    """Linear layer, cross entropy and sum together: the gradient of each loss is the same number."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, losses: Callable) -> Tensor:
        """The sum for hidden (N, H), weight (V, H), bias (V,) and targets (N,)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        low, low_bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
        nll = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight, grad_bias = torch.zeros_like(weight, dtype=wide), torch.zeros_like(bias, dtype=wide)
        for part in _chunks(len(hidden), weight):
            logits = linear(hidden[part], low, low_bias)  # (n, V)
            losses(logits, targets[part], nll[part])
            torch.mm(logits, low, out=grad_hidden[part])
            grad_weight += weight_gradient(logits, hidden[part])
            grad_bias += bias_gradient(logits)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype))
        return nll.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """Each gradient of the sum times that of the loss."""
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, grad_bias * grad, None, None


def _is_first_largest(values: Tensor, index: Tensor) -> Tensor:
    """`values.argmax(1) == index` for values (n, V), index (n,): on a CPU argmax takes 50 times as long as amax."""
    if values.device.type != "cpu":
        return values.argmax(1) == index
    largest = values.amax(1, keepdim=True)
    hit = values.gather(1, index[:, None]) == largest
    hit = hit.squeeze(1)
    rows = hit.nonzero().squeeze(1)
    tied = rows[(values[rows] == largest[rows]).sum(1) > 1]  # equal logits are common in BF16
    hit[tied] = values[tied].argmax(1) == index[tied]
    return hit


def _chunks(rows: int, weight: Tensor) -> list[slice]:
    logits = _CHUNK_LOGITS.get(weight.device.type, _CHUNK_LOGITS["cuda"])
    size = max(1, logits // len(weight) // _ROW_STEP) * _ROW_STEP
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
