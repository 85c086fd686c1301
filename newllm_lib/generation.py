"""Prompts in, text out: one text as a stream of pieces, or many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from newllm_lib.config import BOS, EOS, PAD
from newllm_lib.config.fields import plain_number
from newllm_lib.data.tokenizer import Tokenizer
from newllm_lib.errors import ConfigError
from newllm_lib.model.decoding import Decoding, Sampling, check_count
from newllm_lib.model.newllm import NewLLM

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer makes of the first bytes of a character whose last ones are still to come."""


class Text(NamedTuple):
    """A continuation of a prompt."""

    prompt: str  # as the tokenizer reads it
    text: str  # what follows the prompt
    tokens: list[int]  # the new tokens
    log_probs: list[float]  # natural log of the model's own probability of each
    ended_by: str  # "end of text", "stop" or "length"


class Pieces:
    """Token ids in, text out as soon as it is certain: whole characters, and no beginning of a stop text.

    before: the ids that stand before, which decide whether a word needs a space. stopped: whether a stop text was met;
    nothing from it on is given out.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: str | Sequence[str] = ()):
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stop):
            raise ConfigError("stop = '': must be a text of at least one character")
        self._tokenizer, self._stop = tokenizer, stop
        self._ids, self._known = list(before), len(before)  # ids from the last piece on, and how many are given out
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that became certain with this id."""
        self._ids.append(token)
        new = self._new_text()
        if new.endswith(_UNFINISHED):
            return ""
        self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
        return self._pass(new)

    @property
    def unfinished(self) -> list[int]:
        """Ids of a character whose last ones are still to come."""
        return self._ids[self._known :]

    def flush(self, whole: bool = True) -> str:
        """What was held back, at the end of a text; `whole` = an unfinished character too."""
        rest = self._pass(self._new_text()) if whole and self.unfinished else ""
        held, self._held = self._held, ""
        return rest + held

    def _new_text(self) -> str:
        return self._tokenizer.decode(self._ids)[len(self._tokenizer.decode(self._ids[: self._known])) :]

    def _pass(self, new: str) -> str:
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        sizes = (size for stop in self._stop for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size]))
        hold = max(sizes, default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


class Writer:
    """One text, written on from call to call with the context carried along: nothing is ever read twice."""

    def __init__(self, model: NewLLM, tokenizer: Tokenizer):
        self._model, self._tokenizer = model, tokenizer
        self.reset()

    def reset(self) -> None:
        """Begin a new text."""
        self._unread, self._context = [BOS], None
        self._begun: list[int] = []  # ids of a character that the last call could not give out whole

    def write(
        self,
        prompt: str = "",
        max_new_tokens: int = 50,
        *,
        stop: str | Sequence[str] = (),
        generator: torch.Generator | None = None,
        **sampling,
    ) -> Iterator[str]:
        """Read the prompt and give out its continuation piece by piece; options as for `generate`.

        Ends at `<EOS>` (the next call then begins a new text), where one of the `stop` texts would stand, and after
        max_new_tokens. A stream that is left early can be continued as well.
        """
        check_count(max_new_tokens)
        unread, begun = self._unread + self._tokenizer.encode(prompt), [] if prompt else self._begun
        pieces = Pieces(self._tokenizer, unread[-1:] if not begun else (), stop)
        tokens = torch.tensor([unread], device=self._model.device)
        decoding = Decoding(self._model, tokens, Sampling(**sampling), self._context, generator)
        self._unread, self._begun = unread, []
        for token in begun:
            pieces.push(token)
        for number, step in enumerate(decoding, start=1):
            token = int(step.token)
            self._unread, self._context = [token], step.context
            if token == EOS:
                self.reset()
                break
            piece = pieces.push(token)
            self._begun = pieces.unfinished  # before the caller may leave
            yield piece
            if pieces.stopped or number == max_new_tokens:
                break
        yield pieces.flush(whole=not self._begun)


def stream_text(model: NewLLM, tokenizer: Tokenizer, prompt: str = "", seed: int | None = None, **options):
    """The continuation of a prompt, piece by piece; options as for `Writer.write`."""
    return Writer(model, tokenizer).write(prompt, generator=seeded_generator(model, seed), **options)


def generate_texts(
    model: NewLLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    seed: int | None = None,
    *,
    max_new_tokens: int = 50,
    stop: str | Sequence[str] = (),
    **sampling,
) -> list[Text]:
    """Continue many prompts at once, each encoded after a `<BOS>`; options as for `generate`.

    A text ends at `<EOS>`, before one of the `stop` texts, or after max_new_tokens. The draws of all texts come from
    one generator, so a seed stands for the whole list.
    """
    check_count(max_new_tokens)
    if isinstance(prompts, str):
        raise ConfigError(f"prompts = {prompts!r}: must be a list of texts; for one text there is generate_text")
    if not prompts:
        return []
    encoded = [[BOS, *tokenizer.encode(prompt)] for prompt in prompts]
    tokens, lengths = _padded(encoded, model)
    decoding = Decoding(model, tokens, Sampling(**sampling), None, seeded_generator(model, seed), lengths)
    return _collect(decoding, tokenizer, encoded, max_new_tokens, stop)


def _collect(
    decoding: Decoding, tokenizer: Tokenizer, encoded: list[list[int]], most: int, stop: str | Sequence[str]
) -> list[Text]:
    """Run to the end of every row and put its text together."""
    pieces = [Pieces(tokenizer, ids[-1:], stop) for ids in encoded]
    texts, reasons = [""] * len(encoded), [""] * len(encoded)
    tokens: list[list[int]] = [[] for _ in encoded]
    log_probs: list[list[float]] = [[] for _ in encoded]
    for number, step in enumerate(decoding, start=1):
        for row, (token, log_prob) in enumerate(zip(step.token.tolist(), step.log_prob.tolist(), strict=True)):
            if reasons[row]:
                continue
            tokens[row].append(token)
            log_probs[row].append(log_prob)
            if token == EOS:
                reasons[row] = "end of text"
                continue
            texts[row] += pieces[row].push(token)
            if pieces[row].stopped:
                reasons[row] = "stop"
                decoding.ended[row] = True
        if number == most:
            break
    texts = [text + piece.flush() for text, piece in zip(texts, pieces, strict=True)]
    prompts = [tokenizer.decode(ids) for ids in encoded]
    return [
        Text(*parts[:4], parts[4] or "length") for parts in zip(prompts, texts, tokens, log_probs, reasons, strict=True)
    ]


def generate_text(model: NewLLM, tokenizer: Tokenizer, prompt: str = "", seed: int | None = None, **options) -> str:
    """The prompt as the tokenizer reads it, and its continuation; options as for `generate_texts`."""
    text = generate_texts(model, tokenizer, [prompt], seed, **options)[0]
    return text.prompt + text.text


def _padded(encoded: list[list[int]], model: NewLLM) -> tuple[Tensor, Tensor]:
    """Ids (B, T), padded at the end, and the lengths (B,)."""
    device = model.device
    lengths = torch.tensor([len(ids) for ids in encoded], device=device)
    tokens = torch.full((len(encoded), int(lengths.max())), PAD, device=device)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = torch.tensor(ids, device=device)
    return tokens, lengths


_SEEDS = -(2**63), 2**64 - 1
"""The lowest and the highest seed that torch takes."""


def seeded_generator(model: NewLLM, seed: int | None) -> torch.Generator | None:
    """A generator for the model's device; None, for torch's own, without a seed. ConfigError for what is no seed."""
    seed = plain_number(seed)
    if seed is None:
        return None
    if not isinstance(seed, int) or isinstance(seed, bool) or not _SEEDS[0] <= seed <= _SEEDS[1]:
        raise ConfigError(f"seed = {seed!r}: must be a whole number from {_SEEDS[0]} to {_SEEDS[1]}, or none")
    return torch.Generator(model.device).manual_seed(seed)
