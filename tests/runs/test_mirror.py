"""The copy of a run on another drive: what it holds, how it comes back, and that no drive can hurt a training."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import Quiet, StopAt, result_of, same, tiny_config, write_text

import newllm_lib as nl
from newllm_lib.errors import ChangedError, CheckpointError
from newllm_lib.reporting import curves
from newllm_lib.reporting.progress import TerminalProgress
from newllm_lib.reporting.sync_status import SyncStatus
from newllm_lib.runs import mirror, mirror_copy
from newllm_lib.runs.mirror import Mirror
from newllm_lib.runs.mirror_copy import MANIFEST, RunCopy
from newllm_lib.system import files
from newllm_lib.training.checkpoint import Checkpoints, load_checkpoint, save_checkpoint, sidecar, verified_entry

IDENTITY, OTHER = "a" * 64, "b" * 64


def save(folder, step, name="step", identity=IDENTITY, size=50):
    """A checkpoint of the run `r` at a step, and a record to go with it."""
    checkpoints = Checkpoints(folder / "checkpoints", folder.name)
    path = {"best": checkpoints.best, "final": checkpoints.final, "step": checkpoints.step(step)}[name]
    save_checkpoint(path, {"identity": identity, "state": {"step": step}, "model": torch.full((size,), step)}, step)
    (folder / "run.json").write_text(json.dumps({"step": step, "identity": identity}))
    return path


@pytest.fixture
def run(tmp_path):
    """The folder of a run with best (step 2), two steps (4, 6), a history and a model."""
    folder = tmp_path / "results" / "r"
    save(folder, 2, "best")
    save(folder, 4)
    save(folder, 6)
    (folder / "history.csv").write_text("step\n2\n")
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(b"weights" * 100)
    return folder


@pytest.fixture
def drive(tmp_path):
    folder = tmp_path / "drive"
    folder.mkdir()
    return folder


@pytest.fixture
def copy(run, drive):
    """The copy of `run`, just made."""
    made = RunCopy(run, drive / "r", IDENTITY, clock=lambda: 1000.0)
    assert made.update() == 6
    return made


NAMES = {
    "run.json", "history.csv", "model/model.safetensors",
    "checkpoints/best_r.pt", "checkpoints/r_step_4.pt", "checkpoints/r_step_6.pt",
}  # fmt: skip
SIDECARS = {f"{name}.json" for name in NAMES if name.endswith(".pt")}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def restored(drive, folder, identity=IDENTITY):
    """(what `restore` returns, what it tells) for a folder of the run `r`."""
    told = []
    return RunCopy(folder, drive / "r", identity, clock=lambda: 2000.0).restore(told.append), told


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


# --- what the copy holds ----------------------------------------------------------------------------------------


def test_the_copy_has_the_layout_of_a_run_and_a_manifest_that_names_every_content(run, copy, drive):
    there = contents(drive / "r")
    manifest = json.loads(there.pop(MANIFEST))
    assert set(there) == NAMES | SIDECARS
    assert there == contents(run)
    assert {name: entries[0]["sha256"] for name, entries in manifest["files"].items()} == {
        name: hashlib.sha256(there[name]).hexdigest() for name in NAMES
    }
    assert all(len(entries) == 1 for entries in manifest["files"].values())
    assert (manifest["identity"], manifest["run"], manifest["time"]) == (IDENTITY, "r", 1000.0)


def test_the_last_two_the_best_and_the_final_checkpoint_are_kept(run, copy, drive):
    for step in (8, 10, 12):
        save(run, step)  # as epochs are, they stay in the run's folder
    save(run, 12, "best")
    save(run, 12, "final")
    assert copy.update() == 12
    kept = {path.name for path in (drive / "r" / "checkpoints").glob("*.pt")}
    assert kept == {"best_r.pt", "r_final.pt", "r_step_10.pt", "r_step_12.pt"}
    assert {path.name for path in (drive / "r" / "checkpoints").glob("*.json")} == {f"{name}.json" for name in kept}
    named = json.loads((drive / "r" / MANIFEST).read_text())["files"]
    assert {name for name in named if name.endswith(".pt")} == {f"checkpoints/{name}" for name in kept}


def test_only_what_changed_is_written_again(run, copy, drive):
    inodes = {name: (drive / "r" / name).stat().st_ino for name in NAMES}
    save(run, 7, "best")
    copy.update()
    written = {name for name in NAMES if (drive / "r" / name).stat().st_ino != inodes[name]}
    assert written == {"run.json", "checkpoints/best_r.pt"}
    again = RunCopy(run, drive / "r", IDENTITY)  # another process reads what is there before it trusts it
    flip(drive / "r" / "checkpoints" / "r_step_4.pt")
    inodes = {name: (drive / "r" / name).stat().st_ino for name in NAMES}
    again.update()
    written = {name for name in NAMES if (drive / "r" / name).stat().st_ino != inodes[name]}
    assert written == {"checkpoints/r_step_4.pt"}
    assert contents(run).items() <= contents(drive / "r").items()


def test_what_was_lost_on_the_drive_is_copied_again(run, copy, drive):
    (drive / "r" / "checkpoints" / "best_r.pt").unlink()
    empty(drive / "r" / "history.csv")
    copy.update()
    assert contents(run).items() <= contents(drive / "r").items()


def test_remains_of_copies_that_were_cut_off_are_removed(run, copy, drive):
    for name in (".run.json.99.tmp", "checkpoints/.best_r.pt.99.tmp", "model/.model.safetensors.99.tmp"):
        (drive / "r" / name).write_bytes(b"half")
    (drive / "r" / "mine.txt").write_text("a file of the user")
    copy.update()
    assert set(contents(drive / "r")) == NAMES | SIDECARS | {MANIFEST, "mine.txt"}


def test_a_damaged_checkpoint_of_the_run_does_not_replace_the_whole_one_of_the_copy(run, copy, drive):
    whole = (drive / "r" / "checkpoints" / "best_r.pt").read_bytes()
    save(run, 7, "best")
    flip(run / "checkpoints" / "best_r.pt")
    save(run, 8)
    with pytest.raises(CheckpointError, match=r"best_r\.pt: damaged"):
        copy.update()
    assert (drive / "r" / "checkpoints" / "best_r.pt").read_bytes() == whole
    assert (drive / "r" / "checkpoints" / "r_step_8.pt").is_file()  # the others are copied all the same
    assert restored(drive, run.parent.parent / "elsewhere" / "r")[0] == (1000.0, 8)


def test_newer_checkpoints_of_another_machine_stay(run, copy, drive, tmp_path):
    ahead = tmp_path / "other" / "r"
    shutil.copytree(run, ahead)
    save(ahead, 20)
    RunCopy(ahead, drive / "r", IDENTITY).update()
    save(run, 8)
    copy.update()
    assert restored(drive, tmp_path / "elsewhere" / "r")[0] == (1000.0, 20)


# --- writing to a drive -----------------------------------------------------------------------------------------


def test_a_file_that_reads_back_differently_never_takes_its_place(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(3 << 20))
    target.write_text("old")
    calls = iter(range(100))

    def spoil():
        if next(calls) == 3:  # after the three pieces were written, while the first is read back
            temporary = next(tmp_path.glob(".target.*.tmp"))
            with open(temporary, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")

    digest = files.sha256_of(source)
    with pytest.raises(OSError, match=r"cannot write .*target: it reads back differently from what was written"):
        files.copy_atomic(source, target, digest, spoil)
    assert target.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "target"}
    files.copy_atomic(source, target, digest)
    assert target.read_bytes() == source.read_bytes()


def test_a_file_that_is_replaced_or_removed_meanwhile_is_not_taken_for_the_old_one(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"new content")
    with pytest.raises(ChangedError, match="source: was replaced while it was being copied"):
        files.copy_atomic(source, target, "0" * 64)
    source.unlink()
    with pytest.raises(ChangedError, match="source: was removed before it was copied"):
        files.copy_atomic(source, target, "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_replaced_while_the_copy_is_made_is_copied_as_it_is_then(run, drive):
    replaced = []

    def replace():
        if not replaced:
            replaced.append(save(run, 9, "best"))
            replaced.append(save(run, 9, "final"))
            Checkpoints(run / "checkpoints", "r").prune_steps(newest=10, keep=1)

    tries = RunCopy(run, drive / "r", IDENTITY, alive=replace)
    for _ in range(3):
        try:
            step = tries.update()
            break
        except ChangedError:
            continue
    assert step == 9
    assert contents(drive / "r").keys() - {MANIFEST} == contents(run).keys()
    assert restored(drive, run.parent.parent / "elsewhere" / "r") == ((pytest.approx(time.time(), abs=60), 9), [])


def test_a_drive_that_cannot_sync_folders_will_do(tmp_path, monkeypatch):
    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_text_atomic(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):  # the control
        files.write_text_atomic(tmp_path / "file", "text")


# --- bringing a run back ----------------------------------------------------------------------------------------


def test_a_lost_folder_comes_back_whole(run, copy, drive):
    before = contents(run)
    shutil.rmtree(run)
    assert restored(drive, run) == ((1000.0, 6), [])
    assert contents(run) == before


def test_a_folder_that_is_behind_is_brought_forward(run, copy, drive, tmp_path):
    behind = tmp_path / "behind" / "r"
    save(behind, 2, "best")
    save(behind, 4)
    save(behind, 5)
    assert restored(drive, behind) == ((1000.0, 6), [])
    assert (behind / "run.json").read_bytes() == (run / "run.json").read_bytes()
    assert Checkpoints(behind / "checkpoints", "r").newest_valid(pytest.fail)[1]["state"]["step"] == 6


@pytest.mark.parametrize("step", [6, 7])
def test_a_folder_that_is_as_far_or_further_is_left_alone(run, copy, drive, tmp_path, step):
    ahead = tmp_path / "ahead" / "r"
    save(ahead, step)
    before = contents(ahead)
    assert restored(drive, ahead) == (None, [])
    assert contents(ahead) == before


def test_a_folder_whose_own_checkpoints_are_damaged_is_mended(run, copy, drive):
    whole = contents(run)
    for path in (run / "checkpoints").glob("*.pt"):
        flip(path)
    assert restored(drive, run) == ((1000.0, 6), [])
    assert contents(run) == whole


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
def test_a_damaged_checkpoint_of_the_copy_is_named_and_the_one_before_used(copy, drive, tmp_path, damage):
    newest = drive / "r" / "checkpoints" / "r_step_6.pt"
    damage(newest)
    came_back, told = restored(drive, tmp_path / "new" / "r")
    assert came_back == (1000.0, 4)
    (warning,) = told
    assert warning.startswith(f"warning: {newest}: ")
    assert "damaged: sha256 is" in warning or "cannot be read" in warning
    assert not (tmp_path / "new" / "r" / "checkpoints" / "r_step_6.pt").exists()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damaged=st.sets(st.sampled_from(["best_r", "r_step_4", "r_step_6"])), without=st.sampled_from(["", MANIFEST]))
def test_the_newest_whole_checkpoint_comes_back_whatever_is_damaged(copy, drive, tmp_path_factory, damaged, without):
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(drive, place / "drive")
    (place / "drive" / "r" / without).unlink() if without else None
    for name in damaged:
        flip(place / "drive" / "r" / "checkpoints" / f"{name}.pt")
    steps = {"best_r": 2, "r_step_4": 4, "r_step_6": 6}
    whole = [step for name, step in steps.items() if name not in damaged]
    if not whole:
        with pytest.raises(CheckpointError, match="none of its checkpoints can be read"):
            restored(place / "drive", place / "r")
        assert not (place / "r").exists()
        return
    came_back, told = restored(place / "drive", place / "r")
    assert came_back[1] == max(whole)
    assert {name for name in steps if any(f"{name}.pt: damaged" in text for text in told)} == damaged
    newest = Checkpoints(place / "r" / "checkpoints", "r").newest_valid(pytest.fail)[1]
    assert newest["state"]["step"] == max(whole)


def test_damaged_files_beside_the_checkpoints_are_named_and_passed_over(copy, drive, tmp_path):
    flip(drive / "r" / "run.json")
    cut(drive / "r" / "model" / "model.safetensors")
    (drive / "r" / "history.csv").unlink()
    came_back, told = restored(drive, tmp_path / "new" / "r")
    assert came_back == (1000.0, 6)
    assert {text.split(": ")[1] for text in told} == {
        str(drive / "r" / name) for name in ("run.json", "model/model.safetensors", "history.csv")
    }
    assert all(text.endswith("passed over") for text in told)
    assert {path.name for path in (tmp_path / "new" / "r").iterdir()} == {"checkpoints"}


def _not_json(path):
    path.write_text("{half")


def _other_shape(path):
    path.write_text('{"format_version": 1, "identity": 5, "time": 1.0, "files": {}}')


def _no_hash(path):
    path.write_text(path.read_text().replace('"sha256"', '"sha255"', 1))


@pytest.mark.parametrize("damage", [Path.unlink, empty, _not_json, _other_shape, _no_hash])
def test_without_its_manifest_the_records_beside_the_checkpoints_stand_in(copy, drive, tmp_path, damage):
    damage(drive / "r" / MANIFEST)
    came_back, told = restored(drive, tmp_path / "new" / "r")
    assert came_back[1] == 6
    assert len(told) == (damage is not Path.unlink)
    assert all(text.startswith(f"warning: {drive / 'r' / MANIFEST}: damaged") for text in told)
    assert {path.name for path in (tmp_path / "new" / "r").iterdir()} == {"checkpoints"}  # nothing that is not verified


def test_without_the_records_beside_the_checkpoints_the_manifest_stands_in(run, copy, drive):
    for path in (drive / "r" / "checkpoints").glob("*.json"):
        path.unlink()
    before = contents(run)
    shutil.rmtree(run)
    assert restored(drive, run) == ((1000.0, 6), [])
    assert contents(run) == before


def test_a_copy_of_which_nothing_is_recorded_brings_nothing_back(copy, drive, tmp_path):
    (drive / "r" / MANIFEST).unlink()
    for path in (drive / "r" / "checkpoints").glob("*.json"):
        path.unlink()
    assert restored(drive, tmp_path / "new" / "r") == (None, [])
    assert not (tmp_path / "new").exists()


def test_where_all_is_damaged_the_folder_goes_on_with_what_it_has(run, copy, drive):
    for path in (drive / "r" / "checkpoints").glob("*.pt"):
        flip(path)
    (run / "checkpoints" / "r_step_6.pt").unlink()
    before = contents(run)
    came_back, told = restored(drive, run)
    assert (came_back, len(told)) == (None, 3)
    assert contents(run) == before


def test_a_run_copied_by_hand_is_a_copy(run, drive, tmp_path):
    shutil.copytree(run, drive / "r")
    assert restored(drive, tmp_path / "new" / "r")[0][1] == 6


@pytest.mark.parametrize("manifest", [True, False])
def test_the_copy_of_another_run_is_refused_and_nothing_changes(run, copy, drive, manifest):
    if not manifest:
        (drive / "r" / MANIFEST).unlink()
    before, there = contents(run), contents(drive)
    (run / "checkpoints" / "r_step_6.pt").unlink()
    before.pop("checkpoints/r_step_6.pt")
    with pytest.raises(CheckpointError, match=r"identity aaaaaaaaaaaa, here bbbbbbbbbbbb.*Give another name or mir"):
        restored(drive, run, OTHER)
    assert (contents(run), contents(drive)) == (before, there)


def test_the_copy_of_a_later_version_is_refused(copy, drive, tmp_path):
    path = drive / "r" / MANIFEST
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match=r"MIRROR\.json: version 2, this library reads up to 1; upgrade it"):
        restored(drive, tmp_path / "new" / "r")


@pytest.mark.parametrize("name", ["../evil.json", "checkpoints/../../evil", "/etc/evil", "model/.hidden", "other/x"])
def test_a_manifest_cannot_reach_outside_the_run(copy, drive, tmp_path, name):
    path = drive / "r" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][name] = [{"sha256": hashlib.sha256(b"evil").hexdigest(), "bytes": 4}]
    path.write_text(json.dumps(manifest))
    (drive / "evil.json").write_bytes(b"evil")
    assert restored(drive, tmp_path / "new" / "r")[0][1] == 6
    assert not list((tmp_path / "new").rglob("*evil*"))
    assert not (tmp_path / "new" / "evil.json").exists()


# --- a process that is killed -----------------------------------------------------------------------------------


def fail(text):
    raise AssertionError(text)


def in_another_process(work):
    """Run `work` in a forked process; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def dying(operation, place):
    """Die just before files below `place` are touched for the n-th time; returns what counts as touching too."""
    left = iter(range(operation, -1, -1))

    def touched(event="", arguments=("",)):
        there = str(arguments[0]).startswith(str(place)) and event in ("open", "os.rename", "os.remove", "os.mkdir")
        if (not event or there) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(touched)
    return touched


