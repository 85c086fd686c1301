"""The button that trains: once for a click, and never for a click that was meant for a run that has ended."""

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import IPython
import pytest
from tiny import tiny_config, write_text

from newllm_lib.notebook import panel_plan, train_button
from newllm_lib.notebook.panel import Panel

pytestmark = pytest.mark.usefixtures("no_pictures")
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def kernel(monkeypatch):
    """A kernel whose present message was sent at `kernel.at`, seconds after noon by the page's clock."""
    kernel = SimpleNamespace(at=0.0)
    kernel.get_parent = lambda channel: {"header": {"date": NOON + timedelta(seconds=kernel.at)}}
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=kernel))
    return kernel


@pytest.fixture
def trained(monkeypatch):
    """The configurations that were trained; each takes ten seconds."""
    trained, now = [], [1000.0]

    def train(config, progress):
        trained.append(config)
        now[0] += 10.0
        return f"run {len(trained)}"

    monkeypatch.setattr(train_button, "train", train)
    monkeypatch.setattr(train_button.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(panel_plan, "estimate_speed", lambda setup, measure, anew: None)
    return trained


@pytest.fixture
def panel(tmp_path):
    return Panel(tiny_config(write_text(tmp_path / "text"), results_dir=str(tmp_path / "runs")))


def test_it_trains_what_the_panel_says(panel, trained, kernel):
    panel.set(dropout=0.3)
    panel.train.button.click()
    assert trained == [panel.config]
    assert trained[0].model.dropout == 0.3
    assert panel.train.run == "run 1"


def test_clicks_while_it_trains_start_nothing(panel, trained, kernel):
    panel.train.button.click()
    for kernel.at in (0.5, 4.0, 9.9):  # they come once the kernel is free again
        panel.train.button.click()
    assert len(trained) == 1
    kernel.at = 12.0
    panel.train.button.click()
    assert len(trained) == 2


def test_a_click_in_the_middle_of_a_training_starts_nothing(panel, trained, kernel, monkeypatch):
    train = train_button.train

    def nested(config, progress):
        kernel.at = 99.0
        panel.train.button.click()
        assert panel.train.button.disabled
        return train(config, progress)

    monkeypatch.setattr(train_button, "train", nested)
    panel.train.button.click()
    assert len(trained) == 1
    assert not panel.train.button.disabled


def click_in_a_thread(panel):
    thread = threading.Thread(target=panel.train.button.click)
    thread.start()
    thread.join()


def test_a_click_that_another_thread_hears_trains_in_the_main_one(panel, trained, kernel, monkeypatch):
    threads, train = [], train_button.train
    monkeypatch.setattr(
        train_button,
        "train",
        lambda config, progress: threads.append(threading.current_thread()) or train(config, progress),
    )

    async def notebook():
        panel.train._loop = asyncio.get_running_loop()
        for kernel.at in (0.0, 3.0):  # the second while the first one trains
            click_in_a_thread(panel)
        await asyncio.sleep(0)

    asyncio.run(notebook())
    assert threads == [threading.main_thread()]


def test_where_the_main_thread_cannot_be_reached_it_says_what_to_do_instead(panel, trained, kernel):
    click_in_a_thread(panel)
    assert trained == []
    assert "Run the next cell instead" in panel.train.page.value


def test_a_refusal_is_shown_and_the_button_lives(panel, trained, kernel):
    panel.set(dropout=7.0)
    panel.train.button.click()
    assert trained == []
    assert "dropout = 7.0: must be at least 0 and below 1" in panel.train.page.value
    assert not panel.train.button.disabled
    panel.set(dropout=0.1)
    kernel.at = 5.0
    panel.train.button.click()
    assert len(trained) == 1


def test_the_run_is_shown_below_the_button(panel, kernel, monkeypatch):
    monkeypatch.setattr(panel_plan, "estimate_speed", lambda setup, measure, anew: None)
    panel.train.button.click()
    assert panel.train.run.record["status"] == "finished"
    assert "16 of 16" in panel.train.page.value
    assert "<table" in panel.train.page.value
    assert "already finished: 16 of 16 steps" in panel.view.shown.value
