"""Which tokens of a padded batch are real, in the order in which a shrinking block of rows reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Step after step, within a step the rows by falling length. N real tokens, U distinct ones."""

    order: Tensor  # (B,) int64: the rows by falling length
    sorted: bool  # whether the rows came in that order
    places: int  # B x T
    active: list[int]  # rows with a token at each step; never rises
    offsets: list[int]  # where each step starts among the packed tokens, and their number at the end
    position: Tensor  # (N,) int64: packed place -> place in (B, T), row by row
    words: Tensor  # (U,) int64: the distinct token ids
    word_of: Tensor  # (N,) int64: packed place -> place in words

    @classmethod
    def of(cls, tokens: Tensor, lengths: Tensor | None) -> Packing:
        """The packing of tokens (B, T) int64, of which each row's first `lengths` (B,) are real (None = all)."""
        rows, steps = tokens.shape
        device = tokens.device
        row = torch.arange(rows, device=device)
        order, active = row, [rows] * steps
        if lengths is not None:
            falling, order = torch.sort(lengths.clamp(max=steps), descending=True, stable=True)
            counts = (falling > torch.arange(steps, device=device)[:, None]).sum(1)  # (T,)
            active = [count for count in counts.tolist() if count]
        offsets = [0]
        for count in active:
            offsets.append(offsets[-1] + count)
        step = torch.arange(len(active), device=device)[:, None]
        real = row < torch.tensor(active, dtype=torch.int64, device=device)[:, None]  # (T', B)
        position = (order * steps + step)[real]
        words, word_of = tokens.reshape(-1)[position].unique(return_inverse=True)
        words = words if len(words) else tokens.new_zeros(1)  # so that there is a row to look up, even for no token
        return cls(order, bool(torch.equal(order, row)), rows * steps, active, offsets, position, words, word_of)

    @property
    def slack(self) -> int:
        """Rows by which a step's products may be rounded up: see `rounded`."""
        return max(1, len(self.order) // 16)

    def rounded(self, rows: int) -> int:
        """A row count for products that takes few values: each new one costs a CPU's library a compiled kernel."""
        return min(-(-rows // self.slack) * self.slack, len(self.order))

    def blocks(self, size: int) -> Iterator[range]:
        """The steps from the last to the first, in runs that hold about `size` tokens and at least one step."""
        stop = len(self.active)
        while stop:
            start = stop - 1
            while start and self.offsets[stop] - self.offsets[start - 1] <= size:
                start -= 1
            yield range(start, stop)
            stop = start

    def step(self, t: int) -> slice:
        """The packed places of step t."""
        return slice(self.offsets[t], self.offsets[t + 1])
