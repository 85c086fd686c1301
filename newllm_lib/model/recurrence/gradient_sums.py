"""Gradients of weights and biases: sums over all tokens of a batch, made in FP32 whatever the products' format.

A sum over N tokens grows with N, and FP16 ends at 65,504: in FP16 such a sum overflows once the batch is large enough,
and no loss scale helps where the summands are already at most 1, as those of the output head are.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_BLOCK = 1 << 11
"""Tokens that a CPU converts at a time: few enough that the FP32 copies stay in its cache, at full speed."""


def weight_gradient(deltas: Tensor, inputs: Tensor) -> Tensor:
    """deltas (N, O) and inputs (N, I), of one type: deltas^T inputs (O, I) in float32, in float64 for float64.

    With deltas = the gradient of a linear layer's output, this is the gradient of its weight.
    """
    wide = torch.promote_types(deltas.dtype, torch.float32)
    if deltas.dtype == wide:
        return deltas.t() @ inputs
    if _widens(deltas.device, deltas.dtype):
        return torch.mm(deltas.t(), inputs, out_dtype=wide)
    total = torch.zeros(deltas.shape[1], inputs.shape[1], dtype=wide, device=deltas.device)
    if deltas.dtype == torch.float16:
        for some, those in zip(deltas.split(_BLOCK), inputs.split(_BLOCK), strict=True):
            total.addmm_(some.to(wide).t(), those.to(wide))
    else:  # bfloat16 has the range of FP32, and its products are several times as fast on many CPUs
        for some, those in zip(deltas.split(8 * _BLOCK), inputs.split(8 * _BLOCK), strict=True):
            total += some.t() @ those
    return total


def bias_gradient(deltas: Tensor) -> Tensor:
    """The sum over the rows of deltas (N, O): (O,), in float32, in float64 for float64.

    As a product with ones, which takes a fraction of the time of `sum` for 16-bit types on a CPU.
    """
    return weight_gradient(deltas.new_ones(len(deltas), 1), deltas).squeeze(0)


@lru_cache(maxsize=16)
def _widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device multiplies 16-bit matrices into FP32, tried once with a sum that FP16 cannot hold."""
    if device.type != "cuda":
        return False
    try:
        column = torch.full((128, 1), 32.0, dtype=dtype, device=device)
        return torch.mm(column.t(), column, out_dtype=torch.float32).item() == 128 * 32.0 * 32.0
    except (RuntimeError, TypeError):  # an older torch, or a GPU that its library has no such product for
        return False
