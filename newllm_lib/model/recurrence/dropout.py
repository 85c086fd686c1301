"""Dropout masks as a function of a seed, so that a pass can be repeated and engines can be compared."""

from __future__ import annotations

import random

import torch
from torch import Tensor

_LEVELS = 1 << 16
"""A unit is kept by comparing 16 bits with a threshold, so a rate is met to within 2^-17."""


class Dropout:
    """Masks of one pass over a sequence; `rate` is the share of units dropped (0 to below 1), `seed` below 2^63.

    Drawing 16 fresh bits for each unit and step costs a CPU as much as a tenth of the matrix products. Instead each
    unit of a row gets 16 random bits x once, and step t compares (a_t x + b_t) mod 2^16 with the threshold, with fresh
    random a_t (odd) and b_t. For one unit the steps are independent, and so are two units unless their bits are equal
    (chance 2^-16). The same seed, device and shapes give the same masks; global generators are not touched.

    A batch of `batch_rows` rows may come in parts, each a pass from `first_row` on: a row's masks do not depend on how
    the batch is cut. Without `batch_rows` a pass is a batch.
    """

    def __init__(self, rate: float, seed: int, device: torch.device | str = "cpu", batch_rows: int | None = None):
        self.rate, self.first_row = rate, 0
        self._seed, self._device, self._batch_rows = seed, device, batch_rows
        self._whole: Tensor | None = None  # the bits of a batch, kept while its parts come
        self._threshold = round(rate * _LEVELS) - _LEVELS // 2
        self._steps = random.Random(seed)

    def start(self, num_layers: int, rows: int, width: int, order: Tensor | None = None) -> None:
        """Begin a pass over `rows` rows; `order` (rows,) int64 says in which order the engine takes them."""
        if self._batch_rows in (None, rows):
            bits = self._draw(num_layers, rows, width)
        else:
            if self._whole is None:
                self._whole = self._draw(num_layers, self._batch_rows, width)
            bits = self._whole[:, self.first_row : self.first_row + rows]
        self._bits = bits if order is None else bits[:, order]
        self._mixed = torch.empty_like(self._bits)
        self._steps = random.Random(self._seed)

    def _draw(self, num_layers: int, rows: int, width: int) -> Tensor:
        """Random int16 (L, rows, H), the same at every call."""
        count = num_layers * rows * width
        words = torch.empty(-(-count // 4), dtype=torch.int64, device=self._device)
        words.random_(-(2**63), None, generator=torch.Generator(self._device).manual_seed(self._seed))
        return words.view(torch.int16)[:count].view(num_layers, rows, width)

    def next_masks(self, rows: int, dtype: torch.dtype = torch.bool) -> Tensor:
        """Masks (L, rows, H) of the first `rows` rows in the next time step: true or 1 keeps a unit."""
        factor = self._steps.randrange(-_LEVELS // 2 + 1, _LEVELS // 2, 2)
        shift = self._steps.randrange(-_LEVELS // 2, _LEVELS // 2)
        mixed = torch.mul(self._bits[:, :rows], factor, out=self._mixed[:, :rows]).add_(shift)
        return torch.ge(mixed, self._threshold, out=torch.empty(mixed.shape, dtype=dtype, device=mixed.device))

    @property
    def scale(self) -> float:
        """Factor on the kept units that leaves their expected value unchanged."""
        return 1.0 / (1.0 - self.rate)
