"""The recurrence at the speed of the machine: what need not be in the time loop leaves it.

One custom autograd function for any device. The token half of the first layer is computed once for each word in use;
the three context heads are one product; padding is never computed (rows are taken by falling length, and the active
block shrinks as they end); activations are stored once, packed step after step; weight gradients are one large
product each after the backward loop. The state, its LayerNorm and the gates keep the type of the context (FP32 while
training); the products run in the type of autocast.

Letters: B batch, T time, E embedding, H hidden, C context, L layers; N real tokens of the batch, n rows active in a
step, U distinct words among the tokens.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from newllm_lib.model.recurrence import time_loop
from newllm_lib.model.recurrence.cell import Cell, LoopWeights
from newllm_lib.model.recurrence.dropout import Dropout
from newllm_lib.model.recurrence.gradient_sums import bias_gradient, weight_gradient
from newllm_lib.model.recurrence.packing import Packing
from newllm_lib.model.recurrence.time_loop import Deltas, Trace, rows_at
from newllm_lib.model.recurrence.weights import Weights

_BLOCK = {"cpu": 1 << 14, "cuda": 1 << 16}
"""Tokens after which the backward loop makes its weight gradients: enough for products at full speed, few enough that
what they are made from stays small beside the activations."""
_SAFE_LOOKUPS = 3073
"""Up to 3,072 tokens, CUDA's gradient of an embedding takes a path of its own, in which threads race (pytorch
#187687); rows of zeros lead past it."""


