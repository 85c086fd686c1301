"""Continuing a run that cannot be written to, as an input on Kaggle: a copy of it goes on."""

import os
import shutil

import pytest
from tiny import Quiet, tiny_config

import newllm_lib as nl
from newllm_lib.errors import FileTakenError


@pytest.fixture
def fixed(text, tmp_path, monkeypatch):
    """A run's folder that the system says is read-only; the administrator of this machine could write anywhere."""
    config = tiny_config(text, name="r", results_dir=str(tmp_path / "input"), epochs=None, max_steps=3)
    folder = nl.train(config, progress=Quiet()).folder
    (tmp_path / "input" / ".r.lock").unlink()
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).startswith(str(tmp_path / "input")) and real(path, mode)
    )
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_cannot_be_written_to_goes_on_as_a_copy(fixed, tmp_path):
    before, said = contents(fixed.parent), []
    run = nl.find_run(fixed, results_dir=tmp_path / "results", tell=said.append)
    assert (run.folder, said) == (
        tmp_path / "results" / "r",
        [f"{fixed}: cannot be written to; continuing a copy of it, {tmp_path}/results/r"],
    )
    longer = nl.train(nl.extended(run, max_steps=6), progress=Quiet())
    assert (longer.folder, longer.record.step) == (run.folder, 6)
    again = nl.find_run(fixed, results_dir=tmp_path / "results", tell=said.append)
    assert said[1] == f"{fixed}: cannot be written to; continuing its copy {tmp_path}/results/r"
    assert again.record.step == 6
    assert contents(fixed.parent) == before
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [".r.lock", "r"]


def test_the_copy_goes_to_results_where_its_own_place_is_read_only_too(fixed, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    run = nl.find_run("r", results_dir=fixed.parent, tell=lambda text: None)
    assert run.folder.resolve() == tmp_path / "work" / "results" / "r"


def test_another_run_of_that_name_is_not_replaced(fixed, tmp_path, text):
    config = tiny_config(text, name="r", results_dir=str(tmp_path / "results"), max_steps=2, epochs=None, seed=9)
    other = nl.train(config, progress=Quiet())
    before = contents(other.folder)
    with pytest.raises(FileTakenError, match="is another run"):
        nl.find_run(fixed, results_dir=tmp_path / "results", tell=lambda text: None)
    assert contents(other.folder) == before


def test_a_folder_that_can_be_written_to_is_used_itself(text, tmp_path):
    config = tiny_config(text, name="r", results_dir=str(tmp_path / "here"), epochs=None, max_steps=3)
    folder = nl.train(config, progress=Quiet()).folder
    assert nl.find_run(folder, results_dir=tmp_path / "results").folder == folder
    shutil.rmtree(folder)
