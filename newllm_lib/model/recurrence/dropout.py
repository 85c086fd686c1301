"""Dropout masks as a function of a seed, so that a pass can be repeated and engines can be compared."""

from __future__ import annotations

import math
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
    (chance 2^-16). The same seed, device and shapes give the same masks; a CPU and a GPU, or two
    models of GPU, draw others from one seed. Global generators are not touched.

    A batch of `batch_rows` rows may come in parts, each a pass from `first_row` on: a row's masks do not depend on how
    the batch is cut. Without `batch_rows` a pass is a batch.
    """

    def __init__(self, rate: float, seed: int, device: torch.device | str = "cpu", batch_rows: int | None = None):
        self.rate, self.first_row = rate, 0
        self._seed, self._device, self._batch_rows = seed, device, batch_rows
        self._whole: Tensor | None = None  # the bits of a batch, kept while its parts come
        self.threshold = round(rate * _LEVELS) - _LEVELS // 2
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
        return random_bits(self._seed, (num_layers, rows, width), self._device)

    def next_masks(self, rows: int, dtype: torch.dtype = torch.bool) -> Tensor:
        """Masks (L, rows, H) of the first `rows` rows in the next time step: true or 1 keeps a unit."""
        factor, shift = self._step_numbers()
        mixed = torch.mul(self._bits[:, :rows], factor, out=self._mixed[:, :rows]).add_(shift)
        return torch.ge(mixed, self.threshold, out=torch.empty(mixed.shape, dtype=dtype, device=mixed.device))

    def _step_numbers(self) -> tuple[int, int] | tuple[Tensor, Tensor]:
        """a_t and b_t of the next time step."""
        return _step_numbers(self._steps)

    @property
    def scale(self) -> float:
        """Factor on the kept units that leaves their expected value unchanged."""
        return 1.0 / (1.0 - self.rate)


class StaticDropout(Dropout):
    """The masks of a `Dropout` of the same seed, in memory that stays in place, as a CUDA graph needs it.

    `fill` draws what a pass reads, outside of the graph; the pass itself asks no generator and no clock of the host.
    """

    def __init__(self, rate: float, num_layers: int, rows: int, width: int, steps: int, device: torch.device | str):
        super().__init__(rate, 0, device)
        self.drawn = torch.zeros(num_layers, rows, width, dtype=torch.int16, device=device)
        self.numbers = torch.zeros(steps, 2, dtype=torch.int16, device=device)
        """(T, 2) int16: a_t and b_t of each time step."""
        self._next = 0

    @property
    def bits(self) -> Tensor:
        """(L, rows, H) int16: what the masks are made from, rows in the order of the pass that was started."""
        return self._bits

    def fill(self, seed: int, rows: int) -> None:
        """Make the masks those of `Dropout(rate, seed)` for a batch of `rows` rows (as many as fit here at most)."""
        layers, _, width = self.drawn.shape
        self.drawn[:, :rows].copy_(random_bits(seed, (layers, rows, width), self._device))
        steps = random.Random(seed)
        self.numbers.copy_(torch.tensor([_step_numbers(steps) for _ in self.numbers], dtype=torch.int16))

    def start(self, num_layers: int, rows: int, width: int, order: Tensor | None = None) -> None:
        """Begin a pass, as of `Dropout`; the shapes are those that it was made for."""
        self._bits = self.drawn if order is None else self.drawn[:, order]
        self._mixed = torch.empty_like(self._bits)
        self._next = 0

    def _step_numbers(self) -> tuple[Tensor, Tensor]:
        factor, shift = self.numbers[self._next]
        self._next += 1
        return factor, shift


def random_bits(seed: int, shape: tuple[int, int, int], device: torch.device | str) -> Tensor:
    """Random int16 of a shape: a function of seed, shape and device."""
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(seed))
    return words.view(torch.int16)[:count].view(shape)


def _step_numbers(steps: random.Random) -> tuple[int, int]:
    """a_t, odd, and b_t of the next time step."""
    factor = steps.randrange(-_LEVELS // 2 + 1, _LEVELS // 2, 2)
    return factor, steps.randrange(-_LEVELS // 2, _LEVELS // 2)
