"""One weight, many small products: `x @ weight.T + bias`, with the weight laid out once for all steps of a pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


class Product:
    """x (n, in) -> x @ weight.T + bias (n, out), then relu where asked for, then + other where given.

    On a CPU, in FP32 and BF16, the weight is put into oneDNN's blocked layout, which saves a reordering in each call
    (half the time at 32 rows) and, in FP32 on AMD processors, a slower library. Elsewhere, and with packed=False, it is
    `linear`.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, rows: int, relu: bool = False, packed: bool = True
    ):
        self.weight, self.bias, self.relu = weight, bias, relu
        self._packed = _pack(weight, rows) if packed and packs(weight, rows) else None

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The product for some rows."""
        if self._packed is None:
            y = linear(x, self.weight, self.bias)
            y = y if other is None else y.add_(other)
            return y.relu_() if self.relu else y
        if other is not None:
            y = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self.bias, "add")
            return y.relu_() if self.relu else y
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "relu" if self.relu else "none", [], "")


def packs(weight: Tensor, rows: int) -> bool:
    """Whether this build, processor and type can use oneDNN's layout, and gain by it: not for one row in FP32."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.float32:
        return rows > 1
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not on a processor without AVX-512


def _pack(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
