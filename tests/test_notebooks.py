"""Every notebook runs from top to bottom in an empty folder, and lies in the project without its outputs."""

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
    assert [path.name for path in NOTEBOOKS] == ["00_quickstart.ipynb"]


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
