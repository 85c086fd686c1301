import pytest
import torch

from newllm_lib.recurrence import ENGINES, Dropout, get_engine


def test_masks_keep_the_asked_share_and_repeat_with_their_seed():
    masks = Dropout(0.1, 7).next_masks(6, 40, 512)
    assert masks.shape == (6, 40, 512)
    assert masks.dtype == torch.bool
    assert masks.float().mean() == pytest.approx(0.9, abs=0.003)
    assert torch.equal(masks, Dropout(0.1, 7).next_masks(6, 40, 512))
    assert not torch.equal(masks, Dropout(0.1, 8).next_masks(6, 40, 512))


def test_time_steps_draw_different_masks_and_odd_sizes_work():
    dropout = Dropout(0.5, 1)
    first, second = dropout.next_masks(1, 3, 7), dropout.next_masks(1, 3, 7)
    assert first.shape == (1, 3, 7)
    assert not torch.equal(first, second)


def test_masks_are_not_correlated_between_neighbours():
    masks = Dropout(0.5, 3).next_masks(1, 1000, 64).float()[0] - 0.5
    for shift in (1, 2, 3, 4):
        assert (masks[:, shift:] * masks[:, :-shift]).mean().abs() < 0.01


def test_masks_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    Dropout(0.1, 7).next_masks(2, 3, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_scale_keeps_the_expected_value():
    dropout = Dropout(0.25, 0)
    kept = dropout.next_masks(1, 1, 200_000).float() * dropout.scale
    assert kept.mean() == pytest.approx(1.0, abs=0.01)


def test_engines_by_name():
    assert get_engine("auto")[0] in ENGINES
    assert get_engine("reference") == ("reference", ENGINES["reference"])
    with pytest.raises(ValueError, match=r"TrainConfig\.engine = 'warp': must be auto or one of reference"):
        get_engine("warp")
