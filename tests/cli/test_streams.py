"""What is printed never ends what it tells of: closed terminals, full disks, pipes that end, poor encodings."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from tiny import tiny_command, tiny_config

import newllm_lib as nl
from newllm_lib.escaping import say
from newllm_lib.reporting.progress import TerminalProgress
from newllm_lib.system.console import UnfailingStream


@pytest.fixture
def config(text, tmp_path):
    return tiny_config(text, name="r", results_dir=str(tmp_path / "results"))


def shell(command, line, **environment):
    """Run `line`, in which "$@" is the command, in a shell."""
    words = ["bash", "-o", "pipefail", "-c", line, "bash", *command]
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=200, env=os.environ | environment)


# --- a stream that fails ------------------------------------------------------------------------------------------


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_message_that_cannot_be_written_is_lost(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed, None):
        say("x", stream and UnfailingStream(stream))
        monkeypatch.setattr(sys, "stderr", stream)
        say("x", err=True)
        TerminalProgress().message("x")
    with pytest.raises(OSError, match="No space"):  # the control
        print("x", file=Full())


def test_a_message_for_standard_error_never_goes_to_standard_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    say("x", err=True)
    assert capsys.readouterr().out == ""


def test_what_an_encoding_lacks_is_escaped():
    poor = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("8 … ‘é’", poor)
    assert poor.buffer.getvalue() == b"8 \\u2026 \\u2018\\xe9\\u2019\n"


class Terminal(Full):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_that_is_gone():
    progress = TerminalProgress(Terminal())
    for step in (1, 2):
        progress.step(step, 9, 0.1, 1.0, 10.0)
    progress.evaluating()
    progress.message("x")
    progress.close()


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "status"),
    [
        ('"$@" 2>/dev/full', 0),
        ('"$@" 2>&- <&-', 0),
        ('"$@" 2>&- <&- >&-', 0),
        ('"$@" 2>&1 | head -n 1', 1),  # of the command: its results find no reader
        ('"$@" >/dev/full', 1),  # the results are lost, which a program must learn
        ('LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=ascii "$@"', 0),
    ],
)
def test_a_run_is_finished_whatever_becomes_of_its_output(config, line, status):
    done = shell(tiny_command(config, steps=6), line)
    assert done.returncode == status, done.stderr
    assert nl.load(os.path.join(config.results_dir, "r")).record.status == "finished"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if "full" in line and status:
        assert done.stderr.splitlines()[-1] == "Error: cannot write to standard output: No space left on device"


@pytest.mark.slow
def test_messages_never_go_into_json(config):
    for line in ('"$@" --json', '"$@" --json 2>&-', '"$@" --json --plan 2>&-'):
        done = shell(tiny_command(config, steps=6), line)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)


def start_in_terminal(config, **options):
    """The command in a terminal of its own, once it has saved something; the process and the terminal's end."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        tiny_command(config), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, **options
    )
    os.close(theirs)
    folder, end = os.path.join(config.results_dir, "r", "checkpoints"), time.monotonic() + 120
    while not (os.path.isdir(folder) and any(name.endswith(".pt") for name in os.listdir(folder))):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    return process, ours


def ended_as(config, process, ours):
    os.set_blocking(ours, False)
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:  # a terminal that nobody reads fills up
        try:
            os.read(ours, 1 << 16)
        except (BlockingIOError, OSError):
            time.sleep(0.05)
    return process.wait(1), nl.load(os.path.join(config.results_dir, "r")).record


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_hangup_saves_as_a_termination_does(config, number):
    process, ours = start_in_terminal(config)
    process.send_signal(number)
    process.send_signal(number)
    status, record = ended_as(config, process, ours)
    assert (status, record.status) == (1, "interrupted")
    assert f"r_step_{record.step}.pt" in os.listdir(os.path.join(config.results_dir, "r", "checkpoints"))


@pytest.mark.slow
def test_a_hangup_that_is_ignored_stays_ignored(config):
    """As under nohup: the terminal goes, the training stays."""
    process, ours = start_in_terminal(config, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    before = nl.load(os.path.join(config.results_dir, "r")).record.step
    end = time.monotonic() + 60
    while nl.load(os.path.join(config.results_dir, "r")).record.step <= before:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    assert nl.load(os.path.join(config.results_dir, "r")).record.status == "interrupted"
