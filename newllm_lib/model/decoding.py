"""Sampling with a carried context: each token costs the same time and memory, however long the text."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from newllm_lib.config import BOS, EOS, PAD, UNK, ModelConfig
from newllm_lib.config.fields import plain_number
from newllm_lib.errors import ConfigError
from newllm_lib.model.recurrence import Weights
from newllm_lib.model.recurrence.cell import Cell, LoopWeights
from newllm_lib.model.recurrence.self_check import choose_engine
from newllm_lib.system.hardware import Precision, cpu_threads

_PROMPT_CHUNK = 256
"""Prompt tokens read at a time, so that a long prompt takes no more memory than this many."""


class LanguageModel(Protocol):
    """What decoding needs of a model. `NewLLM` has it, and imports decoding, not the other way round."""

    config: ModelConfig

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """Weight (V, H) and bias (V,) of the output layer."""

    def weights(self) -> Weights:
        """What an engine needs."""

    def check_tokens(self, tokens: Tensor) -> None:
        """ValueError unless tokens are int64, (rows, length), not empty, and in the vocabulary."""

    def check_context(self, context: Tensor | None, rows: int) -> Tensor:
        """The context (rows, C), the empty one for None; ValueError for another shape."""


class Generation(NamedTuple):
    """New tokens, and the state to go on from."""

    tokens: Tensor  # (B, N) int64: the new tokens; PAD after a row's EOS
    context: Tensor  # (B, C) after every token but a row's last one, which goes first into the next call
    log_probs: Tensor  # (B, N): natural log of the model's own probability of each token; 0 after a row's EOS


class Sampling(NamedTuple):
    """How a token is drawn; `check` raises ConfigError naming the first value that is out of its range."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    allow_unknown: bool = False

    def check(self) -> Sampling:
        """Itself in Python's numbers, if every value is in its range."""
        temperature, top_k, top_p = map(plain_number, self[:3])
        if not _is_number(temperature) or not 0 <= temperature < float("inf"):
            raise ConfigError(f"temperature = {temperature!r}: must be a number from 0")
        if not _is_number(top_k, int) or top_k < 0:
            raise ConfigError(f"top_k = {top_k!r}: must be a whole number from 0 (0 = all)")
        if not _is_number(top_p) or not 0 < top_p <= 1:
            raise ConfigError(f"top_p = {top_p!r}: must be a number above 0 to 1")
        return Sampling(temperature, top_k, top_p, self.allow_unknown)


