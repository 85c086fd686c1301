"""Runs found in the places where they may lie, and carried on further than they were planned."""

import os
import shutil

import pytest
from tiny import tiny_config, write_text

import newllm_lib as nl
from newllm_lib.reporting.progress import Progress
from newllm_lib.runs import folder as run_folders
from newllm_lib.training import setup as setups
from newllm_lib.training.setup import with_batch

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text")


def trained(text, tmp_path, **changes):
    return nl.train(tiny_config(text, results_dir=str(tmp_path / "results"), **changes), progress=Progress())


def test_a_constant_rate_just_goes_on(text, tmp_path):
    run = trained(text, tmp_path)
    steps = run.record["step"] // 2  # an epoch
    longer = nl.train(nl.extended(run, epochs=5, patience=30), progress=Progress())
    assert (longer.folder, longer.record["step"]) == (run.folder, 5 * steps)
    assert (longer.config.train.decay_steps, longer.config.train.patience) == (None, 30)
    whole = trained(text, tmp_path, epochs=5, patience=30, name="whole")
    assert longer.best["val_loss"] == whole.best["val_loss"]


def test_a_decaying_rate_gets_a_new_end(text, tmp_path):
    run = trained(text, tmp_path, lr_schedule="cosine", epochs=2)
    steps = run.record["step"] // 2
    config = nl.extended(run, epochs=4)
    assert config.train.decay_steps == 4 * steps
    longer = nl.train(config, progress=Progress())
    assert (longer.folder, longer.record["step"]) == (run.folder, 4 * steps)
    assert longer.history.lr.iloc[-1] < 0.2 * longer.history.lr.max()
    assert nl.extended(longer, epochs=6).train.decay_steps == 6 * steps  # not the end before
    assert nl.extended(longer, epochs=6, decay_steps=99).train.decay_steps == 99


def test_by_steps_and_with_the_batch_that_the_hardware_gave(text, tmp_path):
    run = trained(text, tmp_path, batch_size=None, epochs=None, max_steps=2)
    longer = nl.train(nl.extended(run, max_steps=5), progress=Progress())
    assert (longer.folder, longer.record["step"]) == (run.folder, 5)


def test_the_same_text_in_another_place(text, tmp_path):
    run = trained(text, tmp_path)
    text.rename(tmp_path / "moved")
    longer = nl.train(nl.extended(run, epochs=3, data=str(tmp_path / "moved")), progress=Progress())
    assert longer.record["step"] == run.record["step"] * 3 // 2


def test_a_run_that_is_longer_already_and_other_runs_are_refused(text, tmp_path):
    run = trained(text, tmp_path)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"epochs = 1: tiny-\w+ has already trained \d+ steps \(2.00 epochs\)"):
        nl.extended(run, epochs=1)
    assert nl.train(nl.extended(run, epochs=2), progress=Progress()).record == run.record  # Run all again
    with pytest.raises(ValueError, match="give the new total as one of them"):
        nl.extended(run, epochs=5, max_steps=100)
    with pytest.raises(ValueError, match=r"dropout = 0.5: is 0.2 in tiny-\w+; another value makes another run"):
        nl.extended(run, epochs=5, dropout=0.5)
    with pytest.raises(ValueError, match="unknown setting 'patiance'"):
        nl.extended(run, epochs=5, patiance=3)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_a_run_opened_from_a_bundle_goes_on(text, tmp_path):
    run = trained(text, tmp_path)
    file = nl.bundle(run, tmp_path / "run.zip", checkpoint=True)
    expected = nl.train(nl.extended(run, epochs=4), progress=Progress())
    opened = nl.open_bundle(file, tmp_path / "elsewhere")
    longer = nl.train(nl.extended(opened, epochs=4, data=run.config.data.data), progress=Progress())
    assert longer.folder.parent == tmp_path / "elsewhere"
    assert longer.best["val_loss"] == expected.best["val_loss"]


# --- found ------------------------------------------------------------------------------------------------------


def test_the_newest_run_of_a_folder_and_none_in_an_empty_one(text, tmp_path):
    results = tmp_path / "results"
    assert nl.find_run(results_dir=results) is None
    first, second = (trained(text, tmp_path, name=name, max_steps=1) for name in ("first", "second"))
    for run, seconds in ((first, 2000), (second, 1000)):
        os.utime(run.folder / "run.json", (seconds, seconds))
    assert nl.find_run(results_dir=results).folder == first.folder
    assert nl.find_run(second.folder).folder == second.folder


def test_a_run_that_only_the_copy_has_is_brought_back(text, tmp_path):
    (tmp_path / "drive").mkdir()
    run = trained(text, tmp_path, mirror_dir=str(tmp_path / "drive"))
    shutil.rmtree(run.folder)
    said = []
    found = nl.find_run(results_dir=tmp_path / "results", mirror_dir=tmp_path / "drive", tell=said.append)
    assert (found.folder, found.record["step"]) == (run.folder, run.record["step"])
    assert len(said) == 1 and said[0].startswith(f"brought back from {tmp_path / 'drive' / run.folder.name}: step")
    longer = nl.train(nl.extended(found, epochs=3), progress=Progress())
    assert longer.record["step"] == run.record["step"] * 3 // 2


