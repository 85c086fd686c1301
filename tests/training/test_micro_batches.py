"""How many sequences are computed at a time after memory has run out."""

import pytest

from newllm_lib.errors import TrainingError
from newllm_lib.system.hardware import Machine
from newllm_lib.training.micro_batches import AdaptiveMicroBatch

MACHINE = Machine(device="cpu", name="a small machine", memory_bytes=2**31)


def test_it_halves_the_rows_that_failed_says_so_and_ends_at_one():
    said = []
    size = AdaptiveMicroBatch(9, "training", "the batch of 9", "micro_batch_size", MACHINE, said.append)
    assert [size.halve(9, "no memory"), size.halve(5, "no memory"), size.halve(2, "no memory")] == [5, 3, 1]
    assert size.rows == 1
    assert said[1] == (
        "warning: memory ran out in training: the batch of 9 stays as it is, computed 3 sequences at a time; to start "
        "that way, set micro_batch_size = 3"
    )
    with pytest.raises(TrainingError, match=r"training: memory ran out .*\(no memory.* of 2.0 GiB of a small machine"):
        size.halve(1, "no memory")
    assert len(said) == 3
