"""Who is told of what happens while a Trainer trains."""

import pytest
from tiny import Quiet, tiny_config, tiny_setup, tiny_trainer

import newllm_lib as nl
from newllm_lib.training.observers import Observer


class Notes(Observer):
    """Writes every event into a list."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def on_step(self, trainer, result):
        self.notes.append((self.name, "step", trainer.state.step, result.skipped))

    def on_validation_start(self, trainer):
        self.notes.append((self.name, "start", trainer.state.step, len(trainer.state.history)))

    def on_validation(self, trainer, row, improved):
        assert row is trainer.state.history[-1]
        self.notes.append((self.name, "validation", row["step"], improved))

    def on_save(self, trainer):
        self.notes.append((self.name, "save", trainer.state.step, len(trainer.checkpoints.files())))


@pytest.fixture
def trainer(text, tmp_path):
    """Three steps: a validation after the second and after the last, each of them better than before."""
    setup = tiny_setup(text, epochs=None, max_steps=3, validate_every_steps=2)
    return tiny_trainer(setup, tmp_path / "run")


def test_two_observers_are_both_told_of_everything_in_order(trainer):
    notes = []
    trainer.observers += [Notes("a", notes), Notes("b", notes)]
    trainer.fit()
    assert notes == [
        (name, *event)
        for event in (
            ("step", 1, False),
            ("step", 2, False),
            ("start", 2, 0),
            ("validation", 2, True),
            ("save", 2, 1),
            ("step", 3, False),
            ("start", 3, 1),
            ("validation", 3, True),
            ("save", 3, 1),
        )
        for name in "ab"
    ]


def test_control_of_two_functions_in_one_place_only_the_last_is_called(trainer):
    """As it was with every observer; and the functions do not replace an observer, nor it them."""
    first, second, notes = [], [], []
    trainer.on_step = lambda result: first.append(trainer.state.step)
    trainer.on_step = lambda result: second.append(trainer.state.step)
    trainer.observers.append(Notes("a", notes))
    trainer.fit()
    assert (first, second) == ([], [1, 2, 3])
    assert [note[2] for note in notes if note[1] == "step"] == [1, 2, 3]


def test_functions_get_what_they_always_got_and_can_be_chained(trainer):
    seen = []
    trainer.on_step = lambda result: seen.append(("step", result.tokens > 0))
    before = trainer.on_step
    trainer.on_step = lambda result: (seen.append("chained"), before(result))
    trainer.on_validation = lambda improved: seen.append(("validation", improved))
    trainer.on_save = lambda: seen.append("save")
    trainer.fit()
    step, validation = ["chained", ("step", True)], [("validation", True), "save"]
    assert seen == [*step, *step, *validation, *step, *validation]


def test_an_observer_may_leave_while_it_is_told(trainer):
    notes = []

    class Once(Observer):
        def on_step(self, trainer, result):
            notes.append(("once", trainer.state.step))
            trainer.observers.remove(self)

    trainer.observers += [Once(), Notes("after", notes)]
    trainer.fit()
    steps = [note[:3] for note in notes if note[0] == "once" or note[1] == "step"]
    assert steps == [("once", 1), ("after", "step", 1), ("after", "step", 2), ("after", "step", 3)]


def test_what_an_observer_raises_ends_the_training(trainer):
    class Failing(Observer):
        def on_step(self, trainer, result):
            raise ZeroDivisionError

    trainer.observers.append(Failing())
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert trainer.state.step == 1


def test_a_users_functions_and_observers_do_not_replace_those_of_a_run(text, tmp_path, no_pictures):
    """`train` keeps run.json and the copy up to date as well; it used to replace a user's on_validation."""
    (tmp_path / "drive").mkdir()
    improved, saved, notes = [], [], []

    def watch(trainer):
        trainer.on_validation = improved.append
        trainer.on_save = lambda: saved.append(trainer.state.step)
        trainer.observers.append(Notes("user", notes))

    config = tiny_config(
        text, results_dir=str(tmp_path / "runs"), name="r", mirror_dir=str(tmp_path / "drive"), epochs=None,
        max_steps=3, validate_every_steps=2,
    )  # fmt: skip
    run = nl.train(config, progress=Quiet(), watch=watch)
    assert (improved, saved) == ([True, True], [2, 3])
    assert [note[2] for note in notes if note[1] == "validation"] == [2, 3]
    assert run.history["step"].tolist() == [2, 3]
    assert (tmp_path / "drive" / "r" / "model" / "model.safetensors").is_file()


def test_the_tables_of_a_run_are_written_before_a_users_observer_is_told(text, tmp_path, no_pictures):
    rows = []

    class Reads(nl.Observer):
        def on_validation(self, trainer, row, improved):
            rows.append(len((tmp_path / "r" / "history.csv").read_text().splitlines()) - 1)

    config = tiny_config(text, results_dir=str(tmp_path), name="r", max_steps=3, epochs=None, validate_every_steps=2)
    nl.train(config, progress=Quiet(), watch=lambda trainer: trainer.observers.append(Reads()))
    assert rows == [1, 2]
