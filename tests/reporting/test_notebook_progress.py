"""The live display of a notebook: what it shows, how often, and that nothing about it can stop a training."""

import base64
import io
import math
import re
import signal
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import IPython
import IPython.display
import matplotlib
import nbformat
import pytest
import torch
from histories import history, row
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient
from PIL import Image
from tiny import RECIPE, SHAPE, result_of, same, tiny_setup, tiny_trainer, write_text

from newllm_lib.reporting import notebook_progress as notebook_room
from newllm_lib.reporting.notebook_page import curves_pngs, visible_rows
from newllm_lib.reporting.notebook_progress import NotebookProgress
from newllm_lib.reporting.progress import HEADER, Progress, TerminalProgress, rows_before, table_line
from newllm_lib.system.console import in_kernel
from newllm_lib.training.interrupt import StopRequest

RECORD = {
    "run": "l4_fp16-abc123",
    "preset": "l4_fp16",
    "status": "running",
    "published_protocol": True,
    "parameters": 2_739_432,
    "data": {"name": "wikitext-2"},
    "validation": {"unknown_share": 0.305},
}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Screen:
    """Stands in for IPython's display: keeps every page that it was given, and when."""

    def __init__(self, clock):
        self.clock, self.displays, self.pages, self.times, self.on_update = clock, 0, [], [], lambda: None

    def display(self, data, *, raw, display_id):
        assert raw
        assert display_id is True
        self.displays += 1
        self._show(data)
        return self

    def update(self, data, *, raw):
        assert raw
        self._show(data)

    def _show(self, data):
        self.on_update()
        self.pages.append(data["text/html"])
        self.times.append(self.clock())
        self.plain = data["text/plain"]

    @property
    def text(self):
        """What a reader sees of the newest page, line by line."""
        return " | ".join(read(self.pages[-1]).texts)


