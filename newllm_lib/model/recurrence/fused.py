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

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from newllm_lib.model.recurrence.cell import Cell, LoopWeights, mix
from newllm_lib.model.recurrence.dropout import Dropout
from newllm_lib.model.recurrence.gradient_sums import bias_gradient, weight_gradient
from newllm_lib.model.recurrence.packed_linear import Product
from newllm_lib.model.recurrence.packing import Packing
from newllm_lib.model.recurrence.weights import Weights
from newllm_lib.system.buffer_pool import BUFFERS

_EPSILON = 1e-5
"""Of the LayerNorm, torch's default."""
_BLOCK = 1 << 14
"""Tokens after which the backward loop makes its weight gradients: enough for products at full speed, few enough that
what they are made from stays small beside the activations."""


def recurrence(
    weights: Weights,
    tokens: Tensor,
    context: Tensor,
    lengths: Tensor | None = None,
    dropout: Dropout | None = None,
    packed: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `reference.recurrence`, in values and gradients; packed: whether products may use oneDNN's layout."""
    device = tokens.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else context.dtype
    first = (weights.embedding, weights.token, weights.token_bias, weights.context)
    last = (weights.heads, weights.heads_bias, weights.norm, weights.norm_bias)
    layers = [tensor for pair in weights.layers for tensor in pair]
    with torch.autocast(device, enabled=False):
        packing = Packing.of(tokens, lengths)
        if dropout is None and not torch.is_grad_enabled():
            return _read(LoopWeights.of(weights, packing.words, dtype, packed=packed), packing, context)
        return _Recurrence.apply(packing, dropout, weights.clamp, dtype, packed, context, *first, *last, *layers)


@dataclass
class _Trace:
    """What the backward pass reads, packed step after step."""

    hidden: list[Tensor]  # L times (N + slack, H): each layer's output, before dropout's 1 / keep
    heads: Tensor  # (N, 3C): candidate, forget gate, input gate before their sigmoids
    read: Tensor  # (N, C): the context before the token, as the products read it
    after: Tensor  # (N, C): the context after it
    mean: Tensor  # (N, 1): of each LayerNorm
    rstd: Tensor  # (N, 1): 1 / deviation of each LayerNorm


@dataclass
class _Deltas:
    """Gradients before each activation, packed, and the sums that the loop keeps."""

    hidden: list[Tensor]  # L times (N, H)
    heads: Tensor  # (N, 3C)
    norm: list[Tensor] = field(default_factory=list)  # a (C,) for each step
    norm_bias: list[Tensor] = field(default_factory=list)


class _Recurrence(torch.autograd.Function):
    """All steps of a packed batch, forward and back."""

    @staticmethod
    def forward(ctx, packing, dropout, clamp, dtype, packed, context, *tensors):
        """Hidden (B, T, H) in the type of the products, and the context (B, C) after the last token."""
        embedding, token, token_bias, context_weight, heads, heads_bias, norm, norm_bias, *layers = tensors
        pairs = tuple(zip(layers[::2], layers[1::2], strict=True))
        weights = Weights(
            embedding, token, token_bias, context_weight, pairs, heads, heads_bias, norm, norm_bias, clamp
        )
        cell = LoopWeights.of(weights, packing.words, dtype, dropout.scale if dropout else 1.0, packed)
        state = context[packing.order]
        trace = _new_trace(cell, state, packing)
        _run(cell, packing, dropout, state, trace)
        top = trace.hidden[-1][: len(packing.position)]
        hidden = top.new_zeros(packing.places, top.shape[1])
        hidden.index_copy_(0, packing.position, top * cell.scale if dropout else top)
        after = torch.empty_like(context)
        after[packing.order] = state
        ctx.packing, ctx.cell, ctx.trace = packing, cell, trace
        ctx.save_for_backward(context, *tensors)
        return hidden.view(len(context), -1, top.shape[1]), after

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, grad_after):
        """Gradients of the context and of every weight."""
        context, *tensors = ctx.saved_tensors
        packing, cell = ctx.packing, ctx.cell
        grad_top = _rows(grad_hidden.reshape(packing.places, -1), pad(packing.position, (0, packing.slack)))
        if cell.scale != 1:
            grad_top.mul_(cell.scale)
        grad_state = grad_after[packing.order]
        first, back = context[packing.order], _backward_products(cell, len(packing.order))
        gradients = [torch.zeros_like(tensor) for tensor in tensors]
        for steps in packing.blocks(_BLOCK):
            deltas = _run_back(cell, back, packing, ctx.trace, first, grad_top, grad_state, steps)
            parts = _weight_gradients(cell, packing, ctx.trace, deltas, tensors, steps)
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.add_(part)
        grad_context = torch.empty_like(context)
        grad_context[packing.order] = grad_state
        return None, None, None, None, None, grad_context, *gradients


