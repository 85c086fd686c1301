"""Every place that shows a stranger's text, each with the same hostile run."""

import csv
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from hostile import EVERYTHING, IMAGE, RUN_NAME, SCRIPT, SHEET, TERMINAL, WORDS, hostile_bundle, hostile_record
from tiny import tiny_config, write_text

import newllm_lib as nl
from newllm_lib import cli, escaping
from newllm_lib.cli.output import echo_exact
from newllm_lib.config.parsing import command
from newllm_lib.data.corpus import load_corpus
from newllm_lib.notebook import colab
from newllm_lib.notebook.field_widgets import Setting
from newllm_lib.notebook.panel_plan import refused_html
from newllm_lib.reporting import comparison, curves
from newllm_lib.reporting.comparison_report import table_text, write
from newllm_lib.reporting.notebook_page import View, page, summary
from newllm_lib.reporting.progress import Progress, TerminalProgress
from newllm_lib.reporting.record import HISTORY_COLUMNS, history_rows, read_table, write_history
from newllm_lib.reporting.study_progress import LiveLine
from newllm_lib.runs.recorder import command as called
from newllm_lib.studies.bench import report as report_module
from newllm_lib.studies.lr_scaling import findings as lr_scaling_findings
from newllm_lib.studies.precision import findings as precision_findings
from newllm_lib.studies.shared_words import ModelBits, SharedWords

ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "write_curves", lambda *args: None)
        hostile_bundle(place, place / "hostile.zip")
        nl.open_bundle(place / "hostile.zip", place / "here")
    return place


@pytest.fixture
def run(place):
    return nl.load(place / "here" / RUN_NAME)


