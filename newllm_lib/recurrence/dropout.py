"""Dropout masks as a function of a seed, so that a pass can be repeated and engines can be compared."""

from __future__ import annotations

import torch
from torch import Tensor

_LEVELS = 1 << 16
"""A unit is kept by comparing 16 random bits with a threshold, so a rate is met to within 2^-17."""


class Dropout:
    """Masks of one pass over a sequence, drawn time step by time step from a generator of their own.

    `rate` is the share of units dropped (0 to below 1), `seed` any whole number below 2^63. The same seed, device
    and shapes give the same masks; torch's global generators are not touched.
    """

    def __init__(self, rate: float, seed: int, device: torch.device | str = "cpu"):
        self.rate = rate
        self._threshold = round(rate * _LEVELS) - _LEVELS // 2
        self._generator = torch.Generator(device).manual_seed(seed)

    def next_masks(self, num_layers: int, rows: int, width: int) -> Tensor:
        """Boolean masks (L, B, H) of the next time step; True keeps a unit."""
        count = num_layers * rows * width
        words = torch.empty(-(-count // 4), dtype=torch.int64, device=self._generator.device)
        words.random_(-(2**63), None, generator=self._generator)
        bits = words.view(torch.int16)[:count].view(num_layers, rows, width)
        return bits >= self._threshold

    @property
    def scale(self) -> float:
        """Factor on the kept units that leaves their expected value unchanged."""
        return 1.0 / (1.0 - self.rate)