def _read(prepared: LoopWeights, packing: Packing, context: Tensor) -> tuple[Tensor, Tensor]:
    """The pass when no gradient will be asked for: nothing is kept but the last layer."""
    inputs = _rows(prepared.table, pad(packing.word_of, (0, packing.slack)))  # (N + slack, H)
    cell, state = Cell(prepared, len(packing.order)), context[packing.order]
    hidden = inputs.new_zeros(packing.places, inputs.shape[1])
    top = torch.empty_like(inputs)
    for t, rows in enumerate(packing.active):
        start, more = packing.offsets[t], packing.rounded(rows)
        h, after = cell(inputs[start : start + more], state[:more])
        top[start : start + rows], state[:rows] = h[:rows], after[:rows]
    hidden.index_copy_(0, packing.position, top[: len(packing.position)])
    after = torch.empty_like(context)
    after[packing.order] = state
    return hidden.view(len(context), -1, inputs.shape[1]), after


def _new_trace(cell: LoopWeights, state: Tensor, packing: Packing) -> _Trace:
    total, width = len(packing.position), state.shape[1]
    low = cell.table
    return _Trace(
        hidden=[BUFFERS.empty(total + packing.slack, low.shape[1], like=low) for _ in range(len(cell.layers) + 1)],
        heads=BUFFERS.empty(total, 3 * width, like=low),
        read=BUFFERS.empty(total, width, like=low),
        after=BUFFERS.empty(total, width, like=state),
        mean=state.new_empty(total, 1),
        rstd=state.new_empty(total, 1),
    )


def _run(cell: LoopWeights, packing: Packing, dropout: Dropout | None, state: Tensor, trace: _Trace) -> None:
    """The loop, kept in `trace`; `state` (B, C) ends as the context after each row's last token."""
    inputs = _rows(cell.table, pad(packing.word_of, (0, packing.slack)))  # (N + slack, H)
    most = len(packing.order)
    enter = cell.product(cell.context, rows=most, relu=True)
    layers = [cell.product(weight, bias, rows=most, relu=True) for weight, bias in cell.layers]
    gates = cell.product(*cell.heads, rows=most)
    if dropout:
        dropout.start(len(layers) + 1, most, inputs.shape[1], None if packing.sorted else packing.order)
    for t, rows in enumerate(packing.active):
        span, more = packing.step(t), packing.rounded(rows)
        wide = slice(span.start, span.start + more)  # its rows beyond the span are the next step's, which follow
        read = state[:more].to(inputs.dtype, copy=True)  # the state itself changes below
        masks = dropout.next_masks(more, inputs.dtype) if dropout else None
        h = enter(read, inputs[wide])
        for layer, product in enumerate((*layers, gates)):
            h = product(_keep(h, masks, layer, trace.hidden[layer][wide]))
        heads = h[:rows]
        mixed = mix(heads.to(state.dtype), state[:rows])[0]
        new, mean, rstd = torch.native_layer_norm(mixed, mixed.shape[1:], cell.norm, cell.norm_bias, _EPSILON)
        state[:rows] = new.clamp_(-cell.clamp, cell.clamp)
        trace.read[span], trace.heads[span], trace.after[span] = read[:rows], heads, new
        trace.mean[span], trace.rstd[span] = mean, rstd


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """values (M, W) at index (N,): (N, W)."""
    return torch.index_select(values, 0, index, out=BUFFERS.empty(len(index), values.shape[1], like=values))


