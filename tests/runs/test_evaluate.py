"""What a score is of: the split that was asked for, read as the run read its own text, wherever its weights lie."""

import glob
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import Quiet, tiny_config, write_text

import newllm_lib as nl
from newllm_lib.cli import main
from newllm_lib.config import DataConfig
from newllm_lib.data import corpus
from newllm_lib.errors import CheckpointError, ConfigError, DataError
from newllm_lib.model.recurrence.self_check import choose_numerics
from newllm_lib.reporting.record import PROTOCOL
from newllm_lib.runs import api
from newllm_lib.system.hardware import Machine


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """A run of a stream, its bundle, and a model exported from it and from its checkpoint; the current folder."""
    place = tmp_path_factory.mktemp("streamed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        config = tiny_config(write_text(Path("text")), name="run", layout="stream", sequence_length=7, eval_lanes=2)
        nl.train(config, progress=Quiet())
        nl.export("results/run", "exported")
        nl.export("results/run/checkpoints/best_run.pt", "from_checkpoint", half=True)
        nl.export("exported", "again")
        nl.load_model("exported").model.save_pretrained("saved")
        nl.open_bundle(nl.bundle("results/run"), "opened")
        yield place


# --- the data protocol goes with the weights ---------------------------------------------------------------------

TARGETS = 195 + 12
"""Words of valid.txt, counted by wc, and the ends of its texts."""
PLACES = ("results/run/model", "exported", "again", "saved", "opened/run/model")


@pytest.mark.parametrize("place", PLACES)
def test_a_model_folder_is_scored_as_its_run_is(streamed, place):
    expected = nl.evaluate("results/run")
    assert nl.evaluate(place, "text") == expected
    assert expected.tokens == TARGETS
    default = nl.evaluate(nl.load(streamed / "results/run").model, "text", tokenizer=nl.load("results/run").tokenizer)
    assert default != expected  # the control: windows of 64 tokens give another score


def test_the_protocol_holds_no_path(streamed):
    values = json.loads((streamed / "from_checkpoint" / PROTOCOL).read_text())
    assert values == {
        "text_unit": "line", "tokenizer": "words", "sentencepiece_model": "bpe", "layout": "stream",
        "sequence_length": 7, "stride": 6, "min_words": 5, "validation_fraction": 0.05, "test_fraction": 0.05,
        "eval_lanes": 2,
    }  # fmt: skip
    for place in PLACES:
        assert json.loads((streamed / place / PROTOCOL).read_text()) == values


def test_an_export_of_before_is_scored_by_the_default_protocol_which_is_said(streamed, tmp_path, capsys):
    old = shutil.copytree("exported", tmp_path / "old")
    (old / PROTOCOL).unlink()
    run = nl.load("results/run")
    by_default = nl.evaluate(run.model, "text", tokenizer=run.tokenizer, config=nl.RunConfig())
    capsys.readouterr()
    assert nl.evaluate(old, "text") == by_default
    assert capsys.readouterr().err == (
        "warning: this model does not say how its text was read (it has no data.json): it is scored by the default "
        "protocol, windows of 64 tokens every 32\n"
    )


def test_a_protocol_from_elsewhere_names_no_place_and_a_damaged_one_is_named(streamed, tmp_path):
    other = shutil.copytree("exported", tmp_path / "other")
    (other / PROTOCOL).write_text(json.dumps({"data": "/etc/passwd", "layout": "stream"}))
    assert nl.load_model(other).protocol == DataConfig(layout="stream")
    for damage in ("{", "[]", '{"layout": "rows"}', '{"unknown": 1}'):
        (other / PROTOCOL).write_text(damage)
        with pytest.raises(CheckpointError, match=r"data\.json: not a data protocol that can be read"):
            nl.load_model(other)


# --- which text --------------------------------------------------------------------------------------------------


def test_a_whole_text_is_scored_however_it_comes(streamed, tmp_path, capsys):
    words, texts = Path("text/valid.txt").read_text(), tmp_path / "texts"
    texts.mkdir()
    (texts / "test.txt").write_text(words)
    (tmp_path / "one.txt").write_text(words)
    expected = nl.evaluate("results/run")
    for source, split in ((texts, "test"), (texts, "all"), (tmp_path / "one.txt", "all")):
        assert nl.evaluate("results/run", str(source), split=split) == expected
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    assert nl.evaluate("results/run", str(tmp_path / "short.txt"), split="all").tokens == 4
    (tmp_path / "table.csv").write_text("text\nw1 w2\n")
    capsys.readouterr()
    assert nl.evaluate("results/run", str(tmp_path / "table.csv"), split="all").tokens == 5
    assert capsys.readouterr().err.startswith("warning: table.csv is a table (CSV), and is read as plain text")
    both = nl.evaluate("results/run", split="all").tokens
    assert both == nl.evaluate("results/run", split="train").tokens + expected.tokens
    with pytest.raises(DataError, match="too few for train, validation and test"):
        nl.evaluate("results/run", str(tmp_path / "short.txt"))
    with pytest.raises(ConfigError, match="split = 'tets': must be one of train, validation, test, all"):
        nl.evaluate("results/run", split="tets")


def test_the_shell_scores_a_whole_text(streamed):
    arguments = ["evaluate", "results/run", "--data", "text/valid.txt", "--split", "all"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"results/run, whole text: {TARGETS} targets, ")


def test_a_run_that_read_files_twice_is_told_why_its_text_is_another(tmp_path, monkeypatch):
    write_text(tmp_path / "texts")
    (tmp_path / "more").symlink_to("texts")
    config = tiny_config(f"{tmp_path}/**/*.txt", results_dir=str(tmp_path / "results"), name="old", max_steps=2)
    with monkeypatch.context() as patch:
        found = [Path(name) for name in sorted(glob.glob(config.data.data, recursive=True))]
        patch.setattr(corpus, "real_files", lambda sources: (found, 0))  # as earlier versions read
        nl.train(config, progress=Quiet())
    cause = "2 paths that lead, through links, to files that are in the data already are left out now; earlier versions"
    with pytest.raises(CheckpointError, match=f"the data have changed since this checkpoint: .*{cause}"):
        nl.train(config.replace(max_steps=3), progress=Quiet())
    with pytest.raises(DataError, match=f"the text has changed since the run was trained. {cause}"):
        nl.evaluate(tmp_path / "results" / "old")


# --- the device ---------------------------------------------------------------------------------------------------


def test_a_run_is_scored_on_the_device_and_a_passed_model_where_it_lies(streamed, monkeypatch):
    places = []
    copied_to = api.copied_to

    def recorded(model, place):
        places.append(place)
        return copied_to(model, "cpu")

    monkeypatch.setattr(api, "copied_to", recorded)
    monkeypatch.setattr(api, "choose_numerics", lambda place, precision: choose_numerics("cpu", precision))
    monkeypatch.setattr(api, "detect", lambda device: Machine(device={"auto": "cuda:1"}.get(device, device), name="x"))
    run = nl.load("results/run")
    on_gpu, on_cpu = nl.evaluate(run), nl.evaluate(run, device="cpu")
    passed = nl.evaluate(run.model, tokenizer=run.tokenizer, config=run.config)
    assert places == ["cuda:1", "cpu", "cpu"]
    assert on_gpu == on_cpu == passed
    assert run.model.device.type == "cpu"


def test_the_command_takes_a_device(streamed):
    refused = CliRunner().invoke(main, ["evaluate", "results/run", "--device", "cuda:9"])
    assert refused.exit_code != 0 and "device = 'cuda:9': must be auto, cpu" in refused.stderr
