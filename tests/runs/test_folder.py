"""One place decides a run: the text and the record are read once, and plan, panel and training decide the same."""

import json
import shutil

import pytest
from tiny import Quiet, StopAt, tiny_config

import newllm_lib as nl
from newllm_lib.errors import CheckpointError, ConfigError, RunError
from newllm_lib.notebook.panel_plan import Planner
from newllm_lib.reporting.record import KEYS, RunRecord
from newllm_lib.runs import folder as run_folders
from newllm_lib.runs.folder import decided_in, resolve_run
from newllm_lib.training import setup as setups
from newllm_lib.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def drive(tmp_path):
    (tmp_path / "drive").mkdir()
    return tmp_path / "drive"


@pytest.fixture
def config(text, tmp_path):
    """A run that leaves its batch to the machine."""
    return tiny_config(text, results_dir=str(tmp_path / "results"), name="r", batch_size=None, epochs=None, max_steps=4)


@pytest.fixture
def machine_batch(monkeypatch):
    """A function that sets which batch this machine would choose."""

    def choose(size):
        monkeypatch.setattr(setups, "default_batch_size", lambda machine: size)

    choose(8)
    return choose


@pytest.fixture
def calls(monkeypatch):
    """The names of what was called: the reading of the text, of a record, the search of a batch."""
    called = []

    def counted(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **named: called.append(name) or real(*args, **named))

    counted(setups, "prepare")
    counted(run_folders, "read_record")
    counted(run_folders, "settle_batch")
    return called


def stopped(config, step=2):
    """The run, interrupted after a step."""
    progress = StopAt(step)
    return nl.train(config, progress=progress, watch=lambda trainer: setattr(progress, "trainer", trainer))


class SeenError(Exception):
    """Ends a training before its first update."""


def trained_with(config):
    """The setup with which `train` would train."""
    seen = []

    def watch(trainer):
        seen.append(trainer.setup)
        raise SeenError

    with pytest.raises(SeenError):
        nl.train(config, progress=Quiet(), watch=watch)
    return seen[0]


