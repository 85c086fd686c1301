"""The grid of learning-rate rules: rates by hand, cells that share a run, what is said, and how a grid goes on."""

import io
import json
import math
import shutil
import signal
from types import SimpleNamespace

import IPython
import IPython.display
import nbformat
import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from nbclient import NotebookClient
from tiny import RECIPE, SHAPE, tiny_config, write_text

from newllm_lib import runs
from newllm_lib.cli import main
from newllm_lib.data.dataset import Split
from newllm_lib.model.newllm import NewLLM
from newllm_lib.reporting.study_progress import LiveLine
from newllm_lib.studies.lr_scaling import findings
from newllm_lib.studies.lr_scaling.study import (
    GRIDS,
    INITIALISATIONS,
    cell_steps,
    grid_cells,
    lr_scaling,
    parse_rule,
    plateau,
    unigram_perplexity,
)
from newllm_lib.studies.study_runs import StudyInterrupted, listed
from newllm_lib.training.interrupt import StopRequest
from newllm_lib.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """Drawing takes longer than these runs; the grid that the whole file looks at is drawn before this holds."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"no picture"))


def config_of(text, folder, **changes):
    values = {"lr": None, "lr_base": 1e-3, "epochs": None, "max_steps": 8, "validate_every_steps": None}
    return tiny_config(text, results_dir=str(folder), **values | changes)


# --- the grid -------------------------------------------------------------------------------------------------------


def rates_of(text, tmp_path, batch_sizes, rules, **changes):
    setup = make_setup(config_of(text, tmp_path, **changes))
    cells = grid_cells(setup, batch_sizes, rules, ("published",), (42,), tmp_path)
    return {(cell.batch_size, cell.rule): cell.rate for cell in cells}


def test_rates_of_the_rules_by_hand(text, tmp_path):
    rates = rates_of(text, tmp_path, (32, 2048), ("none", "linear", "sqrt"), batch_size=32, lr_base=1e-4)
    assert rates == pytest.approx(
        {
            (32, "none"): 1e-4, (32, "linear"): 1e-4, (32, "sqrt"): 1e-4,
            (2048, "none"): 1e-4, (2048, "linear"): 6.4e-3, (2048, "sqrt"): 8e-4,
        }
    )  # fmt: skip


def test_a_rule_may_start_from_a_batch_of_its_own(text, tmp_path):
    rates = rates_of(text, tmp_path, (512, 2048, 4096), ("linear:512", "sqrt:32"), batch_size=32, lr_base=1e-4)
    assert rates == pytest.approx(  # the rates of the published runs
        {
            (512, "linear:512"): 1e-4, (2048, "linear:512"): 4e-4, (4096, "linear:512"): 8e-4,
            (512, "sqrt:32"): 4e-4, (2048, "sqrt:32"): 8e-4, (4096, "sqrt:32"): 1.13137e-3,
        },
        rel=1e-4,
    )  # fmt: skip
    assert (parse_rule("sqrt", 32), parse_rule("linear:512", 32)) == (("sqrt", 32), ("linear", 512))


def test_cells_of_equal_rate_share_a_run(text, tmp_path):
    setup = make_setup(config_of(text, tmp_path))
    cells = grid_cells(setup, (8, 32), ("none", "linear", "sqrt"), ("published", "fan-in"), (1, 2), tmp_path)
    assert len(cells) == 2 * 2 * 3 * 2
    names = {cell.config.name for cell in cells}
    assert len(names) == 2 * 2 * (1 + 3)
    assert "fan-in-batch-8-none-seed-2" in names
    assert "fan-in-batch-32-sqrt-seed-1" in names
    assert "fan-in-batch-8-sqrt-seed-1" not in names


def test_every_cell_reads_equally_many_sequences(text, tmp_path):
    by_steps = make_setup(config_of(text, tmp_path, batch_size=8, max_steps=100))
    assert [cell_steps(by_steps, size) for size in (8, 16, 32, 64, 1600)] == [100, 50, 25, 12, 1]
    by_epochs = make_setup(config_of(text, tmp_path, batch_size=8, max_steps=None, epochs=3))
    assert len(by_epochs.train_split.ids) == 62
    assert [cell_steps(by_epochs, size) for size in (8, 32, 62)] == [24, 6, 3]
    for setup in (by_steps, by_epochs):
        cells = grid_cells(setup, (8, 32), ("none",), ("fan-in",), (42,), tmp_path)
        for cell in cells:
            trained = make_setup(cell.config)
            assert trained.total_steps == cell_steps(setup, cell.batch_size)
            assert trained.config.train.patience is None
            assert trained.total_steps // cell.config.train.validate_every_steps >= min(8, trained.total_steps)


def test_the_initialisations_are_what_they_are_called(text, tmp_path):
    setup = make_setup(config_of(text, tmp_path, hidden_dim=200, embed_dim=150, context_dim=50, num_layers=3))
    cells = grid_cells(setup, (8,), ("none",), tuple(INITIALISATIONS), (42,), tmp_path)
    published, fan_in = (NewLLM(make_setup(cell.config).config.model) for cell in cells)
    stds = {name: value.std().item() for name, value in published.named_parameters() if value.ndim == 2}
    assert stds == pytest.approx(dict.fromkeys(stds, 0.02), rel=0.1)
    assert all(value.abs().max().item() == 0 for name, value in published.named_parameters() if "bias" in name)
    assert fan_in.layers[0].weight.std().item() == pytest.approx(0.1, rel=0.05)  # sqrt(2 / 200)
    assert fan_in.from_token.weight.std().item() == pytest.approx(0.1, rel=0.05)  # sqrt(2 / (150 + 50))
    assert fan_in.context_heads.weight.std().item() == pytest.approx(0.0707, rel=0.05)  # sqrt(1 / 200)
    assert fan_in.embedding.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert fan_in.output.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert fan_in.context_heads.bias[50:100].tolist() == [1.0] * 50
    recipes = [{**cell.config.to_dict()["train"]} for cell in cells]
    assert recipes[0] == recipes[1]


def test_the_grids_by_name():
    small, full = (GRIDS[name]() for name in ("small", "full"))
    assert (small.batch_sizes, full.batch_sizes) == ((32, 128, 512), (512, 2048, 4096))
    assert (small.config.data.data, full.config.data.data) == ("builtin", "wikitext-2")
    for grid in (small, full):
        train = grid.config.train
        assert (train.optimizer, train.beta1, train.beta2, train.lr_schedule) == ("adam", 0.9, 0.999, "constant")
    assert full.config.model.num_parameters == 2_739_432
    assert (full.config.train.lr_base, full.config.train.epochs) == (1e-4, 30)


def test_lists_are_given_one_by_one_or_as_text():
    assert listed("none, linear:512") == ("none", "linear:512")
    assert listed((32, 128), int) == listed("32,128", int) == (32, 128)
    with pytest.raises(ValueError, match="'32,x': must be whole numbers with commas between"):
        listed("32,x", int)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"rules": "none,cubic"}, {}, "rules: 'cubic': must be none, linear or sqrt"),
        ({"rules": "linear:"}, {}, "rules: 'linear:': must be"),
        ({"rules": "linear:0"}, {}, "rules: 'linear:0': must be"),
        ({"rules": "none,none"}, {}, r"rules = \('none', 'none'\): must be one or more, each once"),
        ({"batch_sizes": "8,-1"}, {}, "batch_sizes: -1: must be whole numbers from 1"),
        ({"initialisations": "he"}, {}, "initialisations: 'he' is unknown: must be of published, fan-in"),
        ({}, {"lr": 1e-3}, "lr = 0.001: the rules set the rate here; give lr_base"),
        ({}, {"batch_size": None}, "batch_size must be a number here"),
        ({}, {"layout": "stream"}, "layout = 'stream': must be windows here: a stream has as many lanes as"),
        ({"batch_sizes": "8,9999"}, {}, "batch_size = 9999: must be at most 62"),
    ],
)
def test_what_makes_no_grid_is_refused(text, tmp_path, options, changes, message):
    with pytest.raises(ValueError, match=message):
        lr_scaling(config_of(text, tmp_path, **changes), progress=LiveLine(io.StringIO()), **options)
    assert not list(tmp_path.glob("*/*/run.json"))


# --- the plateau ----------------------------------------------------------------------------------------------------


def split_of(*rows):
    return Split(np.array(rows, dtype=np.int32), False)


def test_the_perplexity_of_word_frequencies_by_hand():
    train = split_of([2, 4, 4, 4, 5, 3], [2, 4, 3, 0, 0, 0])  # targets: four 4, one 5, two 3; the padding is none
    # counts + 1 over a vocabulary of 6: 0: 1, 1: 1, 2: 1, 3: 3, 4: 5, 5: 2, in all 13
    scored = split_of([2, 4, 5, 3, 0, 0])
    expected = (13 / 5 * 13 / 2 * 13 / 3) ** (1 / 3)
    assert unigram_perplexity(train, scored, 6) == pytest.approx(expected)


def test_where_a_perplexity_stands_to_the_plateau():
    assert [plateau(value, 100.0) for value in (None, math.inf, 111.0, 109.0, 91.0, 89.0)] == [
        "above", "above", "above", "on", "on", "below",
    ]  # fmt: skip


# --- what is said ---------------------------------------------------------------------------------------------------


def cell(initialisation, batch, rule, lr, ppl, seed=42, plateau="below", status="finished"):
    return {
        "initialisation": initialisation, "batch": batch, "rule": rule, "lr": lr, "seed": seed, "steps": 3200 // batch,
        "status": status, "best_ppl": ppl, "final_ppl": ppl, "accuracy": 0.3, "plateau": plateau,
        "run": f"{initialisation}-{batch}-{lr:g}-{seed}",
    }  # fmt: skip


def record_of(cells):
    return {
        "sequences": 3200, "data": "a text", "epochs": 2.0, "parameters": 1000, "precision": "fp32",
        "unigram_ppl": 67.6, "cells": cells,
    }  # fmt: skip


def test_findings_name_what_is_best_and_no_more():
    cells = [
        cell("published", 32, "none", 1e-4, 50.0),
        cell("published", 32, "sqrt", 1e-4, 50.0),
        cell("published", 512, "none", 1e-4, 67.0, plateau="on"),
        cell("published", 512, "sqrt", 4e-4, 55.0),
        cell("fan-in", 32, "none", 1e-4, 30.0),
        cell("fan-in", 32, "sqrt", 1e-4, 30.0),
        cell("fan-in", 512, "none", 1e-4, 33.5),
        cell("fan-in", 512, "sqrt", 4e-4, 60.0),
    ]
    found = findings.findings(record_of(cells))
    assert found[1] == "published initialisation, batch 32 (100 steps): all rules give the rate 0.0001, PPL 50.0."
    assert found[2] == (
        "published initialisation, batch 512 (6 steps): the square-root rule (0.0004) PPL 55.0; "
        "no scaling (0.0001) PPL 67.0, on the unigram plateau."
    )
    assert "The best rule is the one with the largest rate in 1 of 2 places where the rules differ." in found
    assert found[6] == (
        "At equal batch and rate fan-in is below published in 2 of 3 runs; PPL of published over that of fan-in: "
        "0.92 to 2.00."
    )
    assert "published got below it in 2 of 3 runs; fan-in got below it in 3 of 3 runs" in found[-2]
    assert found[-1].startswith("One seed (42) for each cell: what another seed would change is not known")


def test_seeds_are_taken_together_and_a_broken_cell_is_named():
    cells = [
        cell("fan-in", 64, "linear", 2e-4, 40.0, seed=1),
        cell("fan-in", 64, "linear", 2e-4, 44.0, seed=2),
        cell("fan-in", 64, "none", 1e-4, None, seed=1, plateau="above", status="broke down"),
        cell("fan-in", 64, "none", 1e-4, 50.0, seed=2),
    ]
    found = findings.findings(record_of(cells))
    assert found[1] == (
        "fan-in initialisation, batch 64 (50 steps): the linear rule (0.0002) PPL 42.0 (40.0 to 44.0); "
        "no scaling (0.0001) no figure (50.0 to inf), not even down to the unigram plateau. The first is below the "
        "others with every seed."
    )
    cells[3]["best_ppl"] = 43.0
    assert findings.findings(record_of(cells))[1].endswith("The first is not below the next with every seed.")
    assert "That speaks for a larger rate here, not for the form of a rule." in found[2]
    assert found[-2] == "fan-in-64-0.0001-1 broke down and counts with the best figure it had."
    assert found[-1].startswith("2 seeds for each cell")


# --- whole grids ----------------------------------------------------------------------------------------------------


def grid_of(text, folder, progress=None, stream=None, **changes):
    return lr_scaling(
        config_of(text, folder, **changes),
        "8, 32",
        "none, sqrt",
        "fan-in",
        progress=progress or LiveLine(stream or io.StringIO()),
    )


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    stream = io.StringIO()
    return SimpleNamespace(study=grid_of(text, tmp_path_factory.mktemp("whole"), stream=stream), said=stream.getvalue())


def test_a_grid_of_real_runs(whole):
    table = whole.study.table.set_index(["batch", "rule"])
    assert len(table) == 4
    assert table["steps"].to_dict() == {(8, "none"): 8, (8, "sqrt"): 8, (32, "none"): 2, (32, "sqrt"): 2}
    assert table["lr"].to_dict() == pytest.approx(
        {(8, "none"): 1e-3, (8, "sqrt"): 1e-3, (32, "none"): 1e-3, (32, "sqrt"): 2e-3}
    )
    for (batch, _), row in table.iterrows():
        run = runs.load(whole.study.folder / row["run"])
        assert (run.record["status"], run.config.train.batch_size) == ("finished", batch)
        assert run.best["val_ppl"] == pytest.approx(row["best_ppl"])
        assert run.record["faithful"] is None
    assert set(whole.study.histories["cell"]) == set(table["run"])


def test_one_line_for_each_run(whole):
    lines = whole.said.splitlines()
    assert lines[0] == f"3 runs for 4 cells (equal rates share one) in {whole.study.folder}"
    assert lines[1].startswith("1 of 3  fan-in, batch 8, none/sqrt (0.001), seed 42: PPL ")
    assert " left" in lines[1]
    assert lines[3].startswith("3 of 3  fan-in, batch 32, sqrt (0.002), seed 42: PPL ")
    assert len(lines) == 4


def test_what_it_leaves(whole):
    names = {path.name for path in whole.study.folder.iterdir() if path.is_file() and path.suffix != ".lock"}
    assert names == {
        "settings.json", "study.json", "lr_scaling.csv", "histories.csv", "lr_scaling.md", "lr_scaling.png",
    }  # fmt: skip
    assert (whole.study.folder / "lr_scaling.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((whole.study.folder / "study.json").read_text()) == whole.study.record
    report = (whole.study.folder / "lr_scaling.md").read_text(encoding="utf-8")
    assert all(f"- {sentence}\n" in report for sentence in whole.study.findings)
    assert "| fan-in | 32 | sqrt | 0.002 | 42 | 2 |" in report
    assert "- fan-in: init_std None, embedding_std 1.0, forget_gate_bias 1.0\n" in report


class Counts(LiveLine):
    """Counts the steps of all runs, and calls a function at one of them."""

    def __init__(self, at=0, call=None):
        super().__init__(io.StringIO())
        self.steps, self._at, self._call = 0, at, call

    def step(self, *_):
        self.steps += 1
        if self.steps == self._at:
            self._call()


def crash():
    raise RuntimeError("the machine is gone")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "error"),
    [(lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt), (crash, RuntimeError)],
    ids=["stopped", "crashed"],
)
def test_an_interrupted_grid_goes_on_without_repeating_what_is_finished(whole, text, tmp_path, call, error):
    with pytest.raises(error):
        grid_of(text, tmp_path, Counts(9, call))  # in the second run, after its first step
    finished = next(tmp_path.glob("*/fan-in-batch-8-none-seed-42/run.json"))
    before, counter = finished.stat().st_mtime_ns, Counts()
    study = grid_of(text, tmp_path, counter)
    assert counter.steps == {KeyboardInterrupt: 2 - 1, RuntimeError: 2}[error] + 2  # stopped is saved, crashed is not
    assert finished.stat().st_mtime_ns == before
    columns = ["batch", "rule", "lr", "steps", "best_ppl", "final_ppl", "plateau"]
    assert study.table[columns].equals(whole.study.table[columns])
    assert grid_of(text, tmp_path, Counts(1, crash)).table[columns].equals(whole.study.table[columns])


@pytest.mark.parametrize("times", [1, 2], ids=["after the step", "at once"])
def test_an_interrupt_is_one_of_the_study_in_whatever_way(text, tmp_path, times):
    progress = Counts(1, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(times)])
    with pytest.raises(StudyInterrupted, match="the same call goes on from here") as raised:
        grid_of(text, tmp_path, progress)
    assert isinstance(raised.value, KeyboardInterrupt)  # as which the shell takes it


@pytest.mark.slow
def test_a_notebook_shows_an_interrupted_grid_and_a_run_without_a_model_in_one_line_each(text, tmp_path):
    config = f"nl.RunConfig.from_dict({config_of(text, 'results').to_dict()!r})"
    interrupts = "def step(self, *_):\n        import signal; signal.raise_signal(signal.SIGINT)\n"
    cells = [
        "import newllm_lib as nl\nfrom newllm_lib.reporting.progress import Progress\n"
        "from newllm_lib.reporting.study_progress import LiveLine\n"
        f"class Stops(LiveLine):\n    {interrupts}class Silent(Progress):\n    {interrupts}config = {config}",
        "nl.lr_scaling(config, '8', 'none', 'fan-in', progress=Stops())",
        "run = nl.train(config, name='r', progress=Silent())",
        "run.model",
        "raise KeyboardInterrupt('of somebody else')",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(book, timeout=120, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert book.cells[0].outputs == book.cells[2].outputs == []
    shown, interrupted = book.cells[1].outputs
    assert shown.data["text/plain"].endswith("stopping after this step, then saving; interrupt again to stop at once")
    assert (interrupted.ename, interrupted.traceback) == (
        "StudyInterrupted",
        ["interrupted; what is done is saved: run this cell again to go on"],
    )
    (no_model,) = book.cells[3].outputs
    assert no_model.traceback == [
        "\x1b[31mresults/r: no validation is behind this run yet, so there is no model: train it on (the same call; in "
        "a notebook that cell again)\x1b[0m"
    ]
    assert len("\n".join(book.cells[4].outputs[0].traceback).splitlines()) > 3  # others are shown as ever


@pytest.mark.slow
def test_another_batch_only_adds_runs(text, tmp_path):
    first = lr_scaling(config_of(text, tmp_path), "8", "none", "fan-in", progress=Counts())
    counter = Counts()
    more = lr_scaling(config_of(text, tmp_path), "8,16", "none", "fan-in", progress=counter)
    assert more.folder == first.folder
    assert counter.steps == 4  # those at batch 16
    assert more.table["best_ppl"][0] == first.table["best_ppl"][0]


# --- one folder, one grid -------------------------------------------------------------------------------------------


def one_cell(text, folder, progress=None, **changes):
    return lr_scaling(config_of(text, folder, **changes), "8", "none", "fan-in", progress=progress or Counts())


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"max_steps": 16}, "max_steps 8 there, 16 here"),
        ({"validate_every_steps": 2}, "validate_every_steps None there, 2 here"),
        ({"hidden_dim": 16, "weight_decay": 0.5}, "hidden_dim 12 there, 16 here; weight_decay 0.0 there, 0.5 here"),
        ({}, r"data '\w+ \(sha256 \w{16}…\)' there, 'more \(sha256 \w{16}…\)' here"),
    ],
    ids=["length", "validations", "model", "text"],
)
def test_a_folder_of_another_grid_is_refused_before_anything_is_trained(text, tmp_path, changes, differs):
    """Also while that grid has nothing but its settings; and it goes on as if nothing had been."""
    with pytest.raises(RuntimeError):
        one_cell(text, tmp_path, Counts(1, crash), name="mine")
    other = text if changes else write_text(tmp_path / "more", texts=50)
    before = contents(tmp_path / "mine")
    message = rf"mine: holds a study with other settings: {differs}\. Give this one another name, or move that"
    with pytest.raises(ValueError, match=message):
        one_cell(other, tmp_path, name="mine", **changes)
    assert contents(tmp_path / "mine") == before
    study = one_cell(text, tmp_path, name="mine")
    assert study.record["key"] == json.loads((study.folder / "settings.json").read_text())["key"]
    with pytest.raises(ValueError, match=message):
        one_cell(other, tmp_path, name="mine", **changes)


def test_the_copy_of_another_grid_is_refused_too_and_nothing_is_marked(text, tmp_path):
    (tmp_path / "drive").mkdir()
    changes = {"name": "mine", "mirror_dir": str(tmp_path / "drive")}
    one_cell(text, tmp_path / "first", **changes)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"drive/mine: holds a study with other settings: max_steps 8 there, 4 here"):
        one_cell(text, tmp_path / "second", max_steps=4, **changes)
    assert contents(tmp_path) == before
    assert one_cell(text, tmp_path / "second", **changes).table["steps"].tolist() == [8]


def test_a_grid_of_before_the_settings_were_kept_goes_on(text, tmp_path):
    study = one_cell(text, tmp_path, name="mine")
    (study.folder / "settings.json").unlink()
    record = json.loads((study.folder / "study.json").read_text())
    del record["key"]
    (study.folder / "study.json").write_text(json.dumps(record))
    counter = Counts()
    assert one_cell(text, tmp_path, counter, name="mine").table["best_ppl"].equals(study.table["best_ppl"])
    assert counter.steps == 0


CELL = "fan-in-batch-8-none-seed-42"


def go_on(study, **changes):
    """What a user may do with a run of a study: train it further on its own."""
    return runs.train(runs.load(study.folder / CELL).requested.replace(**changes), progress=Counts())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["finished", "stopped", "killed"])
def test_a_cell_that_was_trained_for_longer_is_refused(text, tmp_path, how):
    """Before the cells before it are trained; or when its turn comes, where its record does not know of it yet."""
    study = one_cell(text, tmp_path)
    if how == "finished":
        assert go_on(study, max_steps=12).record["step"] == 12
    else:
        config = runs.load(study.folder / CELL).requested.replace(max_steps=1000)
        runs.train(config, progress=Counts(4, lambda: signal.raise_signal(signal.SIGINT)))
    if how == "killed":
        record = json.loads((study.folder / CELL / "run.json").read_text())
        (study.folder / CELL / "run.json").write_text(json.dumps(record | {"step": 8, "status": "running"}))
    counter, message = Counts(), rf"{CELL}: has trained 12 steps, and this study plans 8: it was continued on its own"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            lr_scaling(config_of(text, tmp_path), "16,8", "none", "fan-in", progress=counter)
    assert counter.steps == (4 if how == "killed" else 0)
    (study.folder / CELL).rename(tmp_path / "elsewhere")
    counter = Counts()
    again = one_cell(text, tmp_path, counter)
    assert (counter.steps, again.table["best_ppl"][0]) == (8, study.table["best_ppl"][0])


@pytest.mark.slow
def test_a_cell_that_was_cut_short_is_trained_to_its_end(text, tmp_path):
    """By a smaller number of steps, or by patience, which a grid's cells do not have."""
    study = one_cell(text, tmp_path)
    config = runs.load(study.folder / CELL).requested
    for changes in ({"max_steps": 4}, {"patience": 1, "min_delta": 50.0}):
        shutil.rmtree(study.folder / CELL)
        short = runs.train(config.replace(**changes), progress=Counts())
        assert short.record["step"] < 8
        again = one_cell(text, tmp_path)
        assert again.table[["steps", "best_ppl"]].equals(study.table[["steps", "best_ppl"]])


