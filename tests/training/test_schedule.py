import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm_lib.config import TrainConfig
from newllm_lib.training.schedule import batch_factor, clip_norm, peak_rate, rate_factor, run_steps, warmup_of

BASELINE = 2_739_432
ADVANCED = 4_840_936


@pytest.mark.parametrize(
    ("rule", "batch_size", "batch_base", "factor"),
    [("none", 2048, 32, 1.0), ("linear", 2048, 512, 4.0), ("sqrt", 2048, 32, 8.0), ("sqrt", 8, 32, 0.5)],
)
def test_batch_factor(rule, batch_size, batch_base, factor):
    assert batch_factor(rule, batch_size, batch_base) == factor


@pytest.mark.parametrize(
    ("recipe", "parameters", "value", "reason"),
    [
        ({}, BASELINE, 1e-4, "0.0001 at batch 32, not scaled by the batch"),
        (
            {"lr_rule": "linear", "batch_size": 2048, "batch_base": 512},
            BASELINE,
            4e-4,
            "0.0001 at batch 512, linear rule to batch 2048",
        ),
        (
            {"lr_rule": "sqrt", "batch_size": 2048},
            BASELINE,
            8e-4,
            "0.0001 at batch 32, sqrt rule to batch 2048",
        ),
        (
            {"lr_rule": "sqrt", "batch_size": 2048, "scale_lr_by_model_size": True},
            ADVANCED,
            4.5271e-4,
            "0.0001 at batch 32, sqrt rule to batch 2048, divided by the model size ratio 1.767",
        ),
        (
            {"lr_rule": "sqrt", "batch_size": 4096, "lr": 1.1e-3},
            BASELINE,
            1.1e-3,
            "set directly (0.0001 at batch 32, sqrt rule to batch 4096 would give 0.00113)",
        ),
    ],
)
def test_peak_rate(recipe, parameters, value, reason):
    rate = peak_rate(TrainConfig(**recipe), parameters)
    assert rate.value == pytest.approx(value, rel=1e-5)
    assert rate.reason == reason


def test_ten_steps_of_warm_up_and_cosine():
    train = TrainConfig(warmup_steps=4, lr_schedule="cosine")
    by_hand = [0.25, 0.5, 0.75, 1.0, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]
    assert [rate_factor(step, train, 10) for step in range(10)] == pytest.approx(by_hand, abs=1e-7)


def test_cosine_reaches_the_final_fraction_after_the_last_step_and_stays():
    train = TrainConfig(warmup_steps=4, lr_schedule="cosine", lr_final_fraction=0.2)
    by_hand = [0.25, 0.5, 0.75, 1.0, 1.0, 0.94641016, 0.8, 0.6, 0.4, 0.25358984, 0.2, 0.2]
    assert [rate_factor(step, train, 10) for step in range(12)] == pytest.approx(by_hand, abs=1e-7)
    assert rate_factor(10**9, train, 10) == pytest.approx(0.2)


def test_constant_without_warm_up_is_one_from_the_first_step():
    assert [rate_factor(step, TrainConfig(), 1) for step in (0, 1, 1000)] == [1.0, 1.0, 1.0]


recipes = st.builds(
    TrainConfig,
    warmup_steps=st.integers(0, 50),
    lr_schedule=st.sampled_from(["constant", "cosine"]),
    lr_final_fraction=st.floats(0, 1),
)


@given(recipes, st.integers(1, 100))
def test_factor_rises_in_the_warm_up_and_never_after_it(train, decay_steps):
    factors = [rate_factor(step, train, decay_steps) for step in range(150)]
    warm_up, rest = factors[: train.warmup_steps], factors[train.warmup_steps :]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    assert all(0 < low < high for low, high in itertools.pairwise(warm_up))
    assert not warm_up or warm_up[-1] == 1
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(rest))
    if train.lr_schedule == "constant":
        assert set(rest) == {1.0}
    elif decay_steps > train.warmup_steps:
        assert factors[decay_steps] == pytest.approx(train.lr_final_fraction)


@pytest.mark.parametrize(
    ("warmup", "schedule", "decay_steps", "expected"),
    [
        (30, "cosine", 20, 2), (30, "cosine", 299, 29), (30, "cosine", 300, 30), (30, "cosine", 10_000, 30),
        (30, "cosine", 9, 0), (0, "cosine", 20, 0), (30, "constant", 20, 30),
    ],
)  # fmt: skip
def test_the_warm_up_takes_at_most_a_tenth_of_a_decay(warmup, schedule, decay_steps, expected):
    assert warmup_of(TrainConfig(warmup_steps=warmup, lr_schedule=schedule), decay_steps) == expected


@given(st.integers(1, 500), st.integers(0, 1000))
def test_a_decay_ends_where_the_plan_says_however_short_it_is(decay_steps, warmup):
    train = TrainConfig(warmup_steps=warmup, lr_schedule="cosine", lr_final_fraction=0.25)
    factors = [rate_factor(step, train, decay_steps, warmup_of(train, decay_steps)) for step in range(decay_steps + 2)]
    assert factors[decay_steps] == factors[decay_steps + 1] == pytest.approx(0.25)
    assert max(factors[:-2], default=1.0) == 1.0


def test_published_clipping_by_epoch():
    epochs = (0, 1, 9, 10, 29, 30, 31, 149)
    assert [clip_norm(epoch, TrainConfig()) for epoch in epochs] == [0.5, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(3, None, 21), (3, 10, 10), (3, 50, 21), (None, 50, 50), (1, 7, 7)]
)
def test_run_steps_of_seven_steps_an_epoch(epochs, max_steps, steps):
    assert run_steps(TrainConfig(epochs=epochs, max_steps=max_steps), 7) == steps