def _copy_until(operation, run, drive):
    save(run, 8, "best")
    save(run, 8)
    copy = RunCopy(run, drive / "r", IDENTITY, alive=dying(operation, drive))
    assert copy.restore(fail) is None
    copy.update()


def whole(drive, folder):
    """The step that comes back, which is the content of everything that does; nothing is named as damaged."""
    came_back, told = restored(drive, folder)
    assert told == []
    payload = Checkpoints(folder / "checkpoints", "r").newest_valid(fail)[1]
    assert payload["state"]["step"] == came_back[1]
    assert torch.all(payload["model"] == came_back[1])
    assert (folder / "run.json").is_file()
    return came_back[1]


@pytest.mark.slow
def test_a_copy_that_is_killed_before_any_of_its_operations_is_whole(run, copy, drive, tmp_path):
    steps, remains = [], 0
    for operation in range(1_000):
        place = tmp_path / str(operation)
        shutil.copytree(run, place / "r")
        shutil.copytree(drive, place / "drive")
        ended = in_another_process(lambda at=operation, place=place: _copy_until(at, place / "r", place / "drive"))
        remains += bool(list((place / "drive" / "r").rglob(".*.tmp")))
        steps.append(whole(place / "drive", place / "new" / "r"))
        assert contents(place / "new" / "r").keys() >= {"history.csv", "model/model.safetensors"}
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert steps == sorted(steps)  # from the copy before to the new one
    assert (steps[0], steps[-1]) == (6, 8)
    assert len(steps) > 30
    assert remains > 5


