"""Runs as users call them from Python: the folder they leave, continuing, comparing with what was published."""

import csv
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny import RECIPE, SHAPE, Quiet, StopAt, result_of, same, tiny_config, write_text

import newllm_lib as nl
from newllm_lib import runs
from newllm_lib.config import published
from newllm_lib.errors import CheckpointError, TrainingError
from newllm_lib.model.pretrained import export_model
from newllm_lib.reporting import report
from newllm_lib.reporting.record import HISTORY_COLUMNS
from newllm_lib.runs import launch, recorder
from newllm_lib.runs.recorder import Recorder
from newllm_lib.system.hardware import Machine
from newllm_lib.training import setup as setups
from newllm_lib.training.checkpoint import load_checkpoint, save_checkpoint
from newllm_lib.training.estimates import Speed
from newllm_lib.training.trainer import Trainer


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text")


@pytest.fixture
def config(text, tmp_path):
    return tiny_config(text, results_dir=str(tmp_path / "results"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the text and the results of a finished run, to be copied."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        nl.train(tiny_config(write_text(Path("text")), name="done"), progress=Quiet())
    return place


@pytest.fixture
def done(finished, tmp_path, monkeypatch):
    """The configuration of a finished run whose text and folder, results/done, are in the current folder."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "copy"))
    return tiny_config("text", name="done")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_the_files_of_the_design(config):
    run = nl.train(config, progress=Quiet())
    left = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    name = run.folder.name
    assert name.startswith("tiny-")
    assert len(name) == len("tiny-") + 6
    assert left == {
        "run.json", "history.csv", "curves.png", "report.md", "model/model.safetensors", "model/config.json",
        "model/tokenizer.json", "model/data.json", f"checkpoints/best_{name}.pt", f"checkpoints/best_{name}.pt.json",
        f"checkpoints/{name}_final.pt", f"checkpoints/{name}_final.pt.json",
    }  # fmt: skip
    assert (run.folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_record_and_the_history_agree_with_each_other_and_the_model(config):
    run = nl.load(nl.train(config, progress=Quiet()).folder)
    rows = list(csv.DictReader((run.folder / "history.csv").open()))
    assert tuple(rows[0]) == HISTORY_COLUMNS
    best = min(rows, key=lambda row: float(row["val_loss"]))
    assert run.best["step"] == int(best["step"])
    assert run.record["status"] == "finished"
    assert run.record["peak_memory_bytes"] > 0
    assert run.record["decided"] == {
        "batch_size": 8, "micro_batch_size": None, "precision": "fp32", "engine": "fused", "threads": 1,
        "layout": "packed", "device": "cpu",
    }  # fmt: skip
    assert run.history["val_ppl"].min() == pytest.approx(run.best["val_ppl"])
    assert run.record["parameters"] == sum(p.numel() for p in run.model.parameters())
    assert run.config.model == config.replace(vocab_size=34).model  # 30 words and the special ids
    assert nl.evaluate(run).loss == pytest.approx(run.best["val_loss"], abs=1e-6)
    assert run.record["environment"]["versions"]["torch"] == torch.__version__
    json.loads((run.folder / "run.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity


def test_the_same_settings_continue_and_a_finished_run_says_so(config):
    stop = StopAt(5)
    original = Trainer

    def build(*args):
        stop.trainer = original(*args)
        return stop.trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "Trainer", build)
        run = nl.train(config, progress=stop)
    assert run.record["status"] == "interrupted"
    assert run.record["step"] == 5
    second = Quiet()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "estimate_speed", lambda setup, measure: Speed(10.0, "measured here"))
        run = nl.train(config, progress=second)
    (told,) = (text for text in second.messages if text.startswith("continuing tiny-"))
    assert "step 5 of 16 (epoch 0.62 of 2.00), best PPL so far " in told
    assert told.endswith(", about 1 min 31 s left")  # 11 steps of 82.75 tokens, 10 a second
    assert run.record["status"] == "finished"
    third = Quiet()
    before = (run.folder / "report.md").stat().st_mtime_ns
    nl.train(config, progress=third)
    assert any("already finished" in text for text in third.messages)
    fewer = Quiet()
    nl.train(config, epochs=1, progress=fewer)
    assert any("step 16, which is more than the 8 asked for, best PPL so far" in text for text in fewer.messages)
    assert (run.folder / "report.md").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_moved_slider_makes_a_new_folder_and_more_epochs_do_not(config):
    first = nl.train(config, progress=Quiet())
    other = nl.train(config, lr=1e-3, progress=Quiet())
    longer = nl.train(config, epochs=3, progress=Quiet())
    assert other.folder != first.folder
    assert longer.folder == first.folder
    assert longer.record["step"] == 24


@pytest.mark.slow
def test_fresh_starts_over_and_keeps_the_old_folder(config):
    first = nl.train(config, progress=Quiet())
    again = nl.train(config, fresh=True, progress=Quiet())
    assert again.folder == first.folder
    kept = first.folder.with_name(first.folder.name + ".old-1")
    assert nl.load(kept).best["val_loss"] == again.best["val_loss"]


@pytest.mark.slow
def test_a_named_folder_of_another_run_is_refused_and_unchanged(config, text):
    run = nl.train(config, name="mine", progress=Quiet())
    before = contents(run.folder)
    with pytest.raises(CheckpointError, match="of a run with other settings: batch_size 8 there, 4 here"):
        nl.train(config, name="mine", batch_size=4, progress=Quiet())
    with pytest.raises(CheckpointError, match="vocab_size 34 there, 20 here"):
        nl.train(config, name="mine", vocab_size=20, progress=Quiet())
    (text / "train.txt").write_text((text / "train.txt").read_text() + "one more line of text\n")
    with pytest.raises(CheckpointError, match="the data have changed since this checkpoint"):
        nl.train(config, name="mine", progress=Quiet())
    assert contents(run.folder) == before


def test_the_same_text_in_another_place_is_the_same_run(config, text, tmp_path):
    first = nl.train(config, progress=Quiet())
    moved = text.rename(tmp_path / "elsewhere")
    again = nl.train(config, data=str(moved), progress=Quiet())
    assert again.folder == first.folder


@pytest.mark.slow
def test_the_decisions_of_another_run_of_that_name_are_not_taken_over(config, text):
    """Neither where it has saved nothing, and is replaced, nor where it has, and is refused for what differs."""
    run = nl.train(config.replace(name="other", epochs=None, max_steps=1), progress=Quiet())
    record = json.loads((run.folder / "run.json").read_text())
    record["decided"] |= {"batch_size": 1000, "micro_batch_size": 3, "precision": "fp16"}
    (run.folder / "run.json").write_text(json.dumps(record))
    changed = config.replace(name="other", seed=7)
    with pytest.raises(CheckpointError, match="of a run with other settings: seed 42 there, 7 here"):
        nl.train(changed, progress=Quiet())
    assert nl.plan(changed)[0].config.train.batch_size == config.train.batch_size
    shutil.rmtree(run.folder / "checkpoints")
    with pytest.raises(CheckpointError, match=r"the checkpoints of this run are gone \(it was at step 1\)"):
        nl.train(changed, progress=Quiet())
    shutil.rmtree(run.folder / "model")
    found = nl.train(changed, progress=Quiet())
    assert (found.config.train.batch_size, found.config.train.micro_batch_size) == (config.train.batch_size, None)
    assert found.record["decided"]["precision"] == "fp32"


def test_a_run_whose_folder_was_renamed_goes_on_with_its_best(config):
    run = nl.train(config.replace(name="a"), progress=Quiet())
    before = {path.name for path in (run.folder / "checkpoints").iterdir()}
    run.folder.rename(run.folder.with_name("a_b"))
    moved = nl.load(run.folder.with_name("a_b"))
    longer = nl.train(nl.extended(moved, epochs=3, min_delta=99, patience=None), progress=Quiet())
    names = {path.name for path in (longer.folder / "checkpoints").iterdir()}
    assert {"best_a.pt", "a_final.pt", "a_final.pt.json"} <= before
    assert {"best_a_b.pt", "best_a_b.pt.json", "a_b_final.pt", "a_b_final.pt.json"} <= names
    assert not [name for name in names if not name.startswith(("a_b_", "best_a_b."))]
    assert longer.record["run"] == "a_b"
    whole = nl.train(config.replace(name="whole", epochs=3, min_delta=99, patience=None), progress=Quiet())
    assert longer.best["val_loss"] == whole.best["val_loss"]


def test_the_copy_is_finished_even_where_the_report_cannot_be_written(config, tmp_path, monkeypatch):
    (tmp_path / "drive").mkdir()

    def full(self, status, write=Recorder.write):
        if status != "running":
            raise OSError(28, "No space left on device")
        write(self, status)

    monkeypatch.setattr(Recorder, "write", full)
    with pytest.raises(OSError, match="No space left"):
        nl.train(config, name="r", mirror_dir=str(tmp_path / "drive"), progress=Quiet())
    assert list((tmp_path / "drive" / "r" / "checkpoints").glob("*_final.pt"))


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(config):
    run = nl.train(config, checkpoint_every_epochs=1, progress=Quiet())
    final = run.folder / "checkpoints" / f"{run.folder.name}_final.pt"
    best = run.folder / "checkpoints" / f"best_{run.folder.name}.pt"
    os.truncate(final, 1000)
    os.truncate(best, 1000)
    said = Quiet()
    again = nl.train(config, epochs=3, progress=said)
    assert any(str(final) in text and "damaged" in text for text in said.messages)
    assert again.record["step"] == 24


def _cut_all(checkpoints):
    for path in checkpoints.glob("*.pt"):
        os.truncate(path, 1000)


def _of_a_later_version(checkpoints):
    path = checkpoints / "done_final.pt"
    save_checkpoint(path, load_checkpoint(path, pytest.fail) | {"format_version": 2}, step=17)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _cut_all,
            r"results/done/checkpoints: none of its checkpoints can be read; fresh=True .in the shell --fresh. keep",
        ),
        (_of_a_later_version, r"done_final\.pt: format version 2, this library reads up to 1; upgrade it"),
        (
            shutil.rmtree,
            r"the checkpoints of this run are gone \(it was at step 16\), or did not come with it: .*fresh=True",
        ),
    ],
    ids=["unreadable", "newer", "deleted"],
)
@pytest.mark.parametrize("epochs", [2, 3])
def test_a_run_is_not_started_over_where_its_checkpoints_cannot_be_used(done, damage, message, epochs):
    damage(Path("results/done/checkpoints"))
    before = contents(Path("results"))
    with pytest.raises(CheckpointError, match=message):
        nl.train(done, epochs=epochs, progress=Quiet())
    assert contents(Path("results")) == before


def test_a_run_whose_record_was_moved_away_goes_on_from_its_checkpoints(done):
    Path("results/done/run.json").unlink()
    assert nl.train(done, epochs=3, progress=Quiet()).record["step"] == 24


def test_the_model_folder_is_brought_up_to_the_best_checkpoint(config):
    """After a run that ended between saving the best checkpoint and exporting its weights."""
    config, export, calls = config.replace(name="full", validate_every_steps=None), export_model, []

    def full(*args, **options):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        export(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(recorder, "export_model", full)
        nl.train(config, progress=Quiet())
    stale = nl.evaluate(f"{config.results_dir}/full")
    run = nl.train(config, progress=Quiet())
    assert run.best["step"] == 16
    assert nl.evaluate(run).loss == pytest.approx(run.best["val_loss"], abs=1e-6)
    assert stale.loss > run.best["val_loss"] + 0.01  # the control


def test_a_run_a_checkpoint_and_a_model_folder_are_scored(done):
    run = nl.load("results/done")
    expected = pytest.approx(run.best["val_loss"], abs=1e-6)
    for place in (run, run.folder, "results/done/checkpoints/best_done.pt"):
        assert nl.evaluate(place).loss == expected
    alone = run.folder / "model"
    with pytest.raises(ValueError, match=r"done/model: a model alone does not know its text: say which with data="):
        nl.evaluate(alone)
    assert nl.evaluate(alone, "text", config=run.config).loss == expected
    assert nl.evaluate(alone, "text").loss == expected
    assert nl.evaluate(alone, "text", config=nl.RunConfig()).loss != expected  # the control: longer windows
    with pytest.raises(ValueError, match="precision = 'fp8': must be one of auto, fp32, bf16, fp16"):
        nl.evaluate(run, precision="fp8")


def test_a_text_that_has_changed_is_scored_only_when_it_is_named(done):
    Path("text/valid.txt").write_text("w1 w2 w3 w4 w5\n")
    for place in ("results/done", "results/done/checkpoints/best_done.pt"):
        with pytest.raises(ValueError, match="data text: the text has changed since the run was trained"):
            nl.evaluate(place)
        assert nl.evaluate(place, "text").tokens == 6


def test_a_model_and_its_evaluation_on_other_data_and_splits(config, tmp_path):
    run = nl.train(config, progress=Quiet())
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train", "valid", "test"):
        (other / f"{name}.txt").write_text("w1 w2 w3 w4 w5 unseen words here\n" * 3)
    scores = nl.evaluate(run, str(other), split="test")
    assert scores.tokens == 27
    assert scores.unknown_share == pytest.approx(3 / 9)
    with pytest.raises(ValueError, match=r"split 'test': the data text has train, validation"):
        nl.evaluate(run, split="test")
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        nl.evaluate(run.model, str(other))
    by_model = nl.evaluate(run.model, str(other), split="test", tokenizer=run.tokenizer, config=run.config)
    assert by_model == scores


def test_load_model_reads_a_run_a_model_folder_and_a_checkpoint(config):
    run = nl.train(config, progress=Quiet())
    places = [run.folder, run.folder / "model", run.folder / "checkpoints" / f"best_{run.folder.name}.pt"]
    states = [runs.load_model(place)[0].state_dict() for place in places]
    assert same(dict(states[0]), dict(states[1]))
    assert same(dict(states[0]), dict(states[2]))


def test_a_failed_run_says_where_it_stopped_and_keeps_what_it_had(config):
    class Spoil(Quiet):
        def step(self, step, *_rest):
            if step == 5:
                with torch.no_grad():
                    self.trainer.model.output.bias.fill_(float("nan"))

    spoil, original = Spoil(), Trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "Trainer", lambda *args: setattr(spoil, "trainer", original(*args)) or spoil.trainer)
        with pytest.raises(TrainingError, match=r"the loss is nan.* Stopped at step 5; the newest checkpoint is"):
            nl.train(config, name="bad", progress=spoil)
    run = nl.load(f"{config.results_dir}/bad")
    assert run.record["status"] == "failed"
    assert run.best["step"] == 3


class Closed(Quiet):
    def __init__(self):
        super().__init__()
        self.open = True

    def message(self, text):
        super().message(text)
        self.open = True

    def close(self):
        self.open = False


def test_progress_is_closed_however_a_run_ends_or_fails_to_begin(done):
    def fail(_trainer):
        raise KeyboardInterrupt

    shutil.copytree("results/done", "results/broken")
    shutil.rmtree("results/broken/checkpoints")
    for changes, error in (
        ({}, None),  # it has already finished
        ({"name": "other", "epochs": 1}, None),
        ({"name": "other", "epochs": 2, "watch": fail}, KeyboardInterrupt),
        ({"no_such_field": 1}, ValueError),
        ({"data": "nowhere"}, (OSError, ValueError)),
        ({"batch_size": 1000}, ValueError),
        ({"name": "broken"}, CheckpointError),
    ):
        progress = Closed()
        if error is None:
            nl.train(done, progress=progress, **changes)
        else:
            with pytest.raises(error):
                nl.train(done, progress=progress, **changes)
        assert not progress.open, changes


def test_plan_decides_without_training_or_writing(config, tmp_path):
    setup, lines = nl.plan(config)
    text = dict(lines)
    assert setup.total_steps == 16
    assert text["steps"] == "16 (8 an epoch, 2.00 epochs)"
    assert "parameters (2 layers of 12" in text["model"]
    assert text["learning rate"].startswith(
        "0.003: set directly (0.0001 at batch 32, not scaled by the batch would give 0.0001)"
    )
    assert "copy" not in text
    text = dict(nl.plan(config, name="r", mirror_dir=tmp_path / "drive")[1])
    assert text["copy"].startswith(f"{tmp_path / 'drive' / 'r'}: the best, the final and the last two other checkpoint")
    assert not (tmp_path / "results").exists()


def test_a_batch_larger_than_the_data_is_named(config):
    with pytest.raises(ValueError, match=r"batch_size = 63: must be at most 62, the number of training seq"):
        nl.plan(config, batch_size=63)
    with pytest.raises(ValueError, match=r"batch_size = 500: must be at most 56, the number of full s"):
        nl.plan(config, batch_size=500, layout="stream")


def test_a_batch_left_to_the_hardware_is_decided_recorded_and_kept(config):
    first = nl.train(config, batch_size=None, max_steps=1, progress=Quiet())
    assert first.record["decided"]["batch_size"] == 62
    record = json.loads((first.folder / "run.json").read_text())
    record["decided"]["batch_size"] = 16
    (first.folder / "run.json").write_text(json.dumps(record))
    again = nl.train(config, batch_size=None, max_steps=2, progress=Quiet())
    assert (again.folder, again.record["step"]) == (first.folder, 2)
    assert again.config.train.batch_size == again.record["decided"]["batch_size"] == 16


def test_what_was_asked_for_continues_a_run_and_what_was_decided_is_another(config):
    begun = nl.train(config, batch_size=None, name="mine", progress=Quiet())
    assert begun.requested.train.batch_size is None and begun.config.train.batch_size > 0
    longer = nl.train(begun.requested, epochs=3, progress=Quiet())
    assert (longer.folder, longer.record["identity"]) == (begun.folder, begun.record["identity"])
    assert longer.record["step"] > begun.record["step"]
    with pytest.raises(CheckpointError, match="of a run with other settings"):
        nl.train(begun.config, name="mine", epochs=4, progress=Quiet())
    moved = begun.folder.rename(begun.folder.with_name("elsewhere"))
    assert (moved.name, "elsewhere") == ("elsewhere", nl.load(moved).requested.name)


def test_a_record_without_what_was_asked_for_falls_back_to_what_was_decided(done):
    place = Path("results/done/run.json")
    record = json.loads(place.read_text())
    del record["requested"]
    place.write_text(json.dumps(record))
    assert nl.load("results/done").requested == nl.load("results/done").config.replace(name="done")


def test_the_report_without_the_picture(done):
    whole = Path("results/done/report.md").read_text()
    assert whole.count("![curves](curves.png)\n\n") == 1
    assert nl.load("results/done").report == whole.replace("![curves](curves.png)\n\n", "")


def test_a_substituted_precision_is_told_again_when_a_run_goes_on(config, monkeypatch):
    machine = Machine(device="cpu", name="Some CPU", memory_bytes=2**34, cpu_flags=frozenset({"avx512_bf16"}))
    monkeypatch.setattr(setups, "detect", lambda *_args: machine)
    for steps in (1, 2):
        said = Quiet()
        run = nl.train(config, precision="fp16", max_steps=steps, progress=said)
        assert run.record["decided"]["precision"] == "fp32"
    assert any(text.startswith("warning: precision fp32: ") for text in said.messages)


def test_faithful_presets_say_when_they_are_not(text, tmp_path):
    small = SHAPE | RECIPE | {"precision": "fp16", "max_steps": 2, "batch_size": 8, "results_dir": str(tmp_path)}
    said = Quiet()
    run = nl.train("l4_fp16", **small | {"data": str(text)}, progress=said)
    assert run.record["faithful"] is False
    assert "fp16 is not native to" in run.record["faithful_reason"]
    assert "not those of the published protocol" in run.record["faithful_reason"]
    assert any("warning: not faithful" in text for text in said.messages)
    assert nl.train(tiny_config(text, results_dir=str(tmp_path)), progress=Quiet()).record["faithful"] is None


def test_published_figures_stand_only_beside_the_published_protocol(config):
    run = nl.train(config, progress=Quiet())
    assert run.record["published_protocol"] is False
    assert "Not comparable" in (run.folder / "report.md").read_text()


def test_milestones_are_the_first_rows_at_or_below():
    history = [{"val_ppl": ppl, "train_seconds": seconds} for ppl, seconds in ((40, 1), (30.78, 2), (25, 3), (24, 4))]
    reached = [(level, row and row["train_seconds"]) for level, _, row in report.milestones(history)]
    assert reached == [(30.78, 2), (26.03, 3), (23.34, None), (20.60, None)]


@pytest.mark.slow
def test_the_published_protocol_is_recognised_on_wikitext(wikitext):
    setup, _ = nl.plan("quickstart", data=str(wikitext))
    assert setup.validation_split.digest == published.VALIDATION_DIGEST
    assert len(setup.train_split.ids) == 51_026


def test_results_of_a_stopped_run_through_the_public_call_equal_one_piece(config, tmp_path):
    """The same as for the trainer, once more through folders and run.json."""
    trainers = []
    original = Trainer

    def keep(*args):
        trainers.append(original(*args))
        return trainers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "Trainer", keep)
        nl.train(config, progress=Quiet())
        for epochs in (1, 2):
            nl.train(config, results_dir=str(tmp_path / "pieces"), epochs=epochs, progress=Quiet())
    assert same(result_of(trainers[0])["model"], result_of(trainers[2])["model"])
