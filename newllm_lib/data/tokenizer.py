"""Text to token ids and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from newllm_lib.config import BOS, EOS, PAD, SPECIAL_TOKENS, UNK, DataConfig
from newllm_lib.errors import ConfigError, DataError


class Tokenizer(Protocol):
    """What every kind of tokenizer offers; ids 0 to 3 are the special tokens in all of them."""

    kind: str

    @property
    def vocab_size(self) -> int:
        """Ids, the special ones included."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without `<BOS>` and `<EOS>`."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids other than `<UNK>` are left out."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and checkpoints."""

    @property
    def token_bytes(self) -> list[int] | None:
        """UTF-8 bytes of text that each id stands for; None where the text cannot be had back."""


class _Table(dict):
    """Word to id; a word that is not there is the unknown one."""

    def __missing__(self, word: str) -> int:
        return UNK


class WordTokenizer:
    """Lower-cased words between white space, the most frequent ones of the training text, as published.

    Ids 0 to 3 are `<PAD>`, `<UNK>`, `<BOS>`, `<EOS>`; then the words by falling frequency, ties by first
    appearance. A literal `<unk>` in the text is the unknown id and takes no place in the vocabulary.
    """

    kind = "words"
    token_bytes = None

    def __init__(self, words: Sequence[str]):
        self.words = (*SPECIAL_TOKENS, *words)
        self._ids = _Table({word: index for index, word in enumerate(words, start=len(SPECIAL_TOKENS))})
        if len(self._ids) != len(words):
            raise DataError("the vocabulary holds a word twice")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> WordTokenizer:
        """The vocabulary of at most `vocab_size` ids, the special ones included; DataError when no word is left."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text.lower().split())
        counts.pop("<unk>", None)
        room = vocab_size - len(SPECIAL_TOKENS)
        if room < 1:
            raise ConfigError(f"vocab_size = {vocab_size!r}: must be at least {len(SPECIAL_TOKENS) + 1}")
        if not counts:
            raise DataError("the training text holds no word")
        return cls([word for word, _ in counts.most_common(room)])  # most_common keeps first-seen order among ties

    @property
    def vocab_size(self) -> int:
        """Ids, the special ones included."""
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of a text, without `<BOS>` and `<EOS>`."""
        return [self._ids[word] for word in text.lower().split()]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of ids, joined by spaces; padding and the marks of beginning and end are left out."""
        hidden = (PAD, BOS, EOS)
        return " ".join(self.words[int(index)] for index in ids if int(index) not in hidden)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and checkpoints."""
        return {"kind": self.kind, "words": list(self.words[len(SPECIAL_TOKENS) :])}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WordTokenizer:
        """The inverse of `to_dict`."""
        return cls(values["words"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordTokenizer) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)


def train_tokenizer(config: DataConfig, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The tokenizer that `config` names, trained on the texts; DataError or ConfigError where they do not suffice."""
    if config.tokenizer == WordTokenizer.kind:
        return WordTokenizer.train(texts, vocab_size)
    from newllm_lib.data.sentencepiece_tokenizer import SentencePieceTokenizer  # a library that word runs need not load

    return SentencePieceTokenizer.train(texts, vocab_size, config.sentencepiece_model)


def tokenizer_from_dict(values: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` wrote; DataError for a kind that this version does not know."""
    kind = values.get("kind")
    if kind == WordTokenizer.kind:
        return WordTokenizer.from_dict(values)
    if kind != "sentencepiece":
        raise DataError(f"tokenizer kind {kind!r}: this version knows {WordTokenizer.kind!r} and 'sentencepiece'")
    from newllm_lib.data.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer.from_dict(values)