def without_remains(folder):
    """The files of a run; a record may name an older content too, so each is checked, not compared."""
    for path in (folder / "checkpoints").glob("*.pt"):
        verified_entry(path)
    return {name: data for name, data in contents(folder).items() if not name.endswith((".tmp", ".pt.json"))}


def _restore_until(operation, run, drive):
    dying(operation, run)
    restored(drive, run)


@pytest.mark.slow
def test_a_restoring_that_is_killed_before_any_of_its_operations_is_done_again(run, copy, drive, tmp_path):
    before = without_remains(run)
    for operation in range(1_000):
        folder = tmp_path / str(operation) / "r"
        save(folder, 1, "best")  # behind, and with an older best
        ended = in_another_process(lambda at=operation, folder=folder: _restore_until(at, folder, drive))
        assert Checkpoints(folder / "checkpoints", "r").newest_valid(fail)[1]["state"]["step"] in (1, 2, 4, 6)
        complete = without_remains(folder) == before
        assert restored(drive, folder) == (None if complete else (1000.0, 6), [])
        assert without_remains(folder) == before
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert operation > 20


def _train_and_copy(folder, drive, acknowledge):
    """What a training does, without the training: save, copy, say which step is copied."""
    copy = RunCopy(folder, drive / "r", IDENTITY)
    came_back = copy.restore(fail)
    step = came_back[1] if came_back else 10
    while True:
        step += 1
        save(folder, step, "best", size=50_000)
        if step % 3 == 0:
            save(folder, step, size=50_000)
            Checkpoints(folder / "checkpoints", "r").prune_steps(newest=step)
        acknowledge.send(copy.update())


