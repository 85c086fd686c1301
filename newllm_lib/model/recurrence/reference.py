"""The recurrence as the formulas say it, step by step: the oracle that every faster engine is compared with.

Letters: B batch, T time, E embedding, H hidden, C context, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm, linear

from newllm_lib.model.recurrence.dropout import Dropout
from newllm_lib.model.recurrence.weights import Weights


def recurrence(
    weights: Weights,
    tokens: Tensor,
    context: Tensor,
    lengths: Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Run New-LLM over a batch of sequences.

        h_1 = drop(relu(W_e e_t + W_c c_{t-1} + b_1))        h_l = drop(relu(W_l h_{l-1} + b_l))
        [d, f, i] = W_g h_L + b_g        c_t = clamp(LayerNorm(sigmoid(f) c_{t-1} + sigmoid(i) d))

    tokens (B, T) int64; context (B, C), the state before the first token; lengths (B,) int64, the number of real
    tokens of each row, or None when all T are real. Returns hidden (B, T, H), the last layer at each token, zero
    in the padding, and context (B, C) after the last real token of each row. Under autocast the matrix products
    run in its type; the context keeps its own.
    """
    inputs = linear(embedding(tokens, weights.embedding), weights.token, weights.token_bias)  # (B, T, H)
    if dropout is not None:
        dropout.start(len(weights.layers) + 1, len(tokens), inputs.shape[2])
    hidden = []
    for t in range(tokens.shape[1]):
        h = torch.relu(inputs[:, t] + linear(context, weights.context))  # (B, H)
        masks = dropout.next_masks(len(h)) if dropout else None
        h = _drop(h, dropout, masks, 0)
        for layer, (weight, bias) in enumerate(weights.layers, start=1):
            h = _drop(torch.relu(linear(h, weight, bias)), dropout, masks, layer)
        heads = linear(h, weights.heads, weights.heads_bias).to(context.dtype)  # (B, 3C)
        candidate, forget, write = heads.chunk(3, dim=-1)
        mixed = torch.sigmoid(forget) * context + torch.sigmoid(write) * candidate
        update = layer_norm(mixed, mixed.shape[-1:], weights.norm, weights.norm_bias)
        update = update.clamp(-weights.clamp, weights.clamp)
        if lengths is not None:
            real = (t < lengths)[:, None]  # (B, 1)
            h, update = torch.where(real, h, 0), torch.where(real, update, context)
        context = update
        hidden.append(h)
    return torch.stack(hidden, dim=1), context


def _drop(h: Tensor, dropout: Dropout | None, masks: Tensor | None, layer: int) -> Tensor:
    if dropout is None:
        return h
    return torch.where(masks[layer], h * dropout.scale, 0)
