"""One step of the recurrence without gradients: what does not depend on the token is done once, beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from newllm_lib.model.recurrence.packed_linear import Product
from newllm_lib.model.recurrence.weights import Weights


@dataclass
class LoopWeights:
    """The weights as a loop uses them: cast once, and with dropout's 1 / keep on the weight that reads its output."""

    table: Tensor  # (U, H): W_e e + b_1 of each word in use
    context: Tensor  # W_c (H, C)
    layers: list[tuple[Tensor, Tensor]]  # W_l (H, H), b_l (H,) for l = 2..L
    heads: tuple[Tensor, Tensor]  # W_g (3C, H), b_g (3C,)
    norm: Tensor  # in the type of the state, as the two below
    norm_bias: Tensor
    clamp: float
    scale: float = 1.0
    packed: bool = True
    """Whether products may use oneDNN's layout."""

    @classmethod
    def of(
        cls,
        weights: Weights,
        words: Tensor | None,
        dtype: torch.dtype,
        scale: float = 1.0,
        packed: bool = True,
    ) -> LoopWeights:
        """For products in `dtype`; words (U,) int64: the words in use, None for all of the vocabulary."""
        used = weights.embedding if words is None else weights.embedding[words]
        return cls(
            table=linear(used.to(dtype), weights.token.to(dtype), weights.token_bias.to(dtype)),
            context=weights.context.to(dtype),
            layers=[((weight * scale).to(dtype), bias.to(dtype)) for weight, bias in weights.layers],
            heads=((weights.heads * scale).to(dtype), weights.heads_bias.to(dtype)),
            norm=weights.norm,
            norm_bias=weights.norm_bias,
            clamp=weights.clamp,
            scale=scale,
            packed=packed,
        )

    def product(self, weight: Tensor, bias: Tensor | None = None, *, rows: int, relu: bool = False) -> Product:
        """A product of one of these weights, in their layout."""
        return Product(weight, bias, rows=rows, relu=relu, packed=self.packed)


class Cell:
    """inputs (n, H), context (n, C) -> hidden (n, H), context (n, C), for up to `rows` rows.

    It holds some of the weights as copies, in the layout of its products: they must not change while it is used.
    """

    def __init__(self, prepared: LoopWeights, rows: int):
        self.table = prepared.table
        self._enter = prepared.product(prepared.context, rows=rows, relu=True)
        self._layers = [prepared.product(weight, bias, rows=rows, relu=True) for weight, bias in prepared.layers]
        self._heads = prepared.product(*prepared.heads, rows=rows)
        self._norm = (prepared.norm, prepared.norm_bias)
        self._clamp = prepared.clamp
        self.products = [self._enter, *self._layers, self._heads]

    def __call__(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """As one step of `reference.recurrence`; inputs: rows of `table`."""
        h = self._enter(context.to(inputs.dtype), inputs)
        for layer in self._layers:
            h = layer(h)
        mixed = mix(self._heads(h).to(context.dtype), context)[0]
        return h, layer_norm(mixed, mixed.shape[1:], *self._norm).clamp_(-self._clamp, self._clamp)


def mix(heads: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sigmoid(f) c + sigmoid(i) d from the heads (n, 3C), and d, sigmoid(f), sigmoid(i) themselves."""
    width = state.shape[1]
    candidate = heads[:, :width]
    forget, write = heads[:, width:].sigmoid().split(width, dim=1)
    return torch.addcmul(forget * state, write, candidate), candidate, forget, write
