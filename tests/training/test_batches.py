"""Which rows a step reads."""

import numpy as np
import pytest
import torch

from newllm_lib.data.dataset import Split
from newllm_lib.training.batches import Batches, batches_per_epoch, epoch_order, mix_seed

ROWS = np.arange(14, dtype=np.uint16).reshape(7, 2)  # row r holds 2r and 2r + 1
CHUNKS = np.arange(24, dtype=np.uint16).reshape(3, 4, 2)  # three chunks of four lanes


def rows_of(ids):
    """The numbers of the windows that a batch holds."""
    assert ids.dtype == torch.int64
    assert torch.equal(ids[:, 1], ids[:, 0] + 1)
    return (ids[:, 0] // 2).tolist()


def windows():
    return Batches(Split(ROWS, False), 3, seed=1)


def test_an_epoch_reads_every_sequence_once_in_an_order_of_its_own():
    first, second = epoch_order(1, 0, 500), epoch_order(1, 1, 500)
    assert sorted(first.tolist()) == list(range(500))
    assert not torch.equal(first, second)
    assert torch.equal(first, epoch_order(1, 0, 500))
    assert not torch.equal(first, epoch_order(2, 0, 500))


def test_seeds_of_different_uses_differ():
    seeds = {mix_seed(seed, epoch, batch) for seed in range(5) for epoch in range(10) for batch in range(-1, 100)}
    assert len(seeds) == 5 * 10 * 101
    assert all(0 <= seed < 2**62 for seed in seeds)


@pytest.mark.parametrize("epoch", [0, 4])
def test_windows_are_read_in_the_order_of_the_epoch_and_the_last_batch_is_smaller(epoch):
    order = epoch_order(1, epoch, 7).tolist()
    found = [rows_of(windows().read(epoch, number)) for number in range(3)]
    assert found == [order[:3], order[3:6], order[6:]]
    assert windows().per_epoch == batches_per_epoch(Split(ROWS, False), 3) == 3


def test_the_order_of_a_seed_is_what_it_always_was():
    """Another one would let old checkpoints continue with other batches."""
    assert [rows_of(windows().read(0, number)) for number in range(3)] == [[6, 2, 5], [4, 0, 3], [1]]
    assert [rows_of(windows().read(1, number)) for number in range(3)] == [[5, 2, 3], [4, 6, 1], [0]]


def test_an_epoch_read_again_and_again_has_full_batches_only():
    order = epoch_order(1, 0, 7).tolist()
    found = [rows_of(windows().read_repeating(number)) for number in range(5)]
    assert found == [
        [order[place] for place in places] for places in ([0, 1, 2], [3, 4, 5], [6, 0, 1], [2, 3, 4], [5, 6, 0])
    ]


def test_a_batch_larger_than_the_epoch_repeats_rows_only_where_it_has_to_be_full():
    batches, order = Batches(Split(ROWS, False), 10, seed=1), epoch_order(1, 0, 7).tolist()
    assert rows_of(batches.read(0, 0)) == order
    assert rows_of(batches.read_repeating(0)) == [*order, *order[:3]]


def test_a_stream_is_read_in_its_own_order_in_every_epoch():
    batches = Batches(Split(CHUNKS, True), 4, seed=1)
    assert batches.per_epoch == batches_per_epoch(Split(CHUNKS, True), 4) == 3
    for epoch in (0, 5):
        assert [batches.read(epoch, number)[0, 0].item() for number in range(3)] == [0, 8, 16]
    assert batches.read(0, 1).tolist() == [[8, 9], [10, 11], [12, 13], [14, 15]]
    assert batches.read(0, 1).dtype == torch.int64
    assert [batches.read_repeating(number)[0, 0].item() for number in range(5)] == [0, 8, 16, 0, 8]


@pytest.mark.parametrize("split", [Split(ROWS, False), Split(CHUNKS, True)], ids=["windows", "stream"])
@pytest.mark.parametrize("number", [-1, 3])
def test_a_batch_that_the_epoch_does_not_have_is_an_error(split, number):
    with pytest.raises(IndexError, match=f"batch {number}: must be 0 to 2"):
        Batches(split, 3, seed=1).read(0, number)
