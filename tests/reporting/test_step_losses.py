"""Losses of steps, thinned: few points, none left out, and those of a run that goes back taken back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm_lib.reporting.step_losses import StepLosses


def test_every_step_is_a_point_at_first_then_means_of_steps():
    losses = StepLosses(most=4)
    for step, loss in enumerate((8.0, 6.0, 4.0), start=1):
        losses.add(step, loss)
    assert losses.points == [(1, 8.0), (2, 6.0), (3, 4.0)]
    losses.add(4, 2.0)
    assert losses.points == [(2, 7.0), (4, 3.0)]
    losses.add(5, 1.0)
    assert losses.points == [(2, 7.0), (4, 3.0)]
    losses.add(6, 0.0)
    assert losses.points == [(2, 7.0), (4, 3.0), (6, 0.5)]


def test_a_loss_that_is_not_finite_leaves_no_point():
    losses = StepLosses()
    for step, loss in enumerate((8.0, math.nan, math.inf, 6.0), start=1):
        losses.add(step, loss)
    assert losses.points == [(1, 8.0), (4, 6.0)]


def test_a_run_that_goes_back_takes_its_points_back():
    losses = StepLosses()
    for step in (1, 2, 3, 2):
        losses.add(step, float(step))
    assert losses.points == [(1, 1.0), (2, 2.0)]


def test_the_moving_average_has_no_bias_at_its_beginning():
    losses = StepLosses()
    for step in range(1, 41):
        losses.add(step, 5.0 if step < 40 else 1.0)
    smoothed = losses.smoothed()
    assert smoothed[:-1] == [(step, pytest.approx(5.0)) for step in range(1, 40)]
    assert smoothed[-1][1] == pytest.approx(5.0 - 4.0 * 0.25, abs=1e-4)  # over four points: a quarter is of the last


def test_a_few_points_are_not_smoothed():
    losses = StepLosses()
    for step in range(1, 6):
        losses.add(step, float(step))
    assert losses.smoothed() == losses.points


@given(st.lists(st.floats(0, 20), max_size=400), st.integers(2, 9))
def test_there_are_never_more_and_their_mean_is_that_of_the_steps(values, most):
    losses = StepLosses(most)
    for step, loss in enumerate(values, start=1):
        losses.add(step, loss)
        assert len(losses.points) < most or most == 1
    told = [loss for _, loss in losses.points]
    counted = values[: len(told) * losses._every]
    assert sum(told) * losses._every == pytest.approx(sum(counted), abs=1e-6)
