"""The kernels of `kernel_source`, compiled for a GPU, a type and a shape when they are first asked for (NVRTC)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from newllm_lib.model.recurrence.kernel_source import SOURCE

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_THREADS = 256
_CELL_THREADS = 64
"""Few, so that the warps of a small batch spread over all of a GPU."""
_WARPS_PER_BLOCK = _CELL_THREADS // 32
_MOST_WARPS = 2048
"""That share the rows of a backward step: enough to fill a large GPU, each with sums of its own."""
_MOST_COLUMNS = 32
"""Columns of the context a lane keeps in registers."""


class Kernels:
    """Kernels for products in `dtype` and a context of `context_dim`, on the current GPU.

    RuntimeError where torch cannot compile them here; ValueError for a shape that they are not made for.
    """

    def __init__(self, dtype: torch.dtype, context_dim: int, hidden_dim: int, clamp: float):
        pack = 16 // dtype.itemsize
        columns = context_dim // 32
        if dtype not in _TYPES or context_dim % 32 or not 1 <= columns <= _MOST_COLUMNS or hidden_dim % pack:
            raise ValueError(
                f"no kernels for {dtype}, context_dim {context_dim} and hidden_dim {hidden_dim}: context_dim must be a "
                f"multiple of 32 up to {32 * _MOST_COLUMNS}, hidden_dim one of {pack}"
            )
        if not hasattr(torch.cuda, "_compile_kernel"):
            raise RuntimeError("this torch cannot compile CUDA kernels")
        names = {"TYPE": _TYPES[dtype], "CLAMP": f"{clamp:.9e}f", "COLUMNS": columns}
        source = "".join(f"#define {name} {value}\n" for name, value in names.items()) + SOURCE
        compiled = {
            name: torch.cuda._compile_kernel(source, name)
            for name in ("activate", "cell_forward", "cell_backward", "losses")
        }
        self._activate, self._cell_forward = compiled["activate"], compiled["cell_forward"]
        self._cell_backward, self._losses = compiled["cell_backward"], compiled["losses"]
        self._pack, self.context_dim = pack, context_dim

    def activate(self, y: Tensor, add: Tensor, masks: tuple[Tensor, Tensor, int] | None, out: Tensor) -> None:
        """out (n, H) = relu(y + add), zero where dropout drops; add (n, H) or (H,).

        masks: the bits (n, H) int16, the two numbers (2,) int16 of the step, and the threshold of `Dropout`.
        """
        packs = y.numel() // self._pack
        bits, step, threshold = masks or (y, y, 0)
        stride = y.shape[1] if add.ndim == 2 else 0
        arguments = [y, add, stride, bits, step, int(masks is not None), threshold, out, packs, y.shape[1]]
        _launch(self._activate, -(-packs // _THREADS), _THREADS, arguments)

    def cell_forward(
        self,
        heads: Tensor,
        state: Tensor,
        norm: tuple[Tensor, Tensor],
        kept: tuple[Tensor, Tensor, Tensor],
        read: Tensor,
    ) -> None:
        """Gates, LayerNorm and clamp of heads (n, 3C) on state (B, C), in place.

        kept: receives the state (n, C) after, mean (n, 1) and 1 / deviation (n, 1); read (m, C), m at most n: receives
        the first rows of the state in the type of the products.
        """
        rows = len(heads)
        arguments = [heads, state, *norm, *kept, read, len(read), rows]
        _launch(self._cell_forward, -(-rows // _WARPS_PER_BLOCK), _CELL_THREADS, arguments)

    def cell_backward(
        self,
        heads: Tensor,
        kept: tuple[Tensor, Tensor, Tensor, Tensor],
        norm: Tensor,
        product: Tensor,
        carry: Tensor,
        delta: Tensor,
        sums: Tensor,
    ) -> None:
        """The same backwards: fills delta (n, 3C), the gradient of the heads; replaces carry (B, C); adds to sums.

        kept: the state (n, C) before and after, mean and 1 / deviation. The gradient of the state after is carry, plus
        product (m, C) in its first rows. sums (2, warps, C): parts of the gradients of the LayerNorm's scale and shift.
        """
        warps = sums.shape[1]
        arguments = [heads, *kept, norm, product, carry, delta, sums, len(product), len(heads), warps]
        _launch(self._cell_backward, warps // _WARPS_PER_BLOCK, _CELL_THREADS, arguments)

    def new_sums(self, rows: int, like: Tensor) -> Tensor:
        """Zeros (2, warps, C) for `cell_backward` of at most `rows` rows."""
        warps = min(_MOST_WARPS, -(-rows // _WARPS_PER_BLOCK) * _WARPS_PER_BLOCK)
        return like.new_zeros(2, warps, self.context_dim)

    def losses(self, logits: Tensor, targets: Tensor, nll: Tensor) -> None:
        """Replace logits (n, V) by softmax - onehot of targets (n,) int64, and fill nll (n,) float32.

        A target of 0 is padding: its row and its nll become zeros.
        """
        _launch(self._losses, len(logits), 128, [logits, targets, nll, logits.shape[1]])


def _launch(kernel, blocks: int, threads: int, arguments: list) -> None:
    if blocks:
        kernel(grid=(blocks, 1, 1), block=(threads, 1, 1), args=arguments)


@lru_cache(maxsize=16)
def kernels_for(device: str, dtype: torch.dtype, context_dim: int, hidden_dim: int, clamp: float) -> Kernels:
    """The kernels for a GPU (cuda:0, ...), compiled once a process; errors as of `Kernels`."""
    with torch.cuda.device(device):
        return Kernels(dtype, context_dim, hidden_dim, clamp)
