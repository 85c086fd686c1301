"""Muon in the number format that is fast on this machine, with all matrices of one shape in the same products."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MUON_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float32}
"""The type of Muon's products by a run's format. Small singular values would vanish in the short range of FP16."""


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (Jordan et al. 2024), whose state it reads and writes, with products in a type of choice.

    The formula is the same: momentum, Nesterov's look-ahead, Newton-Schulz, the step times sqrt(max(1, rows / cols)).
    torch's own makes its products in bfloat16, one matrix after the other, whatever the processor is fast at.
    """

    def __init__(self, params: Any, *, dtype: torch.dtype = torch.bfloat16, **settings: Any):
        """dtype: of the products in Newton-Schulz; settings: as of `torch.optim.Muon`."""
        super().__init__(params, **settings)
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every matrix that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One update of matrices of the same shape."""
        updates = torch.stack([self._direction(parameter, group).to(self._dtype) for parameter in parameters])
        steps = orthogonalized(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameters[0].shape
        lr = group["lr"] * math.sqrt(max(1, rows / columns))
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(step, alpha=-lr)

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The gradient with momentum, which is kept."""
        state, gradient, momentum = self.state[parameter], parameter.grad, group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum) if group["nesterov"] else average


def orthogonalized(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """matrices (n, R, C) -> (n, R, C), each nearly U V^T of its singular value decomposition U S V^T.

    Newton-Schulz as in Muon: `steps` times X <- a X + (b A + c A^2) X with A = X X^T, from X of norm 1 at most. Its
    coefficients bring every singular value to between about 0.7 and 1.2, not to 1. eps: the least norm to divide by.
    """
    a, b, c = coefficients
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
