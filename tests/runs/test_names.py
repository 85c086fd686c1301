"""Runs and texts of any name: trained and shown, or refused before anything is written."""

import json
import pwd
from pathlib import Path

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from tiny import Quiet, tiny_config, write_text

import newllm_lib as nl
from newllm_lib.cli import main
from newllm_lib.data.dataset import cache_folder

LONGEST = "a$b$ {c $_{ \u5c0f\u8aac ".ljust(216, "n")  # 220 bytes


def test_a_run_and_a_text_of_any_name_train_and_are_shown_as_they_are(tmp_path, monkeypatch):
    name = LONGEST
    monkeypatch.chdir(tmp_path)
    write_text(Path("text"))
    Path("text/train.txt").rename(f"{name}.txt")
    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda figure, text, **options: titles.append((figure, text)))
    run = nl.train(tiny_config(f"{name}.txt", name=name, max_steps=2), progress=Quiet())
    assert run.folder == Path("results", name)
    assert nl.open_bundle(nl.bundle(run), "opened").folder == Path("opened", name)
    assert run.record["data"]["name"] == name
    (figure, title), *_ = titles
    text = figure.text(0, 0, title)
    figure.canvas.draw()
    assert text._preprocess_math(title) == (f"{name}  ({name}, {run.record['parameters']:,} parameters)", False)


@pytest.mark.parametrize("name", [LONGEST + "n", "a\nb", "a\0b", "\x1b[31m"])
def test_a_name_that_cannot_be_is_refused_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_text(Path("text"))
    refused = CliRunner().invoke(main, ["train", "quickstart", "--data", "text", "--name", name])
    assert refused.exit_code == 2
    assert "must be a plain folder name of at most 220 bytes" in refused.output
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_tilde_is_the_home_in_every_place_that_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    (tmp_path / "mirror").mkdir()
    config = tiny_config("~/text", results_dir="~/runs", mirror_dir="~/mirror", name="one", max_steps=2)
    run = nl.train(config, progress=Quiet())
    assert (run.folder, (tmp_path / "mirror" / "one" / "run.json").is_file()) == (tmp_path / "runs" / "one", True)
    nl.export("~/runs/one", "~/exported")
    assert nl.evaluate("~/exported", "~/text") == nl.evaluate("~/runs/one")
    nl.bundle("~/runs/one", "~/one.zip")
    assert nl.open_bundle("~/one.zip", "~/opened").folder == tmp_path / "opened" / "one"
    assert nl.find_run("one", results_dir="~/opened", mirror_dir="~/mirror").folder.name == "one"
    nl.compare(["~/runs/one", "~/opened/one"], out="~/compared")
    found = nl.lr_find(config, steps=10, low=1e-4, high=1e-3)
    assert found.write("~/found") == tmp_path / "found"
    monkeypatch.setenv("NEWLLM_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"
    assert not (tmp_path / "~").exists()
    assert (
        json.loads((tmp_path / "runs" / "one" / "run.json").read_text())["config"]["results_dir"] == f"{tmp_path}/runs"
    )


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "NEWLLM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()  # the control
    assert cache_folder().name.startswith("newllm_lib-")
    assert cache_folder().is_absolute()
