"""Every notebook without a browser, here and with Colab's versions: twice in a row from an empty folder, unasked."""

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))

LEFT = {"run.json", "history.csv", "curves.png", "report.md", "checkpoints", "model"}
"""What the design says that a run leaves behind."""


def executed(jupyter, path, environment):
    """The notebook after all its cells ran in its own folder."""
    command = [jupyter, "execute", "--output=executed", path.name]
    done = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return nbformat.read(path.with_name("executed.ipynb"), as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def shown(notebook):
    """All that its cells print or display as text or HTML."""
    data = [output.get("data", {}) for output in outputs(notebook)]
    return "".join(output.get("text", "") for output in outputs(notebook)) + "".join(
        found.get("text/html", found.get("text/plain", "")) for found in data
    )


def runs(folder):
    """The parsed run.json of each run, also within a study: its folder -> record."""
    return {path.parent: json.loads(path.read_text("utf-8")) for path in (folder / "results").rglob("run.json")}


@pytest.mark.parametrize("stack", ["own", "classic"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_twice_in_a_row(path, stack, jupyter_of, jupyter_environment, tmp_path):
    jupyter, copy = jupyter_of(stack), tmp_path / path.name
    shutil.copy(path, copy)
    first = executed(jupyter, copy, jupyter_environment)
    assert [output for output in outputs(first) if output.get("name") == "stderr"] == []
    left = runs(tmp_path)
    assert left
    for run, record in left.items():
        assert record["status"] in ("finished", "stopped early")
        assert {found.name for found in run.iterdir()} >= LEFT
    offered = re.findall(r"^(.*\.zip) \(.* MiB\)$", "".join(o.get("text", "") for o in first.cells[-1].outputs), re.M)
    assert len(offered) == 1  # the last cell gives one file to take away
    assert zipfile.ZipFile(offered[0]).testzip() is None
    if path.stem[:2] == "03":
        models = [record["config"]["model"] for record in left.values()]
        assert sorted((model["context_dim"], model["num_layers"]) for model in models) == [(64, 2), (96, 4)]

    again = executed(jupyter, copy, jupyter_environment)
    assert runs(tmp_path) == left
    if path.stem[:2] in ("00", "01"):  # which train one run, live
        assert "already finished" in shown(again)


@pytest.mark.parametrize("stack", ["own", "classic"])
def test_a_failing_notebook_is_seen(stack, jupyter_of, jupyter_environment, tmp_path):
    """The control."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("input('your name?')")])
    nbformat.write(notebook, tmp_path / "asks.ipynb")
    with pytest.raises(AssertionError, match="StdinNotImplementedError"):
        executed(jupyter_of(stack), tmp_path / "asks.ipynb", jupyter_environment)
