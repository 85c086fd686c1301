"""Which rows a step reads: the order of an epoch, and seeds that never share a stream."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


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
