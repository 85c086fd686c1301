"""CPU memory that is kept from training step to training step.

A C library gives large blocks back to the system as soon as they are freed, and fresh memory costs a page fault each
4 KiB: a seventh of a training step at batch 512. Blocks taken here go back to a pool by themselves when the last
tensor on them is gone. NumPy asks for huge pages for them where the system has any. On a GPU, torch's own allocator
keeps its memory and is used instead.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector register."""
_HEADROOM = 16
"""A block is made larger than asked for by this part of it, for the next batch may hold a few more tokens."""
_LEAST = 1 << 20
"""Bytes; smaller tensors are left to torch, since the C library keeps those by itself."""


@dataclass(eq=False)
class _Block:
    memory: numpy.ndarray  # bytes
    lent: weakref.ref | None = None  # to the array on which torch's storage rests

    @property
    def free(self) -> bool:
        return self.lent is None or self.lent() is None


class Buffers:
    """A pool of blocks; safe to use from several threads."""

    def __init__(self):
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    def empty(self, *shape: int, like: Tensor) -> Tensor:
        """As `like.new_empty(shape)`: what it holds is not defined."""
        size = math.prod(shape) * like.element_size()
        if like.device.type != "cpu" or size < _LEAST:
            return like.new_empty(shape)
        with self._lock:
            lent = self._lend(size)
        return torch.from_numpy(lent).view(like.dtype).view(shape)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Give everything back at the end of this block."""
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Keep nothing any longer: what a tensor still uses goes back to the system with that tensor."""
        with self._lock:
            self._blocks = []

    @property
    def kept_bytes(self) -> int:
        """Bytes held, in use or not."""
        return sum(block.memory.nbytes for block in self._blocks)

    def _lend(self, size: int) -> numpy.ndarray:
        """An array of `size` bytes: of the smallest free block that holds it, or of a new one instead of a free one."""
        free = sorted((block for block in self._blocks if block.free), key=lambda block: block.memory.nbytes)
        block = next((block for block in free if block.memory.nbytes >= size), None)
        if block is None:
            if free:
                self._blocks.remove(free[-1])
            room = size + size // _HEADROOM
            memory = numpy.empty(room + _ALIGNMENT, dtype=numpy.uint8)
            start = -memory.ctypes.data % _ALIGNMENT
            block = _Block(memory[start : start + room])
            self._blocks.append(block)
        lent = block.memory[:size]
        block.lent = weakref.ref(lent)
        return lent


BUFFERS = Buffers()
"""The pool of this process; training, evaluation and the range test empty it when they are done, however they end."""