class read(HTMLParser):
    """The tags of a page, and its texts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = Counter(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def screen(monkeypatch, clock):
    screen = Screen(clock)
    monkeypatch.setattr(IPython.display, "display", screen.display)
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    return screen


@pytest.fixture
def progress(screen, clock):
    return NotebookProgress(clock=clock)


# --- the page ---------------------------------------------------------------------------------------------------


def test_it_shows_where_the_run_is(progress, screen, clock):
    progress.begin(RECORD, [])
    progress.step(39, 120, 0.33, 3.5, 1000.0)
    clock.now += 2
    progress.time_left(160.4)
    progress.step(40, 120, 0.34, 3.4567, 12_345.6)
    for text in ("l4_fp16-abc123", "wikitext-2, 2,739,432 parameters", "training", "0.34", "40 of 120", "3.457"):
        assert text in screen.text
    assert "12,346" in screen.text
    assert "time left | 2 min 40 s" in screen.text
    assert "width:33.33%" in screen.pages[-1]
    assert screen.plain == "l4_fp16-abc123; training at step 40 of 120; no validation yet"
    assert screen.displays == 1


def test_a_validation_moves_too(progress, screen, clock):
    progress.step(10, 60, 1.0, 3.0, 1000.0)
    clock.now += 5
    progress.evaluating()
    assert "status | validating, 0%" in screen.text
    clock.now += 5
    progress.validating(0.375)
    assert "status | validating, 38%" in screen.text
    progress.validated(row(1), True)
    clock.now += 5
    progress.step(11, 60, 1.1, 3.0, 1000.0)
    assert "status | training" in screen.text


def test_the_plan_is_folded_away_once_there_is_a_validation(progress, screen, clock):
    progress.plan([("batch", "8 sequences"), ("learning rate", "0.003")])
    progress.begin(RECORD, [])
    clock.now += 5
    progress.step(1, 10, 0.1, 3.0, 1.0)
    assert screen.text.count("learning rate  0.003") == 1
    assert "<details open" in screen.pages[-1]
    progress.validated(row(1), True)
    assert screen.text.count("learning rate  0.003") == 1
    assert "<details style" in screen.pages[-1]


def test_a_finished_run_shows_its_finished_page(progress, screen):
    progress.message("this run has already finished")
    record = RECORD | {"status": "finished", "step": 20, "total_steps": 20}
    progress.begin(record, history(val_ppl=[40, 30]))
    progress.close()
    for text in ("status | finished", "20 of 20", "epoch | 2.00", "ran for | –", "★ 20", "already finished"):
        assert text in screen.text
    assert read(screen.pages[-1]).tags["img"] == 3


def test_the_table_holds_the_last_rows_and_the_best():
    rows = history(val_ppl=[40, 30, *range(50, 90)])
    shown, hidden = visible_rows(rows)
    assert [r["epoch"] for r in shown] == [2, *range(28, 43)]
    assert hidden == 26
    assert visible_rows(rows[:15]) == (rows[:15], 0)
    best_late = history(val_ppl=range(90, 70, -1))
    assert visible_rows(best_late) == (best_late[5:], 5)


def test_the_best_row_is_marked_and_hidden_ones_are_counted(progress, screen):
    progress.begin(RECORD, history(val_ppl=[40, 30.25, *range(50, 90)]))
    assert read(screen.pages[-1]).tags["tr"] == 1 + 1 + 1 + 15  # titles, best, gap, last rows
    assert screen.text.count("★") == 1
    assert "★ 20 | 2.00" in screen.text
    assert "26 earlier rows are not shown" in screen.text
    marked = [line for line in screen.pages[-1].split("<tr")[1:] if "font-weight:bold" in line]
    assert len(marked) == 1
    assert "30.25" in marked[0]


def test_a_history_without_numbers_is_shown_all_the_same(progress, screen):
    bad = row(1, val_loss=math.inf, val_ppl=math.inf, val_accuracy=0.0, train_loss=math.nan, val_ppl_known=1e300)
    progress.begin(RECORD, [bad])
    assert "inf" in screen.text
    assert "1.00e+300" in screen.text
    assert "★" not in screen.text
    assert "no validation yet" in screen.plain


def test_bits_per_byte_stand_where_the_tokenizer_loses_nothing(progress, screen):
    progress.begin(RECORD, [row(1, val_bits_per_byte=2.3456)])
    assert "bits a byte" in screen.text
    assert "2.3456" in screen.text
    assert "known perplexity" not in screen.text


def test_warnings_are_marked_and_stay(progress, screen, clock):
    progress.message("warning: not faithful")
    progress.message("batch  32")
    progress.begin(RECORD, history(skipped_steps=[0, 2, 2], val_ppl=[30, 29, 28]))
    clock.now += 5
    progress.step(31, 40, 3.1, 3.0, 1000.0)
    assert "⚠︎ warning |  not faithful" in screen.text
    assert "⚠︎ warning |  epoch 2.00: skipped steps: 2 since" in screen.text
    assert screen.text.count("⚠") == 2
    assert "batch  32" in screen.text
    assert screen.pages[-1].index("not faithful") < screen.pages[-1].index("<table")


def test_a_warning_lasts_as_long_as_its_spell(progress, screen, clock):
    stuck = history(val_ppl=[68.0, 67.8, 67.9, 67.6, 67.4], val_accuracy=[0.305] * 5)
    progress.begin(RECORD, stuck)
    assert "⚠︎ warning |  epoch 5.00: plateau: over 5 validations" in screen.text
    clock.now += 5
    progress.validated(row(6, val_ppl=67.3, val_accuracy=0.305), True)
    assert "⚠︎ warning |  since epoch 5.00: plateau" in screen.text
    clock.now += 5
    progress.validated(row(7, val_ppl=50.0, val_accuracy=0.32), True)
    assert "⚠︎ warning |  epochs 5.00 to 6.00: plateau" in screen.text


def test_a_flood_of_messages_is_cut_and_counted(progress, screen):
    for number in range(50):
        progress.message(f"message {number}.")
    progress.close()
    assert screen.text.count("message ") == 40
    assert "message 49." in screen.text
    assert "message 9." not in screen.text
    assert "10 earlier messages are not shown" in screen.text


HOSTILE = """<script>alert("1")</script><img src=x onerror='y'>&amp;</div>"""


def test_every_text_is_escaped(progress, screen):
    progress.message(HOSTILE)
    progress.message(f"warning: {HOSTILE}")
    progress.begin(RECORD | {"run": HOSTILE, "data": {"name": HOSTILE}}, [row(1)])
    page = read(screen.pages[-1])
    assert set(page.tags) == {"div", "b", "span", "img", "table", "tr", "th", "td"}
    assert page.tags["img"] == 3  # the curves
    assert "onerror='y'" not in screen.pages[-1]
    assert screen.text.count(HOSTILE) == 4
    assert screen.pages[-1].count("<div") == screen.pages[-1].count("</div>")


def test_the_page_takes_the_colours_of_its_surroundings(progress, screen):
    progress.message("warning: something")
    progress.step(1, 2, 0.1, 3.0, 1.0)
    progress.begin(RECORD, history(val_ppl=[40, 30, *range(50, 90)]))
    page = re.sub(r"base64,[^\"]+", "", screen.pages[-1])
    assert re.findall(r"[;\"]color:", page) == []
    assert set(re.findall(r"background:([^;\"]+)", page)) <= {"transparent", "rgba(46,158,91,.22)", "#3b8fd6"}
    assert "<style" not in page


# --- the curves -------------------------------------------------------------------------------------------------


def test_the_curves_are_a_transparent_picture(progress, screen):
    progress.begin(RECORD, history(val_ppl=[40, 30, 28]))
    images = pictures(screen.pages[-1])
    size = (466, 393)  # 311 x 262 at one and a half dots a pixel
    assert [image.size for image in images] == [size] * 3
    assert [image.getpixel((0, 0))[3] for image in images] == [0] * 3
    assert {(0xE0, 0x7B, 0x22), (0x3B, 0x8F, 0xD6)} <= colours_of(images[0])


def pictures(page):
    """The images of a page."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA") for data in found]


