"""The command as a shell sees it: what it prints, its exit status, and what it says about bad input."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from tiny import RECIPE, SHAPE, write_text

from newllm_lib.cli import main
from newllm_lib.config import ModelConfig, flat_fields
from newllm_lib.config.presets import PRESETS
from newllm_lib.data.tokenizer import WordTokenizer
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.pretrained import export_model


def options(**values) -> list[str]:
    return [part for key, value in values.items() for part in ("--" + key.replace("_", "-"), str(value))]


TINY = options(**SHAPE, **RECIPE | {"init_std": "none"})


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text")


@pytest.fixture
def newllm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return call


@pytest.fixture
def trained(newllm, text):
    result = newllm("train", "quickstart", "--data", text, *TINY, "--max-steps", 6, "--name", "small")
    assert result.exit_code == 0, result.output
    return result


def test_training_prints_the_table_and_where_everything_is(trained):
    assert "small: finished" in trained.stdout
    assert "perplexity  accuracy  validation loss" in trained.stdout
    assert "best validation perplexity" in trained.stdout
    files = "report.md, curves.png, history.csv, run.json, model/, checkpoints/"
    assert f"written to results/small/: {files}" in trained.stdout
    assert "precision  fp32: as requested" in trained.stderr
    assert "published" not in trained.stdout  # this text is not the one the published figures are for


def test_results_as_json_go_to_standard_output_alone(newllm, text):
    result = newllm("train", "quickstart", "--data", text, *TINY, "--max-steps", 3, "--json")
    assert json.loads(result.stdout)["status"] == "finished"


def test_a_second_call_says_that_the_run_is_finished(newllm, text, trained):
    again = newllm("train", "quickstart", "--data", text, *TINY, "--max-steps", 6, "--name", "small")
    assert again.exit_code == 0
    assert "this run has already finished" in again.stderr
    assert "to start over, pass fresh=True (--fresh)" in again.stderr
    assert again.stdout == trained.stdout


@pytest.mark.slow
def test_a_run_goes_on_to_a_new_total_from_its_folder_its_name_or_as_the_newest(newllm, trained):
    for place, steps in ((["results/small"], 7), (["small"], 8), ([], 9)):
        more = newllm("continue", *place, "--max-steps", steps, "--json")
        assert more.exit_code == 0, more.output
        record = json.loads(more.stdout)
        assert (record["run"], record["step"], record["status"]) == ("small", steps, "finished")
        assert record["config"]["train"]["decay_steps"] == steps  # a cosine gets the new end
    assert "small: finished" in newllm("continue", "small").stdout  # to its own end, which it has reached
    plan = json.loads(newllm("continue", "small", "--epochs", 5, "--plan", "--json").stdout)
    assert "5.00 epochs" in plan["steps"]


def test_a_bundle_goes_on_and_its_hash_is_checked(newllm, trained, tmp_path):
    assert newllm("bundle", "results/small", "--checkpoint", "--out", "small.zip").exit_code == 0
    digest = hashlib.sha256((tmp_path / "small.zip").read_bytes()).hexdigest()
    there = ("--results-dir", "there")
    unnamed = newllm("continue", "small.zip", "--sha256", digest, "--max-steps", 8, "--results-dir", "unnamed")
    assert (unnamed.exit_code, unnamed.stdout) == (FAILED, "")
    assert "Pass where it is on this one: data=... (in the shell --data" in unnamed.stderr
    text = json.loads((tmp_path / "results" / "small" / "run.json").read_text())["config"]["data"]["data"]
    more = newllm("continue", "small.zip", "--sha256", digest, "--max-steps", 8, *there, "--json", "--data", text)
    assert json.loads(more.stdout)["step"] == 8
    assert (tmp_path / "there" / "small" / "model" / "model.safetensors").is_file()
    other = newllm("continue", "small.zip", "--sha256", "0" * 64, "--results-dir", "elsewhere")
    assert (other.exit_code, other.stdout) == (FAILED, "")
    assert "small.zip: sha256 mismatch: expected " in other.stderr
    assert not (tmp_path / "elsewhere").exists()


def test_what_cannot_be_continued_is_one_message(newllm, trained, tmp_path):
    for arguments, status, message in (
        (["--results-dir", "empty"], FAILED, "empty: holds no run that could be continued; name a place"),
        (["small", "--epochs", 1, "--max-steps", 9], FAILED, "give the new total as one of them"),
        (["small", "--max-steps", 2], FAILED, "max_steps = 2: small has already trained 6 steps"),
        (["nowhere"], FAILED, "'nowhere': must be a file on this machine, the id of a file on Google Drive"),
        (["small", "--dropout", 0.5], USAGE, "No such option"),
    ):
        result = newllm("continue", *arguments)
        assert (result.exit_code, result.stdout) == (status, "")
        assert message in result.stderr


def test_a_plan_trains_nothing(newllm, text, tmp_path):
    result = newllm("train", "cpu_baseline", "--data", text, "--batch-size", 8, "--plan")
    assert result.exit_code == 0
    for words in ("parameters", "steps", "rate  0.0001: 0.0001 at batch 32", "memory", "precision  fp32"):
        assert words in result.stdout
    as_json = newllm("train", "cpu_baseline", "--data", text, "--batch-size", 8, "--plan", "--json")
    assert json.loads(as_json.stdout)["engine"]
    assert not (tmp_path / "results").exists()


def test_every_field_has_an_option_and_the_help_says_what_it_takes(newllm):
    text = newllm("train", "--help").stdout
    for name in flat_fields():
        if name != "preset":
            assert "--" + name.replace("_", "-") in text
    assert "[at least 0 and below 1]" in " ".join(text.split())
    for title in ("Run:", "Data:", "Model:", "Recipe and machine:"):
        assert title in text


def test_presets_are_listed_with_their_rates(newllm):
    text = newllm("presets").stdout
    assert all(name in text for name in PRESETS)
    assert "rate 0.0008: 0.0001 at batch 32, sqrt rule to batch 2048" in text
    assert json.loads(newllm("presets", "--json").stdout)["l4_5_layers"]["model"]["num_layers"] == 5


def test_evaluate_prints_scores_of_a_split(newllm, trained):
    result = newllm("evaluate", "results/small")
    assert "validation split:" in result.stdout
    assert "perplexity" in result.stdout
    scores = json.loads(newllm("evaluate", "results/small", "--split", "train", "--json").stdout)
    assert scores["tokens"] > 300
    missing = newllm("evaluate", "results/small", "--split", "test")
    assert missing.exit_code == 1
    assert "Error: split 'test': the data text has train, validation" in missing.stderr


def test_generate_writes_text(newllm, trained):
    first = newllm("generate", "results/small", "--prompt", "w1 w2", "--seed", 4, "--tokens", 9)
    assert first.stdout.startswith("w1 w2 ")
    assert (
        first.stdout
        == newllm("generate", "results/small/model", "--prompt", "w1 w2", "--seed", 4, "--tokens", 9).stdout
    )
    several = json.loads(newllm("generate", "results/small", "--samples", 3, "--seed", 1, "--json").stdout)
    assert len({text["text"] for text in several}) == 3
    assert all(len(text["tokens"]) == len(text["log_probs"]) for text in several)


def test_generate_reads_prompts_from_a_file_and_stops_where_told(newllm, trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("w1 w2\nw3\n")
    many = newllm("generate", "results/small", "--prompts", tmp_path / "prompts.txt", "--prompt", "w4", "--json")
    assert [text["prompt"] for text in json.loads(many.stdout)] == ["w4", "w1 w2", "w3"]
    stopped = newllm(
        "generate", "results/small", "--prompt", "w1", "--stop", " ", "--samples", "8", "--seed", "1", "--json"
    )
    texts = [text for text in json.loads(stopped.stdout) if text["ended_by"] != "end of text"]  # drawn at once
    assert texts
    for text in texts:
        assert {**text, "tokens": [], "log_probs": []} == {
            "prompt": "w1", "text": "", "tokens": [], "log_probs": [], "ended_by": "stop",
        }  # fmt: skip


def test_prompts_are_the_lines_of_a_file_however_it_was_saved(newllm, trained, tmp_path):
    arguments = ["generate", "results/small", "--tokens", "2", "--json", "--prompts"]
    for raw in (b"\xef\xbb\xbfw1 w2\r\n\r\nw3 \r\n\r\n \r\n", b"w1 w2\n\nw3 ", b"w1 w2\r\rw3 \r"):
        (tmp_path / "prompts.txt").write_bytes(raw)
        many = newllm(*arguments, "prompts.txt")
        assert [text["prompt"] for text in json.loads(many.stdout)] == ["w1 w2", "", "w3"]  # a blank one begins a text
        piped = CliRunner().invoke(main, [*arguments, "-"], input=raw)
        assert [text["prompt"] for text in json.loads(piped.stdout)] == ["w1 w2", "", "w3"]
    (tmp_path / "my prompts.txt").write_bytes("w1\nder gr\xf6\xdfte H\xfcgel\n".encode("latin1"))
    refused = newllm(*arguments, "my prompts.txt")
    assert refused.exit_code == FAILED
    assert refused.stderr == (
        "Error: --prompts my prompts.txt: not UTF-8 at byte 9 (line 2); it is probably CP1252 (Western European); "
        "convert it: iconv -f CP1252 -t UTF-8 -- 'my prompts.txt' > NEW.txt\n"
    )


def test_interactive_carries_the_text_on(newllm, trained):
    arguments = ["generate", "results/small", "--interactive", "--temperature", "0", "--tokens", "4"]
    result = CliRunner().invoke(main, arguments, input="w1 w2\n\n/new\nw1 w2\n")
    assert result.exit_code == 0, result.output
    first, second, third = result.stdout.rstrip("\n").split("\n")
    assert (first, len(first.split()), len(second.split())) == (third, 4, 4)
    whole = newllm("generate", "results/small", "--prompt", "w1 w2", "--temperature", 0, "--tokens", 8)
    assert "w1 w2" + first + second == whole.stdout.rstrip("\n")
    refused = newllm("generate", "results/small", "--interactive", "--json")
    assert refused.exit_code == USAGE


def test_a_model_folder_alone_writes_text_and_needs_data_to_be_scored(newllm, tmp_path):
    export_model(tmp_path / "model", NewLLM(ModelConfig(vocab_size=6, hidden_dim=8)), WordTokenizer(["w1", "w2"]))
    known = newllm("generate", "model", "--prompt", "w1 W2", "--tokens", 3)
    assert (known.exit_code, known.stderr) == (0, "")
    unknown = newllm("generate", "model", "--prompt", "w1 other", "--tokens", 3)
    assert unknown.stderr == "warning: words of the prompt are not in the vocabulary and are read as <UNK>\n"
    assert unknown.stdout.startswith("w1 <UNK>")
    scored = newllm("evaluate", "model")
    assert scored.exit_code == FAILED
    assert "model: a model alone does not know its text: say which with data= (in the shell --data)" in scored.stderr


def test_values_in_the_shell_reach_their_fields(newllm, text):
    result = newllm(
        "train", "cpu_baseline", "--data", text, *TINY, "--clip-by-epoch", "0:0.25,1:2", "--patience", "none",
        "--scale-lr-by-model-size", "--max-steps", 2, "--json",
    )  # fmt: skip
    train = json.loads(result.stdout)["config"]["train"]
    assert train["clip_by_epoch"] == [[0, 0.25], [1, 2.0]]
    assert train["patience"] is None
    assert train["scale_lr_by_model_size"] is True


def test_several_files_are_given_by_repeating_the_option(newllm, text):
    both = ("--data", text / "train.txt", "--data", text / "valid.txt")
    result = newllm("train", "quickstart", *both, *TINY, "--max-steps", 1, "--json")
    assert json.loads(result.stdout)["data"]["name"] == "train+1"


# --- bad input: one message, what is wrong, what would be right, nothing written -----------------------------------

USAGE, FAILED = 2, 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["quickstrat"], USAGE, "unknown preset 'quickstrat'. Did you mean 'quickstart'? Presets: quickstart, auto"),
        (["--lr", "-1"], USAGE, "lr = -1.0: must be above 0 and at most 100, or none"),
        (["--lr", "fast"], USAGE, "Invalid value for '--lr': 'fast': must be above 0 and at most 100, or none"),
        (["--vocab-size", "4"], USAGE, "vocab_size = 4: must be a whole number from 5 to 1,000,000"),
        (["--batch-sizes", "4"], USAGE, "No such option '--batch-sizes'. (Did you mean one of"),
        (["--optimizer", "sgd"], USAGE, "optimizer = 'sgd': must be one of adam, adamw, muon"),
        (["--clip-by-epoch", "5:1"], USAGE, "clip_by_epoch = ((5, 1.0),): must be (epoch, norm) pairs"),
        (["--name", "a/b"], USAGE, "name = 'a/b': must be a plain folder name"),
        (["--batch-size", "5000"], FAILED, "batch_size = 5000: must be at most 62, the number of training"),
        (["--device", "cuda:7"], FAILED, "device = 'cuda:7': must be auto, cpu"),
        (["--engine", "warp"], FAILED, "engine = 'warp': must be auto or one of reference"),
        (["--min-words", "500"], FAILED, "no text of the train split has 500 words or more"),
    ],
)
def test_bad_options(newllm, text, tmp_path, arguments, status, message):
    preset = [] if arguments[0] == "quickstrat" else ["quickstart"]
    result = newllm("train", *preset, "--data", text, *TINY, *arguments)
    assert result.exit_code == status, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "x", "--precision", "fp8"], "'fp8' is not one of 'auto', 'fp32', 'bf16', 'fp16'"),
        (["generate", "x", "--samples", "0"], "Invalid value for '--samples': 0 is not in the range x>=1"),
    ],
)
def test_wrong_usage_of_a_trained_model(newllm, arguments, message):
    result = newllm(*arguments)
    assert result.exit_code == USAGE
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt: the file is empty; it must hold at least one non-blank line"),
        ("binary.txt", b"\x00\x01\x02" * 50, "binary.txt: holds NUL bytes, so it is a binary file; give UTF-8 text"),
        ("latin.txt", b"caf\xe9 au lait\n" * 9, "latin.txt: not UTF-8 at byte 3 (line 1)"),
        (None, None, "missing: no such folder, file or pattern. Give a folder with train.txt and valid.txt"),
    ],
)
def test_bad_text(newllm, tmp_path, name, content, message):
    path = tmp_path / (name or "missing")
    if content is not None:
        path.write_bytes(content)
    result = newllm("train", "quickstart", "--data", path)
    assert result.exit_code == FAILED
    assert message in result.stderr
    assert not (tmp_path / "results").exists()


def test_a_truncated_checkpoint_given_by_path_and_a_run_that_is_not_there(newllm, trained, tmp_path):
    path = tmp_path / "results" / "small" / "checkpoints" / "best_small.pt"
    os.truncate(path, path.stat().st_size // 2)
    result = newllm("generate", path)
    assert result.exit_code == FAILED
    assert "best_small.pt: damaged: sha256 is" in result.stderr
    missing = newllm("evaluate", "results/none")
    assert missing.exit_code == FAILED
    assert "results/none: no such run, model folder or checkpoint" in missing.stderr


def test_a_checkpoint_of_another_vocabulary(newllm, text, trained):
    result = newllm("train", "quickstart", "--data", text, *TINY, "--name", "small", "--vocab-size", 20)
    assert result.exit_code == FAILED
    assert (
        "of a run with other settings: vocab_size 34 there, 20 here. Give another name, or fresh=True" in result.stderr
    )


def test_without_a_network_one_message_names_the_ways_out(newllm, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("newllm_lib.data.corpus._why_no_hub", lambda: "no connection to the hub")
    result = newllm("train", "quickstart", "--data", "wikitext-2")
    assert result.exit_code == FAILED
    assert "set data (in the shell --data) to a folder with train.txt and valid.txt, or to builtin." in result.stderr


# --- a real process -------------------------------------------------------------------------------------------------


def start(text, tmp_path, *more):
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-m",
        "newllm_lib",
        "train",
        "quickstart",
        "--data",
        str(text),
        *TINY,
        "--name",
        "p",
        *more,
    ]
    return subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_ctrl_c_in_a_shell_saves_says_how_to_continue_and_the_same_command_does(text, tmp_path):
    many = ("--max-steps", "4000", "--epochs", "none")
    process = start(text, tmp_path, *many, "--fresh")
    history = tmp_path / "results" / "p" / "history.csv"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (history.exists() and history.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopping after this step, then saving" in errors
    (hint,) = [line for line in errors.splitlines() if line.startswith("interrupted")]
    assert ".pt is saved; to go on: newllm train quickstart --data" in hint
    assert hint.endswith("--max-steps 4000 --epochs none")  # and no --fresh, which would start over
    assert "Traceback" not in errors
    step = json.loads((tmp_path / "results" / "p" / "run.json").read_text())["step"]
    assert 0 < step < 4000
    again = start(text, tmp_path, "--epochs", "none", "--max-steps", str(step + 4), "--decay-steps", "4000")
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0
    assert f"step {step} of {step + 4}" in errors


@pytest.mark.slow
def test_a_killed_process_loses_at_most_the_time_since_its_last_checkpoint(text, tmp_path):
    process = start(text, tmp_path, "--max-steps", "4000", "--epochs", "none", "--checkpoint-every-minutes", "0.001")
    checkpoints = tmp_path / "results" / "p" / "checkpoints"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(checkpoints.glob("p_step_*.pt")):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    found = max(int(path.stem.split("_")[-1]) for path in checkpoints.glob("p_step_*.pt"))
    more = ("--epochs", "none", "--max-steps", str(found + 2), "--decay-steps", "4000")
    again = start(text, tmp_path, *more)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert "continuing p from" in errors
