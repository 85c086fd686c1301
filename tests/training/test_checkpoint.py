"""Files that survive: hashes, damage, refusals, and what one downloads."""

import errno
import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from tiny import (
    fail_on_warning,
    same,
    stopped_trainer,
    tiny_setup,
    tiny_trainer,
    write_text,
)

from newllm_lib.config import ModelConfig
from newllm_lib.data.tokenizer import WordTokenizer
from newllm_lib.errors import CheckpointError
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.pretrained import export_model, load_exported, load_weights
from newllm_lib.system import files
from newllm_lib.training import checkpoint
from newllm_lib.training.checkpoint import Checkpoints, load_checkpoint, save_checkpoint, sidecar, valid_step

FIXTURES = Path(__file__).parents[1] / "fixtures"
FIXTURE_RUN = {
    "precision": "fp16", "optimizer": "muon", "layout": "stream", "batch_size": 6, "sequence_length": 24,
    "eval_lanes": 2, "epochs": 4,
}  # fmt: skip
PAYLOAD = {"model": {"weight": torch.arange(4.0)}, "state": {"step": 3}, "words": ["a", "é"]}


def test_what_is_saved_comes_back_with_its_version_and_hash(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint(path, PAYLOAD, step=3)
    assert same(load_checkpoint(path, fail_on_warning), {"format_version": 1, **PAYLOAD})
    (entry,) = json.loads(sidecar(path).read_text())["contents"]
    assert (entry["step"], entry["bytes"]) == (3, path.stat().st_size)
    assert sorted(os.listdir(tmp_path)) == ["x.pt", "x.pt.json"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[: len(data) // 2], "damaged: sha256 is"),
        (lambda data: data[:700] + bytes([data[700] ^ 1]) + data[701:], "damaged: sha256 is"),
        (lambda data: b"", "damaged: sha256 is e3b0c44298fc1c14"),
    ],
    ids=["truncated", "one bit flipped", "empty"],
)
def test_a_damaged_file_is_named_with_its_hash(tmp_path, damage, words):
    path = tmp_path / "x.pt"
    save_checkpoint(path, PAYLOAD, step=3)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, fail_on_warning)
    assert str(path) in str(error.value)
    assert words in str(error.value)


def test_a_file_without_its_record_is_read_with_a_warning(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint(path, PAYLOAD, step=3)
    sidecar(path).unlink()
    warnings = []
    assert load_checkpoint(path, warnings.append)["state"] == {"step": 3}
    assert "no recorded hash beside it (x.pt.json)" in warnings[0]


def test_a_damaged_newest_file_is_passed_over_for_the_one_before(tmp_path):
    files_of_run = Checkpoints(tmp_path, "r")
    for step in (2, 10, 9):
        save_checkpoint(files_of_run.step(step), PAYLOAD | {"state": {"step": step}}, step)
    newest = files_of_run.step(10)
    newest.write_bytes(newest.read_bytes()[:-20])
    warnings = []
    path, payload = files_of_run.newest_valid(warnings.append)
    assert (path.name, payload["state"]["step"]) == ("r_step_9.pt", 9)
    assert len(warnings) == 1
    assert "r_step_10.pt: damaged" in warnings[0]
    assert "trying the checkpoint before it" in warnings[0]


def test_no_file_is_none_and_files_of_which_none_can_be_read_are_an_error(tmp_path):
    assert Checkpoints(tmp_path, "r").newest_valid(fail_on_warning) is None
    (tmp_path / "r_final.pt").write_bytes(b"nothing")
    warnings = []
    with pytest.raises(
        CheckpointError, match=r"none of its checkpoints can be read; fresh=True .in the shell --fresh. keeps them"
    ):
        Checkpoints(tmp_path, "r").newest_valid(warnings.append)
    assert "not a readable checkpoint (7 bytes)" in warnings[0]


def save_stopped_before_the_rename(path, step):
    def stop(*_args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "write_atomic", stop)
        save_checkpoint(path, PAYLOAD | {"state": {"step": step}}, step)


def test_stops_between_record_and_rename_leave_a_file_that_verifies(tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(path, PAYLOAD, step=3)
    for step in (4, 5):  # the second stop must not take the record of the first for that of the file
        save_stopped_before_the_rename(path, step)
        assert [entry["step"] for entry in json.loads(sidecar(path).read_text())["contents"]] == [step, 3]
        assert load_checkpoint(path, fail_on_warning)["state"] == {"step": 3}
    save_checkpoint(path, PAYLOAD | {"state": {"step": 6}}, step=6)
    assert load_checkpoint(path, fail_on_warning)["state"] == {"step": 6}
    assert len(json.loads(sidecar(path).read_text())["contents"]) == 1


def test_a_file_that_a_stop_left_old_does_not_pass_for_the_newest(tmp_path):
    run = Checkpoints(tmp_path, "r")
    save_checkpoint(run.best, PAYLOAD, step=3)
    save_checkpoint(run.step(5), PAYLOAD | {"state": {"step": 5}}, step=5)
    for step in (6, 7):
        save_stopped_before_the_rename(run.best, step)
        path, payload = run.newest_valid(fail_on_warning)
        assert (path, payload["state"]) == (run.step(5), {"step": 5})


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "best.pt"
    save_checkpoint(path, PAYLOAD, step=3)

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*best\.pt.*No space left on device"):
        save_checkpoint(path, PAYLOAD | {"state": {"step": 4}}, step=4)
    assert load_checkpoint(path, fail_on_warning)["state"] == {"step": 3}
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "best.pt.json"]


class Canary:
    def __reduce__(self):
        return os.system, ("touch canary-ran",)


def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format_version": 1, "model": Canary()}, "evil.pt")
    with pytest.raises(CheckpointError, match="refused: it holds more than tensors and plain values"):
        load_checkpoint(tmp_path / "evil.pt", lambda text: None)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Canary()))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "raw.pt", lambda text: None)
    assert not (tmp_path / "canary-ran").exists()
    torch.load("evil.pt", weights_only=False)  # the control: the canary is alive
    assert (tmp_path / "canary-ran").exists()


