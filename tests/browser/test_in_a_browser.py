"""What a user does with a notebook, done in both interfaces by mouse and keyboard."""

import json
import re

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: make test-browser installs it")
from playwright.sync_api import expect

CURVES = "img[src^='data:image/png']"


def records(folder):
    """run.json of every run in a folder's results."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "results").glob("*/run.json"))]


def interrupt_after_validation(ui, train, step=0):
    """Interrupt a training, by the menu, once its table has a row of a step after this one, until it has ended."""

    def last_step():
        rows = train.locator("tr:last-child td:nth-child(1)").all_text_contents()
        return int(re.sub(r"\D", "", rows[0])) if rows else 0  # the best one has a star

    ui.until(lambda: last_step() > step, "a validation")
    ui.shot("training")
    ui.interrupt()
    ui.wait()


class InABrowser:
    """The same for both; a class for each, so that pytest-xdist gives each a process and a server of its own."""

    def test_what_goes_wrong_is_seen(self, ui, compose):
        """A control of the harness: the others would pass if tracebacks, warnings and questions went unseen."""
        ui.open(compose("import sys; print('careful', file=sys.stderr)", "1 / 0", "print('not reached')"))
        ui.start_all()
        ui.wait()
        warning, traceback, unreached = ui.complained()
        assert warning.strip() == "careful"
        assert "ZeroDivisionError" in traceback
        assert re.fullmatch(r"never ran:\W+print\('not reached'\)", unreached)
        ui.open(compose("input('your name?')"))
        with pytest.raises(AssertionError, match=r"asks.*your name"):
            ui.start_all()
            ui.wait()

    def test_quickstart_and_again(self, ui, folder, place):
        ui.open(place("00"))
        ui.start_all()
        ui.wait()
        assert ui.complained() == []
        train = ui.output("nl.train(").first
        expect(train.locator("tr")).to_have_count(11)  # a head and ten validations
        expect(train.locator(CURVES)).to_have_count(3)
        expect(train).to_contain_text("10 of 10")
        ui.shot("quickstart", ui.cell("nl.train("))
        (record,) = records(folder)
        assert (record["status"], record["step"]) == ("finished", 10)
        assert (folder / "results" / f"{record['run']}.zip").is_file()
        with ui.page.expect_download() as download:
            ui.output("nl.offer_download(").locator("a").click()
        assert download.value.suggested_filename == f"{record['run']}.zip"

        ui.start_all()
        ui.wait()
        assert ui.complained() == []
        expect(train).to_contain_text(f"this run has already finished: results/{record['run']}")
        assert records(folder) == [record]

    def test_interrupted_saved_and_continued(self, ui, folder, place):
        ui.open(place("00", {"STEPS = 10": "STEPS = 3000", "max(1, STEPS // 6)": "4"}))
        ui.start_all()
        train = ui.output("nl.train(").first
        interrupt_after_validation(ui, train)
        assert ui.complained() == []  # the kernel lives, and the cells after use what is saved
        (record,) = records(folder)
        assert record["status"] == "interrupted"
        assert 4 <= record["step"] < 3000
        expect(train).to_contain_text("stopping after this step, then saving; interrupt again to stop at once")
        expect(train).to_contain_text(f"{record['run']}_step_{record['step']}.pt is saved")
        ui.shot("interrupted", ui.cell("nl.train("))

        ui.start(ui.cell("nl.train("))
        interrupt_after_validation(ui, train, record["step"])
        assert ui.complained() == []
        expect(train).to_contain_text(f"continuing {record['run']} from")
        expect(train).to_contain_text(f"step {record['step']:,} of 3,000")
        (after,) = records(folder)
        assert (after["run"], after["status"]) == (record["run"], "interrupted")
        assert record["step"] < after["step"] < 3000
        ui.shot("continued", ui.cell("nl.train("))

    def test_a_slider_moves_the_plan_and_the_run(self, ui, folder, place):
        ui.open(place("01"))
        ui.start_all()
        ui.wait()
        assert ui.complained() == []
        train, panel = ui.output("nl.train(").first, ui.panel()
        expect(train.locator("tr")).to_have_count(4)  # a head, and validations after 4, 8 and 12 steps
        expect(train.locator(CURVES)).to_have_count(3)
        expect(panel).to_contain_text("already finished: 12 of 12 steps")
        (untouched,) = records(folder)
        ui.shot("train_page")

        dropout = ui.setting("dropout").locator("input")
        before = dropout.input_value()
        ui.drag(ui.setting("dropout"), 40)
        ui.until(lambda: dropout.input_value() != before, "the box beside the slider follows it")
        ui.until(lambda: f"--dropout {dropout.input_value()} " in panel.text_content(), "the plan follows the slider")
        expect(panel).to_contain_text("a new run")
        ui.setting("max_steps").locator("input").fill("3000")
        ui.page.keyboard.press("Enter")
        expect(panel).to_contain_text("--max-steps 3000")
        ui.shot("panel", ui.cell("nl.Panel("))

        ui.start(ui.cell("nl.train("))
        interrupt_after_validation(ui, train, 12)
        assert ui.complained() == []
        (moved,) = [record for record in records(folder) if record != untouched]
        assert moved["config"]["model"]["dropout"] == float(dropout.input_value()) > float(before)
        assert (moved["status"], moved["total_steps"]) == ("interrupted", 3000)
        expect(panel).to_contain_text(f"continues at step {moved['step']:,} of 3,000")

        ui.start(ui.cell("nl.train("))
        interrupt_after_validation(ui, train, moved["step"])
        assert ui.complained() == []
        expect(train).to_contain_text(f"step {moved['step']:,} of 3,000")
        (after,) = [record for record in records(folder) if record != untouched]
        assert after["run"] == moved["run"]
        assert moved["step"] < after["step"] < 3000


class TestClassic(InABrowser):
    stack = "classic"


class TestLab(InABrowser):
    stack = "lab"