def killed_after(seconds, folder, drive):
    """The last step that a process said was copied, killed some time after the first."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_train_and_copy, args=(folder, drive, sender))
    process.start()
    sender.close()
    last = receiver.recv()
    time.sleep(seconds)
    process.kill()
    process.join()
    with contextlib.suppress(EOFError):
        while True:
            last = receiver.recv()
    return last


def test_machine_after_machine_is_lost_at_random_and_no_copied_step_with_it(drive, tmp_path):
    moments, furthest = random.Random(1), 0
    for machine in range(8):
        acknowledged = killed_after(moments.uniform(0, 0.05), tmp_path / f"{machine}" / "r", drive)
        came_back = whole(drive, tmp_path / f"after-{machine}" / "r")
        assert came_back >= acknowledged > furthest
        furthest = acknowledged


# --- the thread -------------------------------------------------------------------------------------------------


def settled(mirror):
    """Wait until nothing is being copied; the safety then."""
    with mirror._changed:
        assert mirror._changed.wait_for(lambda: not mirror._pending(), timeout=20)
    return mirror.safety()


def waited(happened):
    """Whether something came to happen within some seconds."""
    ends = time.monotonic() + 20
    while not happened() and time.monotonic() < ends:
        time.sleep(0.01)
    return happened()


def test_safety_says_where_the_work_is(run, drive):
    now = [10_000.0]
    copier = Mirror(run, drive, IDENTITY, pause=0, clock=lambda: now[0])
    assert copier.safety() == SyncStatus("local", "only on this machine so far", True)
    save(run, 1200)
    copier.request()
    assert settled(copier) == SyncStatus("synced", "synced less than a minute ago (step 1,200)", True)
    now[0] += 150
    assert copier.safety().text == "synced 2 minutes ago (step 1,200)"
    drive.rename(drive.with_name("unplugged"))
    save(run, 1300)
    now[0] += 12 * 60
    copier.request()
    gone = settled(copier)
    assert (gone.kind, gone.safe) == ("ENOENT", False)
    assert gone.text == (
        f"NOT synced for 14 minutes: {drive / 'r'}: the copy is gone (is the drive still mounted?); the last copy is "
        "of step 1,200"
    )
    drive.with_name("unplugged").rename(drive)
    now[0] += 3 * 3600
    copier.request()
    assert settled(copier).text == "synced less than a minute ago (step 1,300)"
    told = []
    assert copier.close(told.append) == SyncStatus("synced", "complete and verified (step 1,300)", True)
    assert told == [f"copy in {drive / 'r'}: complete and verified (step 1,300)"]


def test_an_empty_mount_point_is_not_taken_for_the_drive(run, drive):
    copier = Mirror(run, drive, IDENTITY, pause=0)
    copier.request()
    assert settled(copier).kind == "synced"
    (drive / "r").rename(drive.with_name("unplugged"))
    copier.request()
    assert "the copy is gone (is the drive still mounted?)" in settled(copier).text
    assert list(drive.iterdir()) == []
    copier.close()


def test_a_copy_that_failed_is_tried_again_without_being_asked_for(run, drive):
    copier = Mirror(run, drive, IDENTITY, pause=0, retry=0.05)
    drive.rename(drive.with_name("unplugged"))
    copier.request()
    assert settled(copier).kind == "ENOENT"
    drive.with_name("unplugged").rename(drive)
    assert waited(lambda: copier.safety().kind == "synced")
    assert (drive / "r" / MANIFEST).is_file()
    assert copier.close().safe


def test_the_end_of_a_drive_that_stays_away_is_one_more_attempt(run, drive, monkeypatch):
    attempts, attempt = [], Mirror._try
    monkeypatch.setattr(Mirror, "_try", lambda self: attempts.append(1) or attempt(self))
    copier = Mirror(run, drive, IDENTITY, pause=0, retry=10_000)
    drive.rmdir()
    copier.request()
    assert settled(copier).kind == "ENOENT"
    assert copier.close().kind == "ENOENT"
    assert len(attempts) == 2


def test_a_slow_end_is_announced(run, drive, monkeypatch):
    monkeypatch.setattr(mirror, "_PATIENCE_SECONDS", 0.0)
    release, told = hang(drive), []
    copier = Mirror(run, drive, IDENTITY)
    threading.Timer(0.3, release).start()
    copier.close(told.append)
    assert told == [
        f"copying the last state to {drive / 'r'} …",
        f"copy in {drive / 'r'}: complete and verified (step 6)",
    ]


def test_a_drive_that_is_never_there_leaves_the_work_on_this_machine(run, drive):
    copier = Mirror(run, drive, IDENTITY, pause=0)
    drive.rmdir()
    told = []
    safety = copier.close(told.append)
    assert safety.text == (
        f"NOT synced: {drive / 'r'}: No such file or directory (is the drive still mounted?); only on this machine"
    )
    assert told == [f"warning: copy in {drive / 'r'}: {safety.text}"]


def test_a_full_drive_is_named_with_what_to_do(run, drive, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, f"cannot write {drive / 'r' / 'run.json'}: No space left on device")

    monkeypatch.setattr(mirror_copy, "copy_atomic", full)
    copier = Mirror(run, drive, IDENTITY, pause=0)
    safety = copier.close()
    assert safety.kind == "ENOSPC"
    assert safety.text.startswith(f"NOT synced: cannot write {drive / 'r' / 'run.json'}: No space left on device (free")
    assert "empty its bin" in safety.text


def test_a_fault_of_the_copy_itself_is_no_end_of_the_training(run, drive, monkeypatch):
    monkeypatch.setattr(RunCopy, "update", lambda self: 1 / 0)
    assert Mirror(run, drive, IDENTITY, pause=0).close().text == "NOT synced: division by zero; only on this machine"


def hang(drive):
    """Make reading the copy's run.json hang, as a drive without a connection does; returns what lets it go on."""
    path = drive / "r" / "run.json"
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    return threading.Thread(target=lambda: open(path, "wb").close(), daemon=True).start


