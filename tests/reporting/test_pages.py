"""The report and the picture of a run: always there, always true, whatever matplotlib is set up for."""

import json
import math
import os
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
from tiny import Quiet, tiny_command, tiny_config

import newllm_lib as nl
from newllm_lib.reporting import curves, report
from newllm_lib.reporting.progress import table_line
from newllm_lib.reporting.record import RunRecord, history_rows
from newllm_lib.reporting.report import pages_are_current, report_text
from newllm_lib.runs.recorder import parts_before


@pytest.fixture
def config(text, tmp_path):
    return tiny_config(text, name="r", results_dir=str(tmp_path / "results"), epochs=None, max_steps=6)


@pytest.fixture
def done(config):
    return nl.train(config, progress=Quiet())


def is_true(run):
    """Whether report and picture show all that run.json and history.csv hold."""
    run = nl.load(run.folder)
    return pages_are_current(run.folder, run.record, history_rows(run.folder))


def remove_report(folder):
    (folder / "report.md").unlink()


def remove_picture(folder):
    (folder / "curves.png").unlink()


def old_report(folder):
    text = (folder / "report.md").read_text()
    (folder / "report.md").write_text(text.replace("Status: finished", "Status: running"))


def fewer_rows(folder):
    lines = (folder / "report.md").read_text().splitlines()
    (folder / "report.md").write_text("\n".join(line for line in lines if "| 0.75 |" not in line))


def old_picture(folder):
    rows = history_rows(folder)[:1]
    curves.write_curves(folder, nl.load(folder).record, rows)


def half_a_report(folder):
    (folder / "report.md").write_bytes((folder / "report.md").read_bytes()[:300] + b"\xff")


@pytest.mark.parametrize("damage", [remove_report, remove_picture, old_report, fewer_rows, old_picture, half_a_report])
def test_a_finished_run_makes_what_is_missing_or_stale_again(config, done, damage):
    whole = {name: (done.folder / name).read_bytes() for name in ("report.md", "curves.png")}
    assert is_true(done)
    damage(done.folder)
    assert not is_true(done)
    said = Quiet()
    nl.train(config, progress=said)
    assert f"writing the report of {done.folder} again: it was missing or older than the run" in said.messages
    assert {name: (done.folder / name).read_bytes() for name in whole} == whole
    again = Quiet()
    nl.train(config, progress=again)
    assert not any("writing the report" in text for text in again.messages)


@pytest.mark.parametrize("moment", ["history", "curves", "report"])
def test_an_interrupt_in_the_last_second_is_made_good_by_the_same_call(config, monkeypatch, moment):
    from newllm_lib.runs import recorder

    places = {
        "history": (recorder, "write_history"),
        "curves": (curves, "write_curves"),
        "report": (report, "write_report"),
    }
    module, name = places[moment]
    real = getattr(module, name)

    def interrupted(folder, *args):
        if args[0] and isinstance(args[0], dict) and args[0].get("status") == "finished":
            raise KeyboardInterrupt
        if moment == "history" and len(args[0]) == 2 and calls.append(1) is None and len(calls) == 2:
            raise KeyboardInterrupt
        return real(folder, *args)

    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            nl.train(config, progress=Quiet())
    assert nl.load(f"{config.results_dir}/r").record.status == "running"  # never finished without a report
    run = nl.train(config, progress=Quiet())
    assert run.record.status == "finished" and is_true(run)


@pytest.mark.slow
def test_the_first_moment_at_which_a_run_is_finished_its_report_is_there(config, tmp_path):
    """Ctrl-C as soon as run.json says finished."""
    process = subprocess.Popen(tiny_command(config, steps=6), stderr=subprocess.PIPE, text=True)
    record = tmp_path / "results" / "r" / "run.json"
    while process.poll() is None:
        try:
            if json.loads(record.read_text())["status"] == "finished":
                process.send_signal(signal.SIGINT)
                break
        except (OSError, ValueError):
            pass
        time.sleep(0.001)
    process.communicate()
    assert is_true(nl.load(tmp_path / "results" / "r"))


@pytest.mark.slow
def test_the_report_of_a_killed_run_has_its_validations(config, tmp_path):
    process = subprocess.Popen(tiny_command(config), stderr=subprocess.DEVNULL)
    folder, end = tmp_path / "results" / "r", time.monotonic() + 100
    while not (folder / "history.csv").exists() or len(history_rows(folder)) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.wait()
    rows, text = history_rows(folder), (folder / "report.md").read_text()
    assert f"| {rows[-2]['step']:,} | {rows[-2]['epoch']:.2f} |" in text
    assert "No curves: they are drawn when training ends." in text and "![curves]" not in text


# --- matplotlib as a user may have it -------------------------------------------------------------------------------


