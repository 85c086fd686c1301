"""A configuration to the arrays of a run: read, tokenise (once, cached by content) and lay out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from newllm_lib.config import SPECIAL_TOKENS, UNK, RunConfig
from newllm_lib.config.places import user_path
from newllm_lib.data.corpus import ALL, Corpus, load_corpus
from newllm_lib.data.sequences import EncodedTexts, stream, target_lengths, used_share, windows
from newllm_lib.data.spelling import spelling
from newllm_lib.data.tokenizer import Tokenizer, tokenizer_from_dict, train_tokenizer
from newllm_lib.errors import ConfigError, DataError
from newllm_lib.system.files import write_atomic

CACHE_VERSION = 2
"""Raise it when the tokenizer or the layout of a cache file changes."""


@dataclass(frozen=True)
class Split:
    """One split, ready to be read: windows (N, S), or a stream (chunks, lanes, S), int32."""

    ids: np.ndarray
    carries_context: bool
    token_bytes: np.ndarray | None = None
    """(V,) int64: UTF-8 bytes of each id; None where the tokenizer loses text."""
    bytes_per_word: float = math.nan
    """Of the texts, white space between words included."""
    find_unknown: Callable[[], np.ndarray | None] = lambda: None
    """What `spelled_unknown` is found by, once it is asked for."""

    @cached_property
    def spelled_unknown(self) -> np.ndarray | None:
        """(like ids) bool: the ids that spell a literal `<unk>`, with what else is in their pieces; None without one.

        Prepared corpora have it in place of rare words. For a tokenizer of words it is the unknown id.
        """
        return self.find_unknown()

    @property
    def digest(self) -> str:
        """sha256 of the ids: equal where the very same predictions are scored."""
        return hashlib.sha256(np.ascontiguousarray(self.ids, dtype="<i4").tobytes()).hexdigest()

    @property
    def num_tokens(self) -> int:
        """Real targets."""
        return int(target_lengths(self.ids).sum())

    @property
    def unknown_share(self) -> float:
        """Share of the real targets that are the unknown id."""
        return float((self.ids[..., 1:] == UNK).sum() / self.num_tokens)

    @property
    def num_slots(self) -> int:
        """Predictions computed, padding included."""
        return self.ids[..., 1:].size


_PLAIN = len(SPECIAL_TOKENS)
"""A mark that no layout puts in by itself, in place of an id."""


@dataclass(frozen=True)
class Prepared:
    """What a run reads: its tokenizer, its encoded splits, and the hash of the text they came from."""

    corpus_name: str
    fingerprint: str
    tokenizer: Tokenizer
    texts: dict[str, EncodedTexts]
    config: RunConfig
    made_by: tuple
    """The settings that text and tokenizer came from (`text_settings`)."""
    notes: tuple[str, ...] = ()
    """Sentences on the text that whoever uses it should know; no path is in them."""
    left_out: int = 0
    """Paths that lead to a file which was read already."""

    def under(self, config: RunConfig) -> Prepared:
        """The same text for a run whose other settings differ; those that made the text must be equal."""
        assert text_settings(config) == self.made_by, "another text or tokenizer than the one that was prepared"
        return dataclasses.replace(self, config=_within(config, self.tokenizer))

    def split(self, name: str, lanes: int | None = None) -> Split:
        """The arrays of a split; `lanes` is the batch of a stream (None = that of the evaluation)."""
        data, texts = self.config.data, self._texts(name)

        def laid_out(texts: EncodedTexts) -> np.ndarray:
            if data.layout == "stream":
                return stream(texts, data.sequence_length, lanes or data.eval_lanes)
            return windows(texts, data.sequence_length, data.stride, data.min_words)

        def find_unknown() -> np.ndarray | None:
            spelled = spelling(texts, self.tokenizer, UNKNOWN_WORD)
            marks = _PLAIN + spelled.astype(np.int32)
            return laid_out(EncodedTexts(marks, texts.offsets, 0)) == _PLAIN + 1 if spelled.any() else None

        ids = laid_out(texts)
        if not len(ids):
            raise DataError(
                f"data {self.corpus_name}: no text of the {name} split has {data.min_words} words or more "
                "(min_words)" + "".join(f"; {note}" for note in self.notes)
            )
        lossless = self.tokenizer.token_bytes is not None
        measures = self._measures(texts)
        return Split(ids, data.layout == "stream", *measures, *([find_unknown] if lossless else []))

    @property
    def why_changed(self) -> str:
        """What may have changed the text since an earlier version of this library read it; "" without a reason."""
        if not self.left_out:
            return ""
        return (
            f". {self.left_out:,} paths that lead, through links, to files that are in the data already are left out "
            "now; earlier versions of this library read such files twice"
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences that a plan shows: the notes, and what this layout leaves out of the training text."""
        data = self.config.data
        if data.layout != "windows" or data.stride < data.sequence_length:
            return self.notes
        share = used_share(self.texts["train"], data.sequence_length, data.stride, data.min_words)
        return (
            *self.notes,
            f"stride {data.stride} with sequence_length {data.sequence_length} trains on {share:.1%} of the tokens: "
            f"the rest lies between two windows; a stride up to {data.sequence_length - 1} leaves no gap",
        )

    def _texts(self, name: str) -> EncodedTexts:
        """The texts of a split; those of every split for "all"."""
        if name == ALL and self.texts:
            return EncodedTexts.joined(list(self.texts.values()))
        if name not in self.texts:
            raise ConfigError(
                f"split {name!r}: the data {self.corpus_name} has {', '.join(self.texts)}; all = each of them"
            )
        return self.texts[name]

    def _measures(self, texts: EncodedTexts) -> tuple[np.ndarray | None, float]:
        """What bits per byte and word-level perplexity need, for a tokenizer that loses nothing."""
        if self.tokenizer.token_bytes is None:
            return None, math.nan
        token_bytes = np.array(self.tokenizer.token_bytes)
        return token_bytes, float(token_bytes[texts.ids].sum() / max(1, texts.num_words))