def colours_of(image):
    return {near(colour) for _, colour in image.getcolors(image.width * image.height)}


def test_there_is_a_curve_from_the_first_steps_on(progress, screen, clock):
    for step in range(1, 4):
        clock.now += 5
        progress.step(step, 60, step / 20, 5.0 - step, 1000.0)
    loss, ppl, accuracy = pictures(screen.pages[-1])
    assert (0xE0, 0x7B, 0x22) in colours_of(loss)
    assert (0x3B, 0x8F, 0xD6) not in colours_of(loss) | colours_of(ppl) | colours_of(accuracy)


def test_the_share_of_unknown_words_is_drawn_at_the_runs_own_value():
    rows = history(val_ppl=[40, 30, 28], val_accuracy=[0.3, 0.31, 0.32])
    here = [curves_pngs(RECORD | {"validation": {"unknown_share": share}}, rows)[2] for share in (0.305, 0.315, None)]
    assert len(set(here)) == 3


def near(colour):
    """One of the two colours of the curves, where a colour is within what a palette of 64 changes."""
    for wanted in ((0xE0, 0x7B, 0x22), (0x3B, 0x8F, 0xD6)):
        if all(abs(a - b) < 12 for a, b in zip(wanted, colour, strict=False)):
            return wanted
    return None


def test_the_published_curve_is_drawn_only_where_it_compares():
    rows = history(val_ppl=[40, 30, 28])
    bare = curves_pngs(RECORD | {"preset": "quickstart"}, rows)
    assert curves_pngs(RECORD, rows)[1] != bare[1]  # of this run the series gives the perplexities alone
    assert curves_pngs(RECORD | {"published_protocol": False}, rows) == bare


