"""SentencePiece (Kudo and Richardson 2018, arXiv 1808.06226): pieces of words, and bytes for what no piece covers.

Nothing is normalised, so every text comes back as it was: case, spaces, line ends, and any character at all.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import sentencepiece

from newllm_lib.config import BOS, EOS, PAD, SPECIAL_TOKENS, UNK
from newllm_lib.errors import ConfigError, DataError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space; in a text of its own it is given as bytes, or it would come back as a space."""
_AS_BYTES = re.compile(f"[\0{_SPACE}]+")
_BYTES = 256
_LEAST_PIECES = 32
"""Fewest pieces beside the special tokens and the bytes for which training is worth its name."""


class SentencePieceTokenizer:
    """A SentencePiece model with byte fallback and this library's special ids 0 to 3.

    model: the serialised model file. DataError for one that cannot be read or was made in another way.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError("the SentencePiece model cannot be read: it is damaged") from error
        processor = self._processor
        ids = (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id())
        first_byte = processor.piece_to_id("<0x00>")
        if ids != (PAD, UNK, BOS, EOS) or not processor.is_byte(first_byte):
            raise DataError(
                f"the SentencePiece model has the special ids {ids} and "
                f"{'byte' if processor.is_byte(first_byte) else 'no byte'} pieces: must be (0, 1, 2, 3), with byte "
                "fallback; train it with this library"
            )
        self._byte_ids = [processor.piece_to_id(f"<0x{value:02X}>") for value in range(_BYTES)]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, model: str = "bpe") -> SentencePieceTokenizer:
        """A model ('bpe' or 'unigram') of at most `vocab_size` ids; the same texts give the same model.

        ConfigError when vocab_size leaves no room beside the special tokens and the 256 bytes; DataError without text.
        """
        least = len(SPECIAL_TOKENS) + _BYTES + _LEAST_PIECES
        if vocab_size < least:
            raise ConfigError(
                f"vocab_size = {vocab_size!r}: must be at least {least} for a SentencePiece tokenizer, "
                f"{_BYTES} of which are single bytes"
            )
        lines = [line for text in texts for line in text.splitlines(keepends=True)]
        if not lines:
            raise DataError("the training text holds no character")
        out = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(_trainable(lines, (vocab_size - least) // 2 + _LEAST_PIECES // 2)),
                model_writer=out,
                model_type=model,
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                character_coverage=1.0,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                byte_fallback=True,
                pad_id=PAD,
                unk_id=UNK,
                bos_id=BOS,
                eos_id=EOS,
                pad_piece=SPECIAL_TOKENS[PAD],
                unk_piece=SPECIAL_TOKENS[UNK],
                bos_piece=SPECIAL_TOKENS[BOS],
                eos_piece=SPECIAL_TOKENS[EOS],
                max_sentence_length=1 << 30,
                num_threads=1,  # sums of several threads may differ in their last bits, and pieces with them
                minloglevel=2,
            )
        except RuntimeError as error:
            raise DataError(f"SentencePiece cannot train on this text: {error}") from error
        return cls(out.getvalue())

    @property
    def vocab_size(self) -> int:
        """Ids, the special ones and the bytes included."""
        return self._processor.get_piece_size()

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The UTF-8 bytes of each id; none of a special token but `<UNK>`, which no text becomes."""
        pieces = [self._processor.id_to_piece(index).replace(_SPACE, " ").encode() for index in range(self.vocab_size)]
        for value, index in enumerate(self._byte_ids):
            pieces[index] = bytes([value])
        for index in (PAD, BOS, EOS):
            pieces[index] = b""
        return pieces

    @cached_property
    def token_bytes(self) -> list[int]:
        """UTF-8 bytes of text that each id stands for; 0 for the special ones."""
        return [0 if index == UNK else len(piece) for index, piece in enumerate(self._pieces)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without `<BOS>` and `<EOS>`; `decode` gives the very text back."""
        ids: list[int] = []
        start = 0
        for match in _AS_BYTES.finditer(text):
            ids += self._processor.encode(text[start : match.start()])
            ids += [self._byte_ids[value] for value in match.group().encode()]
            start = match.end()
        return ids + self._processor.encode(text[start:])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        pieces = self._pieces
        return b"".join(pieces[int(index)] for index in ids).decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and checkpoints."""
        return {"kind": self.kind, "model": base64.b64encode(self.model).decode("ascii")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SentencePieceTokenizer:
        """The inverse of `to_dict`."""
        return cls(base64.b64decode(values["model"]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SentencePieceTokenizer) and self.model == other.model

    def __hash__(self) -> int:
        return int.from_bytes(hashlib.sha256(self.model).digest()[:8], "big")


def _trainable(lines: list[str], most: int) -> list[str]:
    """Lines as SentencePiece may be trained on them: spaces for the characters that it keeps for itself, and for all
    but the `most` frequent ones, which would fill the vocabulary and are written in bytes instead."""
    counts = Counter(itertools.chain.from_iterable(lines))
    kept = {character for character, _ in counts.most_common(most)} - {"\0", _SPACE}
    table = {ord(character): " " for character in counts.keys() - kept}
    return [line.translate(table) for line in lines] if table else lines
