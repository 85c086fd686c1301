"""A packing whose shapes are the same for every batch of a run, as a CUDA graph needs them.

Each step takes as many rows as any batch of the run has there (the envelope), so some batches compute rows that have
ended. What such a row computes reaches nothing: its target is padding, so no gradient comes from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from newllm_lib.model.recurrence.packing import Packing, offsets_of

_ROWS = 16
"""Rows of a step are a multiple of it, which matrix units like."""


@dataclass(frozen=True)
class Envelope:
    """How many rows each step takes, whatever the batch; N = their sum."""

    active: list[int]  # T' counts, at most T of them; never rises
    most: Tensor  # (T,) int64: the same, with zeros to the end
    step: Tensor  # (N,) int64: packed place -> step
    rank: Tensor  # (N,) int64: packed place -> place among the rows by falling length

    @classmethod
    def of(cls, active: list[int], steps: int, device: torch.device | str) -> Envelope:
        """From the counts, for sequences of `steps` tokens."""
        counts = torch.tensor(active, dtype=torch.int64)
        step = torch.repeat_interleave(torch.arange(len(active)), counts)
        rank = torch.arange(int(counts.sum())) - torch.tensor(offsets_of(active))[step]
        most = torch.zeros(steps, dtype=torch.int64)
        most[: len(active)] = counts
        return cls(active, most.to(device), step.to(device), rank.to(device))


def most_active(batches: Iterable[np.ndarray], rows: int, steps: int) -> list[int]:
    """Most active rows at each step over batches of at most `rows` rows, each given by its rows' lengths.

    Without the steps that no row reaches; rounded up to a multiple of 16, to `rows` at most.
    """
    most = np.zeros(steps, dtype=np.int64)
    for lengths in batches:
        ended = np.bincount(np.minimum(lengths, steps), minlength=steps + 1)  # rows by their length
        most = np.maximum(most, len(lengths) - np.cumsum(ended)[:-1])
    return [min(rows, -(-int(count) // _ROWS) * _ROWS) for count in most if count]


@dataclass(frozen=True)
class StaticPacking(Packing):
    """A `Packing` of a fixed number of rows at each step; making it reads nothing from the device.

    `spread` and `gathered` leave values packed. The context that a pass ends with is right for rows that are active to
    the last step; others hold what they went on to compute, and its gradient must be zero.
    """

    fits: Tensor  # () bool: whether no step has more active rows than it takes

    @classmethod
    def of(cls, tokens: Tensor, lengths: Tensor, envelope: Envelope, vocab_size: int) -> StaticPacking:
        """tokens (B, T) int64, of which each row's first `lengths` (B,) int64 are real; all on one device."""
        rows, steps = tokens.shape
        falling, order = torch.sort(lengths, descending=True, stable=True)
        counts = (falling > torch.arange(steps, device=tokens.device)[:, None]).sum(1)  # (T,)
        position = order[envelope.rank] * steps + envelope.step
        return cls(
            order=order,
            sorted=False,
            places=rows * steps,
            active=envelope.active,
            offsets=offsets_of(envelope.active),
            position=position,
            words=torch.arange(vocab_size, device=tokens.device),
            word_of=tokens.reshape(-1)[position],
            fits=(counts <= envelope.most).all(),
        )

    @property
    def slack(self) -> int:
        """None: the envelope is rounded already."""
        return 0

    def rounded(self, rows: int) -> int:
        """`rows` as it is."""
        return rows

    def spread(self, values: Tensor) -> Tensor:
        """values (N, W) as they are."""
        return values

    def gathered(self, values: Tensor) -> Tensor:
        """values (N, W), in memory of their own."""
        return values.clone()