def test_a_newer_format_and_a_foreign_file_are_refused(tmp_path):
    for name, content, words in (
        ("new", {"format_version": 2}, "format version 2, this library reads up to 1; upgrade it"),
        ("foreign", {"epoch": 3}, "not a checkpoint of newllm_lib"),
        ("list", [1, 2], "not a checkpoint of newllm_lib"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(tmp_path / name, lambda text: None)


def test_a_folder_in_place_of_a_file_is_one_message(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path, fail_on_warning)


def test_weights_of_another_shape_are_listed_and_the_model_stays(tmp_path):
    model = NewLLM(ModelConfig(vocab_size=20, hidden_dim=8))
    other = NewLLM(ModelConfig(vocab_size=30, hidden_dim=8, num_layers=5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(model, {"model": other.state_dict()}, tmp_path / "x.pt")
    assert "embedding.weight: file (30, 256), model (20, 256)" in str(error.value)
    assert "layers.4.bias: file None, model (8,)" in str(error.value)
    assert same(dict(model.state_dict()), before)


def test_a_file_that_version_1_wrote_still_loads_and_goes_on(tmp_path):
    """Written by `stopped_trainer(tiny_setup(write_text(Path("text")), **FIXTURE_RUN), FOLDER, 3)` on 2026-11-21."""
    path = FIXTURES / "checkpoint_v1.pt"
    payload = load_checkpoint(path, fail_on_warning)
    assert payload["format_version"] == 1
    assert set(payload) == {
        "format_version", "run", "identity", "config", "data_fingerprint", "tokenizer", "model", "optimizers",
        "scaler", "generators", "context", "state",
    }  # fmt: skip
    trainer = tiny_trainer(tiny_setup(write_text(tmp_path / "text"), **FIXTURE_RUN), tmp_path / "run")
    trainer.restore(payload, path)
    assert (trainer.state.step, trainer.state.batch, trainer.scaler.get_scale()) == (3, 3, 65536.0)
    assert same(trainer.model.state_dict(), payload["model"])
    assert same(trainer.context, payload["context"])
    assert [(row["step"], row["val_loss"]) for row in trainer.state.history] == [(3, pytest.approx(3.5205415804))]
    assert trainer.fit() == "finished"
    assert trainer.state.history[-1]["val_loss"] == pytest.approx(3.3830, rel=0.003)  # other CPUs round otherwise


def test_the_exported_folder_gives_the_same_logits_through_both_readers(tmp_path):
    tokenizer = WordTokenizer([f"w{k}" for k in range(16)])
    model = NewLLM(ModelConfig(vocab_size=20, hidden_dim=8, dropout=0.0)).eval()
    export_model(tmp_path / "model", model, tokenizer)
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors", "tokenizer.json"]
    tokens = torch.tensor([[2, 5, 7, 19]])
    again, tokenizer_again = load_exported(tmp_path / "model")
    from_hub_mixin = NewLLM.from_pretrained(tmp_path / "model")
    assert tokenizer_again == tokenizer
    assert again.config == from_hub_mixin.config == model.config
    assert torch.equal(again.eval()(tokens)[0], model(tokens)[0])
    assert torch.equal(from_hub_mixin.eval()(tokens)[0], model(tokens)[0])


def test_a_model_folder_with_the_wrong_tokenizer_or_a_broken_file_is_refused(tmp_path):
    model = NewLLM(ModelConfig(vocab_size=20, hidden_dim=8))
    export_model(tmp_path, model, WordTokenizer(["a", "b"]))
    with pytest.raises(CheckpointError, match="the tokenizer has 6 ids, the model 20"):
        load_exported(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 20, "width": 3}')
    with pytest.raises(CheckpointError, match="ModelConfig has no field 'width'"):
        load_exported(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="not a model folder that can be read"):
        load_exported(tmp_path)


def test_only_the_newest_step_files_are_kept_and_no_other_is_touched(tmp_path):
    own, other = Checkpoints(tmp_path, "a"), Checkpoints(tmp_path, "a_step_9")
    # a run that continued from an older file, since that of step 20 was damaged, writes lower steps later
    for path in (own.best, own.final, own.epoch(5), other.step(1), own.step(20), own.step(1), own.step(3)):
        save_checkpoint(path, PAYLOAD, step=1)
    own.prune_steps(newest=3)
    left = {path.name for path in tmp_path.glob("*.pt")}
    assert left == {"a_step_1.pt", "a_step_3.pt", "best_a.pt", "a_final.pt", "a_epoch_5.pt", "a_step_9_step_1.pt"}
    assert not sidecar(own.step(20)).exists()


@pytest.mark.parametrize("clock", [1, -1], ids=["right", "set back"])
def test_the_newest_step_file_stays_whatever_the_clock_says(tmp_path, clock):
    own = Checkpoints(tmp_path, "a")
    for step in (10, 20, 30, 100):
        save_checkpoint(own.step(step), PAYLOAD, step=step)
        os.utime(own.step(step), (1_000_000 + clock * step,) * 2)
        own.prune_steps(newest=step)
    assert {path.name for path in tmp_path.glob("*.pt")} == {"a_step_30.pt", "a_step_100.pt"}


def test_a_payload_is_plain_enough_for_the_safe_reader(text, tmp_path):
    trainer = stopped_trainer(tiny_setup(text, precision="fp16", layout="stream", batch_size=4), tmp_path, 2)
    buffer = io.BytesIO()
    torch.save(trainer.payload(), buffer)
    buffer.seek(0)
    assert same(torch.load(buffer, weights_only=True)["context"], trainer.context)


def test_files_of_a_run_that_had_another_name_are_renamed_with_their_records(tmp_path):
    old, new = Checkpoints(tmp_path, "a"), Checkpoints(tmp_path, "a_epoch_1")
    paths = {old.best: new.best, old.final: new.final, old.epoch(3): new.epoch(3), old.step(12): new.step(12)}
    for number, path in enumerate(paths):
        save_checkpoint(path, {"state": {"step": number}}, number)
    save_checkpoint(new.step(13), {"state": {"step": 13}}, 13)  # its own, though its name begins with a_epoch_1
    save_checkpoint(tmp_path / "other.pt", {"state": {"step": 14}}, 14)
    new.take_over("a_epoch_1")
    assert old.best.exists()
    for _ in range(2):
        new.take_over("a")
        for number, path in enumerate(paths.values()):
            assert load_checkpoint(path, fail_on_warning)["state"]["step"] == number
            assert valid_step(path) == number
    stay = [new.step(13), tmp_path / "other.pt"]
    everything = [*paths.values(), *stay]
    assert sorted(tmp_path.iterdir()) == sorted([*everything, *map(sidecar, everything)])


def test_a_file_that_is_there_under_the_new_name_stays(tmp_path):
    old, new = Checkpoints(tmp_path, "a"), Checkpoints(tmp_path, "b")
    save_checkpoint(old.best, {"state": {"step": 1}}, 1)
    save_checkpoint(new.best, {"state": {"step": 2}}, 2)
    new.take_over("a")
    assert (valid_step(old.best), valid_step(new.best)) == (1, 2)
