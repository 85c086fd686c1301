"""What was moved in a panel is there again after Run all; what the settings say since then comes first."""

import json

import IPython
import IPython.display
import pytest
from tiny import tiny_config, write_text

from newllm_lib.notebook import kept, panel_plan
from newllm_lib.notebook.panel import Panel
from newllm_lib.notebook.panel_view import SavedPlan

pytestmark = pytest.mark.usefixtures("no_pictures")


class Shell:
    """Stands in for IPython's shell in a kernel."""

    kernel = object()

    def __init__(self):
        self.user_ns = {"In": ["", "x = 1"]}
        self.events = self

    def register(self, event, function):
        pass

    def unregister(self, event, function):
        pass


class Handle:
    def update(self, data, *, raw):
        Handle.last = data


@pytest.fixture(autouse=True)
def shell(monkeypatch, tmp_path):
    """A notebook of a person, which shows panels without measuring."""
    shell = Shell()
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    monkeypatch.setattr(IPython.display, "display", lambda data, raw, display_id=False: Handle())
    monkeypatch.setattr(panel_plan, "estimate_speed", lambda setup, measure, anew: None)
    monkeypatch.setattr(Panel, "_last_shown", None)
    monkeypatch.delenv("NEWLLM_SMOKE", raising=False)
    monkeypatch.setenv("JPY_SESSION_NAME", "/somewhere/01_train.ipynb")
    monkeypatch.chdir(tmp_path)
    return shell


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def shown(text, **changes):
    """The panel that running its cell shows."""
    panel = Panel(tiny_config(text), **changes)
    panel._ipython_display_()
    return panel


def typed(panel, **texts):
    for name, value in texts.items():
        panel.settings[name].box.value = value


def test_nothing_is_written_before_something_is_moved(text, tmp_path):
    panel = shown(text)
    panel.set(lr=1e-2)  # by the code of a cell, which runs again
    assert panel.config.train.lr == 1e-2
    assert not (tmp_path / "results").exists()


def test_what_was_moved_is_there_again(text, tmp_path):
    typed(shown(text), dropout="0.3", clip_by_epoch="0:1,5:2", batch_size="")
    again = shown(text)
    assert again.config == tiny_config(text, dropout=0.3, clip_by_epoch=((0, 1.0), (5, 2.0)), batch_size=None)
    assert "Your changes are kept" in again.view._kept.value
    assert again.settings["dropout"].chip.description == "changed from 0.2"
    assert json.loads((tmp_path / "results" / ".panel.json").read_text())["01_train.ipynb"]["tiny"]["moved"] == {
        "batch_size": None, "clip_by_epoch": [[0, 1.0], [5, 2.0]], "dropout": 0.3,
    }  # fmt: skip


def test_a_value_that_the_settings_cell_changed_since_comes_first(text):
    typed(shown(text, seed=1), seed="5", dropout="0.3")
    changed = shown(text, seed=2)
    assert (changed.config.train.seed, changed.config.model.dropout) == (2, 0.3)
    back = shown(text, seed=1)  # a change too: what was moved before is forgotten
    assert (back.config.train.seed, back.config.model.dropout) == (1, 0.3)


def test_each_notebook_and_each_preset_has_its_own(text, monkeypatch):
    typed(shown(text), dropout="0.3")
    assert Panel("quickstart")._store().read(Panel("quickstart")._given) == {}
    monkeypatch.setenv("JPY_SESSION_NAME", "/somewhere/other.ipynb")
    assert shown(text).config.model.dropout == 0.2
    monkeypatch.setenv("JPY_SESSION_NAME", "/elsewhere/01_train.ipynb")
    assert shown(text).config.model.dropout == 0.3


def test_a_preset_that_was_chosen_is_kept_with_what_was_moved_from_it(text):
    panel = shown(text)
    panel.preset.box.value = "quickstart"
    typed(panel, max_steps="7")
    again = shown(text)
    assert (again.preset.value, again.settings["max_steps"].value) == ("quickstart", 7)
    assert again._described() == panel._described()
    assert again.command == panel.command


def test_reset_and_putting_back_by_hand_leave_nothing(text, tmp_path):
    panel = shown(text)
    typed(panel, dropout="0.3")
    panel.view.reset.click()
    assert not (tmp_path / "results" / ".panel.json").exists()
    typed(panel, dropout="0.3")
    panel.settings["dropout"].chip.click()
    assert not (tmp_path / "results" / ".panel.json").exists()
    assert panel.view._kept.value == ""
    assert shown(text).config == tiny_config(text)


def test_what_is_no_value_any_more_is_dropped_and_named(text, tmp_path):
    typed(shown(text), dropout="0.3", lr="0.01")
    file = tmp_path / "results" / ".panel.json"
    entries = json.loads(file.read_text())
    entries["01_train.ipynb"]["tiny"]["moved"] |= {"dropout": 7, "warp": 9}
    file.write_text(json.dumps(entries))
    again = shown(text)
    assert again.config == tiny_config(text, lr=0.01)
    assert "No longer valid and dropped: dropout = 7, warp = 9." in again.view._kept.value
    assert "dropped" not in shown(text).view._kept.value


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"01_train.ipynb": []}', '{"01_train.ipynb": {"tiny": 3}}'])
def test_a_damaged_file_keeps_nothing_and_is_replaced(text, tmp_path, damage):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / ".panel.json").write_text(damage)
    panel = shown(text)
    assert panel.config == tiny_config(text)
    typed(panel, dropout="0.3")
    assert shown(text).config.model.dropout == 0.3


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_memory(text, tmp_path):
    (tmp_path / "results").write_text("a file in the way")
    panel = shown(text)
    typed(panel, dropout="0.3")
    assert panel._described().model.dropout == 0.3


@pytest.mark.parametrize("how", ["smoke", "papermill's cell", "papermill's variable"])
def test_where_no_person_runs_the_notebook_nothing_is_kept(text, monkeypatch, shell, how):
    typed(shown(text), dropout="0.3")
    if how == "smoke":
        monkeypatch.setenv("NEWLLM_SMOKE", "1")
    elif how == "papermill's cell":
        shell.user_ns["In"] += ["# Parameters\nSEED = 3\n"]
    else:
        monkeypatch.setenv("PAPERMILL_OUTPUT_PATH", "out.ipynb")
    panel = shown(text)
    assert panel.config.model.dropout == 0.2
    typed(panel, lr="0.5")
    monkeypatch.undo()


def test_run_all_continues_the_run(text):
    """The same configuration, hence the same identity and folder, after each display."""
    typed(shown(text), dropout="0.3")
    assert len({shown(text).config.identity("text") for _ in range(3)}) == 1


def test_a_saved_notebook_keeps_the_plan_as_plain_html(text):
    panel = shown(text)
    typed(panel, dropout="0.35")
    page = Handle.last["text/html"]
    name = panel._saved_plan._name
    assert f'<div class="{name}">' in page
    assert "--dropout 0.35" in page
    assert name in panel.view.widget.children[-1].value  # the widgets' style sheet hides it
    assert SavedPlan()._name != name


def test_the_name_of_the_notebook(monkeypatch, shell):
    assert kept.notebook_name() == "01_train.ipynb"
    monkeypatch.delenv("JPY_SESSION_NAME")
    assert kept.notebook_name() == ""
    shell.user_ns["__vsc_ipynb_file__"] = "/home/me/mine.ipynb"
    assert kept.notebook_name() == "mine.ipynb"