def _keep(h: Tensor, masks: Tensor | None, layer: int, kept: Tensor) -> Tensor:
    """Dropout without its 1 / keep on h (n, H), written to `kept` (n, H)."""
    return kept.copy_(h) if masks is None else torch.mul(h, masks[layer], out=kept)


def _backward_products(cell: LoopWeights, rows: int) -> tuple[list[Product], Product]:
    """The weights the other way round: of every layer, and of the heads."""
    weights = (cell.context, *(weight for weight, _ in cell.layers))
    return [cell.product(weight.t(), rows=rows) for weight in weights], cell.product(cell.heads[0].t(), rows=rows)


def _run_back(cell, back, packing: Packing, trace: _Trace, first, grad_top, grad_state, steps: range) -> _Deltas:
    """Some steps of the loop backwards; `grad_state` (B, C) ends as the gradient of the context before them."""
    layers, gates = back
    start, end = packing.offsets[steps.start], packing.offsets[steps.stop]
    total = end - start
    rows = total + packing.slack
    spare = [BUFFERS.empty(rows, values.shape[1], like=values) for values in (*trace.hidden, trace.heads)]
    for values in spare:
        values[total:] = 0  # read by the last step's products, never written
    deltas = _Deltas([values[:total] for values in spare[:-1]], spare[-1][:total])
    width = first.shape[1]
    for t in reversed(steps):
        rows, span = packing.active[t], packing.step(t)
        here = slice(span.start - start, span.stop - start)
        more = slice(here.start, here.start + packing.rounded(rows))  # computed, never kept, as in the forward loop
        state = first[:rows] if t == 0 else trace.after[packing.offsets[t - 1] : packing.offsets[t - 1] + rows]
        mixed, candidate, forget, write = mix(trace.heads[span].to(state.dtype), state)
        grad = torch.ops.aten.hardtanh_backward(grad_state[:rows], trace.after[span], -cell.clamp, cell.clamp)
        statistics = (trace.mean[span], trace.rstd[span], cell.norm, cell.norm_bias)
        grad, norm, norm_bias = torch.ops.aten.native_layer_norm_backward(
            grad, mixed, mixed.shape[1:], *statistics, [True, True, True]
        )
        deltas.norm.append(norm)
        deltas.norm_bias.append(norm_bias)
        heads = deltas.heads[here]
        heads[:, :width] = grad * write
        heads[:, width : 2 * width] = torch.ops.aten.sigmoid_backward(grad * state, forget)
        heads[:, 2 * width :] = torch.ops.aten.sigmoid_backward(grad * candidate, write)
        h = gates(spare[-1][more], grad_top[span.start : span.start + packing.rounded(rows)])
        for layer in reversed(range(len(layers))):
            delta = deltas.hidden[layer][here]
            # h > 0 only where the unit was active and kept, so no mask is needed
            torch.ops.aten.threshold_backward.grad_input(h[:rows], trace.hidden[layer][span], 0, grad_input=delta)
            h = layers[layer](spare[layer][more])
        grad_state[:rows] = torch.addcmul(h[:rows].to(state.dtype), grad, forget)
    return deltas


def _weight_gradients(
    cell: LoopWeights, packing: Packing, trace: _Trace, deltas: _Deltas, tensors: list[Tensor], steps: range
):
    """Of some steps, in the order of `tensors` and the type of each: one large product a weight."""
    embedding, token, token_bias, context, heads, heads_bias, _, _, *layers = tensors
    span = slice(packing.offsets[steps.start], packing.offsets[steps.stop])
    wide = deltas.hidden[0].to(token.dtype)
    table = torch.ops.aten.embedding_dense_backward(
        wide, packing.word_of[span], len(packing.words), -1, False
    )  # (U, H)
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
