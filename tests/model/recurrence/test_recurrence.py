import random

import pytest
import torch

from newllm_lib.model.recurrence import ENGINES, Dropout, get_engine


def masks_of(rate: float, seed: int, shape=(6, 40, 512), steps=1) -> torch.Tensor:
    dropout = Dropout(rate, seed)
    dropout.start(*shape)
    return torch.stack([dropout.next_masks(shape[1]) for _ in range(steps)])


def test_masks_keep_the_asked_share_and_repeat_with_their_seed():
    masks = masks_of(0.1, 7, steps=5)
    assert masks.shape == (5, 6, 40, 512)
    assert masks.dtype == torch.bool
    for step in masks:
        assert step.float().mean() == pytest.approx(0.9, abs=0.004)
    assert torch.equal(masks, masks_of(0.1, 7, steps=5))
    assert not torch.equal(masks, masks_of(0.1, 8, steps=5))


def test_a_pass_can_be_started_again():
    dropout = Dropout(0.3, 1)
    dropout.start(2, 3, 7)
    first = [dropout.next_masks(3) for _ in range(4)]
    dropout.start(2, 3, 7)
    assert all(torch.equal(a, dropout.next_masks(3)) for a in first)


def test_masks_of_fewer_rows_another_order_and_another_type_are_the_same_masks():
    order = torch.tensor([2, 0, 1])
    whole, fewer, moved = Dropout(0.4, 5), Dropout(0.4, 5), Dropout(0.4, 5)
    whole.start(2, 3, 9), fewer.start(2, 3, 9), moved.start(2, 3, 9, order)
    for rows in (3, 2, 2, 1):
        expected = whole.next_masks(3)
        assert torch.equal(fewer.next_masks(rows, torch.bfloat16), expected[:, :rows].bfloat16())
        assert torch.equal(moved.next_masks(rows), expected[:, order[:rows]])


def test_masks_of_a_batch_in_parts_are_those_of_the_batch():
    whole, parts = Dropout(0.4, 5), Dropout(0.4, 5, batch_rows=7)
    whole.start(2, 7, 9)
    expected = [whole.next_masks(7) for _ in range(3)]
    for first, rows, order in ((0, 3, None), (3, 3, torch.tensor([2, 0, 1])), (6, 1, None)):
        parts.first_row = first
        parts.start(2, rows, 9, order)
        for masks in expected:
            part = masks[:, first : first + rows]
            assert torch.equal(parts.next_masks(rows), part if order is None else part[:, order])
    parts.first_row = 0
    parts.start(2, 7, 9)  # the batch in one piece
    assert torch.equal(parts.next_masks(7), expected[0])


def test_masks_are_not_correlated_between_units_rows_layers_or_steps():
    """Mean of products of centred masks; its deviation is 0.25 / sqrt(count) for independent ones."""
    masks = masks_of(0.5, 3, shape=(2, 200, 64), steps=40).float() - 0.5
    for axis in range(4):
        for shift in (1, 2, 7):
            size = masks.shape[axis]
            if shift < size:
                pair = masks.narrow(axis, shift, size - shift) * masks.narrow(axis, 0, size - shift)
                assert pair.mean().abs() < 5 * 0.25 / pair.numel() ** 0.5


def test_a_unit_is_dropped_at_independent_steps():
    """The number of steps at which a unit is dropped is binomial: its variance is steps x p x (1 - p)."""
    dropped = (~masks_of(0.1, 11, shape=(1, 64, 512), steps=200)).float().sum(0)
    assert dropped.mean() == pytest.approx(20, rel=0.02)
    assert dropped.var() == pytest.approx(18, rel=0.1)


def test_masks_leave_the_global_generators_alone():
    before, state = torch.get_rng_state(), random.getstate()
    masks_of(0.1, 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == state


def test_the_scale_keeps_the_expected_value():
    kept = masks_of(0.25, 0, shape=(1, 1, 200_000)).float() * Dropout(0.25, 0).scale
    assert kept.mean() == pytest.approx(1.0, abs=0.01)


def test_engines_by_name():
    assert get_engine("auto")[0] in ENGINES
    assert get_engine("reference") == ("reference", ENGINES["reference"])
    with pytest.raises(ValueError, match=r"engine = 'warp': must be auto or one of reference"):
        get_engine("warp")
