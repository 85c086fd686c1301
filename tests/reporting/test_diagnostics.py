"""What a history warns of, told once a spell in a terminal and in the report."""

import io
import math

import pytest
from histories import history, row

from newllm_lib.reporting.diagnostics import (
    Spell,
    best_row,
    every_spell,
    findings,
    follow,
    plateau,
    skipped_steps,
    turning_up,
)
from newllm_lib.reporting.progress import HEADER, TerminalProgress

STUCK = [68.0, 67.8, 67.9, 67.6, 67.4]  # within 0.9 %


def test_a_plateau_at_the_share_of_unknown_is_named():
    text = plateau(history(val_ppl=[90.0, *STUCK], val_accuracy=[0.2] + [0.305] * 5), 0.3053)
    assert text.startswith("plateau: over 5 validations the perplexity moved by 0.9%")
    assert "the share of <UNK> (30.5%): the model says <UNK> and nothing else" in text


@pytest.mark.parametrize(
    "rows, share",
    [
        pytest.param(history(val_ppl=STUCK[:4], val_accuracy=[0.305] * 4), 0.305, id="four validations"),
        pytest.param(history(val_ppl=[69, *STUCK[1:]], val_accuracy=[0.305] * 5), 0.305, id="it moves by 2 %"),
        pytest.param(history(val_ppl=STUCK, val_accuracy=[0.305] * 4 + [0.315]), 0.305, id="accuracy has left"),
        pytest.param(history(val_ppl=STUCK, val_accuracy=[0.36] * 5), 0.305, id="it has stopped elsewhere"),
        pytest.param(history(val_ppl=STUCK, val_accuracy=[0.0] * 5), 0.0, id="no unknown words"),
        pytest.param(history(val_ppl=STUCK, val_accuracy=[0.305] * 5), None, id="share not known"),
        pytest.param(history(val_ppl=[68.0, math.nan, *STUCK[2:]], val_accuracy=[0.305] * 5), 0.305, id="NaN"),
        pytest.param(history(val_ppl=STUCK, val_accuracy=[None] * 5), 0.305, id="accuracy not recorded"),
    ],
)
def test_what_is_no_plateau(rows, share):
    assert plateau(rows, share) is None


@pytest.mark.parametrize(
    "counts, said",
    [
        ([2], "skipped steps: 2 since the validation before, 2 in all"),
        ([0, 3], "skipped steps: 3 since the validation before, 3 in all"),
        ([1, 3, 7], "skipped steps: 4 since the validation before, 7 in all"),
        ([0], None),
        ([0, 0], None),
        ([3, 3], None),
        ([None, None], None),
    ],
)
def test_skipped_steps_are_told_while_they_rise(counts, said):
    text = skipped_steps(history(skipped_steps=counts))
    assert text is None if said is None else text.startswith(said)


def test_validation_that_turns_up_while_training_falls_is_named():
    rows = history(val_ppl=[30, 25, 26, 26.5, 27], train_loss=[3.4, 3.2, 3.1, 3.0, 2.9])
    assert turning_up(rows).startswith(
        "validation turns up: three in a row at a perplexity more than 1% above the best, 25.00 at epoch 2.00"
    )


@pytest.mark.parametrize(
    "ppl, training",
    [
        pytest.param([30, 25, 26, 26.5], [3.4, 3.2, 3.1, 3.0], id="two in a row"),
        pytest.param([30, 25, 25.2, 26.5, 27], [3.4, 3.2, 3.1, 3.0, 2.9], id="one of them within 1 %"),
        pytest.param([30, 25, 26, 26.5, 24.9], [3.4, 3.2, 3.1, 3.0, 2.9], id="a new best"),
        pytest.param([30, 25, 26, 26.5, 27], [3.4, 3.2, 3.3, 3.4, 3.5], id="training rises too: it diverges"),
        pytest.param([30, 25, 26, 26.5, 27], [3.4, 3.2, 3.1, 3.0, 3.2], id="training has come back up"),
        pytest.param([math.nan] * 4, [3.4, 3.2, 3.1, 3.0], id="no best at all"),
    ],
)
def test_what_is_no_turning_up(ppl, training):
    rows = [r | {"val_loss": math.log(r["val_ppl"])} for r in history(val_ppl=ppl, train_loss=training)]
    assert turning_up(rows) is None


def test_findings_by_kind():
    rows = history(val_ppl=STUCK, val_accuracy=[0.305] * 5, skipped_steps=[0, 0, 0, 0, 1])
    assert list(findings(rows, 0.305)) == ["plateau", "skipped_steps"]
    assert findings(rows[:4], 0.305) == {}


