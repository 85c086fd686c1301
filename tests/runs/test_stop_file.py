"""A file that stops a training as an interrupt does."""

import threading

import pytest
from tiny import Quiet, tiny_config, write_text

import newllm_lib as nl
from newllm_lib.runs import stop_file
from newllm_lib.training.observers import Observer

pytestmark = pytest.mark.usefixtures("no_pictures")


class MakeFile(Observer):
    """Somebody creates the file while a step is made."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_step(self, trainer, result):
        if trainer.state.step == self.step:
            self.path.touch()


@pytest.mark.parametrize("thread", [False, True])
def test_it_saves_and_the_same_call_goes_on(tmp_path, monkeypatch, thread):
    monkeypatch.setattr(stop_file, "_SECONDS", 0.0)
    config = tiny_config(write_text(tmp_path / "text"), results_dir=str(tmp_path / "runs"), name="r")
    path, said, runs = tmp_path / "runs" / "r" / "stop", Quiet(), []

    def watch(trainer):
        trainer.observers.insert(0, MakeFile(path, 5))

    def train():
        runs.append(nl.train(config, progress=said, watch=watch))

    if thread:  # where no interrupt reaches
        training = threading.Thread(target=train)
        training.start()
        training.join()
    else:
        train()
    assert (runs[0].record.status, runs[0].record.step) == ("interrupted", 5)
    assert not path.exists()
    assert any(text.startswith(f"{path} was there: stopping after this step, then saving") for text in said.messages)
    assert nl.train(config, progress=Quiet()).record.step == 16


def test_one_of_an_earlier_run_stops_nothing(tmp_path):
    config = tiny_config(write_text(tmp_path / "text"), results_dir=str(tmp_path / "runs"), name="r")
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "stop").touch()
    assert nl.train(config, progress=Quiet()).record.status == "finished"