def recurrence(
    weights: Weights,
    tokens: Tensor,
    context: Tensor,
    lengths: Tensor | None = None,
    dropout: Dropout | None = None,
    packed: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `reference.recurrence`, in values and gradients; packed: whether products may use oneDNN's layout."""
    dtype = product_dtype(tokens.device.type, context.dtype)
    with torch.autocast(tokens.device.type, enabled=False):
        packing = Packing.of(tokens, lengths, len(weights.embedding))
        if dropout is None and not torch.is_grad_enabled():
            return _read(LoopWeights.of(weights, packing.words, dtype, packed=packed), packing, context)
        top, after = packed_recurrence(weights, packing, context, dropout, dtype, packed)
        return top.view(len(context), -1, top.shape[1]), after


def packed_recurrence(
    weights: Weights,
    packing: Packing,
    context: Tensor,
    dropout: Dropout | None,
    dtype: torch.dtype,
    packed: bool = True,
    loop: ModuleType = time_loop,
) -> tuple[Tensor, Tensor]:
    """The last hidden layer as `packing.spread` lays it out, in `dtype`, and the context (B, C) after the last token.

    Call it with autocast disabled. loop: the module that has the time loop, `time_loop` or another with its names.
    """
    first = (weights.embedding, weights.token, weights.token_bias, weights.context)
    last = (weights.heads, weights.heads_bias, weights.norm, weights.norm_bias)
    layers = [tensor for pair in weights.layers for tensor in pair]
    return _Recurrence.apply(packing, dropout, weights.clamp, dtype, packed, loop, context, *first, *last, *layers)


def product_dtype(device_type: str, default: torch.dtype) -> torch.dtype:
    """The type of matrix products here: autocast's where it is on."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else default


class _Recurrence(torch.autograd.Function):
    """All steps of a packed batch, forward and back."""

    @staticmethod
    def forward(ctx, packing, dropout, clamp, dtype, packed, loop, context, *tensors):
        """Hidden in the type of the products, as the packing lays it out, and the context (B, C) after the last."""
        embedding, token, token_bias, context_weight, heads, heads_bias, norm, norm_bias, *layers = tensors
        pairs = tuple(zip(layers[::2], layers[1::2], strict=True))
        weights = Weights(
            embedding, token, token_bias, context_weight, pairs, heads, heads_bias, norm, norm_bias, clamp
        )
        cell = LoopWeights.of(weights, packing.words, dtype, dropout.scale if dropout else 1.0, packed)
        state = context[packing.order]
        trace = loop.forward(cell, packing, dropout, state)
        top = trace.hidden[-1][: packing.total]
        hidden = packing.spread(top * cell.scale if dropout else top)
        after = torch.empty_like(context)
        after[packing.order] = state
        ctx.packing, ctx.cell, ctx.trace, ctx.loop = packing, cell, trace, loop
        ctx.save_for_backward(context, *tensors)
        return hidden, after

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, grad_after):
        """Gradients of the context and of every weight."""
        with torch.autocast(grad_hidden.device.type, enabled=False):  # the caller's, if `backward` is called under it
            return _backward(ctx, grad_hidden, grad_after)


def _backward(ctx, grad_hidden: Tensor, grad_after: Tensor) -> tuple[Tensor | None, ...]:
    """What `_Recurrence.backward` returns."""
    context, *tensors = ctx.saved_tensors
    packing, cell = ctx.packing, ctx.cell
    grad_top = packing.gathered(grad_hidden)
    if cell.scale != 1:
        grad_top.mul_(cell.scale)
    first = context[packing.order]
    loop = ctx.loop.Backward(cell, packing, ctx.trace, first, grad_top, grad_after[packing.order])
    gradients = [torch.zeros_like(tensor) for tensor in tensors]
    for steps in packing.blocks(_BLOCK.get(context.device.type, _BLOCK["cuda"])):
        parts = _weight_gradients(cell, packing, ctx.trace, loop.run(steps), tensors, steps)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.add_(part)
    grad_context = torch.empty_like(context)
    grad_context[packing.order] = loop.grad_state
    return None, None, None, None, None, None, grad_context, *gradients


def _read(prepared: LoopWeights, packing: Packing, context: Tensor) -> tuple[Tensor, Tensor]:
    """The pass when no gradient will be asked for: nothing is kept but the last layer."""
    inputs = rows_at(prepared.table, pad(packing.word_of, (0, packing.slack)))  # (N + slack, H)
    cell, state = Cell(prepared, len(packing.order)), context[packing.order]
    top = torch.empty_like(inputs)
    for t, rows in enumerate(packing.active):
        start, more = packing.offsets[t], packing.rounded(rows)
        h, after = cell(inputs[start : start + more], state[:more])
        top[start : start + rows], state[:rows] = h[:rows], after[:rows]
    after = torch.empty_like(context)
    after[packing.order] = state
    return packing.spread(top[: packing.total]).view(len(context), -1, inputs.shape[1]), after


def _weight_gradients(
    cell: LoopWeights, packing: Packing, trace: Trace, deltas: Deltas, tensors: list[Tensor], steps: range
):
    """Of some steps, in the order of `tensors` and the type of each: one large product a weight."""
    embedding, token, token_bias, context, heads, heads_bias, _, _, *layers = tensors
    span = slice(packing.offsets[steps.start], packing.offsets[steps.stop])
    table = _sums_by_word(deltas.hidden[0].to(token.dtype), packing.word_of[span], len(packing.words))  # (U, H)
    yield torch.zeros_like(embedding).index_copy_(0, packing.words, table @ token)
    yield table.t() @ embedding[packing.words]
    yield table.sum(0).to(token_bias.dtype)
    yield weight_gradient(deltas.hidden[0], trace.read[span]).to(context.dtype)
    yield weight_gradient(deltas.heads, trace.hidden[-1][span]).to(heads.dtype).mul_(cell.scale)
    yield bias_gradient(deltas.heads).to(heads_bias.dtype)
    yield torch.stack(deltas.norm).sum(0)
    yield torch.stack(deltas.norm_bias).sum(0)
    for number, (weight, bias) in enumerate(zip(layers[::2], layers[1::2], strict=True), start=1):
        delta = deltas.hidden[number]
        yield weight_gradient(delta, trace.hidden[number - 1][span]).to(weight.dtype).mul_(cell.scale)
        yield bias_gradient(delta).to(bias.dtype)


def _sums_by_word(values: Tensor, word_of: Tensor, count: int) -> Tensor:
    """values (N, W), of word_of (N,) int64: their sums (count, W) by word, in a fixed order."""
    if values.device.type == "cuda" and len(values) < _SAFE_LOOKUPS:
        missing = _SAFE_LOOKUPS - len(values)
        values, word_of = pad(values, (0, 0, 0, missing)), pad(word_of, (0, missing))
    return torch.ops.aten.embedding_dense_backward(values, word_of, count, -1, False)
