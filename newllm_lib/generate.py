"""Sampling with a carried context: each token costs the same time and memory, however long the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from newllm_lib.config import BOS, EOS, PAD, UNK
from newllm_lib.model import NewLLM


class Generation(NamedTuple):
    """New tokens, and the state to go on from."""

    tokens: Tensor  # (B, N) int64: the new tokens; PAD after a row's EOS
    context: Tensor  # (B, C) after every token but the last one, which goes first into the next call


@torch.no_grad()
def generate(
    model: NewLLM,
    tokens: Tensor,
    max_new_tokens: int = 50,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    allow_unknown: bool = False,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Generation:
    """Continue tokens (B, T) int64, the prompt, which stands after `context` (B, C; None = the empty one).

    temperature 0 takes the likeliest token; top_k keeps that many of the likeliest (0 = all), top_p the fewest whose
    probabilities reach that sum (Holtzman et al. 2019, arXiv 1904.09751). `<PAD>` and `<BOS>` are never drawn,
    `<UNK>` only with allow_unknown; a row ends at `<EOS>`. ValueError for values out of range.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    was_training = model.training
    model.eval()
    try:
        steps = _steps(model, tokens, context, generator, (temperature, top_k, top_p, allow_unknown))
        out, ended = [], torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for token, after in steps:
            out.append(token.masked_fill(ended, PAD))
            ended |= token == EOS
            if len(out) == max_new_tokens or bool(ended.all()):
                return Generation(torch.stack(out, dim=1), after)
    finally:
        model.train(was_training)
    raise AssertionError("the steps of a generation do not end by themselves")


def _steps(
    model: NewLLM,
    tokens: Tensor,
    context: Tensor | None,
    generator: torch.Generator | None,
    sampling: tuple[float, int, float, bool],
) -> Iterator[tuple[Tensor, Tensor]]:
    """One token (B,) after another, each with the context before it was read."""
    temperature, top_k, top_p, allow_unknown = sampling
    banned = [PAD, BOS] if allow_unknown else [PAD, UNK, BOS]
    while True:
        hidden, context = model.hidden(tokens, context)
        logits = linear(hidden[:, -1], *model.head)  # (B, V)
        logits[:, banned] = -torch.inf
        token = sample(logits, temperature, top_k, top_p, generator)
        yield token, context
        tokens = token[:, None]


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token (B,) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # the largest stays 0
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        shares = ordered.softmax(-1)
        beyond = shares.cumsum(-1) - shares >= top_p  # the likeliest is always kept
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """ValueError naming the first value that is out of its range."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens!r}: must be a whole number from 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature = {temperature!r}: must be a number from 0")
    if top_k < 0:
        raise ValueError(f"top_k = {top_k!r}: must be a whole number from 0 (0 = all)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p!r}: must be a number above 0 to 1")


def generate_text(model: NewLLM, tokenizer, prompt: str = "", seed: int | None = None, **options) -> str:
    """The prompt, encoded after a `<BOS>`, and its continuation as text; options as for `generate`."""
    device = model.output.weight.device
    tokens = torch.tensor([[BOS, *tokenizer.encode(prompt)]], device=device)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    new = generate(model, tokens, generator=generator, **options).tokens
    return tokenizer.decode([*tokens[0].tolist(), *new[0].tolist()])