def tree(folder):
    """Every file below a folder, with its content and its time."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


# --- once -------------------------------------------------------------------------------------------------------


def test_the_text_and_the_record_are_read_once_and_the_batch_is_settled_once(config, calls, machine_batch):
    assert resolve_run(config).earlier == {}
    assert calls == ["prepare", "settle_batch"]
    run = stopped(config)
    for resolve in (resolve_run, nl.plan):
        calls.clear()
        resolve(config)
        assert calls == ["prepare", "read_record", "settle_batch"]
    calls.clear()
    nl.train(config, progress=Quiet())
    assert calls == ["prepare", "read_record", "settle_batch"]
    resolved = resolve_run(config)
    assert resolved.earlier == nl.load(run.folder).record
    assert (resolved.place.folder, resolved.place.identity) == (run.folder, resolved.setup.identity)
    calls.clear()
    prepared = resolved.setup.prepared
    assert resolve_run(config.replace(lr=1e-2), prepared).setup.identity != resolved.setup.identity
    assert calls == ["read_record", "settle_batch"]  # the text was there


def test_what_is_counted_is_really_called(config, calls):
    make_setup(config)
    make_setup(config)
    assert calls == ["prepare", "prepare"]


def test_a_preview_searches_no_batch(config, calls, machine_batch, monkeypatch):
    assert resolve_run(config.replace(batch_policy="fast"), preview=True).setup.config.train.batch_size == 8
    assert calls == ["prepare"]
    monkeypatch.setattr(run_folders, "free_memory_bytes", lambda machine: 1)  # so that the batch may need pieces
    resolve_run(config, preview=True)
    assert calls == ["prepare", "prepare", "settle_batch"]


# --- the same decisions, and nothing written --------------------------------------------------------------------


def planned_with(config):
    return nl.plan(config, report=pytest.fail)[0]


def shown_with(config):
    return Planner().plan(config).setup


@pytest.mark.slow
def test_plan_panel_and_training_keep_what_the_run_began_with(config, machine_batch):
    assert planned_with(config).decided == shown_with(config).decided == trained_with(config).decided
    stopped(config)
    machine_batch(16)  # what another machine would choose
    expected = {
        "batch_size": 8, "micro_batch_size": None, "precision": "fp32", "engine": "fused", "threads": 1,
        "layout": "packed", "device": "cpu",
    }  # fmt: skip
    for decide in (planned_with, shown_with, trained_with):
        assert decide(config).decided == expected
    other = config.replace(name="other")
    for decide in (planned_with, shown_with, trained_with):  # the control
        assert decide(other).decided == expected | {"batch_size": 16}


def test_what_a_record_decides_is_what_the_setup_calls_decided(config, machine_batch):
    run = stopped(config)
    assert run.record.decided == resolve_run(config).setup.decided
    assert decided_in({"config": {"train": {"batch_size": 9}}, "scaler": None}) == {"batch_size": 9}
    assert decided_in({"config": {"train": {"batch_size": 9}}, "scaler": {"scale": 1.0}}) == {
        "batch_size": 9,
        "precision": "fp16",
    }


def test_a_run_writes_every_key_but_what_an_import_knows(config, machine_batch):
    run = nl.train(config, progress=Quiet())
    assert list(json.loads((run.folder / "run.json").read_text())) == [name for name in KEYS if name != "imported"]


def test_they_keep_it_where_the_run_lies_in_the_copy_alone(config, machine_batch, drive):
    config = config.replace(mirror_dir=str(drive))
    shutil.rmtree(stopped(config).folder)
    machine_batch(16)
    for decide in (planned_with, shown_with, trained_with):  # training last: it brings the copy back
        assert decide(config).config.train.batch_size == 8


def test_they_keep_it_where_only_the_checkpoints_are_left(config, machine_batch):
    (stopped(config).folder / "run.json").unlink()
    machine_batch(16)
    for decide in (planned_with, trained_with):  # a panel does not read checkpoints at each move of a slider
        assert decide(config).config.train.batch_size == 8


@pytest.mark.slow
@pytest.mark.parametrize("left", ["all", "checkpoints", "copy", "nothing"])
def test_plans_write_nothing(config, machine_batch, drive, tmp_path, left):
    config = config.replace(mirror_dir=str(drive))
    folder = stopped(config).folder
    if left == "checkpoints":
        (folder / "run.json").unlink()
    if left in ("copy", "nothing"):
        shutil.rmtree(folder)
    if left == "nothing":
        shutil.rmtree(drive / "r")
    before = tree(tmp_path)
    planned_with(config)
    shown_with(config)
    resolve_run(config)
    assert tree(tmp_path) == before
    nl.train(config, progress=Quiet())  # the control
    assert tree(tmp_path) != before


# --- what training does, and a plan does not --------------------------------------------------------------------


def test_settings_that_are_refused_touch_no_folder(config, machine_batch, tmp_path):
    stopped(config)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"batch_size = 500: must be at most 62"):
        nl.train(config, batch_size=500, fresh=True, progress=Quiet())
    assert tree(tmp_path) == before
    nl.train(config, fresh=True, progress=Quiet())
    assert (tmp_path / "results" / "r.old-1").is_dir()


def test_training_continues_from_no_record_of_a_copy_that_has_no_checkpoints(config, machine_batch, drive):
    config = config.replace(mirror_dir=str(drive))
    shutil.rmtree(stopped(config, step=3).folder)
    assert json.loads((drive / "r" / "run.json").read_text())["best"]
    shutil.rmtree(drive / "r" / "checkpoints")
    (drive / "r" / "MIRROR.json").unlink()
    assert nl.train(config, progress=Quiet()).record.status == "finished"  # from the start, in peace


def test_a_damaged_record_of_the_copy_is_passed_over_as_in_training(config, machine_batch, drive):
    config = config.replace(mirror_dir=str(drive))
    shutil.rmtree(stopped(config).folder)
    (drive / "r" / "run.json").write_text("{")
    assert planned_with(config).config.train.batch_size == 8
    assert Planner().plan(config).refusal == ""
    assert nl.train(config, progress=Quiet()).record.step == 4


def test_a_plan_needs_no_drive_but_training_and_the_panel_say_that_it_is_not_there(config, machine_batch, tmp_path):
    config = config.replace(mirror_dir=str(tmp_path / "gone"))
    assert planned_with(config).total_steps == 4
    for refuses in (shown_with, trained_with):
        with pytest.raises(ConfigError, match="must be a folder that exists"):
            refuses(config)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("{", RunError, "run.json"),
        (
            json.dumps(RunRecord(run="r", status="imported", config={}, decided={}, best=None)),
            CheckpointError,
            "an imp",
        ),
    ],
)
def test_a_preview_returns_what_the_others_raise(config, machine_batch, tmp_path, content, error, words):
    folder = tmp_path / "results" / "r"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(content)
    for decide in (planned_with, trained_with, resolve_run):
        with pytest.raises(error, match=words) as raised:
            decide(config)
    resolved = resolve_run(config, preview=True)
    assert (resolved.refusal, resolved.earlier) == (str(raised.value), {})
    assert resolved.setup.config.train.batch_size == 8  # a plan all the same: in another folder it would do
