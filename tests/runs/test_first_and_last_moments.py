"""A run's first and last moments: what stops before anything was saved, and weights that are of no use."""

import errno
import json
import math
import os
import signal
import subprocess
import time

import pytest
import torch
from click.testing import CliRunner
from tiny import Quiet, tiny_command, tiny_config

import newllm_lib as nl
from newllm_lib.cli import main
from newllm_lib.errors import CheckpointError, FileError, TrainingError
from newllm_lib.notebook.panel_plan import Planner
from newllm_lib.training import checkpoint as checkpoints
from newllm_lib.training.checkpoint import Checkpoints, load_checkpoint, save_checkpoint


@pytest.fixture
def config(text, tmp_path):
    return tiny_config(text, name="r", results_dir=str(tmp_path / "results"), epochs=None, max_steps=6)


@pytest.fixture
def whole(config, tmp_path):
    """The weights of the same run without trouble."""
    return nl.train(config, results_dir=str(tmp_path / "whole"), progress=Quiet()).model.state_dict()


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


# --- the first best -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(errno.ENOSPC, "No space left on device"), FileError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_run_whose_first_save_failed_starts_again_by_itself(config, whole, monkeypatch, error, raised):
    def fail(path, write, *more):
        if path.suffix == ".pt":
            raise error if isinstance(error, KeyboardInterrupt) else FileError(str(error))
        return real(path, write, *more)

    real = checkpoints.write_atomic
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_atomic", fail)
        with pytest.raises(raised):
            nl.train(config, progress=Quiet())
    record = nl.load(f"{config.results_dir}/r").record
    assert record.best and record.status in ("failed", "interrupted")  # the very state that stranded such a run
    assert Planner().plan(config).refusal == ""
    said = Quiet()
    run = nl.train(config, progress=said)
    assert f"{config.results_dir}/r: ended at step 3 before anything was saved; starting from the beginning" in (
        said.messages
    )
    assert run.record.status == "finished" and same(run.model.state_dict(), whole)
    assert list(run.history["step"]) == [3, 6]


def test_a_run_that_saved_and_lost_its_checkpoints_is_not_replaced(config):
    """The control: its model is still there."""
    run = nl.train(config, progress=Quiet())
    for path in (run.folder / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="the checkpoints of this run are gone"):
        nl.train(config, max_steps=9, progress=Quiet())
    assert "gone" in Planner().plan(config.replace(max_steps=9)).refusal


# --- weights that are not finite --------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_never_saved(config):
    def spoil(trainer):
        def after(result):
            if trainer.state.step == 5:
                with torch.no_grad():
                    trainer.model.embedding.weight[3, 2] = math.inf
                trainer.request_stop()

        trainer.on_step = after

    with pytest.raises(
        TrainingError,
        match=r"the weights are no longer finite and are not saved: embedding\.weight\. Stopped at step 5; the newest "
        r"checkpoint is best_r\.pt",
    ):
        nl.train(config, progress=Quiet(), watch=spoil)
    run = nl.load(f"{config.results_dir}/r")
    assert run.record.status == "failed"
    assert sorted(path.name for path in (run.folder / "checkpoints").glob("*.pt")) == ["best_r.pt"]
    again = nl.train(config, progress=Quiet())
    assert (again.record.status, again.record.step) == ("finished", 6)


def spoiled(path, value=math.nan):
    payload = load_checkpoint(path, lambda text: None)
    payload["model"]["layers.0.weight"][0, 0] = value
    save_checkpoint(path, payload, payload["state"]["step"])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_saved_weights_that_are_not_finite_are_passed_over(config, value):
    newest, *others = Checkpoints.of(nl.train(config, progress=Quiet()).folder).files()
    assert others
    spoiled(newest, value)
    said = Quiet()
    longer = nl.train(config, max_steps=9, progress=said)
    (warning,) = [text for text in said.messages if "not finite" in text]
    assert warning == (
        f"warning: {newest}: its weights are not finite (layers.0.weight); trying the checkpoint before it"
    )
    assert longer.record.step == 9


def test_a_model_that_is_not_finite_is_named_as_such(config, tmp_path):
    run = nl.train(config, progress=Quiet())
    path = run.folder / "checkpoints" / "best_r.pt"
    spoiled(path)
    for command in (["generate", str(path), "--prompt", "w1"], ["evaluate", str(path), "--data", config.data.data]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1] == (
            f"Error: {path}: not a model that can be used: layers.0.weight not finite"
        )


# --- a file that is no run ------------------------------------------------------------------------------------------


@pytest.fixture
def good(config, tmp_path):
    run = nl.train(config, results_dir=str(tmp_path / "elsewhere"), progress=Quiet())
    return run.folder / "checkpoints" / "r_final.pt"


def truncated(path, good):
    path.write_bytes(good.read_bytes()[:-2000])


def of_text(path, good):
    path.write_text("no checkpoint")


def empty(path, good):
    path.write_bytes(b"")


def a_folder(path, good):
    path.mkdir()


def with_state(path, good):
    payload = load_checkpoint(good, lambda text: None)
    payload["state"]["step"] = "six"
    save_checkpoint(path, payload, 6)


def with_another_shape(path, good):
    payload = load_checkpoint(good, lambda text: None)
    payload["model"]["layers.0.weight"] = torch.zeros(3, 3)
    save_checkpoint(path, payload, 6)


def with_nan(path, good):
    payload = load_checkpoint(good, lambda text: None)
    payload["model"]["layers.0.weight"][0, 0] = math.nan
    save_checkpoint(path, payload, 6)


@pytest.mark.parametrize("damage", [truncated, of_text, empty, a_folder, with_state, with_another_shape, with_nan])
def test_continuing_a_bad_file_leaves_nothing_behind(config, tmp_path, good, damage):
    bad, results = tmp_path / "bad.pt", tmp_path / "results"
    damage(bad, good)
    result = CliRunner().invoke(main, ["continue", str(bad), "--results-dir", str(results)])
    assert (result.exit_code, len(result.stderr.splitlines()[-1]) > 20) == (1, True)
    assert "Traceback" not in result.stderr
    assert not results.exists() or not list(results.iterdir())
    run = nl.find_run(good, results_dir=results)
    assert nl.train(run.requested, max_steps=8, data=config.data.data, progress=Quiet()).record.step == 8


# --- before training begins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["prepare", "settle_execution", "fresh"])
def test_an_interrupt_before_training_is_one_line(config, moment, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    from newllm_lib.model.newllm import NewLLM
    from newllm_lib.runs import folder
    from newllm_lib.training import setup

    where = {"prepare": (setup, moment), "settle_execution": (folder, moment), "fresh": (NewLLM, moment)}[moment]
    arguments = tiny_command(config, steps=6)[3:]
    with monkeypatch.context() as patch:
        patch.setattr(*where, interrupt)
        result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "interrupted\n")
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert (result.exit_code, json.loads(result.stdout)["status"]) == (0, "finished")


@pytest.mark.slow
def test_an_interrupt_in_a_real_process_while_it_loads(config, tmp_path):
    process = subprocess.Popen(tiny_command(config), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    place, end = tmp_path / "results" / ".r.lock", time.monotonic() + 100
    while not place.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (1, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("interrupted")
    assert nl.train(config, progress=Quiet()).record.status == "finished"
    assert os.path.exists(config.results_dir)