def run_with(config, **environment):
    command = tiny_command(config, steps=6)
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.slow
def test_a_backend_that_is_not_there_costs_the_picture_and_no_run(config, tmp_path):
    result = run_with(config, MPLBACKEND="nonsense")
    assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning") and "no picture" in line]
    folder = tmp_path / "results" / "r"
    assert warning.startswith(f"warning: {folder}/curves.png: no picture: they could not be drawn (ValueError: ")
    text = (folder / "report.md").read_text()
    assert "No curves: they could not be drawn (ValueError: " in text and "![curves]" not in text
    assert not (folder / "curves.png").exists()
    assert nl.load(folder).record.status == "finished"
    again = run_with(config)
    assert again.returncode == 0 and is_true(nl.load(folder))


@pytest.mark.slow
def test_latex_that_is_not_there_is_not_asked_for(config, tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: No Such Font\n")
    result = run_with(config, MATPLOTLIBRC=str(tmp_path / "matplotlibrc"), PATH="/nowhere")
    assert (result.returncode, "no picture" in result.stderr) == (0, False), result.stderr
    assert is_true(nl.load(tmp_path / "results" / "r"))


def test_a_picture_that_fails_later_leaves_no_older_one(config, done, monkeypatch):
    def broken(*args):
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(curves, "_curves_png", broken)
    said = Quiet()
    nl.train(config, max_steps=9, progress=said)
    assert (
        f"warning: {done.folder}/curves.png: no picture: they could not be drawn (RuntimeError: no font\\nat all); "
        in ("".join(said.messages))
    )
    assert not (done.folder / "curves.png").exists()
    assert nl.load(done.folder).record.status == "finished"


# --- bundles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [remove_report, remove_picture, old_report, old_picture])
def test_a_bundle_ships_no_stale_page(done, tmp_path, damage):
    whole = (done.folder / "curves.png").read_bytes()
    damage(done.folder)
    before = {path: path.read_bytes() for path in done.folder.iterdir() if path.is_file()}
    opened = nl.open_bundle(nl.bundle(done, tmp_path / "r.zip"), tmp_path / "opened")
    assert (opened.folder / "curves.png").read_bytes() == whole
    assert "Status: finished." in (opened.folder / "report.md").read_text()
    assert {path: path.read_bytes() for path in done.folder.iterdir() if path.is_file()} == before


def test_a_bundle_without_its_picture_rather_than_with_a_stale_one(done, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no font")

    old_picture(done.folder)
    monkeypatch.setattr(curves, "_curves_png", broken)
    with zipfile.ZipFile(nl.bundle(done, tmp_path / "r.zip")) as archive:
        names = [name.rpartition("/")[2] for name in archive.namelist()]
        text = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("report.md"))
    assert "curves.png" not in names
    assert "No curves: they could not be drawn (RuntimeError)." in text


# --- figures that went out of bounds ---------------------------------------------------------------------------------


def diverged(ppl):
    row = {
        "epoch": 1.0, "step": 8, "train_loss": 1.0, "val_loss": math.log(ppl) if ppl < 1e308 else 800.0,
        "val_ppl": ppl, "val_accuracy": 0.1, "val_ppl_known": 2.0, "val_bits_per_byte": None, "val_word_ppl": None,
        "val_bits_per_byte_known": None, "lr": 0.1, "clip": 1.0, "train_seconds": 1.0, "tokens_per_second": 10.0,
        "peak_memory_bytes": 1, "skipped_steps": 0,
    }  # fmt: skip
    return row


def test_a_perplexity_of_many_digits_stays_readable(done):
    assert table_line(diverged(1.234e184), False) == (
        "        8    1.00    1.2e+184    10.00%         423.8859         1.0000       1.0"
    )
    rows = [
        diverged(20.0),
        diverged(1.234e184) | {"step": 16, "epoch": 2.0},
        diverged(math.inf) | {"step": 24, "epoch": 3.0},
    ]
    record = nl.load(done.folder).record
    record.best = rows[0]
    text = report_text(record, rows)
    assert max(map(len, text.splitlines())) < 2000
    assert "| 16 | 2.00 | 1.2e+184 | 10.00% | 423.8859 | 1.0000 |" in text
    assert curves.curves_png(record, rows).startswith(b"\x89PNG")
    record.best = rows[1]
    assert "Best validation perplexity **1.2e+184** (accuracy" in report_text(record, rows[1:])
    assert curves.curves_png(record, rows[1:]).startswith(b"\x89PNG")
    assert Path(done.folder).is_dir()


def test_json_holds_no_infinity(done, capsys):
    from newllm_lib.cli.output import echo_json

    echo_json({"a": [math.inf, -math.inf, math.nan, 1.5], "b": {"c": (math.nan,)}})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"a": [None, None, None, 1.5], "b": {"c": [None]}}
    (done.folder / "run.json").write_text(
        (done.folder / "run.json").read_text().replace('"step": 6', '"step": Infinity', 1)
    )
    with pytest.raises(nl.RunError):  # a count, which cannot be infinite
        nl.load(done.folder)