def _is_number(value: object, kinds: type | tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


class Step(NamedTuple):
    """One new token of every row."""

    token: Tensor  # (B,) int64: PAD in a row that has ended
    log_prob: Tensor  # (B,): before temperature and limits; 0 in a row that has ended
    context: Tensor  # (B, C) before the token was read


def generate(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int = 50,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    allow_unknown: bool = False,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
    lengths: Tensor | None = None,
) -> Generation:
    """Continue tokens (B, T) int64, the prompts, which stand after `context` (B, C; None = the empty one).

    temperature 0 takes the likeliest token; top_k keeps that many of the likeliest (0 = all), top_p the fewest whose
    probabilities reach that sum (Holtzman et al. 2019, arXiv 1904.09751). `<PAD>` and `<BOS>` are never drawn,
    `<UNK>` only with allow_unknown; a row ends at `<EOS>`. lengths (B,) int64, each from 1 to T: the real tokens of
    each prompt, which stand first in its row (None = all T). Dropout is off. ConfigError for values out of range.
    """
    check_count(max_new_tokens)
    sampling = Sampling(temperature, top_k, top_p, allow_unknown)
    decoding, steps = Decoding(model, tokens, sampling, context, generator, lengths), []
    for step in decoding:
        steps.append(step)
        if len(steps) == max_new_tokens:
            break
    tokens, log_probs = (torch.stack(values, dim=1) for values in list(zip(*steps, strict=True))[:2])
    return Generation(tokens, steps[-1].context, log_probs)


class Decoding:
    """Steps of a generation, one at a time, until every row has ended; options as for `generate`.

    The weights are prepared when it is made, some as copies: they must not change while it runs. Set a row of `ended`
    (B,) to end it; a row that has ended reads nothing more.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        sampling: Sampling,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        lengths: Tensor | None = None,
    ):
        self._sampling, self._generator = sampling.check(), generator
        if generator is not None and generator.device.type != tokens.device.type:
            raise ValueError(f"generator is on {generator.device}: must be on {tokens.device}, where the tokens are")
        self._head = tuple(tensor.detach() for tensor in model.head)
        self._limits = torch.zeros(len(self._head[1]), device=tokens.device)  # added to the logits
        self._limits[[PAD, BOS] if sampling.allow_unknown else [PAD, UNK, BOS]] = -torch.inf
        self._hidden, self.context = read_prompts(model, tokens, context, lengths)  # (B, H), (B, C)
        self._cell = Cell(LoopWeights.of(model.weights(), None, self.context.dtype), len(tokens))
        self._token: Tensor | None = None
        self.ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    def __iter__(self) -> Decoding:
        return self

    def __next__(self) -> Step:
        # products of one row are too small to share between threads: two of them took 1.5 times as long as one
        threads = cpu_threads(1) if len(self.ended) == 1 else nullcontext()
        with threads, torch.autocast(self.ended.device.type, enabled=False):  # products are laid out for one type
            return self._next()

    @torch.no_grad()
    def _next(self) -> Step:
        ended = int(self.ended.sum())
        if ended == len(self.ended):
            raise StopIteration
        if self._token is not None:
            self._hidden, after = self._cell(self._cell.table.index_select(0, self._token), self.context)
            self.context = torch.where(self.ended[:, None], self.context, after) if ended else after
        logits = linear(self._hidden, *self._head)  # (B, V)
        shares = logits.log_softmax(-1)
        token = sample(logits + self._limits, *self._sampling[:3], self._generator)
        log_prob = shares.gather(1, token[:, None]).squeeze(1)
        if ended:
            token, log_prob = token.masked_fill(self.ended, PAD), log_prob.masked_fill(self.ended, 0)
        self._token = token
        self.ended = self.ended | (token == EOS)
        return Step(token, log_prob, self.context)


@torch.no_grad()
def read_prompts(
    model: LanguageModel, tokens: Tensor, context: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The last hidden layer (B, H) at the last real token of each row, and the context (B, C) after it."""
    model.check_tokens(tokens)
    rows, total = tokens.shape
    lengths = torch.full((rows,), total, device=tokens.device) if lengths is None else lengths
    if lengths.shape != (rows,) or int(lengths.min()) < 1 or int(lengths.max()) > total:
        raise ValueError(f"lengths = {lengths.tolist()!r}: must be {rows} whole numbers from 1 to {total}")
    context = model.check_context(context, rows)
    engine = choose_engine("auto", Precision("fp32", "generation"), str(tokens.device)).run
    last = context.new_zeros(rows, model.config.hidden_dim)
    for start in range(0, int(lengths.max()), _PROMPT_CHUNK):
        part = tokens[:, start : start + _PROMPT_CHUNK]
        left = (lengths - start).clamp(0, part.shape[1])  # (B,)
        hidden, context = engine(model.weights(), part, context, left, None)
        ends = hidden.gather(1, (left - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)
        last = torch.where((left > 0)[:, None], ends.to(last.dtype), last)
    return last, context


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
    sums = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, V)
    total = sums[:, -1:]
    place = torch.rand(total.shape, dtype=torch.float64, device=total.device, generator=generator) * total
    place = torch.minimum(place, torch.nextafter(total, torch.zeros_like(total)))  # so that some sum lies above it
    return torch.searchsorted(sums, place, right=True).squeeze(1)  # multinomial takes several times as long on a CPU


def check_count(max_new_tokens: int) -> None:
    """ConfigError unless it is a whole number from 1."""
    if not _is_number(plain_number(max_new_tokens), int) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens!r}: must be a whole number from 1")
