"""When skipped steps stop a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm_lib.training.skips import diagnosis, listed, remembered


@pytest.mark.parametrize(
    ("recent", "loss_scale", "expected"),
    [
        ([1, 1], 1024.0, None),
        ([1, 1, 1], 1024.0, "3 steps in a row were skipped"),
        ([0, 1, 0, 1, 0, 1], 1024.0, None),  # half of 2 x 3
        ([1, 1, 0, 1, 0, 1], 1024.0, "4 of the last 6 steps were skipped"),
        ([1, 1, 0, 1, 1], 1024.0, "4 of the last 5 steps were skipped"),
        ([1], 1.0, None),
        ([1], 0.5, "a step was skipped at a loss scale of 0.5, below 1"),
    ],
)
def test_diagnosis_of_a_limit_of_3(recent, loss_scale, expected):
    text = diagnosis(recent, 3, loss_scale, ["output.bias"])
    if expected is None:
        assert text is None
    else:
        assert text.startswith(expected)
        assert "The gradient of output.bias" in text
        assert "train another one with precision = fp32" in text  # `extended` refuses it for this one
        assert "lower lr" not in text


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 9))
def test_remembered_keeps_the_newest_of_twice_the_limit(attempts, limit):
    recent = []
    for attempt in attempts:
        recent = remembered(recent, attempt, limit)
    assert recent == [int(attempt) for attempt in attempts[-2 * limit :]]


def test_listed_names_four_parameters_and_counts_the_rest():
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c", "d"]) == "a, b, c, d"
    assert listed(["a", "b", "c", "d", "e", "f"]) == "a, b, c, d and 2 more"
