"""Every notebook runs from top to bottom in an empty folder, and lies in the project without its outputs."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from newllm_lib import runs, sharing

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def executed(path, folder):
    """The notebook after all its cells ran in `folder`; a cell that fails raises."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def outputs_of(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook):
    """Everything that its cells wrote to standard output."""
    return "".join(output.text for output in outputs_of(notebook) if output.get("name") == "stdout")


def shown(notebook):
    """All HTML that its cells display, as it stands at the end."""
    return "".join(output.data.get("text/html", "") for output in outputs_of(notebook) if "data" in output)


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == [
        "00_quickstart", "01_train_wikitext2", "02_continue_training", "03_larger_model", "04_fp16_vs_fp32",
        "05_learning_rate_scaling", "06_compare_runs",
    ]  # fmt: skip


def test_they_are_as_tidy_py_leaves_them_and_it_sees_when_not(tmp_path):
    folder = NOTEBOOKS[0].parent
    check = [sys.executable, folder / "tidy.py", "--check"]
    assert subprocess.run(check, capture_output=True, text=True, check=False).stdout == ""
    for path in (folder / "tidy.py", folder / "setup_cell.py", NOTEBOOKS[0], NOTEBOOKS[1]):
        (tmp_path / path.name).write_text(path.read_text())
    odd = nbformat.read(NOTEBOOKS[1], as_version=4)
    next(cell for cell in odd.cells if cell.source.startswith("# @title Set-up")).source += "\nprint(1)"
    odd.metadata["widgets"] = {"state": {}}
    nbformat.write(odd, tmp_path / NOTEBOOKS[1].name)
    check[1] = tmp_path / "tidy.py"
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "01_train_wikitext2.ipynb: is not tidy\n")
    assert subprocess.run(check[:2], capture_output=True, text=True, check=False).returncode == 0
    assert (tmp_path / NOTEBOOKS[1].name).read_text() == NOTEBOOKS[1].read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_a_thin_client(path):
    """Settings and calls of the library: no class, no function, nothing that asks."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and not cell.source.startswith("# @title Set-up"):
            words = cell.source.split()
            assert not {"class", "def", "lambda", "while"} & set(words), cell.source
            assert "input(" not in cell.source
            assert len(cell.source.splitlines()) <= 25


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_quickstart_twice_in_a_row(tmp_path, monkeypatch):
    monkeypatch.setenv("NEWLLM_SMOKE", "1")
    path = next(path for path in NOTEBOOKS if path.stem == "00_quickstart")
    first = executed(path, tmp_path)
    assert [output for output in outputs_of(first) if output.get("name") == "stderr"] == []
    text = printed(first)
    assert "[the value of]" in text
    assert "perplexity" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs_of(first)) == 1
    assert shown(first).count("data:image/png;base64,") == 1  # the live curves
    assert "10 of 10" in shown(first)
    folder = next((tmp_path / "results").glob("quickstart-*/"))
    assert runs.load(folder).record["status"] == "finished"
    assert {"report.md", "curves.png", "history.csv", "run.json", "model"} <= {found.name for found in folder.iterdir()}
    opened = sharing.open_bundle(folder.with_suffix(".zip"), tmp_path / "elsewhere")
    assert opened.best == runs.load(folder).best
    assert f"already finished: {folder.relative_to(tmp_path)}" in shown(executed(path, tmp_path))
