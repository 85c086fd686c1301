"""Runs found in folders, bundles and patterns, and their models beside each other."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import tiny_config, write_text

import newllm_lib as nl
from newllm_lib.errors import BundleError
from newllm_lib.reporting.progress import Progress


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """results/one and results/two, and a bundle of each outside of it."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        text = write_text(Path("text"))
        for name, seed in (("one", 1), ("two", 2)):
            run = nl.train(tiny_config(text, name=name, seed=seed, epochs=1), progress=Progress())
            nl.bundle(run, f"{name}.zip")
    return place


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "copy"))


def names(runs):
    return [str(run.folder) for run in runs]


def test_folders_bundles_and_patterns_each_once(here):
    assert names(nl.gather("results/two")) == ["results/two"]
    assert names(nl.gather(["results/two", "results/*", "*.zip"])) == ["results/two", "results/one"]
    assert names(nl.gather("*.zip", results_dir="opened")) == ["opened/one", "opened/two"]
    assert names(nl.gather(["nothing/*"])) == []


def test_what_a_pattern_finds_beside_runs_is_left_out_with_the_reason(here):
    said = []
    Path("odd.zip").write_bytes(b"no zip file")
    Path("results/notes").mkdir()
    Path("results/two/run.json").write_text(json.dumps(nl.load("results/two").record | {"best": None}))
    assert names(nl.gather(["results/*", "odd*"], report=said.append)) == ["results/one"]
    assert len(said) == 2
    assert said[0] == "left out: results/two: has no validation behind it yet"
    assert said[1].startswith("left out: odd.zip: not a readable zip file")


def test_what_is_named_must_be_a_run(here):
    Path("odd.zip").write_bytes(b"no zip file")
    with pytest.raises(BundleError, match=r"odd\.zip"):
        nl.gather("odd.zip")
    with pytest.raises(FileNotFoundError, match="results/three: no run's folder and no bundle"):
        nl.gather(["results/one", "results/three"])


def test_a_bundle_whose_name_is_taken_gets_a_free_one(here):
    shutil.rmtree("results/two")
    shutil.copytree("results/one", "results/two")  # another run of that name
    Path("results/two-2").mkdir()  # taken as well
    for _ in range(2):  # the second time it is there already
        said = []
        assert names(nl.gather(["results/two", "two.zip"], report=said.append)) == ["results/two", "results/two-3"]
        assert len(said) == 1
        assert said[0].startswith("two.zip: opened as results/two-3, because results/two: is there already, with anoth")
    assert nl.load("results/two").record["identity"] == nl.load("results/one").record["identity"]


def test_a_bundle_of_an_earlier_state_is_left_out_and_one_of_a_later_state_is_not(here):
    first = nl.load("results/two")
    longer = nl.train(nl.extended(first, epochs=2), progress=Progress())
    said = []
    assert names(nl.gather(["results/*", "*.zip"], report=said.append)) == ["results/one", "results/two"]
    steps = (first.record["step"], longer.record["step"])
    assert said == ["two.zip: holds step {} of results/two, which is at {}: left out".format(*steps)]
    nl.bundle(longer, "two.zip")
    shutil.rmtree("results/two")
    shutil.copytree(shutil.copytree("../copy/results/one", "kept"), "results/two")
    record = json.loads(Path("results/two/run.json").read_text())
    Path("results/two/run.json").write_text(json.dumps(record | {"identity": longer.record["identity"]}))
    assert names(nl.gather(["results/two", "two.zip"], report=said.append)) == ["results/two", "results/two-2"]


def test_a_run_and_its_copy_count_once_as_the_one_that_is_further(here):
    shutil.copytree("results", "drive")
    assert names(nl.gather(["results/*", "drive/*"])) == ["results/one", "results/two"]
    behind = nl.load("results/one").record
    Path("results/one/run.json").write_text(json.dumps(behind | {"step": behind["step"] - 1}))
    assert names(nl.gather(["results/*", "drive/*"])) == ["drive/one", "results/two"]
    Path("drive/two/run.json").write_text(json.dumps(nl.load("drive/two").record | {"identity": "another"}))
    assert names(nl.gather(["results/*", "drive/*"])) == ["drive/one", "results/two", "drive/two"]


def test_the_same_prompts_by_every_model(here):
    runs = nl.gather("results/*")
    frame = nl.side_by_side(runs, ["w1 w2", "w3"], seed=3, max_new_tokens=5)
    assert (list(frame.columns), list(frame.index)) == (["one", "two"], ["w1 w2", "w3"])
    for run in runs:
        expected = nl.generate_texts(run.model, run.tokenizer, ["w1 w2", "w3"], 3, max_new_tokens=5)
        assert list(frame[run.folder.name]) == [text.prompt + text.text for text in expected]
    assert list(frame["one"]) != list(frame["two"])


def test_models_of_one_name_are_told_apart_by_their_folders(here):
    shutil.copytree("results/one", "other/one")
    frame = nl.side_by_side([nl.load("results/one"), nl.load("other/one")], ["w1"], max_new_tokens=2)
    assert list(frame.columns) == ["results/one", "other/one"]


@pytest.mark.parametrize(("runs", "prompts"), [([], ["w1"]), (["results/one"], []), (["results/one"], "w1")])
def test_nothing_to_put_side_by_side(here, runs, prompts):
    with pytest.raises(ValueError, match="at least one run and a list of at least one prompt"):
        nl.side_by_side([nl.load(run) for run in runs], prompts)
