"""How long a run will still take, on a clock that a test moves, with the steps and validations of a real plan."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Quiet, tiny_setup, tiny_trainer, write_text

from newllm_lib.training.estimates import validations_left
from newllm_lib.training.time_left import TimeLeft


class Driven:
    """A trainer of 60 steps whose time passes as a test says."""

    def __init__(self, every, expected=None):
        self.now, self.told = 0.0, []
        config = SimpleNamespace(train=SimpleNamespace(validate_every_steps=every))
        self.setup = SimpleNamespace(total_steps=60, steps_per_epoch=60, config=config)
        self.state = SimpleNamespace(step=0)
        self.progress = SimpleNamespace(time_left=self.told.append)
        self.observer = TimeLeft(clock=lambda: self.now)
        self.observer.expected_validation = expected

    def step(self, seconds):
        self.now += seconds
        self.state.step += 1
        self.observer.on_step(self, None)
        return self.told[-1]

    def validate(self, seconds):
        self.observer.on_validation_start(self)
        self.now += seconds


def test_validations_count_once_they_are_known():
    run = Driven(every=20)
    assert run.step(1.0) is None  # what the first one took, no clock has seen
    for _ in range(19):
        assert run.step(2.0) == 2.0 * (60 - run.state.step)
    run.validate(500.0)
    assert run.step(2.0) == 39 * 2.0 + 2 * 500.0  # at 40 and 60


def test_what_the_plan_expects_counts_until_then():
    run = Driven(every=20, expected=30.0)
    run.step(1.0)
    assert run.step(2.0) == 58 * 2.0 + 3 * 30.0


def test_one_slow_step_does_not_change_it():
    run = Driven(every=None)
    for number in range(10):
        run.step(300.0 if number == 5 else 1.0)
    assert run.told[-1] == 50.0 + 0.0


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(every=st.one_of(st.none(), st.integers(1, 30)), steps=st.integers(1, 30))
def test_as_many_validations_are_left_as_the_trainer_makes(text, tmp_path_factory, every, steps):
    setup = tiny_setup(text, epochs=None, max_steps=steps, validate_every_steps=every)  # 8 steps an epoch
    trainer = tiny_trainer(setup, tmp_path_factory.mktemp("run"), Quiet())
    trainer.fit()
    made = [row["step"] for row in trainer.state.history]
    assert [validations_left(setup, done) for done in range(steps + 1)] == [
        sum(step > done for step in made) for done in range(steps + 1)
    ]