def test_a_hanging_drive_is_given_up_and_stops_nothing(run, drive, monkeypatch):
    monkeypatch.setattr(mirror, "STALL_SECONDS", 0.2)
    release = hang(drive)
    copier = Mirror(run, drive, IDENTITY, pause=0)
    copier.request()
    for _ in range(1000):
        copier.request()  # none of them waits
    while copier.safety().kind != "stalled":
        time.sleep(0.01)
    assert copier.safety().text == "NOT synced: the drive does not answer; only on this machine"
    safety = copier.close(stall=0.2)
    assert safety.text == "NOT synced: the drive does not answer; only on this machine"
    release()
    copier._thread.join(20)
    assert not copier._thread.is_alive()
    assert not (drive / "r" / MANIFEST).exists()  # nothing is written after it was given up


def test_while_a_copy_is_made_any_number_of_requests_make_one_more(run, drive, monkeypatch):
    copies, attempt = [], Mirror._try
    monkeypatch.setattr(Mirror, "_try", lambda self: copies.append(1) or attempt(self))
    release = hang(drive)
    copier = Mirror(run, drive, IDENTITY, pause=0)
    copier.request()
    while not copies:
        time.sleep(0.01)
    for step in range(7, 20):
        save(run, step)
        copier.request()
    release()
    assert settled(copier).text == "synced less than a minute ago (step 19)"
    assert len(copies) == 2
    copier.close()


