"""The published formulas once more, written apart from the library: one token and one row at a time, in NumPy."""

import numpy as np


def published_logits(
    weights: dict[str, np.ndarray], num_layers: int, tokens: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (T, V) and the last context (C,), float64, from the parameters under the library's names."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    first = np.concatenate([w["from_token.weight"], w["from_context.weight"]], axis=1)  # W_1 (H, E + C)
    candidate, forget, write = np.split(w["context_heads.weight"], 3)
    candidate_bias, forget_bias, write_bias = np.split(w["context_heads.bias"], 3)
    context = np.zeros(len(candidate))
    logits = []
    for token in tokens:
        x = np.concatenate([w["embedding.weight"][token], context])
        h = np.maximum(first @ x + w["from_token.bias"], 0)
        for layer in range(num_layers - 1):
            h = np.maximum(w[f"layers.{layer}.weight"] @ h + w[f"layers.{layer}.bias"], 0)
        logits.append(w["output.weight"] @ h + w["output.bias"])
        d = candidate @ h + candidate_bias
        f = 1 / (1 + np.exp(-(forget @ h + forget_bias)))
        i = 1 / (1 + np.exp(-(write @ h + write_bias)))
        mixed = f * context + i * d
        normed = (mixed - mixed.mean()) / np.sqrt(mixed.var() + 1e-5)
        context = np.clip(normed * w["context_norm.weight"] + w["context_norm.bias"], -10, 10)
    return np.array(logits), context
