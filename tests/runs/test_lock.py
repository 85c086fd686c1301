"""One writer for each run: processes, threads, kills, file systems without locks."""

import errno
import json
import os
import signal
import socket
import subprocess
import threading
import time

import filelock
import pytest
from tiny import Quiet, tiny_command, tiny_config

import newllm_lib as nl
from newllm_lib.errors import ConfigError, RunInUseError
from newllm_lib.runs import lock as locks
from newllm_lib.runs.lock import RunLock, lock_path

HOST = socket.gethostname()


@pytest.fixture
def config(text, tmp_path):
    return tiny_config(text, name="r", results_dir=str(tmp_path / "results"), max_steps=6)


@pytest.fixture
def place(config, tmp_path):
    return tmp_path / "results" / ".r.lock"


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that cannot lock."""

    class Unable:
        def __init__(self, *args, **options):
            pass

        def acquire(self):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks, "FileLock", Unable)


def holder(**changes):
    """What a lock file says of a process of this host that is alive."""
    now = time.time()
    return {"host": HOST, "pid": os.getppid(), "started": now - 100, "renewed": now} | changes


@pytest.fixture
def training(config, place):
    """The same run in another process, which has saved something."""
    process = subprocess.Popen(tiny_command(config), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not list(place.parent.glob("r/checkpoints/*.pt")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_second_process_is_refused_in_one_sentence(training, config, place):
    record = (place.parent / "r" / "run.json").read_text()
    started = json.loads(place.read_text())["started"]
    for more in ((), ("--fresh",)):
        second = subprocess.run(tiny_command(config, *more), check=False, capture_output=True, text=True, timeout=100)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))
        assert second.stderr.splitlines()[-1] == (
            f"Error: {place.parent}/r: is being trained by process {training.pid} on {HOST}, since {since}. Wait until "
            "it has ended, stop it, or give this run another name"
        )
        assert (second.returncode, second.stdout) == (1, "")
    assert json.loads((place.parent / "r" / "run.json").read_text())["status"] == "running"
    assert json.loads(record)["identity"] and not (place.parent / "r.old-1").exists()
    training.send_signal(signal.SIGTERM)
    assert training.wait(60) == 1
    assert place.read_text() == ""


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(training, config, place):
    training.send_signal(signal.SIGKILL)
    training.wait(60)
    assert json.loads(place.read_text())["pid"] == training.pid
    asked = subprocess.run(tiny_command(config, "--plan"), check=False, capture_output=True, text=True, timeout=100)
    assert asked.returncode == 0
    run = nl.load(place.parent / "r")
    said = Quiet()
    step = 6 + max(nl.checkpoint.recorded_step(path) for path in (run.folder / "checkpoints").glob("*.pt"))
    again = nl.train(run.requested, max_steps=step, decay_steps=100_000, progress=said)
    assert (again.record["status"], again.record["step"]) == ("finished", step)
    assert not any("taking over" in text for text in said.messages)
    assert any(text.startswith("continuing r from") for text in said.messages)


def test_another_thread_of_this_process_is_refused(config):
    found = []

    def second(trainer):
        def body():
            try:
                nl.train(config, progress=Quiet())
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()

    nl.train(config, progress=Quiet(), watch=second)
    (error,) = found
    assert isinstance(error, RunInUseError) and isinstance(error, ValueError)
    assert f"process {os.getpid()} on {HOST}" in str(error)


def test_an_interrupt_gives_the_run_back(config, place):
    def interrupt(trainer):
        assert json.loads(place.read_text())["pid"] == os.getpid()
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            nl.train(config, progress=Quiet(), watch=interrupt)
        assert place.read_text() == ""
    assert nl.train(config, progress=Quiet()).record["status"] == "finished"
    assert not any(thread.name.startswith("lock of") for thread in threading.enumerate())


def test_an_error_gives_the_run_back(config, place):
    with pytest.raises(ZeroDivisionError):
        nl.train(config, progress=Quiet(), watch=lambda trainer: 1 / 0)
    assert nl.train(config, fresh=True, progress=Quiet()).record["status"] == "finished"


def test_what_another_host_left_is_taken_over_with_a_line(config, place):
    place.parent.mkdir()
    place.write_text(json.dumps(holder(host="elsewhere", pid=77, renewed=time.time() - 7200)))
    said = Quiet()
    nl.train(config, progress=said)
    (line,) = [text for text in said.messages if "taking over" in text]
    assert line == f"taking over {place.parent}/r from process 77 on elsewhere, which was last seen 2 h ago"


@pytest.mark.parametrize(
    "left", ["", "{}", "[]", "null", "nonsense", '{"host": 1, "pid": "x"}', '{"host": "h", "pid": 1}', "\ud800",
             '{"host": "h", "pid": 1, "started": 1e999, "renewed": NaN}'],
)  # fmt: skip
def test_what_the_file_says_decides_nothing(config, place, left):
    place.parent.mkdir()
    place.write_bytes(left.encode(errors="surrogatepass"))
    assert nl.train(config, progress=Quiet()).record["status"] == "finished"
    held = filelock.FileLock(str(place))
    with held:
        place.write_bytes(left.encode(errors="surrogatepass"))
        with pytest.raises(RunInUseError, match="is being trained by"):
            nl.train(config, progress=Quiet())


def test_without_locks_it_trains_with_one_warning(config, place, no_locks):
    said = Quiet()
    assert nl.train(config, progress=said).record["status"] == "finished"
    (warning,) = [text for text in said.messages if "cannot lock" in text]
    assert warning == (
        f"warning: {place.parent}: this file system cannot lock files ([Errno 37] No locks available): make sure that "
        "nothing else trains r"
    )


@pytest.mark.parametrize(
    ("seconds", "changes", "alive"),
    [
        (0, {}, True),
        (590, {}, True),
        (601, {}, False),
        (0, {"host": "elsewhere"}, False),
        (0, {"pid": 2**22 + 1}, False),  # there is no such process
    ],
)
def test_without_locks_the_time_stamp_decides(config, place, no_locks, seconds, changes, alive):
    place.parent.mkdir()
    place.write_text(json.dumps(holder(renewed=time.time() - seconds, **changes)))
    said = Quiet()
    if alive:
        with pytest.raises(RunInUseError, match=f"process {os.getppid()} on {HOST}"):
            nl.train(config, progress=said)
    else:
        nl.train(config, progress=said)
        assert any(text.startswith(f"taking over {place.parent}/r from process") for text in said.messages)


def test_the_time_stamp_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_RENEW_SECONDS", 0.01)
    with RunLock(pytest.fail) as lock:
        lock.take(tmp_path / "r")
        first = json.loads(lock_path(tmp_path / "r").read_text())
        end, later = time.monotonic() + 60, first
        while later["renewed"] == first["renewed"]:
            assert time.monotonic() < end
            later = locks._read(lock_path(tmp_path / "r")) or first
        assert later["started"] == first["started"]
        assert first["renewed"] < later["renewed"] <= time.time()


def test_the_lock_is_in_no_bundle_and_no_copy(config, tmp_path, place):
    (tmp_path / "drive").mkdir()
    run = nl.train(config, mirror_dir=str(tmp_path / "drive"), progress=Quiet())
    assert place.is_file() and not list(run.folder.rglob("*.lock")) and not list((tmp_path / "drive").rglob("*.lock"))


def test_torchrun_with_several_processes_is_refused(config, monkeypatch, place):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 2: this is one of 2 processes that torchrun started"):
        nl.train(config, progress=Quiet())
    assert not place.exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert nl.train(config, progress=Quiet()).record["status"] == "finished"


def test_a_file_is_not_put_into_a_run_that_trains(config, tmp_path, place):
    run = nl.train(config, progress=Quiet())
    file = next((run.folder / "checkpoints").glob("*.pt"))
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with RunLock(pytest.fail) as lock:
        lock.take(run.folder)
        with pytest.raises(RunInUseError):
            nl.adopt(file, results_dir=config.results_dir)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