def test_between_copies_there_is_a_pause_but_not_at_the_end(run, drive):
    copier = Mirror(run, drive, IDENTITY, pause=10_000)
    copier.request()
    while copier.safety().kind != "synced":
        time.sleep(0.01)
    save(run, 8)
    copier.request()
    assert copier.safety().text == "synced less than a minute ago (step 6)"
    assert copier.close().text == "complete and verified (step 8)"


def test_ctrl_c_ends_the_waiting_for_the_last_copy_and_nothing_else(run, drive, monkeypatch):
    release = hang(drive)
    copier = Mirror(run, drive, IDENTITY)

    def interrupted(timeout):
        raise KeyboardInterrupt

    monkeypatch.setattr(copier._changed, "wait", interrupted)
    safety = copier.close()
    assert safety.text == "NOT synced: the last copy was given up; only on this machine"
    release()
    copier._thread.join(20)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "nowhere': must be a folder that exists; make it, or mount its drive"),
        ("results", "results': must be another folder than results_dir"),
    ],
)
def test_a_folder_that_cannot_hold_copies_is_refused(run, tmp_path, folder, message):
    with pytest.raises(ValueError, match=r"mirror_dir = .*" + message):
        Mirror(run, tmp_path / folder, IDENTITY)
    assert not (tmp_path / "nowhere").exists()


