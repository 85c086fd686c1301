"""Which rows a step reads, from a split to ids on the device; and seeds that never share a stream."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from newllm_lib.data.dataset import Split


class Batches:
    """The batches of a split: the one rule for the rows that a step reads, a function of seed, epoch and number.

    Of windows, each epoch reads every row once, in an order of its own, and its last batch may be smaller. A stream is
    read in its own order in every epoch, one chunk of all its lanes at a time, and `batch_size` is their number.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, device: str | torch.device = "cpu"):
        """The split's ids are kept on `device`, in their own small integer type."""
        self._ids = torch.from_numpy(split.ids).to(device)
        self._is_stream, self._batch_size, self._seed = split.carries_context, batch_size, seed
        self.per_epoch = batches_per_epoch(split, batch_size)

    def read(self, epoch: int, number: int) -> Tensor:
        """The ids (B, S) int64 of one batch of an epoch, both counted from 0; IndexError where the epoch has fewer."""
        if not 0 <= number < self.per_epoch:
            raise IndexError(f"batch {number}: must be 0 to {self.per_epoch - 1}, the batches of an epoch")
        if self._is_stream:
            return self._ids[number].long()
        start = number * self._batch_size
        return self._windows(epoch, slice(start, start + self._batch_size))

    def read_repeating(self, number: int) -> Tensor:
        """The ids (B, S) int64 of batch `number` (from 0) of the first epoch repeated without end, every batch full."""
        if self._is_stream:
            return self._ids[number % len(self._ids)].long()
        start = number * self._batch_size
        return self._windows(0, torch.arange(start, start + self._batch_size) % len(self._ids))

    def _windows(self, epoch: int, places: slice | Tensor) -> Tensor:
        """The rows at some places of an epoch's order: one index into the split."""
        rows = epoch_order(self._seed, epoch, len(self._ids))[places]
        return self._ids[rows.to(self._ids.device)].long()


def batches_per_epoch(split: Split, batch_size: int) -> int:
    """Batches of an epoch, the last one possibly smaller."""
    return len(split.ids) if split.carries_context else -(-len(split.ids) // batch_size)


def ids_are_below(split: Split, vocab_size: int) -> bool:
    """Whether every id of a split is in a vocabulary, 0 to below its size."""
    return bool(split.ids.min() >= 0 and split.ids.max() < vocab_size)


@lru_cache(maxsize=2)  # asked for at every batch of an epoch
def epoch_order(seed: int, epoch: int, rows: int) -> Tensor:
    """The order (rows,) in which an epoch reads its sequences: a function of seed and epoch alone."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(mix_seed(seed, epoch, -1)))


def mix_seed(*parts: int) -> int:
    """One seed below 2^62 from several numbers (an FNV-1a hash), so that no two uses share a generator's stream."""
    value = 0xCBF29CE484222325
    for part in parts:
        for byte in part.to_bytes(9, "little", signed=True):
            value = ((value ^ byte) * 0x100000001B3) & (2**64 - 1)
    return value >> 2