# --- cells that break down, copies ---------------------------------------------------------------------------------


def test_a_cell_that_breaks_down_is_a_result_and_is_not_tried_again(text, tmp_path):
    changes = {"lr_base": 100.0, "weight_decay": 10.0, "optimizer": "adamw", "max_steps": 60}
    study = lr_scaling(config_of(text, tmp_path, **changes), "8", "none", "fan-in", progress=Counts())
    assert study.table["status"].tolist() == ["broke down"]
    assert any("broke down and counts with the best figure it had" in sentence for sentence in study.findings)
    counter = Counts()
    lr_scaling(config_of(text, tmp_path, **changes), "8", "none", "fan-in", progress=counter)
    assert counter.steps == 0


def test_a_copy_is_kept_where_one_is_wanted(text, tmp_path):
    (tmp_path / "drive").mkdir()
    config = config_of(text, tmp_path / "results", mirror_dir=str(tmp_path / "drive"))
    study = lr_scaling(config, "8", "none", "fan-in", progress=Counts())
    copy = tmp_path / "drive" / study.folder.name
    assert (copy / "study.json").read_text() == (study.folder / "study.json").read_text()
    assert (copy / "fan-in-batch-8-none-seed-42" / "run.json").exists()


# --- the moving line ------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_moves_in_a_terminal_alone_and_at_most_twice_a_second():
    for stream, moved in ((Terminal(), 3), (io.StringIO(), 0)):
        now = iter((0.0, 0.1, 0.6, 0.7, 1.3))
        line = LiveLine(stream, clock=lambda now=now: next(now))
        line.label = "1 of 2"
        for step in range(1, 6):
            line.step(999 + step, 5000, 0.1, 4.0, 1000.0)
        assert stream.getvalue().count("\r1 of 2: step") == moved
        assert ("step 1,000 of 5,000" in stream.getvalue()) == bool(moved)
        line.say("done")
        assert stream.getvalue().endswith("done\n")
        assert stream.getvalue().split("\r")[-1] == "done\n"