def test_the_terminal_tells_each_trouble_once_and_when_it_is_over(capsys):
    full, gone = SyncStatus("ENOSPC", "NOT synced: full", False), SyncStatus("ENOENT", "NOT synced: gone", False)
    course = [
        SyncStatus("local", "only here"), SyncStatus("copying", "copying"), SyncStatus("synced", "synced (step 1)"),
        SyncStatus("copying", "copying"), SyncStatus("synced", "synced (step 2)"), full,
        SyncStatus("copying", "copying"), full, gone, full, gone,
        SyncStatus("synced", "synced (step 9)"), SyncStatus("synced", "synced (step 10)"),
    ]  # fmt: skip
    progress = TerminalProgress(line_seconds=1e9)
    progress.watch(iter(course).__next__)
    for step in range(1, len(course) + 1):
        progress.step(step, 100, 0.1, 3.0, 1000.0)
    assert capsys.readouterr().err.splitlines() == [
        "copy: synced (step 1)", "warning: copy: NOT synced: full", "warning: copy: NOT synced: gone",
        "copy: synced (step 9)",
    ]  # fmt: skip


# --- whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, drive, monkeypatch):
    monkeypatch.setattr(curves, "write_curves", lambda *args: None)  # most of the time of so small a run
    text = write_text(tmp_path / "text")
    return tiny_config(text, results_dir=str(tmp_path / "here"), mirror_dir=str(drive), name="r")


def trained(config, stop_at=None, **options):
    """(trainer, messages) of a run, stopped after a step if asked for."""
    progress, kept = (StopAt(stop_at) if stop_at else Quiet()), []
    messages = progress.messages = []
    progress.message = messages.append

    def watch(trainer):
        kept.append(trainer)
        progress.trainer = trainer

    nl.train(config, progress=progress, watch=watch, **options)
    return (kept or [None])[0], messages


def test_a_run_whose_machine_is_lost_goes_on_from_its_copy_bit_for_bit(config, tmp_path, drive):
    whole, _ = trained(config, mirror_dir=None, results_dir=str(tmp_path / "whole"))
    _, messages = trained(config, stop_at=11)
    assert messages[-1] == f"copy in {drive / 'r'}: complete and verified (step 11)"
    shutil.rmtree(config.results_dir)
    trainer, messages = trained(config)
    assert f"brought back from {drive / 'r'}: step 11, copied less than a minute ago" in messages
    assert any("continuing r from r_step_11.pt: step 11 of 16" in text for text in messages)
    assert same(result_of(trainer), result_of(whole))
    assert nl.load(Path(config.results_dir) / "r").record["status"] == "finished"
    assert contents(Path(config.results_dir) / "r").items() <= contents(drive / "r").items()


def test_the_copy_follows_while_the_run_trains(config, drive):
    class Wait(Quiet):
        copied = None

        def watch(self, safety):
            self.safety = safety

        def step(self, step, *_rest):
            if step == 12:  # after validations, and so checkpoints, at 3, 6, 8 and 9
                tries = iter(range(2_000))
                while self.safety().kind in ("local", "copying") and next(tries, None) is not None:
                    time.sleep(0.01)
                self.copied = set(contents(drive / "r"))

    progress = Wait()
    nl.train(config, progress=progress)
    assert progress.copied >= {MANIFEST, "run.json", "model/model.safetensors", "checkpoints/best_r.pt"}


def test_a_damaged_newest_copy_still_gives_the_same_result(config, tmp_path, drive):
    whole, _ = trained(config, mirror_dir=None, results_dir=str(tmp_path / "whole"))
    trained(config, stop_at=11)
    shutil.rmtree(config.results_dir)
    flip(drive / "r" / "checkpoints" / "r_step_11.pt")
    trainer, messages = trained(config)
    assert any("r_step_11.pt: damaged" in text and text.endswith("passed over") for text in messages)
    assert any("continuing r from best_r.pt: step 9 of 16" in text for text in messages)
    assert same(result_of(trainer), result_of(whole))


