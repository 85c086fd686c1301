"""The time loop with gradients in torch's own operations, on any device: forward into a trace, and back.

Letters as in `fused`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from newllm_lib.model.recurrence.cell import LoopWeights, mix
from newllm_lib.model.recurrence.dropout import Dropout
from newllm_lib.model.recurrence.packed_linear import Product
from newllm_lib.model.recurrence.packing import Packing
from newllm_lib.system.buffer_pool import BUFFERS

EPSILON = 1e-5
"""Of the LayerNorm, torch's default."""


@dataclass
class Trace:
    """What the backward pass reads, packed step after step."""

    hidden: list[Tensor]  # L times (N + slack, H): each layer's output, before dropout's 1 / keep
    heads: Tensor  # (N, 3C): candidate, forget gate, input gate before their sigmoids
    read: Tensor  # (N, C): the context before the token, as the products read it
    after: Tensor  # (N, C): the context after it
    mean: Tensor  # (N, 1): of each LayerNorm
    rstd: Tensor  # (N, 1): 1 / deviation of each LayerNorm

    @classmethod
    def empty(cls, cell: LoopWeights, packing: Packing, state: Tensor) -> Trace:
        """One for all steps of a packing; state (B, C): the context, for its type."""
        total, width, low = packing.total, state.shape[1], cell.table
        return cls(
            hidden=[BUFFERS.empty(total + packing.slack, low.shape[1], like=low) for _ in range(len(cell.layers) + 1)],
            heads=BUFFERS.empty(total, 3 * width, like=low),
            read=BUFFERS.empty(total, width, like=low),
            after=BUFFERS.empty(total, width, like=state),
            mean=state.new_empty(total, 1),
            rstd=state.new_empty(total, 1),
        )

    def before(self, packing: Packing, t: int, first: Tensor) -> Tensor:
        """The context (n, C) that the rows of step t began it with; first (B, C): that of the first step."""
        rows = packing.active[t]
        return first[:rows] if t == 0 else self.after[packing.offsets[t - 1] : packing.offsets[t - 1] + rows]


@dataclass
class Deltas:
    """Gradients before each activation, packed, and the sums that the loop keeps."""

    hidden: list[Tensor]  # L times (N, H)
    heads: Tensor  # (N, 3C)
    norm: list[Tensor] = field(default_factory=list)  # each a (C,), to be added up
    norm_bias: list[Tensor] = field(default_factory=list)


def forward(cell: LoopWeights, packing: Packing, dropout: Dropout | None, state: Tensor) -> Trace:
    """The loop, kept in the trace that is returned; `state` (B, C) ends as the context after each row's last token."""
    trace = Trace.empty(cell, packing, state)
    inputs = rows_at(cell.table, pad(packing.word_of, (0, packing.slack)))  # (N + slack, H)
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
        new, mean, rstd = torch.native_layer_norm(mixed, mixed.shape[1:], cell.norm, cell.norm_bias, EPSILON)
        state[:rows] = new.clamp_(-cell.clamp, cell.clamp)
        trace.read[span], trace.heads[span], trace.after[span] = read[:rows], heads, new
        trace.mean[span], trace.rstd[span] = mean, rstd
    return trace


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """values (M, W) at index (N,): (N, W)."""
    return torch.index_select(values, 0, index, out=BUFFERS.empty(len(index), values.shape[1], like=values))


def _keep(h: Tensor, masks: Tensor | None, layer: int, kept: Tensor) -> Tensor:
    """Dropout without its 1 / keep on h (n, H), written to `kept` (n, H)."""
    return kept.copy_(h) if masks is None else torch.mul(h, masks[layer], out=kept)


class Backward:
    """The loop backwards, some steps at a time, the last ones first; `grad_state` is what they leave of the context.

    first (B, C): the context before the first step; grad_top (N + slack, H): the gradient of the last layer;
    grad_state (B, C): that of the context after the last token, changed in place to that before the steps done so far.
    """

    def __init__(
        self,
        cell: LoopWeights,
        packing: Packing,
        trace: Trace,
        first: Tensor,
        grad_top: Tensor,
        grad_state: Tensor,
    ):
        self.grad_state = grad_state
        self._cell, self._packing, self._trace, self._first, self._grad_top = cell, packing, trace, first, grad_top
        rows = len(packing.order)
        weights = (cell.context, *(weight for weight, _ in cell.layers))
        self._layers: list[Product] = [cell.product(weight.t(), rows=rows) for weight in weights]
        self._gates = cell.product(cell.heads[0].t(), rows=rows)

    def run(self, steps: range) -> Deltas:
        """These steps, of which the last is the one before those of the call before."""
        packing, trace = self._packing, self._trace
        start, end = packing.offsets[steps.start], packing.offsets[steps.stop]
        total = end - start
        spare = [
            BUFFERS.empty(total + packing.slack, values.shape[1], like=values)
            for values in (*trace.hidden, trace.heads)
        ]
        for values in spare:
            values[total:] = 0  # read by the last step's products, never written
        deltas = Deltas([values[:total] for values in spare[:-1]], spare[-1][:total])
        for t in reversed(steps):
            rows, span = packing.active[t], packing.step(t)
            here = slice(span.start - start, span.stop - start)
            more = slice(here.start, here.start + packing.rounded(rows))  # computed, never kept, as in the forward loop
            carried = self._step_cell(t, deltas, deltas.heads[here])
            h = self._gates(spare[-1][more], self._grad_top[span.start : span.start + packing.rounded(rows)])
            for layer in reversed(range(len(self._layers))):
                delta = deltas.hidden[layer][here]
                # h > 0 only where the unit was active and kept, so no mask is needed
                torch.ops.aten.threshold_backward.grad_input(h[:rows], trace.hidden[layer][span], 0, grad_input=delta)
                h = self._layers[layer](spare[layer][more])
            self.grad_state[:rows] = torch.addcmul(h[:rows].to(carried[0].dtype), *carried)
        return deltas

    def _step_cell(self, t: int, deltas: Deltas, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and LayerNorm of step t backwards: fills the gradient of the heads (n, 3C), adds to the norm's.

        Returns two factors (n, C), whose product is the part of the state's gradient that passes the forget gate.
        """
        cell, trace, width = self._cell, self._trace, self._first.shape[1]
        rows, span = self._packing.active[t], self._packing.step(t)
        state = trace.before(self._packing, t, self._first)
        mixed, candidate, forget, write = mix(trace.heads[span].to(state.dtype), state)
        grad = torch.ops.aten.hardtanh_backward(self.grad_state[:rows], trace.after[span], -cell.clamp, cell.clamp)
        statistics = (trace.mean[span], trace.rstd[span], cell.norm, cell.norm_bias)
        grad, norm, norm_bias = torch.ops.aten.native_layer_norm_backward(
            grad, mixed, mixed.shape[1:], *statistics, [True, True, True]
        )
        deltas.norm.append(norm)
        deltas.norm_bias.append(norm_bias)
        heads[:, :width] = grad * write
        heads[:, width : 2 * width] = torch.ops.aten.sigmoid_backward(grad * state, forget)
        heads[:, 2 * width :] = torch.ops.aten.sigmoid_backward(grad * candidate, write)
        return grad, forget
