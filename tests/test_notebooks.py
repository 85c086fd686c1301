"""Every notebook runs from top to bottom in an empty folder, and lies in the project without its outputs."""

import os
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import newllm_lib as nl
from newllm_lib import runs
from newllm_lib.config import presets
from newllm_lib.sharing import bundle
from newllm_lib.training.schedule import peak_rate

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def executed(path, folder, replaced=()):
    """The notebook after all its cells ran in `folder`, a part (old, new) replaced; a cell that fails raises."""
    notebook = nbformat.read(path, as_version=4)
    if replaced:
        cell = next(cell for cell in notebook.cells if replaced[0] in cell.source)
        cell.source = cell.source.replace(*replaced)
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_papermill_finds_the_settings(path):
    """The one cell after which it puts its values is tagged, and begins with settings."""
    notebook = nbformat.read(path, as_version=4)
    (tagged,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert tagged is code[1]  # after the set-up
    name, _, value = tagged.source.splitlines()[0].partition(" = ")
    assert name.isupper() and value


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_set_up_hands_on_the_gpu_that_the_notebook_asks_for(path):
    asked = {"00_quickstart": "", "06_compare_runs": ""}.get(path.stem, "T4")
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.get("colab", {}).get("gpuType", "") == asked
    assert any(f'os.environ["NEWLLM_NOTEBOOK_GPU"] = "{asked}"' in cell.source for cell in notebook.cells)


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


@pytest.mark.skipif("NEWLLM_JUPYTER" not in os.environ, reason="half a minute: make test-notebooks")
def test_quickstart_twice_in_a_row(tmp_path, monkeypatch):
    monkeypatch.setenv("NEWLLM_SMOKE", "1")
    path = next(path for path in NOTEBOOKS if path.stem == "00_quickstart")
    first = executed(path, tmp_path)
    assert [output for output in outputs_of(first) if output.get("name") == "stderr"] == []
    text = printed(first)
    assert "[the value of]" in text
    assert "perplexity" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs_of(first)) == 0
    assert shown(first).count("data:image/png;base64,") == 3  # the live curves, once
    assert shown(first).count("<table") == 1
    assert "10 of 10" in shown(first)
    folder = next((tmp_path / "results").glob("quickstart-*/"))
    assert runs.load(folder).record["status"] == "finished"
    assert {"report.md", "curves.png", "history.csv", "run.json", "model"} <= {found.name for found in folder.iterdir()}
    opened = bundle.open_bundle(folder.with_suffix(".zip"), tmp_path / "elsewhere")
    assert opened.best == runs.load(folder).best
    assert f"already finished: {folder.relative_to(tmp_path)}" in shown(executed(path, tmp_path))
    longer = shown(executed(path, tmp_path, ("STEPS = 10", "STEPS = 14")))  # a rate that had decayed to its end
    assert "step 10 of 14" in longer
    assert "14 of 14" in longer
    assert [found.name for found in (tmp_path / "results").glob("quickstart-*/")] == [folder.name]


@pytest.mark.parametrize(
    ("recipe", "rule", "larger_rate", "baseline_preset", "baseline_rate"),
    [
        ("tuned", False, 4e-3, "quickstart", 4e-3),
        ("tuned", True, 2.2636e-3, "quickstart", 4e-3),  # 4e-3 / (4,840,936 / 2,739,432)
        ("published", False, 4e-4, "l4_fp16", 8e-4),
        ("published", True, 4.5271e-4, "l4_fp16", 8e-4),  # 8e-4 / the same ratio
    ],
)
def test_larger_model_and_its_baseline(
    recipe, rule, larger_rate, baseline_preset, baseline_rate, monkeypatch, tmp_path
):
    """What the cells of 03 make of its two switches, up to the training."""
    for name, lines in (("train", 2100), ("valid", 10)):  # the published batch is 2,048 sequences
        (tmp_path / f"{name}.txt").write_text("one two three four five six\n" * lines)
    monkeypatch.delenv("NEWLLM_SMOKE", raising=False)
    path = next(path for path in NOTEBOOKS if path.stem == "03_larger_model")
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for old, new in (
        ('RECIPE = "tuned"', f"RECIPE = {recipe!r}"),
        ("MODEL_SIZE_RULE = False", f"MODEL_SIZE_RULE = {rule}"),
        ("BASELINE_TOO = False", "BASELINE_TOO = True"),
        ('DATA = "wikitext-2"', f"DATA = {str(tmp_path)!r}"),
    ):
        assert old in cells[1]
        cells[1] = cells[1].replace(old, new)
    trained = []
    values = {"os": os, "nl": types.SimpleNamespace(storage=nl.storage, Panel=nl.Panel, train=trained.append)}
    for cell in cells[1:5]:  # settings, panel, the larger model, its baseline
        exec(cell, values)
    larger, baseline = trained
    assert peak_rate(larger.train, larger.model.num_parameters).value == pytest.approx(larger_rate, rel=1e-4)
    assert (larger.model.context_dim, larger.model.num_layers, larger.model.num_parameters) == (512, 12, 4_840_936)
    assert peak_rate(baseline.train, baseline.model.num_parameters).value == pytest.approx(baseline_rate, rel=1e-4)
    assert baseline == presets.get(baseline_preset).replace(data=str(tmp_path))
    if recipe == "published" and not rule:
        assert larger == presets.get("l4_advanced").replace(data=str(tmp_path))