def test_a_bundle_and_a_checkpoint_are_taken_in_and_their_hash_is_checked(text, tmp_path):
    run = trained(text, tmp_path)
    bundle = nl.bundle(run, tmp_path / "run.zip", checkpoint=True)
    final = next((run.folder / "checkpoints").glob("*_final.pt"))
    for number, file in enumerate((bundle, final)):
        found = nl.find_run(file, results_dir=tmp_path / f"elsewhere{number}")
        assert found.folder == tmp_path / f"elsewhere{number}" / run.folder.name
        longer = nl.train(nl.extended(found, epochs=3, data=run.config.data.data), progress=Progress())
        assert longer.record["step"] == run.record["step"] * 3 // 2
    with pytest.raises(ValueError, match="sha256 mismatch: expected 0000"):
        nl.find_run(bundle, results_dir=tmp_path / "nowhere", sha256="0" * 64)
    with pytest.raises(ValueError, match="must be a file on this machine, the id of a file"):
        nl.find_run("no such file", results_dir=tmp_path / "nowhere")


def test_what_cannot_go_on_is_passed_over(text, tmp_path):
    results = tmp_path / "results"
    run = trained(text, tmp_path, name="mine", max_steps=1)
    other = trained(text, tmp_path, name="theirs", max_steps=2)
    file = nl.bundle(other, tmp_path / "theirs.zip")  # without a checkpoint
    shutil.rmtree(other.folder)
    nl.open_bundle(file, results)
    (results / "broken").mkdir()
    (results / "broken" / "run.json").write_text("")
    os.utime(run.folder / "run.json", (1000, 1000))
    said = []
    assert nl.find_run(results_dir=results, tell=said.append).folder == run.folder
    assert len(said) == 1 and said[0].startswith(f"left out: {results / 'broken' / 'run.json'}")


def test_an_imported_run_is_not_taken_for_one_that_can_go_on(text, tmp_path):
    run = trained(text, tmp_path)
    record = (run.folder / "run.json").read_text()
    (run.folder / "run.json").write_text(record.replace('"status": "finished"', '"status": "imported"'))
    shutil.rmtree(run.folder / "checkpoints")  # of which an import has none
    assert nl.find_run(results_dir=tmp_path / "results") is None


def test_a_run_is_found_by_its_name_here_and_in_the_copy(text, tmp_path):
    results, drive = tmp_path / "results", tmp_path / "drive"
    drive.mkdir()
    here = trained(text, tmp_path, name="with-fifteen-letters", max_steps=1)  # as an id of Google Drive may look
    there = trained(text, tmp_path, name="only-on-the-drive", max_steps=1, mirror_dir=str(drive))
    shutil.rmtree(there.folder)
    for place in ("with-fifteen-letters", here.folder):
        assert nl.find_run(place, results_dir=results, mirror_dir=drive).folder == here.folder
    for place in ("only-on-the-drive", drive / "only-on-the-drive"):
        found = nl.find_run(place, results_dir=results, mirror_dir=drive, tell=lambda text: None)
        assert (found.folder, found.record["step"]) == (there.folder, 1)
        shutil.rmtree(there.folder)
    with pytest.raises(ValueError, match="'nowhere': must be a file on this machine, the id of a file"):
        nl.find_run("nowhere", results_dir=results, mirror_dir=drive)
    with pytest.raises(FileNotFoundError, match="results: no run here"):
        nl.find_run(results, results_dir=results)


@pytest.mark.parametrize("record", [True, False])
def test_a_copy_does_not_replace_another_run_of_its_name(text, tmp_path, record):
    drive, results = tmp_path / "drive", tmp_path / "results"
    drive.mkdir()
    copied = trained(text, tmp_path, name="r", seed=1, mirror_dir=str(drive))
    shutil.rmtree(copied.folder)
    other = trained(text, tmp_path, name="r", seed=2, max_steps=1, epochs=None)  # less far, so that it would be brought
    if not record:
        (other.folder / "run.json").unlink()
    before = {path: path.read_bytes() for path in other.folder.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="r: is there already, and is another run"):
        nl.find_run("" if not record else drive / "r", results_dir=results, mirror_dir=drive)
    assert {path: path.read_bytes() for path in other.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("asked", [{"batch_size": None}, {"batch_policy": "fast"}])
def test_epochs_are_counted_with_the_batch_that_the_run_has(text, tmp_path, monkeypatch, asked):
    def settled(setup, decided, report):
        found = "batch_size" in decided or setup.requested.train.batch_policy == "recipe"
        return setup if found else with_batch(setup, 4)

    monkeypatch.setattr(run_folders, "settle_batch", settled)
    monkeypatch.setattr(setups, "default_batch_size", lambda machine: 4)
    run = trained(text, tmp_path, lr_schedule="cosine", **asked)
    assert run.config.train.batch_size == 4
    steps = run.record["step"] // 2
    monkeypatch.setattr(setups, "default_batch_size", lambda machine: 16)  # on another machine
    config = nl.extended(run, epochs=3)
    assert config.train.decay_steps == 3 * steps
    longer = nl.train(config, progress=Progress())
    assert (longer.folder, longer.record["step"], longer.config.train.batch_size) == (run.folder, 3 * steps, 4)
