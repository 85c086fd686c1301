"""When a training saves, and what it finds again."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_setup, tiny_trainer

from newllm_lib.training.checkpoint import Checkpoints, load_checkpoint
from newllm_lib.training.saving import Saver


def payload(step, weight=0.0):
    return {"state": {"step": step}, "model": {"w": torch.tensor([weight])}}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", "r")


def test_the_beginning_is_kept_until_there_is_a_file(checkpoints):
    saver, weights = Saver(checkpoints), payload(0, 1.0)
    assert saver.newest(pytest.fail) is None
    saver.begin(lambda: weights)
    weights["model"]["w"].fill_(9.0)  # as training does: what is kept does not follow
    path, found = saver.newest(pytest.fail)
    assert (path, found["state"]["step"], found["model"]["w"].item()) == (Path("the beginning"), 0, 1.0)
    saver.save_step(payload(4, 2.0))
    path, found = saver.newest(pytest.fail)
    assert (path, found["state"]["step"], found["model"]["w"].item()) == (checkpoints.step(4), 4, 2.0)
    checkpoints.step(4).unlink()
    assert saver.newest(pytest.fail) is None  # the beginning is long out of date


def test_a_training_that_begins_from_a_file_keeps_nothing_in_memory(checkpoints):
    Saver(checkpoints).save(checkpoints.best, payload(3))
    saver = Saver(checkpoints)
    saver.begin(lambda: pytest.fail("not needed"))
    assert saver.newest(pytest.fail)[0] == checkpoints.best


def test_the_two_newest_files_of_steps_are_kept_and_all_others_stay(checkpoints):
    saver = Saver(checkpoints)
    saver.save(checkpoints.epoch(1), payload(2))
    for step in (3, 4, 5):
        saver.save_step(payload(step))
    kept = {checkpoints.step(4), checkpoints.step(5), checkpoints.epoch(1)}
    assert set(checkpoints.files()) == kept
    assert saver.saves == 4
    assert load_checkpoint(checkpoints.step(5), pytest.fail)["state"] == {"step": 5}


def test_the_minutes_count_from_the_last_file(checkpoints, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("newllm_lib.training.saving.time.monotonic", lambda: now[0])
    saver = Saver(checkpoints)
    saver.begin(lambda: payload(0))
    now[0] += 90
    assert saver.minutes_since_save() == 1.5
    saver.save(checkpoints.best, payload(1))
    now[0] += 30
    assert saver.minutes_since_save() == 0.5


def test_state_holds_what_the_first_version_reads_and_nothing_else(text, tmp_path):
    """It made its own state of exactly these, so that it can still continue a run of today."""
    written = tiny_trainer(tiny_setup(text), tmp_path).payload()
    assert set(written["state"]) == {
        "step", "epoch", "batch", "train_seconds", "skipped_steps", "skipped_in_a_row", "best_loss", "best_step",
        "patience_loss", "stale_validations", "nll_since_row", "tokens_since_row", "seconds_since_row", "decay_steps",
        "history",
    }  # fmt: skip
    assert written["recent_skips"] == []
