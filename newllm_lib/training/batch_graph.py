"""Forward and backward pass of a batch as one CUDA graph: the thousands of launches of a step become a single one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from newllm_lib.config import PAD
from newllm_lib.model.loss import softmax_less_target, summed_loss
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import fused, kernel_loop, time_loop
from newllm_lib.model.recurrence.dropout import StaticDropout
from newllm_lib.model.recurrence.kernels import Kernels, kernels_for
from newllm_lib.model.recurrence.static_packing import Envelope, StaticPacking
from newllm_lib.system.cuda_graph import recorded
from newllm_lib.system.hardware import Precision

_WARM_UPS = 3
"""Passes before the capture, in which libraries choose their kernels and take their memory."""


class Totals(NamedTuple):
    """What a pass over a batch gave, besides gradients; all of it on the device."""

    nll: Tensor
    """() float64: sum over the targets (nats)."""
    tokens: Tensor
    """() float64: real targets."""
    fits: Tensor
    """() float64: 1 where the batch fitted the envelope; else the pass is worth nothing."""


class BatchGraph:
    """The gradients of a model by batches of up to `rows` windows, in memory that stays in place.

    `compute` does the pass operation by operation, on any device; `capture` turns it into a graph, which `compute`
    replays from then on. The parameters must stay where they are: weights may change, storage may not.
    """

    def __init__(
        self, model: NewLLM, precision: Precision, rows: int, active: list[int], kernels: Kernels | None = None
    ):
        """active: most rows at each step, of `most_active`; kernels: None = torch's own operations."""
        config, device = model.config, model.device
        steps = len(active)
        self.model, self._precision, self._kernels = model, precision, kernels
        self._parameters = list(model.parameters())
        self._ids: Tensor | None = None
        self._rows, self._active, self._envelope = rows, active, None
        self._scale = torch.ones((), device=device)
        self._context = model.initial_context(rows)
        self._dropout = None
        if config.dropout:
            shape = (config.num_layers, rows, config.hidden_dim)
            self._dropout = StaticDropout(config.dropout, *shape, steps, device)
        self._replay: Callable[[], None] = self._pass
        self._gradients: list[Tensor] = []
        self._totals: Tensor | None = None

    def compute(self, ids: Tensor, dropout_seed: int, scale: Tensor) -> Totals:
        """Set every parameter's gradient to that of the mean loss of ids (B, S) int64 times `scale`, a scalar tensor.

        The masks of dropout are those of an ordinary step with this seed. ids: at most `rows` rows, of the length of
        the first call.
        """
        with _on(ids.device):
            self._load(ids, dropout_seed, scale)
            self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return Totals(*self._totals)

    def capture(self, ids: Tensor, dropout_seed: int = 0) -> None:
        """Make the graph; ids as of `compute`."""
        with _on(ids.device):
            self._load(ids, dropout_seed, self._scale)
        self._replay = recorded(self._pass, ids.device, _WARM_UPS)

    def _load(self, ids: Tensor, dropout_seed: int, scale: Tensor) -> None:
        """Put what a pass reads where it reads it; missing rows are padding."""
        if self._ids is None:
            self._ids = ids.new_full((self._rows, ids.shape[1]), PAD)
            self._envelope = Envelope.of(self._active, ids.shape[1] - 1, ids.device)
        self._ids[: len(ids)].copy_(ids)
        self._ids[len(ids) :].fill_(PAD)
        self._scale.copy_(scale)
        if self._dropout is not None:
            self._dropout.fill(dropout_seed, len(ids))

    def _pass(self) -> None:
        """One forward and backward pass over what was loaded; nothing of it waits for the device."""
        model, device = self.model, self._ids.device
        tokens, targets = self._ids[:, :-1], self._ids[:, 1:]
        lengths = (targets != PAD).sum(1)
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            packing = StaticPacking.of(tokens, lengths, self._envelope, model.config.vocab_size)
            dtype = self._precision.dtype
            loop, losses = time_loop, softmax_less_target
            if self._kernels is not None:
                loop, losses = kernel_loop, self._kernels.losses
            hidden, _ = fused.packed_recurrence(
                model.weights(), packing, self._context, self._dropout, dtype, packed=False, loop=loop
            )
            nll = summed_loss(hidden, model.head, targets.reshape(-1)[packing.position], losses)
            count = lengths.sum()
            gradients = torch.autograd.grad(nll * (self._scale / count), self._parameters)
        self._gradients = list(gradients)
        self._totals = torch.stack([nll.detach().double(), count.double(), packing.fits.double()])


def _on(device: torch.device) -> AbstractContextManager:
    """Where streams and kernels are those of a GPU that is not the current one; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def best_kernels(model: NewLLM, precision: Precision) -> tuple[Kernels | None, str]:
    """The kernels for a model on a GPU; None with the reason where there are none."""
    config, device = model.config, model.device
    if device.type != "cuda":
        return None, "the kernels are for CUDA GPUs"
    try:
        shape = (config.context_dim, config.hidden_dim, config.context_clamp)
        return kernels_for(str(device), precision.dtype, *shape), ""
    except Exception as error:  # a private function of torch and a compiler that is on the machine or not
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