def prepare(config: RunConfig, tokenizer: Tokenizer | None = None, scored: str | None = None) -> Prepared:
    """Read and tokenise the data of a run; with a tokenizer given, only encode with it.

    The model's vocabulary shrinks to the tokens that the training text has, if those are fewer. scored: the one split
    that is wanted of the data, as for `load_corpus`; then a tokenizer is needed.
    """
    corpus = load_corpus(config.data, scored)
    tokenizer, texts = _encode_cached(corpus, config, tokenizer)
    within, made_by = _within(config, tokenizer), text_settings(config)
    notes = corpus.notes + _tokenizer_notes(corpus, tokenizer)
    return Prepared(corpus.name, corpus.fingerprint, tokenizer, texts, within, made_by, notes, corpus.left_out)


_LONG_WORD = 20
"""Characters between white space, on average, above which a text has no words to speak of: 5 in English."""
UNKNOWN_WORD = "<unk>"
"""What prepared corpora hold in place of rare words."""


def _tokenizer_notes(corpus: Corpus, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Where a kind of tokenizer does not suit a text."""
    if tokenizer.kind == "words":
        texts = corpus.splits.get("train", [])
        size, words = sum(map(len, texts)), sum(len(text.split()) for text in texts)
        if size <= _LONG_WORD * words:
            return ()
        return (
            f"{size / max(1, words):,.0f} characters between white space, on average: text without spaces between its "
            "words needs tokenizer sentencepiece (in the shell --tokenizer sentencepiece)",
        )
    texts = corpus.splits.get("validation", [])
    size = sum(len(text.encode(errors="replace")) for text in texts)
    share = sum(text.count(UNKNOWN_WORD) for text in texts) * len(UNKNOWN_WORD) / max(1, size)
    if share < 0.001:
        return ()
    return (
        f"{share:.1%} of the validation bytes are {UNKNOWN_WORD} (the spaces before it not counted), which stands for "
        "rare words in this text and is easy to guess: bits per byte are given without it as well",
    )


def text_settings(config: RunConfig) -> tuple:
    """What decides the encoded text and its tokenizer; everything else may differ between runs that share them."""
    data = config.data
    source = (data.data, data.text_unit, data.validation_fraction, data.test_fraction)
    return (*source, data.tokenizer, data.sentencepiece_model, config.model.vocab_size)


def _within(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """A vocabulary no larger than the tokenizer's."""
    return config.replace(vocab_size=min(config.model.vocab_size, tokenizer.vocab_size))


def _encode_cached(
    corpus: Corpus, config: RunConfig, tokenizer: Tokenizer | None
) -> tuple[Tokenizer, dict[str, EncodedTexts]]:
    data, vocab_size = config.data, config.model.vocab_size
    wanted = tokenizer.to_dict() if tokenizer else [data.tokenizer, data.sentencepiece_model, vocab_size]
    key = json.dumps([CACHE_VERSION, corpus.fingerprint, wanted])
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"
    try:
        return _read_cache(path)
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        tokenizer = tokenizer or train_tokenizer(data, corpus.splits["train"], vocab_size)
    texts = {
        split: EncodedTexts.from_lists([tokenizer.encode(text) for text in found], sum(len(t.split()) for t in found))
        for split, found in corpus.splits.items()
    }
    _write_cache(path, tokenizer, texts)
    return tokenizer, texts


def cache_folder() -> Path:
    """Where encoded text is kept: $NEWLLM_CACHE, or newllm_lib in the user's cache folder. Safe to delete.

    A user without a home has it in the folder of temporary files.
    """
    if chosen := os.environ.get("NEWLLM_CACHE"):
        return user_path(chosen)
    base = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if base.is_absolute():
        return base / "newllm_lib"
    return Path(tempfile.gettempdir(), f"newllm_lib-{os.getuid()}")  # a user without a home, as in many containers


def _read_cache(path: Path) -> tuple[Tokenizer, dict[str, EncodedTexts]]:
    with np.load(path, allow_pickle=False) as stored:
        tokenizer = tokenizer_from_dict(json.loads(stored["tokenizer"].tobytes()))
        names = json.loads(stored["splits"].tobytes())
        return tokenizer, {name: _stored(stored, name) for name in names}


def _stored(arrays: Mapping[str, np.ndarray], name: str) -> EncodedTexts:
    return EncodedTexts(arrays[f"{name}_ids"], arrays[f"{name}_offsets"], int(arrays[f"{name}_words"]))


def _write_cache(path: Path, tokenizer: Tokenizer, texts: dict[str, EncodedTexts]) -> None:
    """Best effort: a full or read-only disk costs time at the next start, not this run."""
    arrays = {
        "tokenizer": np.frombuffer(json.dumps(tokenizer.to_dict()).encode(), dtype=np.uint8),
        "splits": np.frombuffer(json.dumps(list(texts)).encode(), dtype=np.uint8),
    }
    for name, encoded in texts.items():
        arrays[f"{name}_ids"], arrays[f"{name}_offsets"] = encoded.ids, encoded.offsets
        arrays[f"{name}_words"] = np.array(encoded.num_words)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: np.savez(file, **arrays))
    except OSError:
        return