# --- the parts of a run ----------------------------------------------------------------------------------------------


def elsewhere(monkeypatch, name):
    from newllm_lib.runs import recorder

    real = recorder.environment
    monkeypatch.setattr(recorder, "environment", lambda machine: real(machine) | {"device_name": name})


@pytest.mark.slow
def test_each_part_of_a_run_keeps_its_environment(config, monkeypatch):
    nl.train(config, max_steps=2, progress=Quiet())
    nl.train(config, max_steps=4, progress=Quiet())
    record = nl.load(f"{config.results_dir}/r").record
    assert [part["from_step"] for part in record.parts] == [0]  # nothing has changed
    assert "## Parts" not in nl.load(f"{config.results_dir}/r").report
    elsewhere(monkeypatch, "Another | CPU")
    run = nl.train(config, max_steps=6, progress=Quiet())
    first, second = run.record.parts
    assert (first["from_step"], second["from_step"]) == (0, 4)
    assert (second["environment"]["device_name"], run.record.environment) == ("Another | CPU", second["environment"])
    here = first["environment"]
    (line,) = [line for line in run.report.splitlines() if line.startswith("| 0 to 4 |")]
    assert f"| {here['device_name']}, 1 thread | fp32 | python {here['versions']['python']}, torch " in line
    assert "\n| 4 to 6 | Another &#124; CPU, 1 thread | fp32 | python" in run.report


def test_a_run_of_an_earlier_version_has_one_part_more(config, monkeypatch):
    run = nl.train(config, max_steps=2, progress=Quiet())
    record = json.loads((run.folder / "run.json").read_text())
    del record["parts"]
    (run.folder / "run.json").write_text(json.dumps(record))
    assert nl.load(run.folder).record.parts is None
    elsewhere(monkeypatch, "Another CPU")
    first, second = nl.train(config, max_steps=4, progress=Quiet()).record.parts
    assert (first["from_step"], first["environment"], second["from_step"]) == (0, record["environment"], 2)


@pytest.mark.parametrize("damaged", [[{"from_step": None}], [{"from_step": "0"}], [{}], ["x"], 5, {"a": 1}])
def test_damaged_parts_of_a_record_do_not_keep_a_run_from_continuing(damaged):
    earlier = RunRecord(parts=damaged, step=2, environment={"device_name": "old"}, decided={"precision": "fp32"})
    before = {"from_step": 0, "precision": "fp32", "environment": {"device_name": "old"}}
    here = {"from_step": 2, "precision": "fp32", "environment": {"device_name": "new"}}
    assert parts_before(earlier, here) == [before]
    assert here["from_step"] == 2


# --- what a picture and a count say ----------------------------------------------------------------------------------


def test_always_unk_is_drawn_at_the_runs_own_share(done, monkeypatch):
    from matplotlib.axes import Axes

    drawn, real = [], Axes.axhline

    def seen(axes, y, **style):
        drawn.append((y, style.get("label")))
        return real(axes, y, **style)

    monkeypatch.setattr(Axes, "axhline", seen)
    record = nl.load(done.folder).record
    for share, expected in ((0.125, [(12.5, "always <UNK>")]), (0.0, []), (None, [])):
        drawn.clear()
        record.validation["unknown_share"] = share
        curves.curves_png(record, history_rows(done.folder))
        assert drawn == expected


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        (11, 10, [8, 11]),  # 10 would be a step before the end
        (17, 10, [8, 10, 16, 17]),  # the ends of epochs and of the run are always validated
        (12, 10, [8, 10, 12]),
        (6, 3, [3, 6]),
        (9, 2, [2, 4, 6, 8, 9]),
    ],
)
def test_two_validations_a_step_apart_are_one(config, steps, every, expected):
    run = nl.train(config, max_steps=steps, validate_every_steps=every, progress=Quiet())
    assert list(run.history["step"]) == expected


def test_one_thing_is_singular():
    from newllm_lib.reporting.formatting import counted, ppl_text

    assert [counted(n, "thread") for n in (0, 1, 2, 1000)] == ["0 threads", "1 thread", "2 threads", "1,000 threads"]
    assert (counted(1, "batch", "batches"), counted(2, "batch", "batches")) == ("1 batch", "2 batches")
    assert [ppl_text(x) for x in (1.005, 9_999_999.0, 1e7, math.inf)] == ["1.00", "9999999.00", "1e+07", "inf"]
