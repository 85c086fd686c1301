"""How many sequences are computed at a time: fewer after memory has run out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from newllm_lib.errors import TrainingError
from newllm_lib.reporting.formatting import counted
from newllm_lib.system.hardware import Machine
from newllm_lib.system.memory import fewer_rows, peak_memory_bytes


@dataclass
class AdaptiveMicroBatch:
    """How many sequences are computed at a time: half as many each time that memory runs out."""

    rows: int
    """Sequences at a time."""
    work: str
    """What is computed, for messages."""
    whole: str
    """What does not change with `rows`, for messages."""
    field: str
    """The setting that `rows` starts from."""
    machine: Machine
    log: Callable[[str], None]

    def halve(self, rows: int, failure: str) -> int:
        """Set `rows` to half of those that failed, tell the user, and return it; TrainingError where only one failed.

        rows: sequences that were computed when memory ran out; failure: what the system said.
        """
        try:
            self.rows = fewer_rows(rows, failure)
        except MemoryError as error:
            used, there = (size / 2**30 for size in (peak_memory_bytes(self.machine), self.machine.memory_bytes))
            raise TrainingError(
                f"{self.work}: {error}. At most {used:.1f} GiB were in use, of {there:.1f} GiB of {self.machine.name}"
            ) from None
        self.log(
            f"warning: memory ran out in {self.work}: {self.whole} stays as it is, computed "
            f"{counted(self.rows, 'sequence')} at a time; to start that way, set {self.field} = {self.rows}"
        )
        return self.rows
