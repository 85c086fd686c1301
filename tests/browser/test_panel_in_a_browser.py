"""The panel as a user moves it: what is kept, what is marked, how it looks in narrow windows, and the Train button."""

import json

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: make test-browser installs it")
from playwright.sync_api import expect

SETTINGS = """import os
os.environ.pop("NEWLLM_SMOKE", None)  # a person is here
import newllm_lib as nl
SEED = 42
small = {"hidden_dim": 64, "num_layers": 2, "batch_size": 16, "epochs": None, "max_steps": 12}"""
PANEL = """panel = nl.Panel("quickstart", data="builtin", seed=SEED, validate_every_steps=4, **small)
panel"""
TRAIN = "run = nl.train(panel.config)"
WIDTHS = (390, 768, 1280)


def records(folder):
    """run.json of every run in a folder's results."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "results").glob("*/run.json"))]


def run_all(ui):
    ui.start_all()
    ui.wait()
    assert ui.complained() == []


class PanelInABrowser:
    """The same for both; a class for each, so that pytest-xdist gives each a process and a server of its own."""

    def test_run_all_keeps_what_was_moved_and_a_button_undoes_it(self, ui, folder, compose):
        ui.open(compose(SETTINGS, PANEL, TRAIN))
        run_all(ui)
        panel = ui.panel()
        (untouched,) = records(folder)
        dropout = ui.setting("dropout").locator("input")
        before = dropout.input_value()
        ui.drag(ui.setting("dropout"), 40)
        ui.until(lambda: dropout.input_value() != before, "the box beside the slider follows it")
        ui.page.wait_for_timeout(1000)  # a pulled slider is heard more than once
        moved = dropout.input_value()
        chip = ui.setting("dropout").get_by_role("button")
        expect(chip).to_have_text(f"changed from {before}")

        run_all(ui)
        assert ui.setting("dropout").locator("input").input_value() == moved
        expect(panel).to_contain_text("Your changes are kept")
        (second,) = [record for record in records(folder) if record["run"] != untouched["run"]]
        assert second["config"]["model"]["dropout"] == float(moved) != float(before)
        ui.shot("kept", ui.cell("nl.Panel("))
        run_all(ui)
        assert len(records(folder)) == 2  # it was finished: nothing is trained again

        ui.setting("dropout").get_by_role("button").click()
        ui.until(lambda: ui.setting("dropout").locator("input").input_value() == before, "it is put back")
        run_all(ui)
        assert records(folder) == sorted([untouched, second], key=lambda record: record["run"])
        expect(ui.output("nl.train(")).to_contain_text(f"already finished: results/{untouched['run']}")

    def test_two_wrong_values_are_both_marked(self, ui, folder, compose):
        ui.open(compose(SETTINGS, PANEL))
        run_all(ui)
        panel = ui.panel()
        for name, text in (("dropout", "1.5"), ("seed", "x")):
            ui.setting(name).locator("input").fill(text)
            ui.page.keyboard.press("Enter")
        alert = panel.get_by_role("alert")
        expect(alert).to_contain_text("dropout = 1.5: must be at least 0 and below 1")
        expect(alert).to_contain_text("seed = 'x': must be a whole number from 0 to")
        for name in ("dropout", "seed"):
            expect(ui.setting(name)).to_contain_text("refused")
        ui.shot("two_wrong_values", ui.cell("nl.Panel("))

    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    def test_nothing_is_clipped_in_a_narrow_window(self, ui, folder, compose, dark):
        ui.open(compose(SETTINGS, PANEL, TRAIN))
        if dark:
            ui.darken()
        run_all(ui)
        ui.setting("seed").locator("input").fill("1234567")
        ui.page.keyboard.press("Enter")
        expect(ui.setting("seed").get_by_role("button")).to_be_visible()
        ui.hide_files()
        for width in WIDTHS:
            ui.page.set_viewport_size({"width": width, "height": 1600})
            ui.page.wait_for_timeout(300)
            ui.shot(f"panel_{width}{'_dark' * dark}", ui.cell("nl.Panel("))
            ui.shot(f"page_{width}{'_dark' * dark}", ui.output("nl.train(").first)
            assert ui.page.locator(".newllm-row").evaluate_all(CLIPPED) == []
            shown = ui.output("nl.train(").locator("tr").last.locator("td").evaluate_all(RIGHT_ENDS)
            assert shown[3] <= ui.output("nl.train(").first.evaluate(
                "output => output.getBoundingClientRect().right"
            )  # step, epoch, perplexity and accuracy are in view

    def test_the_train_button_and_its_stop(self, ui, folder, compose):
        ui.open(compose(SETTINGS.replace('"max_steps": 12', '"max_steps": 3000'), PANEL, TRAIN))
        for source in ("import os", "nl.Panel("):
            ui.start(ui.cell(source))
            ui.wait()
        panel = ui.panel()
        train = panel.get_by_role("button", name="Train", exact=True)
        train.click()
        expect(panel.locator("td").first).to_be_visible()  # a validation
        train.click(force=True)  # for nothing
        ui.shot("train_button", ui.cell("nl.Panel("))
        ui.interrupt()
        expect(panel).to_contain_text("interrupted")
        ui.until(lambda: records(folder)[0]["status"] == "interrupted", "the run is saved")
        ui.page.wait_for_timeout(1500)
        (record,) = records(folder)
        assert (record["status"], 4 <= record["step"] < 3000) == ("interrupted", True)  # the second click did nothing

        train.click()
        ui.until(lambda: records(folder)[0]["status"] == "running", "it continues")
        run = folder / "results" / record["run"]
        (run / "stop").touch()
        ui.until(lambda: records(folder)[0]["status"] == "interrupted", "the file stops it")
        assert records(folder)[0]["step"] > record["step"]
        assert not (run / "stop").exists()

    def test_run_all_during_a_run_of_the_train_button_starts_nothing_twice(self, ui, folder, compose):
        ui.open(compose(SETTINGS.replace('"max_steps": 12', '"max_steps": 120'), PANEL, TRAIN))
        for source in ("import os", "nl.Panel("):
            ui.start(ui.cell(source))
            ui.wait()
        panel = ui.panel()
        panel.get_by_role("button", name="Train", exact=True).click()
        expect(panel.locator("td").first).to_be_visible()  # a validation
        assert records(folder)[0]["status"] == "running"
        run_all(ui)  # the cells wait for the run to end
        (record,) = records(folder)
        assert (record["status"], record["step"], len(record["parts"])) == ("finished", 120, 1)
        expect(ui.output("nl.train(")).to_contain_text(f"already finished: results/{record['run']}")

    def test_a_saved_notebook_shows_the_plan_without_its_widgets(self, ui, folder, compose):
        path = compose(SETTINGS, PANEL)
        ui.open(path)
        run_all(ui)
        plan = ui.page.locator("[class^=newllm-saved-plan]")
        expect(plan).to_have_count(1)
        expect(plan).to_be_hidden()  # the widgets show it
        ui.save("newllm train quickstart")
        ui.server.stop_kernels()
        ui.open(path)
        plan = ui.page.locator("[class^=newllm-saved-plan]")
        expect(plan).to_be_visible()
        expect(plan).to_contain_text("newllm train quickstart")
        dead = ui.page.locator(ui.outputs, has_text=ui.dead_widgets)
        ui.until(lambda: not any(found.is_visible() for found in dead.all()), "no dead widget is seen")
        expect(ui.page.get_by_text("Loading widget")).to_be_hidden()
        ui.shot("reopened")


CLIPPED = """rows => rows.filter(row => row.offsetParent).flatMap(row =>
    [row, ...row.querySelectorAll('*')].filter(part => {
        const box = part.getBoundingClientRect(), outer = row.getBoundingClientRect();
        return box.width && (box.right > outer.right + 1 || box.left < outer.left - 1);
    }).map(part => row.innerText.slice(0, 20) + ': ' + part.className))"""
"""Parts of the rows in view that reach beyond their row."""
RIGHT_END = "part => part.getBoundingClientRect().right"
RIGHT_ENDS = "cells => cells.map(cell => cell.getBoundingClientRect().right)"


class TestClassic(PanelInABrowser):
    stack = "classic"


class TestLab(PanelInABrowser):
    stack = "lab"