def test_the_users_own_plots_are_left_alone():
    script = """
import matplotlib, sys
matplotlib.rcParams["font.size"] = 31
before = dict(matplotlib.rcParams)
from newllm_lib.reporting.notebook_page import curves_pngs
row = dict(epoch=1.0, train_loss=1.0, val_loss=1.0, val_ppl=2.7, val_accuracy=0.3)
curves_pngs(None, [row])
print(dict(matplotlib.rcParams) == before, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_the_users_style_does_not_change_the_curves():
    rows = history(val_ppl=[40, 30, 28])
    plain = curves_pngs(RECORD, rows)
    with matplotlib.rc_context({"font.family": "monospace", "axes.linewidth": 9, "axes.facecolor": "black"}):
        assert curves_pngs(RECORD, rows) == plain


@pytest.fixture
def drawings(monkeypatch, clock):
    """The number of rows at each drawing; each takes `drawings.seconds`."""

    class Drawings(list):
        seconds = 0.0

    def draw(record, rows, losses):
        drawings.append(len(rows))
        clock.now += drawings.seconds
        return [b"png"] * 3

    drawings = Drawings()
    monkeypatch.setattr(notebook_room, "curves_pngs", draw)
    return drawings


def train_for_a_while(progress, clock, steps, seconds, every):
    for step in range(1, steps + 1):
        clock.now += seconds
        progress.step(step, steps, step / 100, 3.0, 1000.0)
        if step % every == 0:
            progress.evaluating()
            clock.now += 3 * seconds
            progress.validated(row(step / 100), True)


def test_curves_are_drawn_for_steps_and_validations(progress, clock, drawings, screen):
    drawings.seconds = 0.3  # so every 6 s
    train_for_a_while(progress, clock, 100, 2.0, every=20)  # 230 s
    assert sorted(set(drawings)) == [0, 1, 2, 3, 4, 5]
    assert 30 <= len(drawings) <= 36


def test_curves_take_at_most_a_twentieth_of_the_time(progress, clock, drawings, screen):
    drawings.seconds = 0.2
    train_for_a_while(progress, clock, 1000, 0.01, every=1)  # 40 s, validating all the time
    progress.close()
    assert 4 <= len(drawings) <= 13
    assert drawings[-1] == 1000  # the end has the whole curve


# --- a run that goes back to a checkpoint -----------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=12), st.sets(st.integers(1, 60)))
def test_rows_are_those_of_the_run_however_often_it_goes_back(course, skipped):
    """course: rows to go back by, then rows to go on by; skipped: rows before which no update was made."""
    every = []
    for number in range(60):
        every.append(row(0.25 * (number + 1), step=(every[-1]["step"] if every else 0) + (number not in skipped)))
    shown, length = [], 0
    for back, on in course:
        length = max(0, length - back)
        for new in every[length : length + on]:
            shown = [*rows_before(shown, new), dict(new)]
            length += 1
            assert shown == every[:length]


def test_a_run_whose_update_is_torn_shows_each_validation_once(tmp_path, progress, screen, clock, drawings):
    """Memory runs out while the weights change, at step 8; no validation was the best, so it goes back to step 0."""
    trainer = tiny_trainer(tiny_setup(write_text(tmp_path / "text")), tmp_path / "run", progress)
    trainer.state.best_loss = 0.0
    update, calls, validated = trainer.optimizers[0].step, iter(range(10_000)), []

    def torn(*args, **kwargs):
        clock.now += 1
        update(*args, **kwargs)
        if next(calls) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.optimizers[0].step = torn
    trainer.on_validation = lambda best: validated.append(trainer.state.step)
    progress.begin(RECORD, [])
    assert trainer.fit() == "finished"
    progress.close()
    assert validated == [3, 6, 3, 6, 8, 9, 12, 15, 16]
    assert re.findall(r"<td[^>]*>(?:★ )?(\d+)</td><td[^>]*>\d\.\d\d</td>", screen.pages[-1]) == [
        "3", "6", "8", "9", "12", "15", "16",
    ]  # fmt: skip
    assert drawings[-1] == 7
    assert "resumed from step 0" in screen.text


def test_a_row_that_comes_again_takes_the_place_of_the_first_in_table_curves_and_warnings(
    progress, clock, drawings, screen
):
    stuck = history(val_ppl=[68.0, 67.8, 67.9, 67.6, 67.4], val_accuracy=[0.305] * 5)
    progress.begin(RECORD, stuck[:4])
    clock.now += 60
    progress.validated(stuck[3] | {"val_ppl": 67.65}, False)
    assert drawings == [4, 4]
    assert screen.text.count("67.60") == 0
    assert screen.text.count("67.65") == 1
    clock.now += 60
    progress.validated(dict(stuck[2]), False)
    assert drawings == [4, 4, 3]
    clock.now += 60
    progress.validated(dict(stuck[3]), False)
    assert "plateau" not in screen.text  # four validations, however often they came
    clock.now += 60
    progress.validated(stuck[4], False)
    assert "epoch 5.00: plateau: over 5 validations" in screen.text
    clock.now += 60
    progress.validated(dict(stuck[2]), False)
    assert "plateau" not in screen.text


def test_plain_lines_count_each_validation_once_too():
    stuck = history(val_ppl=[68.0, 67.8, 67.9, 67.6, 67.4], val_accuracy=[0.305] * 5)
    progress = TerminalProgress(stream := io.StringIO())
    progress.begin(RECORD, stuck[:3])
    for new in (stuck[3], stuck[2], stuck[3]):
        progress.validated(dict(new), False)
    assert "plateau" not in stream.getvalue()
    progress.validated(stuck[4], False)
    assert stream.getvalue().count("warning: plateau: over 5 validations") == 1


def test_plain_lines_after_a_failure_know_what_came_again(progress, screen, clock, capsys):
    rows = history(val_ppl=[40, 30, 28, 27])
    progress.begin(RECORD, rows[:3])
    clock.now += 5
    progress.validated(rows[3], False)
    for number in (3, 2, 3, 3):  # the first is shown, the others come in the same second
        progress.validated(dict(rows[number]), False)

    def fail():
        raise RuntimeError("no socket")

    screen.on_update = fail
    clock.now += 5
    progress.step(50, 100, 5.0, 3.0, 1.0)
    assert "no socket" in capsys.readouterr().out
    assert progress._plain._history == rows


# --- when it is shown -------------------------------------------------------------------------------------------


def most_in_a_second(times):
    return max(sum(0 <= other - time < 1 for other in times) for time in times)


@pytest.mark.parametrize("seconds, every", [(0.01, 7), (0.03, 40), (0.3, 5), (0.7, 2)])
def test_two_updates_a_second_at_most(progress, clock, drawings, screen, seconds, every):
    for number in range(12):
        progress.message(f"plan {number}")
    progress.begin(RECORD, [])
    train_for_a_while(progress, clock, round(60 / seconds), seconds, every)
    assert most_in_a_second(screen.times) <= 2
    pauses = [later - earlier for earlier, later in zip(screen.times, screen.times[1:], strict=False)]
    assert max(pauses) < 2.5
    assert screen.displays == 1


def test_a_long_run_is_updated_less_often(progress, clock, drawings, screen):
    train_for_a_while(progress, clock, 40_000, 0.1, every=20_000)
    early, late = ([t for t in screen.times if a <= t - 100 < a + 100] for a in (0, 3000))
    assert 85 < len(early) <= 100
    assert 45 < len(late) <= 50


def test_validating_is_said_at_once(progress, screen, clock):
    for step in range(1, 30):
        clock.now += 0.05
        progress.step(step, 100, 0.1, 3.0, 1.0)
    progress.evaluating()
    assert "validating" in screen.text


def test_the_end_is_always_shown(progress, screen, clock):
    for step in range(1, 11):
        progress.step(step, 10, step / 10, 3.0 + step / 1000, 1.0)
    progress.evaluating()
    progress.validated(row(1, val_ppl=12.34), True)
    progress.close()
    for text in ("finished", "10 of 10", "3.010", "12.34", "ran for"):
        assert text in screen.text
    assert "background:#2e9e5b" in screen.pages[-1]
    shown = len(screen.pages)
    progress.close()
    assert len(screen.pages) == shown


def test_an_interrupted_run_keeps_what_is_shown(progress, screen, clock):
    progress.begin(RECORD, [row(1, val_ppl=12.34)])
    progress.step(4, 10, 0.4, 3.0, 1.0)
    progress.close()
    progress.message("interrupted; step_4.pt is saved")
    for text in ("ended", "4 of 10", "12.34", "interrupted; step_4.pt is saved"):
        assert text in screen.text
    assert screen.displays == 1


@pytest.mark.parametrize(
    "status, bar",
    [
        ("finished", "width:100.00%;background:#2e9e5b"),  # with a step skipped
        ("stopped early", "width:90.00%;background:#2e9e5b"),
        ("interrupted", "width:90.00%;background:#e07b22"),
        ("failed", "width:90.00%;background:#e07b22"),
    ],
)
def test_the_record_tells_how_it_ended(progress, screen, status, bar):
    record = dict(RECORD)
    progress.begin(record, [])
    progress.step(9, 10, 1.0, 3.0, 1.0)
    progress.close()
    assert "status | ended" in screen.text
    record |= {"status": status}
    progress.close()
    assert f"status | {status}" in screen.text
    assert bar in screen.pages[-1]


def test_large_numbers_have_separators(progress, screen):
    progress.begin(RECORD, [row(1, step=1_234_567, train_seconds=123_456.7)])
    progress.step(1_234_568, 3_000_000, 1.1, 3.0, 1.0)
    progress.close()
    for text in ("1,234,567", "123,456.7", "1,234,568 of 3,000,000"):
        assert text in screen.text
    assert "step 1,234,568 of 3,000,000; best validation perplexity 33.10 at step 1,234,567" in screen.plain


def test_messages_alone_show_no_bar(progress, screen):
    progress.message("starting over")
    progress.message("this run has already finished")
    progress.close()
    assert "this run has already finished" in screen.text
    assert "of 0" not in screen.text
    assert screen.plain == "this run has already finished"


def test_another_run_gets_a_display_of_its_own(progress, screen, clock):
    progress.begin(RECORD, [row(1)])
    progress.step(10, 10, 1.0, 3.0, 1.0)
    progress.close()
    progress.begin(RECORD | {"run": "second"}, [])
    assert screen.displays == 2
    assert "second" in screen.text
    assert read(screen.pages[-1]).tags["table"] == 0


# --- nothing about it stops a training --------------------------------------------------------------------------


def test_after_a_failure_there_are_plain_lines(progress, screen, clock, capsys):
    progress.message("shown")

    def fail():
        raise RuntimeError("no socket")

    screen.on_update = fail
    progress.message("the plan")  # too soon to be shown
    clock.now += 5
    progress.validated(row(1, val_ppl=12.34), True)
    progress.message("after it")
    progress.step(11, 20, 1.1, 3.0, 1.0)
    progress.evaluating()
    progress.validated(row(2, val_ppl=11.22), False)
    progress.close()
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == ""
    assert lines[0] == "warning: the live display failed (RuntimeError: no socket); plain lines instead"
    assert lines[1] == "the plan"
    assert lines[2].split()[:2] == ["step", "epoch"]
    assert "12.34" in lines[3]
    assert lines[4] == "after it"
    assert "11.22" in lines[5]
    assert len(lines) == 6
    assert len(screen.pages) == 1


@pytest.mark.parametrize("broken", ["display", "curves"])
def test_training_is_the_same_when_drawing_fails(tmp_path, screen, monkeypatch, capsys, broken):
    def fail(*_):
        raise OSError("broken")

    if broken == "display":
        screen.on_update = fail
    else:
        monkeypatch.setattr(notebook_room, "curves_pngs", fail)
    data = write_text(tmp_path / "text")
    silent = tiny_trainer(tiny_setup(data), tmp_path / "a", Progress())
    shown = tiny_trainer(tiny_setup(data), tmp_path / "b", NotebookProgress())
    assert silent.fit() == shown.fit() == "finished"
    shown.progress.close()
    assert same(result_of(silent), result_of(shown))
    assert capsys.readouterr().out.count("the live display failed (OSError: broken)") == 1


def test_a_second_interrupt_gets_through(progress, screen, clock):
    def interrupt():
        raise KeyboardInterrupt

    progress.step(1, 10, 0.1, 3.0, 1.0)
    screen.on_update = interrupt
    clock.now += 5
    with pytest.raises(KeyboardInterrupt):
        progress.step(2, 10, 0.2, 3.0, 1.0)
    screen.on_update = lambda: None
    progress.close()
    assert "2 of 10" in screen.text


def test_a_message_in_the_middle_of_an_update_waits_for_the_next(progress, screen, clock):
    def interrupted():  # by a signal, in a slow drawing
        clock.now += 3
        if not screen.pages:
            progress.message("stopping")

    screen.on_update = interrupted
    progress.step(1, 10, 0.1, 3.0, 1.0)
    assert len(screen.pages) == 1
    clock.now += 5
    progress.step(2, 10, 0.2, 3.0, 1.0)
    assert screen.text.count("stopping") == 1


def test_without_a_notebook_there_are_plain_lines(capsys):
    progress = NotebookProgress()
    stuck = history(val_ppl=[68.0, 67.8, 67.9, 67.6, 67.4], val_accuracy=[0.305] * 5)
    progress.begin(RECORD, stuck[:4])
    progress.message("the plan")
    progress.validated(stuck[4], True)
    progress.close()
    printed = "".join(capsys.readouterr())
    assert "<div" not in printed
    assert printed.splitlines()[0] == "the plan"
    assert printed.count("warning: plateau: over 5 validations") == 1


def test_plain_lines_after_a_failure_know_the_rows_that_the_page_has_shown(progress, screen, clock, capsys):
    stuck = history(val_ppl=[68.0, 67.8, 67.9, 67.6, 67.4], val_accuracy=[0.305] * 5)
    progress.begin(RECORD, stuck[:3])

    def fail():
        raise RuntimeError("no socket")

    screen.on_update = fail
    progress.validated(stuck[3], True)  # not shown any more: told by the plain lines, as all that follows
    progress.validated(stuck[4], True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["step", "40", "50", "warning:"]
    assert "plateau: over 5 validations the perplexity moved by 0.9%" in lines[4]


# --- in a kernel ------------------------------------------------------------------------------------------------


def test_ipython_in_a_terminal_is_no_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    assert not in_kernel()
    script = "import ipykernel; from newllm_lib.system.console import in_kernel; "
    script += "print('found', in_kernel(), get_ipython() is None)"
    command = [sys.executable, "-m", "IPython", "--quick", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "found False False\n" in done.stdout


class CountingClient(NotebookClient):
    """Counts the messages of a kernel by their kind."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kinds = Counter()

    def process_message(self, msg, cell, cell_index):
        self.kinds[msg["msg_type"]] += 1
        return super().process_message(msg, cell, cell_index)


