"""When a run stops because its validation loss no longer falls, on sequences written by hand."""

import math

import pytest

from newllm_lib.training.early_stopping import EarlyStopping
from newllm_lib.training.state import TrainState


def stops_after(losses, patience, min_delta=0.0):
    """The number of validations after which the run stops, None where it never does."""
    stopping, state = EarlyStopping(patience, min_delta), TrainState()
    for number, loss in enumerate(losses, start=1):
        stopping.observe(state, loss)
        if stopping.is_due(state):
            return number
    return None


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "expected"),
    [
        ([5, 4, 3, 2], 1, 0.0, None),
        ([5, 5, 5], 1, 0.0, 2),  # the same is no progress
        ([5, 4, 4.5, 4.2, 4.1], 3, 0.0, 5),
        ([5, 4, 4.5, 4.2, 3.9, 4.1, 4.1], 3, 0.0, None),  # progress starts the count again
        ([5, 4, 4.5, 4.2, 3.9, 4.1, 4.1, 4.1], 3, 0.0, 8),
        ([5, 4.95, 4.91, 4.89], 2, 0.1, 3),  # less than min_delta below the last progress
        ([5, 4.95, 4.89, 4.85, 4.80], 2, 0.1, 5),  # small falls add up: 4.89 is progress on 5
        ([5, 4, 3.5], 1, 1.0, 2),  # 4 = 5 - min_delta is not below it
        ([math.nan, math.nan, 5], 2, 0.0, 2),
        ([math.nan, 5, math.nan, 4], 2, 0.0, None),
        ([math.inf, 5, 6], 2, 0.0, None),
        ([5, 6, 7, 8, 9], None, 0.0, None),
    ],
)
def test_a_run_stops_after_patience_validations_without_progress(losses, patience, min_delta, expected):
    assert stops_after(losses, patience, min_delta) == expected


def test_what_is_remembered_lies_in_the_state_under_its_stored_names():
    stopping, state = EarlyStopping(2, 0.1), TrainState()
    for loss in (5.0, 4.0, 3.95):
        stopping.observe(state, loss)
    assert (state.patience_loss, state.stale_validations) == (4.0, 1)
    assert not stopping.is_due(state)
    again = TrainState(patience_loss=4.0, stale_validations=1)  # as a checkpoint brings it back
    stopping.observe(again, 3.93)
    assert stopping.is_due(again)