def test_a_spell_lasts_from_its_first_validation_to_its_last():
    rows = history(skipped_steps=[0, 1, 2, 2, 2, 5])
    spells = [{}]
    for count in range(1, 7):
        spells.append(follow(spells[-1], rows[:count], None))
    seen = [(s.first_epoch, s.last_epoch, s.active) for found in spells for s in found.values()]
    assert seen == [(2, 2, True), (2, 3, True), (2, 3, False), (2, 3, False), (6, 6, True)]
    assert isinstance(spells[2]["skipped_steps"], Spell)


def test_every_spell_in_the_order_of_their_beginnings():
    ppl = [90.0, *STUCK, 67.3, 60.0, 61.0, 61.1, 61.2, 50.0]
    rows = history(
        val_ppl=ppl,
        val_accuracy=[0.2, *[0.305] * 6, *[0.32] * 5],
        skipped_steps=[1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 4],
        train_loss=[5 - epoch / 10 for epoch in range(12)],
    )
    assert [(str(spell).split(":")[:2], spell.active) for spell in every_spell(rows, 0.305)] == [
        (["epoch 1.00", " skipped steps"], False),
        (["epochs 4.00 to 5.00", " skipped steps"], False),
        (["epochs 6.00 to 7.00", " plateau"], False),
        (["epoch 11.00", " validation turns up"], False),
        (["epoch 12.00", " skipped steps"], True),
    ]
    assert [str(spell).split(":")[0] for spell in every_spell(rows[:7], 0.305)][-1] == "since epoch 6.00"
    assert every_spell([], 0.305) == []


def test_rows_of_an_imported_run_know_little_and_warn_of_nothing():
    unknown = dict.fromkeys(row(), None) | {"epoch": 1.0, "val_loss": 4.0}
    rows = [unknown | {"epoch": float(epoch), "val_loss": loss} for epoch, loss in enumerate((3.5, 3.6, 3.7, 3.8, 3.9))]
    assert best_row(rows)["epoch"] == 0.0
    assert every_spell(rows, 0.305) == []


# --- in a terminal ----------------------------------------------------------------------------------------------


def told(rows, before=0, share=0.3053):
    """The lines of a terminal, without the table, of a run that had some rows before."""
    stream = io.StringIO()
    progress = TerminalProgress(stream)
    progress.begin({"validation": {"unknown_share": share}}, rows[:before])
    for new in rows[before:]:
        progress.validated(new, False)
    progress.close()
    return [line for line in stream.getvalue().splitlines() if line != HEADER and "%  " not in line]


def test_a_terminal_tells_each_warning_once_a_spell_and_when_a_plateau_is_over():
    ppl = [*STUCK, 67.3, 60.0, *[60.0 - 0.1 * k for k in range(5)]]
    accuracy = [*[0.305] * 6, 0.32, *[0.305] * 5]
    rows = history(val_ppl=ppl, val_accuracy=accuracy, skipped_steps=[0, 1, 2, 2, 2, 2, 2, 2, 5, 5, 5, 5])
    lines = told(rows)
    assert [line[:40] for line in lines] == [
        "warning: skipped steps: 1 since the vali",
        "warning: plateau: over 5 validations the",
        "the plateau of epochs 5.00 to 6.00 is ov",
        "warning: skipped steps: 3 since the vali",
        "warning: plateau: over 5 validations the",
    ]
    assert lines[1].endswith("the model says <UNK> and nothing else")


def test_a_terminal_tells_validation_that_turns_up_once():
    rows = history(val_ppl=[30, 25, 26, 26.5, 27, 28, 29], train_loss=[3.4, 3.2, 3.1, 3.0, 2.9, 2.8, 2.7])
    (line,) = told(rows)
    assert line.startswith("warning: validation turns up: three in a row")
    assert told(rows[:4]) == []


def test_a_run_that_goes_on_in_a_spell_is_told_of_it_at_its_start_and_not_again():
    rows = history(val_ppl=[90.0, *STUCK, 67.3, 67.3], val_accuracy=[0.2, *[0.305] * 7])
    (line,) = told(rows, before=7)
    assert line.startswith("warning: since epoch 6.00: plateau")
    (line,) = told(rows, before=5)
    assert line.startswith("warning: plateau")
    assert told(rows, share=None) == []


def test_without_a_beginning_rows_are_told_all_the_same():
    stream = io.StringIO()
    progress = TerminalProgress(stream)
    for new in history(skipped_steps=[0, 2]):
        progress.validated(new, False)
    assert stream.getvalue().count("warning: skipped steps: 2") == 1
