"""Which tokens of a padded batch are real, in the order in which a shrinking block of rows reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from newllm_lib.system.buffer_pool import BUFFERS


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
    def of(cls, tokens: Tensor, lengths: Tensor | None, vocab_size: int) -> Packing:
        """The packing of tokens (B, T) int64, of which each row's first `lengths` (B,) are real (None = all)."""
        rows, steps = tokens.shape
        device = tokens.device
        row = torch.arange(rows, device=device)
        order, counts, is_sorted = row, torch.full((steps,), rows, device=device), True
        if lengths is not None:
            falling, order = torch.sort(lengths.clamp(max=steps), descending=True, stable=True)
            counts = (falling > torch.arange(steps, device=device)[:, None]).sum(1)  # (T,)
            # one reading, for each makes the host wait for the device
            *found, is_sorted = torch.cat([counts, (order == row).all().reshape(1).to(counts.dtype)]).tolist()
            active = [count for count in found if count]
        else:
            active = [rows] * steps
        offsets = offsets_of(active)
        step = torch.arange(steps, device=device).repeat_interleave(counts, output_size=offsets[-1])  # (N,)
        start = counts.cumsum(0) - counts  # (T,)
        position = order[torch.arange(offsets[-1], device=device) - start[step]] * steps + step
        words, word_of = _distinct(tokens.reshape(-1)[position], vocab_size)
        return cls(order, bool(is_sorted), rows * steps, active, offsets, position, words, word_of)

    @property
    def total(self) -> int:
        """N."""
        return self.offsets[-1]

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

    def spread(self, values: Tensor) -> Tensor:
        """values (N, W) of the packed places at their places in the batch (B x T, W), zeros elsewhere."""
        return values.new_zeros(self.places, values.shape[1]).index_copy_(0, self.position, values)

    def gathered(self, values: Tensor) -> Tensor:
        """The inverse of `spread`, with `slack` rows more, which hold what nothing reads: (N + slack, W)."""
        values = values.reshape(self.places, -1)
        index = pad(self.position, (0, self.slack))
        return torch.index_select(values, 0, index, out=BUFFERS.empty(len(index), values.shape[1], like=values))


def _distinct(ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The words (U,) that ids (N,) int64 are among, at least one, and the place of each id in them (N,).

    On a GPU all of the vocabulary: their product costs it less than the host's wait for their number.
    """
    if ids.device.type == "cuda":
        return torch.arange(vocab_size, device=ids.device), ids
    words, word_of = ids.unique(return_inverse=True)
    return (words if len(words) else ids.new_zeros(1)), word_of


def offsets_of(active: list[int]) -> list[int]:
    """Where each step starts among the packed tokens, and their number at the end."""
    offsets = [0]
    for count in active:
        offsets.append(offsets[-1] + count)
    return offsets
