"""The files for a reader, from histories and records that training rarely gives."""

import json
import math
import signal
from itertools import pairwise

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from tiny import tiny_config, write_text

import newllm_lib as nl
from newllm_lib import cli
from newllm_lib.cli import training
from newllm_lib.config import RunConfig
from newllm_lib.errors import CheckpointError, NoModelError
from newllm_lib.reporting import report
from newllm_lib.reporting.curves import plain_log_axis, write_curves
from newllm_lib.reporting.diagnostics import best_row
from newllm_lib.reporting.formatting import duration
from newllm_lib.reporting.notebook_page import curves_pngs
from newllm_lib.reporting.progress import Progress
from newllm_lib.reporting.record import write_history, write_record
from newllm_lib.runs.run import Run

RECORD = {
    "run": "r", "preset": "cpu_baseline", "status": "finished", "parameters": 7, "published_protocol": True,
    "faithful": True, "faithful_reason": None, "decided": {}, "plan": [("engine", "fused")],
    "commands": ["newllm train"], "data": {"name": "text", "fingerprint": "00ff"},
    "validation": {"tokens": 9, "unknown_share": 0.25},
    "peak_memory_meaning": "of tensors on the GPU", "environment": {"versions": {"torch": "2"}, "git_commit": None},
    "config": RunConfig().to_dict(), "samples": [],
}  # fmt: skip


def row(step: int, loss: float, perplexity: float) -> dict:
    return {
        "step": step, "epoch": step / 4, "train_loss": loss, "val_loss": loss, "val_ppl": perplexity,
        "val_accuracy": 0.25, "val_ppl_known": perplexity, "lr": 1e-3, "clip": 1.0, "train_seconds": 1.5,
        "tokens_per_second": 100.0, "peak_memory_bytes": 2**20, "skipped_steps": 0,
    }  # fmt: skip


NAN, INFINITE = row(1, math.nan, math.nan), row(2, math.inf, math.inf)
OVERFLOWN, GOOD, WORSE = row(3, 800.0, math.inf), row(4, 3.0, 20.1), row(5, 3.5, 33.1)


@pytest.mark.parametrize(
    ("history", "best"),
    [
        ([], None),
        ([NAN], None),
        ([INFINITE, NAN], None),
        ([NAN, OVERFLOWN, INFINITE], OVERFLOWN),
        ([NAN, INFINITE, OVERFLOWN, GOOD, WORSE, NAN], GOOD),
    ],
    ids=["none", "NaN", "infinite", "overflown", "mixed"],
)
def test_losses_that_are_not_finite_are_told_and_never_the_best(tmp_path, capsys, history, best):
    assert best_row(history) is best
    record = RECORD | {"best": best}
    write_record(tmp_path, record)
    write_history(tmp_path, history)
    write_curves(tmp_path, record, history)
    report.write_report(tmp_path, record, history)
    stored = json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert (stored["best"] and stored["best"]["val_ppl"]) == (20.1 if best is GOOD else None)
    run = Run(tmp_path)
    assert repr(run) == f"Run('{tmp_path}', finished" + (", PPL 20.10)" if best is GOOD else ")")
    assert len(run.history) == len(history)
    training._print_run(run, as_json=False)
    printed = capsys.readouterr().out
    assert ("best validation perplexity 20.10 at step 4" in printed) == (best is GOOD)
    assert ("best validation perplexity inf at step 3" in printed) == (best is OVERFLOWN)
    written = (tmp_path / "report.md").read_text()
    assert ("No validation yet" in written) == (best is None)
    assert ("No curves: no validation yet." in written) == (history == [])
    assert ("No curves: no validation gave a finite loss." in written) == (best is None and history != [])


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([], "no validation yet"),
        ([NAN], "no validation gave a finite loss"),
        ([INFINITE, NAN], "no validation gave a finite loss"),
        ([GOOD], None),
    ],
    ids=["none", "NaN", "infinite", "one"],
)
def test_there_is_a_picture_whatever_happened_and_it_says_what(tmp_path, monkeypatch, history, words):
    drawn, subplots = [], Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda figure, *args: drawn.append(subplots(figure, *args)) or drawn[-1])
    write_curves(tmp_path, RECORD | {"best": None, "published_protocol": False}, history)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for axes in drawn[0]:
        assert axes.get_title()
        assert [text.get_text() for text in axes.texts] == ([words] if words else [])
        assert bool(axes.lines) == (words is None)


class Stop(Progress):
    """Interrupts after the first step."""

    def step(self, *_):
        signal.raise_signal(signal.SIGINT)


def test_a_run_interrupted_before_its_first_validation_says_so_wherever_its_model_is_asked_for(tmp_path):
    config = tiny_config(write_text(tmp_path / "text"), results_dir=str(tmp_path / "results"), name="r")
    run = nl.train(config, progress=Stop())
    assert (run.record["status"], run.best, len(run.history)) == ("interrupted", None, 0)
    assert (run.folder / "curves.png").is_file()
    assert "No curves: no validation yet." in run.report
    message = (
        f"{tmp_path}/results/r: no validation is behind this run yet, so there is no model: train it on (the same "
        "call; in a notebook that cell again)"
    )
    asks = [
        lambda: run.model,
        lambda: run.tokenizer,
        lambda: nl.evaluate(run),
        lambda: nl.evaluate(run.folder),
        lambda: nl.bundle(run),
        lambda: nl.bundle(run, checkpoint=True),
        lambda: nl.export(run, tmp_path / "out"),
    ]
    for ask in asks:
        with pytest.raises(NoModelError) as raised:
            ask()
        assert str(raised.value) == message
    assert isinstance(raised.value, CheckpointError)
    assert raised.value._render_traceback_() == [f"\x1b[31m{message}\x1b[0m"]
    asked = CliRunner().invoke(cli.main, ["generate", str(run.folder), "--prompt", "w1"])
    assert (asked.exit_code, asked.stderr) == (1, f"Error: {message}\n")
    write_history(run.folder, [INFINITE])
    with pytest.raises(NoModelError, match="r: no validation gave a finite loss, so there is no model"):
        nl.bundle(run)
    after = nl.train(config, progress=Progress())
    assert after.model.config.num_layers == 2
    (after.folder / "model" / "model.safetensors").unlink()
    assert nl.load(after.folder).model.config.num_layers == 2  # by the best checkpoint
    (after.folder / "checkpoints" / "best_r.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"best_r\.pt: cannot be read"
    ) as lost:  # validated, but its files are gone
        _ = nl.load(after.folder).model
    assert not isinstance(lost.value, NoModelError)