@pytest.fixture
def newllm():
    return lambda *arguments: CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def tags_of(html):
    """Every tag with its attributes that act."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, {n for n, _ in attributes if n[:2] == "on"}))
    parser.feed(html)
    return found


def assert_harmless_page(html):
    assert {tag for tag, _ in tags_of(html)} <= {"div", "span", "b", "img", "table", "tr", "td", "th", "a", "style"}
    assert not any(acting for _, acting in tags_of(html))
    assert "data-foreign" not in re.sub(r"(?s)>[^<]*<", "><", html)  # but as text
    assert not re.search(r"\$[^<]", re.sub("<style.*?</style>", "", html))  # a formula


def without_code(markdown):
    """What is not shown as it is."""
    return re.sub(r"(?s)(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", markdown)


def assert_harmless_markdown(text):
    rest = without_code(text)
    assert not re.search(r"<(?!/?span>)", rest)
    assert "](javascript" not in rest and "$" not in rest and "https://foreign" not in rest
    assert not ACTING.search(text)


# --- Markdown ---------------------------------------------------------------------------------------------------


def test_the_report_and_the_card(run):
    assert_harmless_markdown(run.report)
    assert_harmless_markdown(run.model.card)
    assert without_code(f"a `{IMAGE}` b") == "a  b"  # the controls
    with pytest.raises(AssertionError):
        assert_harmless_markdown(f"a {IMAGE}")


def test_a_comparison_in_markdown_csv_and_json(run, tmp_path):
    found = comparison.collect([run.folder])
    assert_harmless_markdown(table_text(found))
    found.entries[0].values |= {"run": SHEET, "note": "+1", "device": "@a", "status": "-cmd|x"}
    write(found, tmp_path)
    (row,) = csv.DictReader((tmp_path / "comparison.csv").open(newline=""))
    assert [row[name] for name in ("run", "note", "device", "status")] == [f"'{SHEET}", "+1", "'@a", "'-cmd|x"]
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"][0]["run"] == SHEET  # as it is


def test_a_history_with_texts_is_no_formula_and_comes_back(tmp_path):
    rows = [dict.fromkeys(HISTORY_COLUMNS) | {"step": 3, "lr": -0.5, "epoch": 0.5, "val_loss": float("inf")}]
    write_history(tmp_path, rows)
    assert history_rows(tmp_path) == rows
    write_history(tmp_path, [rows[0] | {"clip": SHEET}])
    assert "'=HYPERLINK" in (tmp_path / "history.csv").read_text()
    assert read_table(tmp_path / "history.csv")["clip"][0] == SHEET
    with pytest.raises(ValueError, match=r"history\.csv: line 2: could not convert .*; the file is damaged"):
        history_rows(tmp_path)


def test_studies(tmp_path):
    environment = {"device_name": EVERYTHING, "threads": 1, "versions": {"torch": EVERYTHING}, "git_commit": EVERYTHING}
    labelled = {"label": EVERYTHING, "final_ppl": 1.0, "best_ppl": 1.0, "skipped_steps": 0, "train_seconds": 1.0}
    record = {"environment": environment, "findings": [EVERYTHING], "rounding": [], "comparisons": []}
    assert_harmless_markdown(precision_findings.text(record | {"runs": [labelled]}))
    cell = dict.fromkeys(("initialisation", "rule", "plateau", "run"), EVERYTHING) | {"batch": 1, "lr": 0.1, "seed": 1}
    cell |= {"steps": 1, "accuracy": None, "best_ppl": None, "final_ppl": None}
    recipe = {"train": nl.TrainConfig().to_dict(), "model": nl.ModelConfig().to_dict()}
    more = {"cells": [cell], "config": recipe, "initialisations": {EVERYTHING: {"a": EVERYTHING}}}
    text = lr_scaling_findings.text(record | more | {"precision": EVERYTHING, "precision_reason": EVERYTHING})
    assert_harmless_markdown(text)
    assert_harmless_markdown(report_module.table_text({"environment": environment, "rows": []}))
    bits = ModelBits("words", 1.0, 1.0, 1.0, 1.0, 1)
    assert_harmless_markdown(SharedWords(bits, bits, 1, 1, 1.0, 1, ()).text([EVERYTHING, "b"]))


# --- a page -----------------------------------------------------------------------------------------------------


def test_the_page_of_a_training(run, tmp_path):
    record = hostile_record(json.loads(json.dumps(run.record)), tmp_path)
    view = View(record=record | {"run": EVERYTHING}, status=EVERYTHING, messages=[EVERYTHING, f"warning: {IMAGE}"])
    view.total_steps = 10
    assert_harmless_page(page(view))
    assert not ACTING.search(summary(view))
    with pytest.raises(AssertionError):
        assert_harmless_page(f"<div>{IMAGE}</div>")  # the control


def test_the_panel(run):
    config = run.requested.replace(data=EVERYTHING, mirror_dir=EVERYTHING)
    panel = nl.Panel(config)
    panel.refresh()
    shown = [panel.view.shown.value, *(setting.note.value for setting in (panel.preset, *panel.settings.values()))]
    for html in (*shown, refused_html(EVERYTHING)):
        assert_harmless_page(html)
    setting = Setting(nl.config.flat_fields()["data"], lambda: None)
    setting.set("b")
    setting.mark(EVERYTHING, True, EVERYTHING)
    assert_harmless_page(setting.note.value)


def test_a_table_of_models(run):
    table = nl.side_by_side([run], [IMAGE, "a"], max_new_tokens=30, seed=1)
    html = table.style.set_properties(**{"white-space": "pre-wrap"}).to_html()
    assert "<img" not in html and "<script" not in html
    assert not re.search(r"\$[^<]", html)
    assert any(word in table.iloc[0, 0] for word in WORDS)  # the words themselves, in the frame


@pytest.mark.parametrize("name", ["javascript:x.zip", "a b'<img src=x onerror=y>.zip", "x#y?z.zip", "$x$.zip"])
def test_a_link_to_a_file(name, tmp_path, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    monkeypatch.setattr(colab, "in_kernel", lambda: True)
    (tmp_path / name).write_text("x")
    colab.offer_download(name)
    html = shown[0]._repr_html_()
    assert_harmless_page(html)
    assert re.match(r"<a href='[\w%./-]+' download style='[\w:;#%-]+( [\w:;#%-]+)*'>", html)
    monkeypatch.setattr(colab, "in_kernel", lambda: False)


# --- a terminal -------------------------------------------------------------------------------------------------


def test_what_observers_print(capsys):
    stream = io.StringIO()
    TerminalProgress(stream).message(TERMINAL)
    LiveLine(stream).say(TERMINAL)
    escaping.say(TERMINAL, stream)
    assert not ACTING.search(stream.getvalue())
    assert stream.getvalue().count("\\x1b[2J\\x9b31m\\u202etxt") == 3


def test_the_commands(place, run, newllm):
    for arguments in (
        ("compare", run.folder),
        ("evaluate", run.folder, "--data", place / EVERYTHING.replace("/", "")),
        ("open", place / "hostile.zip", "--results-dir", place / "again"),
        ("continue", f"no {TERMINAL}"),
        ("train", f"no {TERMINAL}"),
        (f"no {TERMINAL}",),
        ("continue", run.folder, "--plan"),
    ):
        result = newllm(*arguments)
        assert isinstance(result.exception, (SystemExit, type(None))), result.exception
        assert result.stdout + result.stderr
        assert not ACTING.search(result.stdout + result.stderr), arguments


def test_json_is_exact_and_harmless(run, newllm):
    arguments = ("generate", run.folder, "--tokens", 60, "--temperature", 2, "--samples", 4, "--seed", 1)
    printed = newllm(*arguments, "--json").stdout
    assert not ACTING.search(printed)
    expected = nl.generate_texts(run.model, run.tokenizer, [""] * 4, 1, max_new_tokens=60, temperature=2.0)
    assert [text["text"] for text in json.loads(printed)] == [text.text for text in expected]
    assert any(ACTING.search(text.text) for text in expected)  # the control
    # a file and a pipe get every character, a terminal sees them
    assert newllm(*arguments).stdout == "\n\n".join(text.prompt + text.text for text in expected) + "\n"


def test_a_text_on_a_terminal_and_elsewhere(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in ((Terminal(), "a\\x1b[2J\\udc80\n"), (io.StringIO(), "a\x1b[2J\\udc80\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        echo_exact("a\x1b[2J\udc80")
        assert stream.getvalue() == shown


@pytest.mark.slow
def test_generate_in_a_real_terminal(run):
    parent, child = pty.openpty()
    words = [sys.executable, "-m", "newllm_lib", "generate", str(run.folder), "--tokens", "60", "--temperature", "2"]
    done = subprocess.run([*words, "--seed", "1", "--samples", "4"], stdout=child, stderr=subprocess.PIPE, check=True)
    os.close(child)
    shown = os.read(parent, 1 << 16).decode()
    os.close(parent)
    assert done.stderr == b""
    assert "\\x1b[31m" in shown
    assert not ACTING.search(shown.replace("\r\n", "\n"))


# --- a picture --------------------------------------------------------------------------------------------------


def test_pictures_with_dollars(run, tmp_path, monkeypatch):
    monkeypatch.undo()
    record = run.record | {"run": "US$5_{$10 a$$b", "data": {"name": "$\\bad{$"}}
    curves.write_curves(tmp_path, record, history_rows(run.folder))
    found = comparison.collect([run.folder])
    found.entries[0].values["run"] = "$\\bad{$"
    write(found, tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


# --- a command to paste -----------------------------------------------------------------------------------------

NAMES = ["x; touch pwned", "d$(touch pwned)", "`touch pwned`", "a'b c", "--fresh", "é\n#"]


@pytest.mark.parametrize("name", NAMES)
def test_suggested_commands_in_a_real_shell(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["newllm", "train", "--data", name, "--fresh"])
    (tmp_path / "newllm").write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    (tmp_path / "newllm").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for suggested, words in (
        (command("auto", {"data": (name, "b"), "name": "n"}), ["auto", "--data", name, "--data", "b", "--name", "n"]),
        (called(), ["--data", name, "--fresh"]),
    ):
        done = subprocess.run(["bash", "-c", suggested], cwd=tmp_path, env=environment, capture_output=True, check=True)
        assert done.stdout.decode().split("\0")[:-1] == ["train", *words]
    assert {path.name for path in tmp_path.iterdir()} == {"newllm"}


@pytest.mark.parametrize("name", ["x; touch pwned", "d$(touch pwned)", "[1]", "a'b"])
def test_what_an_error_suggests(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name
    folder.mkdir()
    (folder / "loose.txt").write_text("a\n" * 60)
    with pytest.raises(ValueError, match="no train split") as error:
        load_corpus(nl.DataConfig(data=str(folder)))
    pattern = shlex.split(str(error.value).rpartition("--data ")[2])
    assert load_corpus(nl.DataConfig(data=pattern[0])).splits["train"]
    (folder / "odd.txt").write_bytes(b"\xe9t\xe9\n")
    with pytest.raises(ValueError, match="not UTF-8") as error:
        load_corpus(nl.DataConfig(data=f"{name}/odd.txt" if "[" not in name else str(folder / "odd.txt")))
    suggested = str(error.value).rpartition("convert it: ")[2]
    subprocess.run(["bash", "-c", suggested], cwd=tmp_path, check=True)
    assert (tmp_path / "NEW.txt").read_text(encoding="utf-8") == "été\n"
    assert not (tmp_path / "pwned").exists()


def test_a_run_of_ours_is_shown_as_before(tmp_path, monkeypatch):
    """Ordinary names are the same in every place."""
    monkeypatch.setattr(curves, "write_curves", lambda *args: None)
    run = nl.train(
        tiny_config(write_text(tmp_path / "wiki_text-2.5"), results_dir=str(tmp_path), name="l4_fp16-1", epochs=1),
        progress=Progress(),
    )
    assert run.report.startswith("# l4_fp16-1\n")
    assert "| data | wiki_text-2.5: 40 training" in run.report
    assert SCRIPT not in run.report
