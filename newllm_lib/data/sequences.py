"""Token ids of texts to the integer arrays that training reads; one index gives one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from newllm_lib.config import BOS, EOS, PAD


@dataclass(frozen=True)
class EncodedTexts:
    """The ids of many texts end to end: text k is `ids[offsets[k] : offsets[k + 1]]`."""

    ids: np.ndarray  # (N,) int32
    offsets: np.ndarray  # (number of texts + 1,) int64
    num_words: int  # of the texts themselves, between white space

    @classmethod
    def from_lists(cls, texts: Sequence[Sequence[int]], num_words: int = 0) -> EncodedTexts:
        """Pack lists of ids."""
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in texts], out=offsets[1:])
        ids = np.fromiter((index for text in texts for index in text), dtype=np.int32, count=int(offsets[-1]))
        return cls(ids, offsets, num_words)

    @classmethod
    def joined(cls, parts: Sequence[EncodedTexts]) -> EncodedTexts:
        """The texts of several, in their order."""
        sizes = np.concatenate([np.diff(part.offsets) for part in parts])
        offsets = np.concatenate(([0], np.cumsum(sizes)))
        return cls(np.concatenate([part.ids for part in parts]), offsets, sum(part.num_words for part in parts))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]


def windows(texts: EncodedTexts, length: int, stride: int, min_words: int) -> np.ndarray:
    """The published sequences: (N, length) int32, padded with PAD.

    A text becomes BOS + ids + EOS. Up to `length` ids: one padded row. Longer: rows of `length` whose starts are
    `stride` apart, the incomplete tail dropped. Texts of fewer than `min_words` ids are skipped.
    """
    words = np.diff(texts.offsets)
    marked = words + 2  # with BOS and EOS
    ends = np.cumsum(marked)
    line = np.full(int(ends[-1]) + length if len(ends) else length, PAD, dtype=np.int32)  # all texts in a row
    line[ends - marked], line[ends - 1] = BOS, EOS
    between = np.zeros(len(line), dtype=bool)
    between[: len(line) - length] = True
    between[ends - marked] = between[ends - 1] = False
    line[between] = texts.ids
    used = words >= min_words
    firsts, marked = (ends - marked)[used], marked[used]
    rows = np.where(marked <= length, 1, (marked - length) // stride + 1)
    within = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)  # 0, 1, ... in each text
    out = np.lib.stride_tricks.sliding_window_view(line, length)[np.repeat(firsts, rows) + stride * within]
    out[np.arange(length) >= np.repeat(marked, rows)[:, None]] = PAD  # what follows a short text in the line
    return out


def used_share(texts: EncodedTexts, length: int, stride: int, min_words: int) -> float:
    """Share of the targets of the texts that `windows` takes which are in one of its rows, for a stride from length - 1
    on, where no target is in two."""
    words = np.diff(texts.offsets)
    targets = words[words >= min_words] + 1  # the EOS is one, the BOS none
    rows = np.maximum(targets + 1 - length, 0) // stride + 1
    return float(np.minimum(targets, rows * (length - 1)).sum() / max(1, targets.sum()))


def stream(texts: EncodedTexts, length: int, lanes: int) -> np.ndarray:
    """All texts as one run of tokens in parallel lanes: (chunks, lanes, length) int32, padded with PAD.

    The stream is BOS, then each text and an EOS. Lane b holds the b-th contiguous piece; chunk k + 1 of a lane goes
    on where chunk k ended (its first id is the other's last target), so that every token but the BOS is a target
    exactly once when chunks are read in order with the context carried over.
    """
    ends = np.insert(texts.ids, texts.offsets[1:], EOS)
    line = np.concatenate(([BOS], ends)).astype(np.int32)
    num_targets = len(line) - 1
    per_lane = -(-num_targets // lanes)
    step = length - 1
    chunks = -(-per_lane // step)
    out = np.full((chunks, lanes, length), PAD, dtype=np.int32)
    for lane in range(lanes):
        end = min((lane + 1) * per_lane, num_targets)
        for chunk, start in enumerate(range(lane * per_lane, end, step)):
            piece = line[start : min(start + step, end) + 1]
            out[chunk, lane, : len(piece)] = piece
    return out


def target_lengths(ids: np.ndarray) -> np.ndarray:
    """Real targets of each row of ids (..., length): its non-padding ids but the first."""
    return np.maximum((ids != PAD).sum(axis=-1) - 1, 0)
