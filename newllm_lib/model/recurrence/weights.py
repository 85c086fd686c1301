"""The tensors that an engine needs, by name."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """Everything of the model but its output head."""

    embedding: Tensor  # (V, E)
    token: Tensor  # W_e (H, E): the token half of the first layer
    token_bias: Tensor  # b_1 (H,)
    context: Tensor  # W_c (H, C): the context half of the first layer
    layers: tuple[tuple[Tensor, Tensor], ...]  # W_l (H, H), b_l (H,) for l = 2..L
    heads: Tensor  # W_g (3C, H): candidate, forget gate, input gate
    heads_bias: Tensor  # b_g (3C,)
    norm: Tensor  # LayerNorm scale (C,)
    norm_bias: Tensor  # LayerNorm shift (C,)
    clamp: float  # bound of the context
