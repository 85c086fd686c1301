"""How far a run is: what a step and a validation add."""

import math
from types import SimpleNamespace

import pytest

from newllm_lib.evaluation import Metrics
from newllm_lib.reporting.record import HISTORY_COLUMNS
from newllm_lib.training.state import TrainState

SCORES = Metrics(
    loss=2.0, perplexity=7.4, accuracy=0.25, loss_known=1.9, perplexity_known=6.7, accuracy_known=0.26,
    unknown_share=0.01, tokens=100, bits_per_byte=1.5, word_perplexity=9.0, bits_per_byte_known=1.6,
)  # fmt: skip


def result(nll, tokens, skipped=False):
    return SimpleNamespace(nll=nll, tokens=tokens, skipped=skipped)


def test_a_row_holds_the_means_since_the_last_one_under_the_columns_of_the_history():
    state = TrainState()
    state.count(result(30.0, 10), 0.5, 4)
    state.count(result(10.0, 10, skipped=True), 1.5, 4)
    state.count(result(20.0, 20), 2.0, 4)
    row = state.add_row(SCORES, steps_per_epoch=7, lr=1e-3, clip=0.5, peak_memory_bytes=99)
    assert tuple(row) == HISTORY_COLUMNS
    assert row == {
        "step": 2, "epoch": 0.4286, "train_loss": 1.5, "val_loss": 2.0, "val_ppl": 7.4, "val_accuracy": 0.25,
        "val_ppl_known": 6.7, "val_bits_per_byte": 1.5, "val_word_ppl": 9.0, "val_bits_per_byte_known": 1.6,
        "lr": 1e-3, "clip": 0.5,
        "train_seconds": 4.0, "tokens_per_second": 10.0, "peak_memory_bytes": 99, "skipped_steps": 1,
    }  # fmt: skip
    state.count(result(8.0, 4), 1.0, 4)
    second = state.add_row(SCORES, steps_per_epoch=7, lr=1e-3, clip=0.5, peak_memory_bytes=99)
    assert state.history == [row, second]
    assert (second["train_loss"], second["tokens_per_second"], second["train_seconds"]) == (2.0, 4.0, 5.0)


def test_a_skipped_step_is_counted_and_is_no_update():
    state = TrainState()
    for skipped in (True, True, False, True):
        state.count(result(1.0, 1, skipped), 1.0, 1)
    assert (state.batch, state.step, state.skipped_steps, state.skipped_in_a_row) == (4, 1, 3, 1)
    assert state.recent_skips == [0, 1]  # of the last 2 x max_skipped_steps


def test_the_best_loss_is_kept_with_its_step_and_nan_never_is():
    state, kept = TrainState(), []
    for step, loss in enumerate((math.nan, 5.0, 5.0, 4.0, math.nan, 4.5), start=1):
        state.step = step
        kept.append(state.keep_best(loss))
    assert kept == [False, True, False, True, False, False]
    assert (state.best_loss, state.best_step) == (4.0, 4)


def test_epochs_count_the_part_of_the_current_one():
    assert TrainState(epoch=2, batch=3).epochs(4) == pytest.approx(2.75)
