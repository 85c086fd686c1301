"""How many sequences are computed at a time: fewer after memory has run out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from newllm_lib.errors import TrainingError
from newllm_lib.system.hardware import Machine
from newllm_lib.system.memory import fewer_rows, peak_memory_bytes


@dataclass
class Portion:
    """How many sequences are computed at a time: fewer each time that memory has run out."""

    rows: int
    work: str
    whole: str
    """What does not change with `rows`."""
    field: str
    """Which one sets `rows`."""
    machine: Machine
    tell: Callable[[str], None]

    def halve(self, rows: int, failure: str) -> int:
        """Half of `rows` from here on, said to the user; TrainingError where it is one. As `memory.fewer_rows`."""
        try:
            self.rows = fewer_rows(rows, failure)
        except MemoryError as error:
            used, there = (size / 2**30 for size in (peak_memory_bytes(self.machine), self.machine.memory_bytes))
            raise TrainingError(
                f"{self.work}: {error}. At most {used:.1f} GiB were in use, of {there:.1f} GiB of {self.machine.name}"
            ) from None
        self.tell(
            f"warning: memory ran out in {self.work}: {self.whole} stays as it is, computed {self.rows} sequences at a "
            f"time; {self.field} = {self.rows} begins that way"
        )
        return self.rows
