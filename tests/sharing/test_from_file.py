"""A run that goes on from a file: the same bits as if it had never stopped, and clear words where it cannot."""

import shutil

import pytest
from published_format import write_old
from tiny import StopAt, result_of, same, tiny_config, tiny_trainer, write_text

import newllm_lib as nl
from newllm_lib.errors import BundleError, CheckpointError
from newllm_lib.reporting import curves
from newllm_lib.reporting.progress import Progress
from newllm_lib.sharing.bundle import bundle
from newllm_lib.sharing.from_file import adopt
from newllm_lib.training.checkpoint import load_checkpoint, save_checkpoint, sidecar

pytestmark = pytest.mark.usefixtures("no_pictures")


def trained(config, stop_at=None, **changes):
    """The trainer of a run, stopped after a step if asked for."""
    kept, progress = [], StopAt(stop_at) if stop_at else Progress()
    nl.train(config, progress=progress, watch=lambda t: kept.append(t) or setattr(progress, "trainer", t), **changes)
    return kept[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the text, the results of a run stopped at step 11, and those of the whole run of 3 epochs."""
    place = tmp_path_factory.mktemp("adopting")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "write_curves", lambda *args: None)
        config = tiny_config(write_text(place / "text"), results_dir=str(place / "results"), name="r")
        trained(config, stop_at=11)
        trained(config, name="whole", epochs=3)
    return place


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_as_whole(trainer, place):
    """Whether a run of 3 epochs has ended as the uninterrupted one did: all of its final checkpoint but the timings."""
    uninterrupted = tiny_trainer(trainer.setup, place / "unused")
    path = place / "results" / "whole" / "checkpoints" / "whole_final.pt"
    uninterrupted.restore(load_checkpoint(path, pytest.fail), path)
    return same(result_of(trainer), result_of(uninterrupted))


STEP = "results/r/checkpoints/r_step_11.pt"


def test_a_bare_checkpoint_goes_on_bit_for_bit(place, tmp_path, capsys):
    shutil.copy(place / STEP, tmp_path / "downloaded.pt")
    run = adopt(tmp_path / "downloaded.pt", tmp_path / "results")
    assert run.folder == tmp_path / "results" / "r"
    assert (run.record["status"], run.record["step"], run.best["step"]) == ("interrupted", 11, 9)
    assert "r_step_11" not in capsys.readouterr().out
    assert list(run.history["step"]) == [3, 6, 8, 9]
    trainer = trained(run.requested, epochs=3, data=str(place / "text"))
    assert trainer.state.step == 24
    assert same_as_whole(trainer, place)
    assert nl.load(run.folder).record["status"] == "finished"


def test_a_bundle_with_a_checkpoint_goes_on_bit_for_bit(place, tmp_path):
    path = bundle(place / "results" / "r", tmp_path / "r.zip", checkpoint=True)
    run = adopt(path, tmp_path / "results")
    assert run.folder == tmp_path / "results" / "r"
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [".r.lock", "r"]
    assert run.best["step"] == 9
    trainer = trained(run.requested, epochs=3, data=str(place / "text"))
    assert same_as_whole(trainer, place)
    again = adopt(path, tmp_path / "results")  # the cell is run again: what is further stays
    assert (again.record["status"], again.record["step"]) == ("finished", 24)


def test_the_text_may_lie_elsewhere_but_must_be_the_same(place, tmp_path):
    run = adopt(place / STEP, tmp_path / "results")
    shutil.copytree(place / "text", tmp_path / "moved")
    assert trained(run.requested, data=str(tmp_path / "moved"), max_steps=12).state.step == 12
    with pytest.raises(FileNotFoundError, match="no such folder, file or pattern"):
        trained(run.requested, data=str(tmp_path / "nowhere"))
    (tmp_path / "moved" / "train.txt").write_text("w1 w2 w3 w4 w5 w6 w7\n" * 40)
    with pytest.raises(CheckpointError, match="the data have changed since this checkpoint"):
        trained(run.requested, data=str(tmp_path / "moved"))


def test_settings_that_define_a_run_are_another_run(place, tmp_path):
    run = adopt(place / STEP, tmp_path / "results")
    with pytest.raises(CheckpointError, match=r"of a run with other settings: lr 0\.003 there, 0\.01 here"):
        trained(run.requested, lr=0.01, data=str(place / "text"))


def test_the_best_checkpoint_is_kept_as_the_best(place, tmp_path):
    run = adopt(place / "results/r/checkpoints/best_r.pt", tmp_path / "results", name="other")
    assert [path.name for path in sorted((run.folder / "checkpoints").glob("*.pt"))] == ["best_other.pt"]
    assert nl.evaluate(run, str(place / "text")).loss == pytest.approx(run.best["val_loss"], abs=1e-6)
    assert run.requested.name == "other"
    card = (nl.export(run, tmp_path / "model") / "README.md").read_text()
    assert f"perplexity **{run.best['val_ppl']:.2f}**" in card
    assert "unknown share" not in card  # which the file does not tell


def test_where_the_best_weights_are_not_in_the_file_it_says_so(place, tmp_path, capsys):
    run = adopt(place / STEP, tmp_path / "results")
    said = capsys.readouterr().err
    assert "r_step_11.pt is of step 11, its run's best weights were those of step 9: they are not in it" in said
    assert (run.record["model_step"], run.best["step"]) == (11, 9)
    own = nl.load_model(place / STEP).model.state_dict()
    assert same(dict(run.model.state_dict()), dict(own))
    better = nl.train(run.requested, epochs=3, data=str(place / "text"), progress=Progress())
    assert better.best["step"] > 12
    assert better.record["model_step"] is None
    assert nl.evaluate(better, str(place / "text")).loss == pytest.approx(better.best["val_loss"], abs=1e-6)


def test_while_nothing_better_comes_the_weights_of_the_file_stay(place, tmp_path):
    payload = load_checkpoint(place / STEP, lambda text: None)
    payload["state"]["history"][-1]["val_loss"] = payload["state"]["best_loss"] = 0.001  # nothing will be better
    save_checkpoint(tmp_path / "lucky.pt", payload, 11)
    run = adopt(tmp_path / "lucky.pt", tmp_path / "results")
    longer = nl.train(run.requested, epochs=3, data=str(place / "text"), progress=Progress())
    assert (longer.record["step"], longer.best["step"], longer.record["model_step"]) == (24, 9, 11)
    assert "**The model here is not that best one**, but the one of step 11" in longer.report
    assert "not that best one" in longer.model.card
    own = nl.load_model(place / STEP).model.state_dict()
    assert same(dict(longer.model.state_dict()), dict(own))
    path = bundle(longer, tmp_path / "r.zip", checkpoint=True)
    adopt(tmp_path / "lucky.pt", tmp_path / "there")
    assert adopt(path, tmp_path / "there").record["model_step"] == 11  # the bundle's model is no better


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bundle", "final"])
def test_a_newer_state_brings_the_whole_run_up_to_it(place, tmp_path, kind):
    """Its history, its record and its best weights, so that a run that has ended there has ended here."""
    shutil.copytree(place / "results" / "r", tmp_path / "there" / "r")
    further = nl.train(nl.load(tmp_path / "there" / "r").requested, epochs=3, progress=Progress())
    here = nl.train(tiny_config(place / "text", results_dir=str(tmp_path), name="r"), progress=Progress())
    assert here.record["status"] == "finished" and here.record["step"] < further.record["step"]
    file = further.folder / "checkpoints" / "r_final.pt"
    if kind == "bundle":
        file = bundle(further, tmp_path / "r.zip", checkpoint=True)
    run = adopt(file, tmp_path)
    assert (run.record["step"], run.best["step"]) == (further.record["step"], further.best["step"])
    assert list(run.history["step"]) == list(further.history["step"])
    if kind == "bundle":
        assert same(dict(run.model.state_dict()), dict(further.model.state_dict()))
    again = nl.train(nl.extended(run, epochs=3), progress=Progress())
    assert (again.record["status"], again.record["step"]) == ("finished", further.record["step"])
    assert again.best == further.best
    with pytest.raises(ValueError, match="has already trained 24 steps"):
        nl.extended(run, epochs=2)


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "..", "a/b", ""])
def test_a_checkpoint_cannot_name_a_folder_outside(place, tmp_path, name):
    payload = load_checkpoint(place / STEP, lambda text: None)
    save_checkpoint(tmp_path / "evil.pt", payload | {"run": name}, 11)
    (tmp_path / "results").mkdir()
    with pytest.raises(BundleError, match=r"evil\.pt: refused: .* is no name for a folder"):
        adopt(tmp_path / "evil.pt", tmp_path / "results")
    assert not list((tmp_path / "results").glob("*"))
    assert adopt(tmp_path / "evil.pt", tmp_path / "results", name="good").folder.name == "good"


def test_a_batch_that_was_left_to_the_hardware_comes_along(place, tmp_path):
    config = tiny_config(place / "text", results_dir=str(tmp_path / "here"), name="auto", batch_size=None, max_steps=1)
    trained(config)
    run = adopt(tmp_path / "here/auto/checkpoints/auto_final.pt", tmp_path / "there")
    assert run.requested.train.batch_size is None
    assert run.record["decided"]["batch_size"] == 62
    assert trained(run.requested, max_steps=2, data=str(place / "text")).setup.config.train.batch_size == 62


def test_places_of_another_machine_are_left_behind(place, tmp_path):
    drive = tmp_path / "drive"
    drive.mkdir()
    config = tiny_config(place / "text", results_dir=str(tmp_path / "here"), name="r", mirror_dir=str(drive))
    trained(config, max_steps=3)
    path = bundle(tmp_path / "here" / "r", tmp_path / "r.zip", checkpoint=True)
    shutil.copy(tmp_path / "here/r/checkpoints/r_final.pt", tmp_path / "bare.pt")
    shutil.rmtree(drive)
    for number, file in enumerate((path, tmp_path / "bare.pt")):
        run = adopt(file, tmp_path / f"there-{number}")
        assert (run.requested.mirror_dir, run.config.mirror_dir) == (None, None)
        assert trained(run.requested, max_steps=4, data=str(place / "text")).state.step == 4


def test_a_run_that_is_there_gets_what_is_newer_and_keeps_what_it_has(place, tmp_path):
    adopt(place / "results/r/checkpoints/best_r.pt", tmp_path)
    assert adopt(place / STEP, tmp_path).folder == tmp_path / "r"
    assert trained(nl.load(tmp_path / "r").requested, max_steps=12, data=str(place / "text")).state.step == 12
    before = contents(tmp_path)
    adopt(place / STEP, tmp_path)
    assert contents(tmp_path) == before


def test_another_run_of_that_name_is_left_alone(place, tmp_path):
    trained(tiny_config(place / "text", results_dir=str(tmp_path), name="r", lr=0.01, max_steps=3))
    path = bundle(place / "results" / "r", tmp_path / "r.zip", checkpoint=True)
    for without_record in (False, True):
        if without_record:
            (tmp_path / "r" / "run.json").unlink()
        before = contents(tmp_path)
        for file in (place / STEP, path):
            with pytest.raises(FileExistsError, match="r: is there already, and is another run: give another name"):
                adopt(file, tmp_path)
        assert contents(tmp_path) == before


def test_what_cannot_be_continued_says_why(place, tmp_path):
    (tmp_path / "results").mkdir()
    plain = bundle(place / "results" / "r", tmp_path / "plain.zip")
    with pytest.raises(BundleError, match=r"plain\.zip: holds no checkpoint, so its run cannot be continued"):
        adopt(plain, tmp_path / "results")
    old = tmp_path / "best_model.pt"
    write_old(old)
    with pytest.raises(CheckpointError, match=r"best_model\.pt: a file of the published series: .* l4_fp16_extended"):
        adopt(old, tmp_path / "results")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"text\.pt: not a readable checkpoint"):
        adopt(tmp_path / "text.pt", tmp_path / "results")
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file"):
        adopt(tmp_path / "none.pt", tmp_path / "results")
    assert not list((tmp_path / "results").glob("*"))


@pytest.mark.parametrize(
    ("part", "value", "what"),
    [
        ("state", {}, "step, history"),
        ("state.future", 1, "future"),
        ("state.step", "x", "step"),
        ("state.step", -5, "step"),
        ("state.history", ["a"], "history"),
        ("requested", 7, "not iterable"),
        ("config.model", 3, "ModelConfig: must be a dictionary"),
        ("run", 5, "run missing or damaged"),
        ("optimizers", None, "optimizers missing or damaged"),
        ("scaler", None, "scaler missing or damaged"),
        ("generators", None, "generators missing or damaged"),
    ],
)
def test_a_state_that_no_run_writes_leaves_nothing_behind(place, tmp_path, part, value, what):
    payload = load_checkpoint(place / STEP, pytest.fail)
    *within, name = part.split(".")
    (payload[within[0]] if within else payload)[name] = value
    save_checkpoint(tmp_path / "x.pt", payload, 11)
    with pytest.raises(CheckpointError, match=rf"x\.pt: .*{what}"):
        adopt(tmp_path / "x.pt", tmp_path / "results")
    assert not list((tmp_path / "results").glob("*"))


@pytest.mark.parametrize(
    ("part", "value", "what"),
    [
        ("optimizers", [], "shorter"),
        ("optimizers", [{"a": 1}], "param_groups"),
        ("generators", {}, "python"),
        ("context", "x", "str"),
        ("recent_skips", "abc", "recent_skips"),
        ("recent_skips", [0.5], "recent_skips"),
        ("state.batch", 10**9, "batch 1000000000 of an epoch of"),
    ],
)
def test_a_state_that_cannot_be_restored_says_so(place, tmp_path, part, value, what):
    payload = load_checkpoint(place / STEP, pytest.fail)
    *within, name = part.split(".")
    (payload[within[0]] if within else payload)[name] = value
    save_checkpoint(tmp_path / "x.pt", payload, 11)
    run = adopt(tmp_path / "x.pt", tmp_path / "results")
    with pytest.raises(CheckpointError, match=rf"its training state is damaged.*{what}"):
        nl.train(run.requested, data=str(place / "text"))


def test_a_damaged_checkpoint_is_refused(place, tmp_path):
    for path in (place / STEP, sidecar(place / STEP)):
        shutil.copy(path, tmp_path)
    data = bytearray((tmp_path / "r_step_11.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "r_step_11.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"r_step_11\.pt: damaged: sha256 is"):
        adopt(tmp_path / "r_step_11.pt", tmp_path / "results")
    assert not (tmp_path / "results" / "r").exists()
