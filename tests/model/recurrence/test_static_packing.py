"""Packing with the same shapes for every batch: which rows it takes, and that a pass over it is the ordinary one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from newllm_lib.config import ModelConfig
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import fused
from newllm_lib.model.recurrence.dropout import Dropout, StaticDropout
from newllm_lib.model.recurrence.packing import Packing
from newllm_lib.model.recurrence.static_packing import Envelope, StaticPacking, most_active


def test_the_envelope_takes_the_most_rows_of_any_batch():
    batches = [np.array([3, 1, 1]), np.array([2, 2, 0])]
    assert most_active(batches, rows=3, steps=4) == [3, 3, 3]  # 16 and more, cut at the rows of a batch
    many = [np.array([3] * 17 + [1] * 40), np.array([2] * 20)]
    # step 0: 57 of the first; step 1: 20 of the second; step 2: 17 of the first; none after
    assert most_active(many, rows=100, steps=9) == [64, 32, 32]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=40), min_size=1, max_size=4))
def test_every_batch_fits_the_envelope_of_its_run(batches):
    most = most_active([np.array(batch) for batch in batches], rows=40, steps=6)
    assert most == sorted(most, reverse=True)
    for batch in batches:
        counts = [sum(length > t for length in batch) for t in range(6)]
        assert all(count <= taken for count, taken in zip(counts, [*most, *[0] * 6], strict=False))


TOKENS = torch.tensor([[5, 0, 0], [6, 7, 8], [9, 4, 0]])
LENGTHS = torch.tensor([1, 3, 2])


def test_places_by_hand():
    packing = StaticPacking.of(TOKENS, LENGTHS, Envelope.of([3, 3, 2], 3, "cpu"), vocab_size=10)
    assert packing.order.tolist() == [1, 2, 0]
    assert packing.offsets == [0, 3, 6, 8] and packing.total == 8
    # step by step rows 1, 2, 0; then the same, of which row 0 has ended; then rows 1 and 2, of which 2 has ended
    assert packing.position.tolist() == [3, 6, 0, 4, 7, 1, 5, 8]
    assert packing.word_of.tolist() == [6, 9, 5, 7, 4, 0, 8, 0]
    assert packing.words.tolist() == list(range(10))
    assert packing.fits.item() is True


@pytest.mark.parametrize(("active", "fits"), [([3, 2, 1], True), ([3, 1, 1], False), ([3, 2], False)])
def test_it_says_whether_the_batch_fits(active, fits):
    assert StaticPacking.of(TOKENS, LENGTHS, Envelope.of(active, 3, "cpu"), 10).fits.item() is fits


def test_the_masks_of_a_static_dropout_are_those_of_an_ordinary_one():
    order = torch.tensor([2, 0, 1])
    usual, static = Dropout(0.3, 5), StaticDropout(0.3, 2, 4, 8, steps=6, device="cpu")
    usual.start(2, 3, 8, order)
    static.fill(5, rows=3)
    static.start(2, 4, 8, torch.tensor([2, 0, 1, 3]))
    for t in range(6):
        rows = 3 - t // 3
        assert torch.equal(usual.next_masks(rows), static.next_masks(rows)), t
    static.fill(6, rows=3)
    static.start(2, 4, 8)
    usual.start(2, 3, 8)
    assert not torch.equal(usual.next_masks(3), static.next_masks(3))


@pytest.mark.parametrize("active", [[3, 2, 1], [3, 3, 3]])
def test_a_pass_gives_the_values_and_gradients_of_the_ordinary_one(active):
    torch.manual_seed(0)
    model = NewLLM(ModelConfig(vocab_size=10, embed_dim=6, hidden_dim=8, context_dim=4, num_layers=2, init_std=0.5))
    model = model.double()
    packings = [
        Packing.of(TOKENS, LENGTHS, 10),
        StaticPacking.of(TOKENS, LENGTHS, Envelope.of(active, 3, "cpu"), 10),
    ]
    weighting = torch.randn(9, 8, dtype=torch.float64)  # of each place of the batch
    weighting[[1, 2, 8]] = 0  # of the padding
    found = []
    for packing in packings:
        model.zero_grad()
        context = model.initial_context(3)
        hidden, _ = fused.packed_recurrence(model.weights(), packing, context, None, torch.float64)
        weights = weighting[packing.position] if isinstance(packing, StaticPacking) else weighting
        (hidden * weights).sum().backward()
        found.append([(hidden * weights).sum(), *(p.grad for p in model.parameters() if p.grad is not None)])
    usual, static = found
    assert len(usual) == len(static) > 10
    for expected, value in zip(usual, static, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