@pytest.mark.parametrize(("size", "font"), [((4.3, 4.0), 10), ((3.0, 2.7), 8)], ids=["curves.png", "live"])
@pytest.mark.parametrize(("low", "high"), [(25, 190), (30, 310), (24, 800), (30, 20_000), (1e-5, 3e2)])
def test_the_numbers_on_a_log_axis_are_plain_and_do_not_touch(low, high, size, font):
    figure = Figure(figsize=size)
    axes = figure.subplots()
    axes.tick_params(labelsize=font)
    axes.plot([0, 1, 2], [high, (low * high) ** 0.5, low])
    plain_log_axis(axes)
    figure.canvas.draw()
    bottom, top = axes.get_ylim()
    shown = [label for label in axes.get_yticklabels() if bottom <= label.get_position()[1] <= top]
    boxes = [label.get_window_extent() for label in shown]
    assert len(boxes) >= 3
    assert all(above.y0 > below.y1 for below, above in pairwise(boxes))
    assert all("$" not in label.get_text() for label in shown)  # as in 10 to the power of 2


@pytest.mark.parametrize("epochs", [[0.0154], [0.3077], [12.3456], [0.0154, 0.0308], [*range(1, 51)]], ids=len)
@pytest.mark.parametrize("draw", ["curves.png", "live"])
def test_epochs_begin_at_0_and_their_labels_do_not_touch(tmp_path, monkeypatch, draw, epochs):
    """The measured places of the labels on the drawn picture, at least a space apart; the last point within it."""
    drawn, subplots = [], Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda figure, *args: drawn.append(subplots(figure, *args)) or drawn[-1])
    history = [GOOD | {"epoch": epoch, "val_bits_per_byte": None, "val_word_ppl": None} for epoch in epochs]
    record = RECORD | {"best": history[0], "published_protocol": False}
    if draw == "live":
        curves_pngs(record, history)
    else:
        write_curves(tmp_path, record, history)
    for axes in drawn if draw == "live" else drawn[0]:
        left, right = axes.get_xlim()
        assert left == 0
        assert epochs[-1] < right < 1.1 * epochs[-1]
        shown = [label for label in axes.get_xticklabels() if left <= label.get_position()[0] <= right]
        boxes = [label.get_window_extent() for label in shown]
        assert len(boxes) >= 3
        assert all(after.x0 - before.x1 > 8 for before, after in pairwise(boxes))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (60, "1 min"), (145.4, "2 min 25 s"),
        (1109.3, "18 min 29 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h"), (4140, "1 h 9 min"), (97_200, "27 h"),
        (100_799, "28 h"), (100_820, "28 h"),
    ],
)  # fmt: skip
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_what_the_history_warned_of_stands_in_the_report(tmp_path):
    stuck = [row(step, 4.2, 67.0) for step in range(4, 36, 4)]  # epochs 1 to 8, at the share of <UNK>
    rows = [*stuck, row(36, 3.0, 20.1) | {"val_accuracy": 0.4}, row(40, 2.9, 18.0) | {"skipped_steps": 3}]
    report.write_report(tmp_path, RECORD | {"best": rows[-1]}, rows)
    text = (tmp_path / "report.md").read_text()
    assert text.count("## Warnings") == 1
    assert text[text.index("## Warnings") : text.index("## Time to")] == (
        "## Warnings\n\n"
        "- epochs 5.00 to 8.00: plateau: over 5 validations the perplexity moved by 0.0%, and the accuracy is the "
        "share of &lt;UNK&gt; (25.0%): the model says &lt;UNK&gt; and nothing else.\n"
        "- epoch 10.00: skipped steps: 3 since the validation before, 3 in all, because gradients were not finite; a "
        "few are normal in FP16, while the loss scale settles.\n\n"
    )
    report.write_report(tmp_path, RECORD | {"best": GOOD}, [GOOD, WORSE])
    assert "Warnings" not in (tmp_path / "report.md").read_text()


def test_special_tokens_of_a_sample_are_no_html(tmp_path):
    report.write_report(tmp_path, RECORD | {"best": None, "samples": ["**<BOS> a** <UNK> b"]}, [])
    assert "> **&lt;BOS&gt; a** &lt;UNK&gt; b\n" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "not the record of a run, best, config, decided, run, status missing"),
        ("[]", "not the record of a run, best, config, decided, run, status missing"),
        ("null", "not the record of a run, best, config, decided, run, status missing"),
        (json.dumps(RECORD)[:200], "not readable as JSON (Unterminated string starting at: line 1"),
    ],
    ids=["empty", "a list", "null", "truncated"],
)
def test_a_damaged_record_is_one_message_with_a_way_out(tmp_path, content, words):
    (tmp_path / "run.json").write_text(content)
    result = CliRunner().invoke(cli.main, ["evaluate", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path}/run.json: {words}")
    assert result.stderr.endswith("; move it away: the checkpoints beside it go on without it\n")