def test_a_batch_left_to_the_hardware_comes_back_even_without_the_record(config, drive):
    trained(config, batch_size=None, max_steps=1)
    shutil.rmtree(config.results_dir)
    flip(drive / "r" / "run.json")
    path = drive / "r" / "checkpoints" / "r_final.pt"
    payload = load_checkpoint(path, fail)
    payload["config"]["train"]["batch_size"] = payload["decided"]["batch_size"] = 16  # as on a smaller machine
    save_checkpoint(path, payload, 1)
    (drive / "r" / "checkpoints" / "best_r.pt").unlink()
    trainer, _ = trained(config, batch_size=None, max_steps=2)
    assert (trainer.setup.config.train.batch_size, trainer.state.step) == (16, 2)


def test_a_drive_that_fails_in_the_middle_changes_nothing_about_the_run(config, tmp_path, drive):
    whole, _ = trained(config, mirror_dir=None, results_dir=str(tmp_path / "whole"))

    class Unplug(Quiet):
        def validated(self, row, best):
            if row["step"] == 6:
                drive.rename(tmp_path / "unplugged")

    progress, kept = Unplug(), []
    run = nl.train(config, progress=progress, watch=kept.append)
    assert run.record["status"] == "finished"
    assert same(result_of(kept[0]), result_of(whole))
    assert progress.messages[-1].startswith(f"warning: copy in {drive / 'r'}: NOT synced")
    assert not drive.exists()
    (tmp_path / "unplugged").rename(drive)
    _, messages = trained(config)  # finished already, but not its copy
    assert any("already finished" in text for text in messages)
    assert messages[-1] == f"copy in {drive / 'r'}: complete and verified (step 16)"
    assert contents(run.folder).items() <= contents(drive / "r").items()


def test_a_hanging_drive_delays_only_the_end(config, drive, monkeypatch):
    monkeypatch.setattr(Mirror.close, "__defaults__", (Mirror.close.__defaults__[0], 0.2))
    release = hang(drive)
    trainer, messages = trained(config)
    assert trainer.ended() == "finished"
    assert (
        messages[-1] == f"warning: copy in {drive / 'r'}: NOT synced: the last copy was given up; only on this machine"
    )
    release()


def test_fresh_keeps_the_old_run_and_its_copy(config, drive):
    trained(config, stop_at=11)
    old, old_copy = contents(Path(config.results_dir) / "r"), contents(drive / "r")
    trainer, messages = trained(config, fresh=True)
    assert trainer.state.step == 16
    assert not any("brought back" in text for text in messages)
    assert contents(Path(config.results_dir) / "r.old-1") == old
    assert contents(drive / "r.old-1") == old_copy
    assert contents(Path(config.results_dir) / "r").items() <= contents(drive / "r").items()


def test_two_runs_of_one_name_are_kept_apart(config, tmp_path, drive):
    trained(config, max_steps=3)
    there = contents(drive)
    with pytest.raises(CheckpointError, match="the copy of a run with other settings or other data"):
        trained(config, lr=1e-2, results_dir=str(tmp_path / "other"))
    assert not (tmp_path / "other" / "r").exists()
    with pytest.raises(CheckpointError, match=r"of a run with other settings: lr 0\.003 there, 0\.01 here"):
        trained(config, lr=1e-2)  # the run's own folder speaks first
    assert contents(drive) == there


def test_an_imported_run_is_not_replaced_by_a_copy(config):
    trained(config, max_steps=3)
    folder = Path(config.results_dir) / "r"
    record = json.loads((folder / "run.json").read_text())
    shutil.rmtree(folder / "checkpoints")
    (folder / "run.json").write_text(json.dumps(record | {"status": "imported", "identity": None}))
    before = contents(folder)
    with pytest.raises(CheckpointError, match="an imported run"):
        trained(config)
    assert contents(folder) == before


def test_a_wrong_folder_is_named_before_anything_is_spent(config, tmp_path):
    with pytest.raises(ValueError, match=r"mirror_dir = .*must be a folder that exists"):
        nl.train(config, mirror_dir=str(tmp_path / "typo"), progress=Quiet())
    assert not (tmp_path / "here").exists()


def test_the_record_beside_each_copied_checkpoint_is_its_own(run, copy, drive):
    for path in (drive / "r" / "checkpoints").glob("*.pt"):
        (entry,) = json.loads(sidecar(path).read_text())["contents"]
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
