"""The time loop of `time_loop` with the kernels of `kernels` between its products: the same names, for a static batch.

Letters as in `fused`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from newllm_lib.model.recurrence.cell import LoopWeights
from newllm_lib.model.recurrence.dropout import StaticDropout
from newllm_lib.model.recurrence.kernels import Kernels, kernels_for
from newllm_lib.model.recurrence.static_packing import StaticPacking
from newllm_lib.model.recurrence.time_loop import Deltas, Trace


def kernels_of(cell: LoopWeights) -> Kernels:
    """The kernels for these weights."""
    return kernels_for(str(cell.table.device), cell.table.dtype, cell.context.shape[1], cell.table.shape[1], cell.clamp)


def forward(cell: LoopWeights, packing: StaticPacking, dropout: StaticDropout | None, state: Tensor) -> Trace:
    """As `time_loop.forward`."""
    kernels, trace = kernels_of(cell), Trace.empty(cell, packing, state)
    inputs = cell.table.index_select(0, packing.word_of)  # (N, H)
    if dropout:
        dropout.start(len(trace.hidden), len(state), inputs.shape[1], packing.order)
    trace.read[packing.step(0)] = state[: packing.active[0]].to(inputs.dtype)
    norm = (cell.norm, cell.norm_bias)
    for t, rows in enumerate(packing.active):
        span = packing.step(t)
        h, weight, add = trace.read[span], cell.context, inputs[span]
        for layer, kept in enumerate(trace.hidden):
            if layer:
                weight, add = cell.layers[layer - 1]
            masks = (dropout.bits[layer, :rows], dropout.numbers[t], dropout.threshold) if dropout else None
            kernels.activate(h @ weight.t(), add, masks, kept[span])
            h = kept[span]
        weight, bias = cell.heads
        torch.addmm(bias, h, weight.t(), out=trace.heads[span])
        end = packing.offsets[min(t + 2, len(packing.active))]
        kept = (trace.after[span], trace.mean[span], trace.rstd[span])
        kernels.cell_forward(trace.heads[span], state, norm, kept, trace.read[span.stop : end])
    return trace


class Backward:
    """As `time_loop.Backward`."""

    def __init__(
        self,
        cell: LoopWeights,
        packing: StaticPacking,
        trace: Trace,
        first: Tensor,
        grad_top: Tensor,
        grad_state: Tensor,
    ):
        self._cell, self._packing, self._trace, self._first, self._grad_top = cell, packing, trace, first, grad_top
        self._kernels = kernels_of(cell)
        self._carry = grad_state.contiguous()
        self._product = trace.read[:0]  # of the step after: (m, C)

    @property
    def grad_state(self) -> Tensor:
        """The gradient (B, C) of the context before the steps done so far."""
        grad = self._carry.clone()
        grad[: len(self._product)] += self._product
        return grad

    def run(self, steps: range) -> Deltas:
        """As `time_loop.Backward.run`."""
        packing, trace, cell = self._packing, self._trace, self._cell
        start, total = packing.offsets[steps.start], packing.offsets[steps.stop] - packing.offsets[steps.start]
        deltas = Deltas(
            [values.new_empty(total, values.shape[1]) for values in trace.hidden],
            trace.heads.new_empty(total, trace.heads.shape[1]),
        )
        sums = self._kernels.new_sums(len(packing.order), self._carry)
        weights = (cell.context, *(weight for weight, _ in cell.layers))
        for t in reversed(steps):
            span = packing.step(t)
            here = slice(span.start - start, span.stop - start)
            before = trace.before(packing, t, self._first)
            kept = (before, trace.after[span], trace.mean[span], trace.rstd[span])
            self._kernels.cell_backward(
                trace.heads[span], kept, cell.norm, self._product, self._carry, deltas.heads[here], sums
            )
            h = torch.addmm(self._grad_top[span], deltas.heads[here], cell.heads[0])
            for layer in reversed(range(len(weights))):
                delta = deltas.hidden[layer][here]
                torch.ops.aten.threshold_backward.grad_input(h, trace.hidden[layer][span], 0, grad_input=delta)
                h = delta @ weights[layer]
            self._product = h
        norm, norm_bias = sums.sum(1)
        deltas.norm.append(norm)
        deltas.norm_bias.append(norm_bias)
        return deltas