def test_a_warning_is_told_once_and_other_messages_not_at_all():
    line = LiveLine(stream := io.StringIO())
    for text in ("warning: a", "      run  results/x", "warning: a", "warning: b"):
        line.message(text)
    assert stream.getvalue() == "warning: a\nwarning: b\n"


def test_the_answer_to_an_interrupt_is_told():
    line = LiveLine(stream := io.StringIO())
    with StopRequest(line).listening():
        signal.raise_signal(signal.SIGINT)
    assert stream.getvalue() == "stopping after this step, then saving; press Ctrl-C again to stop at once\n"


def test_in_a_notebook_all_lines_are_one_display(monkeypatch):
    pages, line, signals = [], None, iter([signal.SIGINT])

    def show(data, **_):
        pages.append(data["text/plain"])
        for number in signals:  # an interrupt in the middle of an update
            signal.raise_signal(number)
        return SimpleNamespace(update=show)

    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr(IPython.display, "display", show)
    line = LiveLine(clock=iter(range(10)).__next__)
    line.label = "1 of 2"
    with StopRequest(line).listening():
        line.say("2 runs")
    assert pages == ["2 runs"]  # one display, not two
    line.step(1, 2, 0.5, 3.0, 100.0)
    line.close()
    answer = "stopping after this step, then saving; interrupt again to stop at once"
    assert pages[1:] == [f"2 runs\n{answer}\n1 of 2: step 1 of 2, loss 3.000, 100 tokens/s", f"2 runs\n{answer}"]


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = SHAPE | RECIPE | {"init_std": "none", "data": text, "max_steps": 2, "lr_base": 1e-3}
    options = [part for key, value in values.items() for part in ("--" + key.replace("_", "-"), str(value))]
    at = options.index("--lr")
    options = [*options[:at], *options[at + 2 :], "--epochs", "none"]
    call = ["lr-scaling", "small", "--batch-sizes", "8", "--rules", "none", "--initialisations", "fan-in"]
    result = CliRunner().invoke(main, [*call, *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("- Every cell read 16 sequences of ")
    assert "1 run for 1 cell " in result.stderr
    as_json = CliRunner().invoke(main, [*call, *options, "--json"])
    assert json.loads(as_json.stdout)["cells"][0]["steps"] == 2
    for wrong in (["--batch-sizes", "8,x"], ["--dropout", "2"]):
        refused = CliRunner().invoke(main, ["lr-scaling", *wrong])
        assert refused.exit_code == 2, refused.output