@pytest.mark.slow
def test_a_run_in_a_notebook_is_one_output(tmp_path):
    settings = SHAPE | RECIPE | {"data": str(write_text(tmp_path / "text")), "results_dir": str(tmp_path / "results")}
    stops = "class Stops(NotebookProgress):\n    def step(self, step, *rest):\n        super().step(step, *rest)\n"
    stops += "        if step == 2:\n            import signal; signal.raise_signal(signal.SIGINT)\n"
    cells = [
        "import newllm_lib as nl\nfrom newllm_lib.reporting.notebook_progress import NotebookProgress\n"
        "from newllm_lib.system.console import in_kernel\nassert in_kernel()",
        f"config = nl.RunConfig(preset='tiny').replace(**{settings!r})\n"
        "run = nl.train(config, progress=NotebookProgress())\nassert run.record['status'] == 'finished'",
        f"{stops}run = nl.train(config, name='stop', progress=Stops())\nassert run.record['status'] == 'interrupted'",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = CountingClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert book.cells[0].outputs == []
    (output,) = book.cells[1].outputs
    assert output.output_type == "display_data"
    assert (client.kinds["display_data"], client.kinds["stream"]) == (2, 0)  # that of the second run too
    assert client.kinds["update_display_data"] >= 2
    page = output.data["text/html"]
    text = " | ".join(read(page).texts)
    assert 'src="data:image/png;base64,' in page
    assert "finished" in text
    assert "★" in text
    assert "tiny" in text
    (stopped,) = book.cells[2].outputs
    assert "stopping after this step, then saving; interrupt again to stop at once" in stopped.data["text/html"]


# --- in a terminal ----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_lines_of_a_terminal_have_separators_and_stand_under_their_heading():
    line = table_line(row(123.4, step=1_234_567, train_seconds=123_456.7), True)
    assert line == "1,234,567  123.40       33.10    34.00%           3.5000         4.0000 123,456.7 *"
    assert len(line) - 2 == len(HEADER)
    TerminalProgress(log := io.StringIO(), line_seconds=0).step(1_234, 5_000, 1.1, 3.0, 1_000.0)
    assert log.getvalue().startswith("step 1,234 of 5,000 (epoch 1.10): loss 3.000, 1,000 tokens/s")
    progress = TerminalProgress(terminal := Terminal())
    progress.step(1_235, 5_000, 1.1, 3.0, 1_000.0)
    progress.close()
    assert "| 1,234 of 5,000 [" in terminal.getvalue()


def test_a_bar_may_go_back():
    """As where an update was torn."""
    progress = TerminalProgress(Terminal())
    for step in (1_999, 2_000, 1_001):
        progress.step(step, 5_000, 1.1, 3.0, 1_000.0)
    assert progress._bar.n == 1_001
    progress.close()


@pytest.mark.parametrize(("kernel", "words"), [(True, "interrupt again"), (False, "press Ctrl-C again")])
def test_how_to_stop_at_once_is_said_as_it_is_done_here(monkeypatch, kernel, words):
    monkeypatch.setitem(sys.modules, "ipykernel", object())  # a script may load it too
    if kernel:
        monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    progress = TerminalProgress(stream := io.StringIO())
    with StopRequest(progress).listening():
        signal.raise_signal(signal.SIGINT)
        assert stream.getvalue() == f"stopping after this step, then saving; {words} to stop at once\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
