"""Two models with different tokenizers on the words that both know, in bits a byte.

Perplexities of different tokenizers count different things. Here each model scores every text whole, and the negative
log-likelihood of its tokens is handed to the words, what stands between white space, that they are parts of. Over the
same words, of the same number of bytes, the sums compare.

Letters: B texts, T tokens of the longest, H hidden.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from newllm_lib.config import BOS, EOS, PAD, UNK, DataConfig
from newllm_lib.data.corpus import load_corpus
from newllm_lib.errors import ConfigError, DataError
from newllm_lib.escaping import markdown_text
from newllm_lib.evaluation import copied_to
from newllm_lib.model.loss import token_losses
from newllm_lib.model.recurrence.self_check import choose_numerics
from newllm_lib.runs.run import Loaded, load_model
from newllm_lib.system.buffer_pool import BUFFERS
from newllm_lib.system.files import file_errors
from newllm_lib.system.hardware import detect

_SLOTS = 1 << 14
"""Tokens of one forward pass, padding included: their hidden layer is 32 MiB at 512 units, however long a text is."""

_CAVEATS = {
    "": "Both models read and predict whole texts, each from an empty context; the ends of texts and the words that "
    "are not counted are read, and their own bits left out.",
    "words": "A word model reads <UNK> for every word that it does not know, and need not predict upper or lower case.",
    "sentencepiece": "A SentencePiece model predicts case too, spends probability on every rare word, and pays for "
    "the end of a word in the first piece of what follows.",
}
"""What the figures do not tell, by the tokenizer that it holds for."""


@dataclass(frozen=True)
class ModelBits:
    """What one model paid, in bits."""

    tokenizer: str
    bits: float
    """For the counted words, the white space before them included."""
    bits_per_byte: float
    bits_per_word: float
    other_bits: float
    """For all else: words that are not counted, white space at the ends, and the ends of texts."""
    tokens: int
    """Predictions made, the ends of texts included."""


@dataclass(frozen=True)
class SharedWords:
    """Two models over the same words."""

    first: ModelBits
    second: ModelBits
    words: int
    """Counted: known to both tokenizers."""
    all_words: int
    share: float
    """words / all_words, from 0 to 1."""
    bytes: int
    """UTF-8 bytes of the counted words, and one for a space each."""
    caveats: tuple[str, ...]

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def text(self, names: Sequence[str]) -> str:
        """The result as a Markdown table under the names of the two models, with the caveats."""
        names = [markdown_text(name) for name in names]
        width = max(5, *map(len, names))
        lines = [
            f"{self.words:,} of {self.all_words:,} words ({self.share:.1%}) are known to both tokenizers; with a space "
            f"each they hold {self.bytes:,} bytes.",
            "",
            f"| {'model':{width}} | tokenizer     | bits a byte | bits a word | all bits of the words | of the rest |",
            f"|{'-' * (width + 2)}|---------------|-------------|-------------|-----------------------|-------------|",
        ]
        for name, model in zip(names, (self.first, self.second), strict=True):
            lines.append(
                f"| {name:{width}} | {model.tokenizer:13} | {model.bits_per_byte:11.4f} | {model.bits_per_word:11.4f} "
                f"| {model.bits:21,.0f} | {model.other_bits:11,.0f} |"
            )
        return "\n".join([*lines, "", *(f"- {caveat}" for caveat in self.caveats)])


class WordBits(NamedTuple):
    """What one model paid for one text: word by word, and for the rest (white space at the end, the end itself)."""

    words: np.ndarray  # (words of the text,) float64, bits
    known: np.ndarray  # (words of the text,) bool
    rest: float
    tokens: int
    """Predictions, the end included."""


@file_errors()
def compare_models(
    first: str | Path,
    second: str | Path,
    data: str | tuple[str, ...] | None = None,
    *,
    split: str = "validation",
    precision: str = "fp32",
    device: str = "auto",
) -> SharedWords:
    """`shared_word_bits` of two places (runs, model folders, checkpoints) on a split of some data, on a device.

    data: None takes what both were trained on (of a bare model folder that is assumed); other data become texts as the
    first run's do. ConfigError when the two were trained on different texts, when the text is not known, and when there
    is no such split; DataError when the text has changed.
    """
    pair = (load_model(first), load_model(second))
    runs = [loaded.config.data for loaded in pair if loaded.config]
    config = next(iter(runs or [loaded.protocol for loaded in pair if loaded.protocol]), DataConfig())
    prints = {loaded.fingerprint for loaded in pair} - {None}
    if data is None and len(prints) != 1:
        why = "were trained on different texts" if prints else "do not know what text they were trained on"
        raise ConfigError(f"{first} and {second} {why}: say which to score with data= (in the shell --data)")
    corpus = load_corpus(dataclasses.replace(config, data=data), split) if data else load_corpus(config)
    if data is None and corpus.fingerprint not in prints:
        raise DataError(
            f"data {config.data}: the text has changed since the runs were trained; to score it all the same, name it "
            "with data= (in the shell --data)"
        )
    if split not in corpus.splits:
        raise ConfigError(f"split {split!r}: the data {corpus.name} has {', '.join(corpus.splits)}")
    place = detect(device).device
    with ExitStack() as copies:
        there = [loaded._replace(model=copies.enter_context(copied_to(loaded.model, place))) for loaded in pair]
        return shared_word_bits(*there, corpus.splits[split], precision=precision)


def shared_word_bits(first: Loaded, second: Loaded, texts: list[str], *, precision: str = "fp32") -> SharedWords:
    """What two models pay for the words of texts that both of their tokenizers know.

    A word tokenizer knows the words whose lower-cased form is in its vocabulary, SentencePiece knows all. DataError
    when no word is known to both, or a tokenizer and its model do not belong together.
    """
    paid = [word_bits(loaded, texts, precision=precision) for loaded in (first, second)]
    sizes = np.array([len(word.encode()) + 1 for text in texts for word in text.split()], dtype=np.int64)
    shared = np.concatenate([a.known & b.known for a, b in zip(*paid, strict=True)] or [np.zeros(0, bool)])
    if not shared.any():
        raise DataError(f"{len(sizes):,} words, none of which both tokenizers know: there is nothing to compare")
    size, count = int(sizes[shared].sum()), int(shared.sum())
    results = []
    for loaded, found in zip((first, second), paid, strict=True):
        bits = np.concatenate([text.words for text in found])
        counted, total = float(bits[shared].sum()), float(bits.sum()) + sum(text.rest for text in found)
        kind, tokens = loaded.tokenizer.kind, sum(text.tokens for text in found)
        results.append(ModelBits(kind, counted, counted / size, counted / count, total - counted, tokens))
    kinds = ["", *sorted({loaded.tokenizer.kind for loaded in (first, second)})]
    caveats = tuple(_CAVEATS[kind] for kind in kinds if kind in _CAVEATS)
    return SharedWords(*results, count, len(sizes), count / len(sizes), size, caveats)


def word_bits(loaded: Loaded, texts: Sequence[str], *, precision: str = "fp32") -> list[WordBits]:
    """What a model pays for each text, word by word: BOS, the text and EOS, read once from an empty context."""
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")
    encoded = [tokenizer.encode(text) for text in texts]
    token_bytes = None if tokenizer.token_bytes is None else np.array(tokenizer.token_bytes)
    found: list[WordBits | None] = [None] * len(texts)
    with BUFFERS.kept():
        for index, nll in _scored(loaded, encoded, precision):
            bits = nll.double().cpu().numpy() / math.log(2)
            found[index] = _by_word(texts[index], encoded[index], bits, token_bytes)
    return [text for text in found if text is not None]


@torch.no_grad()
def _scored(loaded: Loaded, encoded: list[list[int]], precision: str) -> Iterator[tuple[int, Tensor]]:
    """The index of each text and the nll (tokens + 1,) of its tokens and its end, in nats."""
    model, device = loaded.model, loaded.model.device
    chosen, engine = choose_numerics(device, precision)
    was_training = model.training
    model.eval()
    try:
        for rows in _batches([len(ids) + 1 for ids in encoded]):
            marked = [torch.tensor([BOS, *encoded[row], EOS]) for row in rows]
            ids = pad_sequence(marked, batch_first=True, padding_value=PAD).to(device)
            lengths, context, parts = (ids[:, 1:] != PAD).sum(1), None, []
            for start in range(0, ids.shape[1] - 1, _SLOTS):  # a single text may be longer than a pass
                tokens, targets = ids[:, start : start + _SLOTS], ids[:, start + 1 : start + _SLOTS + 1]
                tokens = tokens[:, : targets.shape[1]]
                with chosen.autocast(device.type):
                    hidden, context = model.hidden(tokens, context, (targets != PAD).sum(1), engine=engine.run)
                    parts.append(token_losses(hidden, model.head, targets)[0])
            yield from zip(rows, torch.cat(parts).split(lengths.tolist()), strict=True)
    finally:
        model.train(was_training)


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Indices of texts of similar length, as many as fit into a pass with their padding; at least one."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if rows and (len(rows) + 1) * lengths[rows[0]] > _SLOTS:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _by_word(text: str, ids: list[int], bits: np.ndarray, token_bytes: np.ndarray | None) -> WordBits:
    """Hand the bits (tokens + 1,) of a text to its words; those of its end are the rest.

    token_bytes (V,): the UTF-8 bytes of each id, which find its word; None where every word is one token.
    """
    if token_bytes is None:
        known = np.array(ids, dtype=np.int64) != UNK
        assert len(known) == len(text.split()), text
        return WordBits(bits[:-1], known, float(bits[-1]), len(bits))
    starts, word_of_byte = _word_bytes(text)
    count, sizes = len(starts), token_bytes[ids]
    assert sizes.sum() == len(word_of_byte), text
    token_of_byte, inside = np.repeat(np.arange(len(ids)), sizes), word_of_byte >= 0
    held = np.bincount(token_of_byte[inside], minlength=len(ids))  # bytes of words in each token
    a_byte = bits[:-1] / np.maximum(held, 1)
    words = np.bincount(word_of_byte[inside], a_byte[token_of_byte[inside]], minlength=count)
    space = held == 0  # a token of nothing but white space belongs to the word that follows it, or to the rest
    following = np.searchsorted(starts, np.cumsum(sizes)[space])
    words = np.bincount(following, bits[:-1][space], minlength=count + 1) + np.append(words, 0.0)
    return WordBits(words[:-1], np.ones(count, dtype=bool), float(words[-1] + bits[-1]), len(bits))


def _word_bytes(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each word starts (bytes), and for each byte of the text the number of its word, -1 in white space."""
    starts, owners, end = [], [], 0
    for number, word in enumerate(re.finditer(r"\S+", text)):
        gap, size = len(text[end : word.start()].encode()), len(word.group().encode())
        starts.append(len(owners) + gap)
        owners += [-1] * gap + [number] * size
        end = word.end()
    owners += [-1] * len(text[end:].encode())
    return np.array(starts, dtype=np.int64), np.array(owners, dtype=np.int64)
