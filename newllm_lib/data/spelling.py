"""Where a word stands in encoded text, for a tokenizer that loses nothing."""

from __future__ import annotations

import re

import numpy as np

from newllm_lib.data.sequences import EncodedTexts
from newllm_lib.data.tokenizer import Tokenizer


def spelling(texts: EncodedTexts, tokenizer: Tokenizer, word: str) -> np.ndarray:
    """(N,) bool: which of the ids hold a byte of `word`, wherever it stands in a text."""
    lengths, found = np.array(tokenizer.token_bytes), np.zeros(len(texts.ids), dtype=bool)
    pattern = re.compile(re.escape(word.encode()))
    for index in range(len(texts)):
        ids, start = texts[index], texts.offsets[index]
        ends = np.cumsum(lengths[ids])
        for match in pattern.finditer(tokenizer.decode(ids).encode()):
            first, last = np.searchsorted(ends, (match.start(), match.end() - 1), side="right")
            found[start + first : start + last + 1] = True
    return found
