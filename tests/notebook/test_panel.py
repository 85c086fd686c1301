"""The panel of settings: every field in it, no value bent, a plan that follows, refusals in the words of training."""

import gc
import math
import re
import weakref
from html import escape, unescape

import ipywidgets
import nbformat
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient
from tiny import RECIPE, SHAPE, StopAt, tiny_config, write_text

import newllm_lib as nl
from newllm_lib import runs
from newllm_lib.config import flat_fields, presets
from newllm_lib.config.fields import allowed_types
from newllm_lib.config.parsing import shown
from newllm_lib.data import dataset
from newllm_lib.data.dataset import Prepared
from newllm_lib.notebook import panel as room
from newllm_lib.notebook import panel_plan
from newllm_lib.notebook.field_widgets import RED, SLIDERS, label_of
from newllm_lib.notebook.panel import Panel
from newllm_lib.notebook.panel_view import GROUPS, MOST_USED, group_of
from newllm_lib.reporting.progress import Progress
from newllm_lib.runs.folder import run_folder
from newllm_lib.training.estimates import Speed
from newllm_lib.training.plan import plan_lines
from newllm_lib.training.setup import make_setup

pytestmark = pytest.mark.usefixtures("no_pictures")

FIELDS = flat_fields()


@pytest.fixture
def tiny(text, tmp_path):
    """A panel of a run that takes a second."""
    return Panel(tiny_config(text, results_dir=str(tmp_path / "runs")))


@pytest.fixture(scope="module")
def shared():
    """A panel that is never shown, for tests that set every field they look at."""
    return Panel("quickstart")


def widgets_in(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from widgets_in(child)


def read(html):
    """The texts of a page, one after another."""
    return " ".join(unescape(part).strip() for part in re.sub(r"<[^>]*>", "\n", html).split("\n") if part.strip())


def plan_of(panel):
    """What the plan shows."""
    return read(panel.view.shown.value)


def note_of(panel, name):
    return read(panel.settings[name].note.value)


def type_into(panel, name, text):
    panel.settings[name].box.value = text


def refused(panel):
    """The words in red, the same as those with which the panel refuses."""
    with pytest.raises(ValueError) as raised:
        _ = panel.config
    alert = re.search(r'<div role="alert"[^>]*>(.*?)</div>', panel.view.shown.value, re.DOTALL)
    assert unescape(alert[1]) == str(raised.value)
    return str(raised.value)


# --- every field ------------------------------------------------------------------------------------------------


def test_every_field_stands_in_the_panel_once(shared):
    assert {*shared.settings, "preset"} == set(FIELDS)
    inside = list(widgets_in(shared.widget))
    for setting in (shared.preset, *shared.settings.values()):
        for widget in filter(None, (setting.label, setting.slider, setting.box, setting.note)):
            assert inside.count(widget) == 1


def test_only_widgets_that_both_versions_have(shared):
    kinds = {type(widget).__name__ for widget in widgets_in(shared.widget)}
    assert kinds == {"VBox", "HBox", "Accordion", "Button", "HTML", "Label", "Dropdown", "IntSlider", "Text"}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_explains_itself_once_in_the_words_of_its_docstring(shared, name):
    setting = shared.preset if name == "preset" else shared.settings[name]
    assert setting.label.value == label_of(FIELDS[name])
    if name != "preset":  # there the preset explains itself
        assert read(setting.note.value).endswith(FIELDS[name].doc.replace("\n", " "))
        assert "title=" not in setting.note.value


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("epochs", "1", "150"), ("lr", "1e-05", "0.1"), ("batch_size", "8", "4096"), ("dropout", "0", "0.6")],
)
def test_a_slider_shows_its_ends(shared, name, low, high):
    setting = shared.settings[name]
    assert (setting.slider.description, setting.box.description) == (low, high)


def test_device_and_engine_are_lists_of_what_this_machine_has(shared):
    assert [value for _, value in shared.settings["device"].box.options] == ["auto", "cpu"]
    assert [value for _, value in shared.settings["engine"].box.options] == ["auto", "reference", "fused"]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("vocab_size", "vocab_size (ids)"),
        ("hidden_dim", "hidden_dim (units)"),
        ("num_layers", "num_layers"),
        ("dropout", "dropout"),
        ("sequence_length", "sequence_length (tokens)"),
        ("stride", "stride (tokens)"),
        ("min_words", "min_words"),
        ("eval_lanes", "eval_lanes"),
        ("epochs", "epochs"),
        ("batch_size", "batch_size (sequences)"),
        ("micro_batch_size", "micro_batch_size (sequences)"),
        ("lr", "lr"),
        ("warmup_steps", "warmup_steps"),
        ("patience", "patience (validations)"),
        ("min_delta", "min_delta (nats)"),
        ("checkpoint_every_minutes", "checkpoint_every_minutes"),
        ("clip_by_epoch", "clip_by_epoch"),
        ("data", "data"),
        ("tokenizer", "tokenizer"),
    ],
)
def test_a_unit_stands_behind_a_name_that_does_not_tell_it(name, label):
    assert label_of(FIELDS[name]) == label


def test_groups():
    by_group = {title: [name for name in FIELDS if group_of(FIELDS[name]) == title] for title in GROUPS}
    assert sum(map(len, by_group.values())) == len(FIELDS)
    assert {"hidden_dim", "init_std"} <= set(by_group["Model"])
    assert {"data", "stride", "tokenizer"} <= set(by_group["Data"])
    assert {"optimizer", "lr", "batch_size", "beta2", "seed"} <= set(by_group["Optimizer and rate"])
    assert {"epochs", "warmup_steps", "clip_by_epoch", "patience"} <= set(by_group["Schedule and length"])
    assert {"device", "precision", "threads", "name", "results_dir"} <= set(by_group["Machine and folders"])


@pytest.mark.parametrize("name", SLIDERS)
def test_a_slider_has_only_values_that_its_field_allows(name):
    scale, whole = SLIDERS[name], int in allowed_types(FIELDS[name].type)
    values = [scale.value(position) for position in range(scale.last + 1)]
    assert values == sorted(set(values))
    assert [scale.position(value) for value in values] == list(range(len(values)))
    changes = {"stride": 1} if name != "stride" else {}
    for value in values:
        assert not whole or value == round(value)
        presets.get("quickstart").replace(**changes | {name: round(value) if whole else value})


@pytest.mark.parametrize(
    ("name", "value", "position"),
    [
        ("batch_size", 128, 4), ("batch_size", 70, 3), ("batch_size", None, 0), ("batch_size", 10**6, 9),
        ("batch_size", "8x", 0), ("lr", 4e-3, 52), ("lr", -1.0, 0), ("lr", math.inf, 80), ("lr", math.nan, 0),
        ("hidden_dim", 100, 2), ("dropout", 0.1, 10), ("seed", 1, None),
    ],
)  # fmt: skip
def test_where_a_slider_stands(name, value, position):
    assert (SLIDERS[name].position(value) if name in SLIDERS else None) == position


# --- what it says -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Text for a batch of 4096."""
    return str(write_text(tmp_path_factory.mktemp("large"), texts=4200))


@pytest.mark.parametrize("name", presets.PRESETS)
def test_an_untouched_panel_is_its_preset(large, name):
    panel = Panel(name, data=large)
    config, expected = panel.config, presets.get(name).replace(data=large)
    assert config == expected
    assert config.identity("text") == expected.identity("text")
    assert panel.overrides == {"data": large}
    assert panel.command == f"newllm train {name} --data {large}"


def test_a_panel_of_a_configuration_of_ones_own(tiny, text):
    assert tiny.config == tiny_config(text, results_dir=tiny.settings["results_dir"].value)
    assert tiny.preset.value == "tiny"
    assert tiny.overrides == {}
    tiny.set(lr=1e-2)
    assert tiny.overrides == {"lr": 1e-2}
    assert tiny.command.startswith("newllm train auto --vocab-size 40 --embed-dim 8 ")
    tiny.set(preset="quickstart")
    tiny.set(preset="tiny")
    assert tiny.overrides == {}


def test_a_configuration_of_a_known_preset_is_compared_with_it(text):
    panel = Panel(presets.get("quickstart").replace(lr=2e-3, data=str(text)), max_steps=9)
    assert panel.overrides == {"data": str(text), "max_steps": 9, "lr": 2e-3}
    assert panel.command == f"newllm train quickstart --data {text} --max-steps 9 --lr 0.002"


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (("quickstrat",), {}, "unknown preset 'quickstrat'. Did you mean 'quickstart'?"),
        (("quickstart",), {"droput": 0.1}, "unknown setting 'droput'. Did you mean 'dropout'?"),
    ],
)
def test_unknown_names_are_refused_at_once(arguments, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Panel(*arguments, **changes)


def test_unknown_names_are_refused_by_set(tiny):
    for changes in ({"droput": 0.1}, {"preset": "quickstrat"}):
        with pytest.raises(ValueError, match="Did you mean"):
            tiny.set(lr=1.0, **changes)
    assert tiny.overrides == {}


def values_of(item):
    """Values of a field, from all that it allows."""
    kinds, allowed = allowed_types(item.type), item.metadata
    none = [st.none()] if type(None) in kinds else []
    if allowed["choices"]:
        return st.one_of(st.sampled_from(allowed["choices"]), *none)
    if bool in kinds:
        return st.booleans()
    if int in kinds:
        return st.one_of(st.integers(allowed["low"], allowed["high"]), *none)
    if float in kinds:
        ends = {"exclude_min": allowed["open_low"], "exclude_max": allowed["open_high"]}
        return st.one_of(st.floats(allowed["low"], allowed["high"], allow_nan=False, **ends), *none)
    if item.name == "clip_by_epoch":
        return st.builds(
            lambda first, rest: ((0, first), *sorted(rest.items())),
            st.floats(1e-6, 1e6),
            st.dictionaries(st.integers(1, 10**6), st.floats(1e-6, 1e6), max_size=4),
        )
    return st.text("abc xyz/", min_size=1).map(str.strip).filter(len)


VALUES = st.fixed_dictionaries(
    {},
    optional={
        name: values_of(item) for name, item in FIELDS.items() if name not in ("preset", "name", "epochs", "mirror_dir")
    },
)


QUICKSTART = {name: room._value(presets.get("quickstart"), item) for name, item in FIELDS.items() if name != "preset"}


@settings(max_examples=30)
@given(values=VALUES)
def test_values_that_are_set_come_back_exactly(shared, values):
    assume(values.get("max_steps", 1) is not None)
    shared.set(**QUICKSTART | values)
    assert shared._described() == presets.get("quickstart").replace(**values)
    assert shared.overrides == {name: value for name, value in values.items() if value != QUICKSTART[name]}


@settings(max_examples=30)
@given(values=VALUES)
def test_values_that_are_typed_come_back_exactly(shared, values):
    assume(values.get("max_steps", 1) is not None)
    typed = {name: value for name, value in values.items() if isinstance(shared.settings[name].box, ipywidgets.Text)}
    shared.set(**QUICKSTART)
    for name, value in typed.items():
        type_into(shared, name, "" if value is None else shown(FIELDS[name], value))
    assert shared._described() == presets.get("quickstart").replace(**typed)


def test_an_empty_box_is_none_and_files_stand_between_semicolons(shared):
    shared.set(**QUICKSTART | {"epochs": 2})
    type_into(shared, "max_steps", " 7 ")
    type_into(shared, "epochs", "")
    type_into(shared, "data", "a b.txt; c.txt")
    described = shared._described()
    assert (described.train.max_steps, described.train.epochs) == (7, None)
    assert described.data.data == ("a b.txt", "c.txt")
    shared.set(data=("d.txt", "e f.txt"))
    assert shared.settings["data"].box.value == "d.txt; e f.txt"


@pytest.mark.parametrize(
    ("name", "value", "box", "position"),
    [
        ("batch_size", 70, "70", 3),
        ("batch_size", 50_000, "50000", 9),
        ("lr", 3.3333, "3.3333", 80),
        ("lr", 1.1e-3, "0.0011", 41),
        ("epochs", 1_000_000, "1000000", 149),
        ("init_gain", 1e-300, "1e-300", None),
        ("seed", 2**63 - 1, "9223372036854775807", None),
        ("dropout", 0.123456789, "0.123456789", 12),
    ],
)
def test_values_off_the_slider_are_shown_as_they_are(name, value, box, position):
    panel = Panel("quickstart", **{name: value})
    setting = panel.settings[name]
    assert setting.box.value == box
    assert position is None or setting.slider.value == position
    assert setting.value == value
    assert (
        getattr(panel._described().model if name in ("dropout", "init_gain") else panel._described().train, name)
        == value
    )


# --- presets and marks ------------------------------------------------------------------------------------------


def test_another_preset_brings_its_recipe_and_leaves_text_folders_and_machine(text):
    kept = {"data": str(text), "results_dir": "elsewhere", "device": "cpu", "threads": 2}
    panel = Panel("quickstart", **kept, max_steps=9, lr=1.0, name="mine")
    panel.preset.box.value = "l4_fp16"  # by hand
    assert panel.overrides == kept
    assert panel._described() == presets.get("l4_fp16").replace(**kept)
    assert "square-root rule to 8e-4" in read(panel.preset.note.value)


def chip_of(panel, name):
    """What the button that undoes a change says; "" where there is none to see."""
    chip = panel.settings[name].chip
    return chip.description if chip and chip.layout.display != "none" else ""


def test_reset_brings_back_what_the_settings_and_the_preset_say(text):
    panel = Panel("quickstart", data=str(text), lr=1.0, results_dir="mine")
    panel.settings["hidden_dim"].slider.value = 1
    panel.settings["results_dir"].box.value = "elsewhere"
    panel.preset.box.value = "l4_fp16"
    assert panel.overrides == {"data": str(text), "results_dir": "elsewhere"}
    panel.view.reset.click()
    assert panel.preset.value == "quickstart"
    assert panel.overrides == {"data": str(text), "lr": 1.0, "results_dir": "mine"}


def test_a_field_that_was_changed_shows_it_and_a_button_undoes_it(tiny):
    assert chip_of(tiny, "lr") == ""
    tiny.refresh()
    assert tiny.view.accordion.get_title(0) == "Model"
    tiny.set(lr=1e-2, hidden_dim=20, num_layers=3, batch_size=None, clip_by_epoch=((0, 2.0),))
    assert chip_of(tiny, "lr") == "changed from 0.003"
    assert chip_of(tiny, "batch_size") == "changed from 8"
    assert chip_of(tiny, "clip_by_epoch") == "changed from 0:0.5,10:1,30:2"
    assert tiny.view.accordion.get_title(0) == "Model (2 changed)"
    tiny.settings["lr"].chip.click()
    assert (tiny.settings["lr"].value, tiny.settings["lr"].box.value, chip_of(tiny, "lr")) == (3e-3, "0.003", "")
    assert "learning rate 0.003" in plan_of(tiny)
    tiny.set(hidden_dim=12, num_layers=2)
    assert tiny.view.accordion.get_title(0) == "Model"


def test_what_the_settings_cell_says_is_no_change(text):
    panel = Panel("quickstart", data=str(text), seed=7)
    assert (chip_of(panel, "seed"), chip_of(panel, "data")) == ("", "")


def test_a_long_value_keeps_its_button_small(tiny, tmp_path):
    tiny.set(data=str(tmp_path / "other"))
    assert len(chip_of(tiny, "data")) <= len("changed from ") + 25
    assert chip_of(tiny, "data").startswith("changed from \N{HORIZONTAL ELLIPSIS}")


# --- the plan ---------------------------------------------------------------------------------------------------


def test_the_plan_of_a_tiny_run(tiny):
    plan = read(repr(tiny)) and plan_of(tiny)
    # 34 words of the 40 allowed; 62 sequences with 662 targets, in batches of 8, twice
    for shown_text in (
        "parameters 1,296",
        "steps 16",
        "epochs 2.00",
        "tokens a step 83",
        "learning rate 0.003",
        "8 an epoch",
    ):
        assert shown_text in plan
    assert "0.003: set directly (0.0001 at batch 32, not scaled by the batch would give 0.0001); constant" in plan
    assert "a new run" in plan
    assert "shell newllm train auto --vocab-size 40" in plan


def test_the_plan_is_that_of_training(tiny):
    setup = make_setup(tiny.config)
    plan = plan_of(tiny)
    for name, line in plan_lines(setup, str(run_folder(setup))):
        assert f"{name} {line}" in plan


def test_the_plan_follows_a_slider(tiny):
    repr(tiny)
    tiny.settings["num_layers"].slider.value = 4  # positions from 1
    assert tiny.settings["num_layers"].box.value == "5"
    assert tiny.config.model.num_layers == 5
    assert "parameters 1,764" in plan_of(tiny)  # 3 more layers of 12 x 12 + 12
    tiny.settings["lr"].slider.value = 40
    assert tiny.config.train.lr == 1e-3
    assert "learning rate 0.001" in plan_of(tiny)
    tiny.settings["optimizer"].box.value = "muon"
    assert "Muon 0.02 on the hidden matrices" in plan_of(tiny)
    tiny.settings["scale_lr_by_model_size"].box.value = True
    assert tiny.config.train.scale_lr_by_model_size is True


def test_nothing_is_read_before_it_is_shown_or_asked_for(text, monkeypatch):
    monkeypatch.setattr(panel_plan, "prepare", None)
    panel = Panel("quickstart", data=str(text))
    panel.set(lr=1e-3)
    assert panel.view.shown.value == ""


def test_what_it_says_while_it_reads_is_text_and_no_html(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, pages = write_text(tmp_path / "<b>x" / "text"), []
    panel, prepare = Panel(tiny_config(text)), dataset.prepare
    monkeypatch.setattr(panel_plan, "prepare", lambda config: pages.append(panel.view.shown.value) or prepare(config))
    repr(panel)
    assert "<b>" not in pages[0]
    assert read(pages[0]) == f"reading the text of {text} …"


def test_the_text_is_read_again_only_where_its_settings_change(tiny, monkeypatch):
    reads, prepare, seen = [], dataset.prepare, []
    monkeypatch.setattr(panel_plan, "prepare", lambda config: reads.append(plan_of(tiny)) or prepare(config))
    repr(tiny)
    assert len(reads) == 1
    assert reads[0].startswith("reading the text of ")
    for changes in ({"lr": 1e-2}, {"sequence_length": 9}, {"layout": "stream"}, {"batch_size": 4}, {"name": "a"}):
        tiny.set(**changes)
        seen.append(tiny._plan.setup.train_split.ids.shape)
    assert len(reads) == 1
    assert seen == [(62, 12), (78, 9), (10, 8, 9), (20, 4, 9), (20, 4, 9)]
    tiny.set(vocab_size=20)
    assert len(reads) == 2
    assert tiny._plan.setup == make_setup(tiny._described(), prepared=tiny._planner._text)


def test_splits_are_laid_out_once_and_are_those_of_training(tiny):
    repr(tiny)
    first = tiny._plan.setup.train_split
    tiny.set(lr=1e-2, batch_size=4)
    assert tiny._plan.setup.train_split is first
    for changes in ({"stride": 5}, {"min_words": 9}, {"layout": "stream"}, {"eval_lanes": 3}, {"batch_size": 5}):
        tiny.set(**changes)
        alone = make_setup(tiny._described())
        assert tiny._plan.setup.train_split.digest == alone.train_split.digest
        assert tiny._plan.setup.validation_split.digest == alone.validation_split.digest


def test_the_streams_of_all_batches_share_what_tells_the_largest(tiny, monkeypatch):
    tiny.set(layout="stream")
    repr(tiny)
    made, split = [], Prepared.split
    monkeypatch.setattr(
        Prepared, "split", lambda self, name, lanes=None: made.append(lanes) or split(self, name, lanes)
    )
    tiny.set(batch_policy="fast", batch_size=3)
    tiny.set(batch_size=4)
    assert made == [1, 3, 4]


def test_training_does_not_share_the_memory_with_the_panel(tiny):
    repr(tiny)
    laid_out = weakref.ref(tiny._plan.setup.train_split.ids)
    assert laid_out() is not None
    assert tiny.config is not None  # as training reads it
    gc.collect()
    assert laid_out() is None
    assert "1,296 parameters" in repr(tiny)  # and is laid out anew


def test_minutes_come_from_the_measured_rate(tiny, monkeypatch):
    asked = []

    def estimate(setup, measure, anew):
        asked.append(((measure, anew), plan_of(tiny)))
        return Speed(10.0, "measured just now") if any(was for (was, _), _ in asked) else None

    monkeypatch.setattr(panel_plan, "estimate_speed", estimate)
    repr(tiny)
    assert "time here not measured" in plan_of(tiny)
    buttons = {w.description: w for w in widgets_in(tiny.widget) if isinstance(w, ipywidgets.Button)}
    buttons["Measure this machine"].click()
    assert asked[-1][0] == (True, True)
    assert asked[-1][1].startswith("measuring this machine … parameters 1,296")  # the last plan stays, dimly
    assert "time here about 2 min 12 s" in plan_of(tiny)  # 16 steps of 82.75 tokens, 10 a second
    assert "validation and saving not counted (10 tokens/s, measured just now)" in plan_of(tiny)
    tiny.set(epochs=1)
    assert asked[-1][0] == (False, False)
    assert "time here about 1 min 6 s" in plan_of(tiny)


def test_what_should_be_known_before_is_said(text):
    panel = Panel("cpu_baseline", data=str(text), device="cpu", hidden_dim=60_000)
    plan = repr(panel) and plan_of(panel)
    assert "not faithful to the published run: vocab_size is 34, not 1000; hidden_dim is 60000, not 512" in plan
    assert re.search(r"about [\d.]+ GiB are needed, and this machine has [\d.]+ GiB", plan)
    panel.set(batch_policy="fast", hidden_dim=64)
    assert "batch_policy fast finds the batch when training starts" in plan_of(panel)
    assert "with a larger batch the same steps read more text" not in plan_of(panel)
    panel.set(max_steps=100)
    assert "max_steps = 100 counts steps: with a larger batch the same steps read more text" in plan_of(panel)
    assert "GiB are needed" not in plan_of(panel)


# --- what does not go together ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named", "message"),
    [
        ({"epochs": None}, "epochs max_steps", "epochs = none and max_steps = none: give"),
        ({"batch_size": 5000}, "batch_size", "batch_size = 5000: must be at most 62, the number of"),
        ({"lr": -1.0}, "lr", "lr = -1.0: must be above 0 and at most 100, or none"),
        ({"optimizer": "sgd"}, "optimizer", "optimizer = 'sgd': must be one of adam, adamw, muon"),
        ({"scale_lr_by_model_size": 1}, "scale_lr_by_model_size", "scale_lr_by_model_size = 1: must be"),
        ({"clip_by_epoch": "x"}, "clip_by_epoch", "clip_by_epoch = 'x': must be"),
        ({"device": "cuda:7"}, "device", "device = 'cuda:7': must be auto, cpu"),
        ({"engine": "warp"}, "engine", "engine = 'warp': must be auto or one of reference"),
        ({"name": "a/b"}, "name", "name = 'a/b': must be a plain folder name"),
        ({"min_words": 99}, "min_words", "data "),
        ({"data": "no<such>&text"}, "data", "data no<such>&text: no such folder, file or pattern."),
        ({"mirror_dir": "no such"}, "mirror_dir", "mirror_dir = 'no such': must be a folder that exists"),
        (
            {"lr": "x", "seed": None},
            "lr seed",
            "lr = 'x': must be a number, above 0 and at most 100, or none\n"
            "seed = none: must be a whole number from 0 to 9,223,372,036,854,775,807",
        ),
    ],
    ids=str,
)
def test_a_refusal_is_in_red_and_in_the_words_of_training(tiny, changes, named, message):
    good = tiny.config
    tiny.set(**changes)
    words = refused(tiny)
    assert words.startswith(message)
    assert f"{' '.join(words.splitlines())} The last plan that could be: parameters 1,296" in plan_of(tiny)
    with pytest.raises((ValueError, OSError)) as training:
        runs.train(good, **changes, progress=Progress())
    assert str(training.value) == words.splitlines()[0]  # training names the first alone
    named = set(named.split())
    marked = {name for name in tiny.settings if note_of(tiny, name).startswith("refused ")}
    assert named <= marked <= named | {"data"}
    assert any("refused" in tiny.view.accordion.get_title(index) for index in range(5)) == bool(named - {*MOST_USED})
    tiny.set(dropout=0.5)  # the others go on working
    assert refused(tiny) == words
    tiny.set(**{name: room._value(good, FIELDS[name]) for name in changes})
    assert tiny.config == good.replace(dropout=0.5)
    assert 'role="alert"' not in tiny.view.shown.value
    assert not any("refused" in note_of(tiny, name) for name in tiny.settings)


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        ("batch_size", "8x", "batch_size = '8x': must be a whole number from 1 to 1,000,000, or none"),
        ("stride", "", "stride = '': must be a whole number from 1 to 1,000,000"),
        ("seed", "1.5", "seed = '1.5': must be a whole number from 0 to 9,223,372,036,854,775,807"),
        ("dropout", "nan", "dropout = nan: must be at least 0 and below 1"),
        (
            "clip_by_epoch",
            "often",
            "clip_by_epoch = (('often',),): must be (epoch, norm) pairs with rising",
        ),
        ("name", "..", "name = '..': must be a plain folder name"),
    ],
)
def test_a_typed_text_that_is_no_value_is_refused_and_stays(tiny, name, typed, message):
    good = tiny.config
    type_into(tiny, name, typed)
    assert refused(tiny).startswith(message)
    assert tiny.settings[name].box.value == typed
    type_into(tiny, name, shown(FIELDS[name], room._value(good, FIELDS[name])))
    assert tiny.config == good


def test_defaults_that_do_not_go_together_do_not_stop_run_all(text):
    panel = Panel("quickstart", data=str(text), optimizer="sgd", max_steps=-3, scale_lr_by_model_size="often")
    assert panel.settings["optimizer"].box.value == "sgd"
    assert panel.settings["max_steps"].box.value == "-3"
    assert panel.settings["scale_lr_by_model_size"].box.value == "often"
    assert repr(panel).endswith("\nrefused: " + refused(panel))
    panel.settings["optimizer"].box.value = "adam"
    panel.set(max_steps=3, scale_lr_by_model_size=False, batch_size=8)
    assert panel.config.train.optimizer == "adam"
    assert "sgd" in str(panel.settings["optimizer"].box.options)  # until it is set anew


def test_a_text_that_cannot_be_read_is_tried_once_and_again_when_asked(tiny, tmp_path, monkeypatch):
    tries, prepare = [], dataset.prepare
    monkeypatch.setattr(panel_plan, "prepare", lambda config: tries.append(1) or prepare(config))
    again = next(w for w in widgets_in(tiny.widget) if getattr(w, "description", "") == "Read the text again")
    later = tmp_path / "later"
    tiny.set(data=str(later))
    repr(tiny)
    assert again.layout.display is None
    tiny.set(lr=1e-2)
    tiny.set(lr=2e-2)
    assert len(tries) == 1
    write_text(later)
    again.click()
    assert "parameters 1,296" in plan_of(tiny)
    assert again.layout.display == "none"
    tiny.set(data=str(tmp_path / "never"))
    refused(tiny)  # training would try it again, so it does too
    assert len(tries) == 4


def test_whatever_goes_wrong_is_shown_and_does_not_stop_the_notebook(tiny, monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("the <roof> fell in")

    monkeypatch.setattr(panel_plan, "resolve_run", broken)
    assert "refused: RuntimeError: the <roof> fell in" in repr(tiny)
    assert refused(tiny) == "RuntimeError: the <roof> fell in"


# --- a run that is there already --------------------------------------------------------------------------------


def train(panel, step=None, **options):
    """The panel's run, to its end or interrupted after a step."""
    stop = StopAt(step)
    return runs.train(panel.config, progress=stop, watch=lambda trainer: setattr(stop, "trainer", trainer), **options)


def training_says(panel):
    with pytest.raises(ValueError) as raised:
        runs.train(panel.config, progress=Progress())
    return str(raised.value)


def test_the_plan_tells_what_is_there(tiny):
    assert ": a new run" in repr(tiny)
    train(tiny, step=5)
    assert ": continues at step 5 of 16" in repr(tiny)
    train(tiny)
    assert ": already finished: 16 of 16 steps" in repr(tiny)
    tiny.set(epochs=3)  # the rate is constant: it just goes on
    assert ": continues at step 16 of 24" in repr(tiny)
    tiny.set(lr=1e-2)
    assert ": a new run" in repr(tiny)


def test_minutes_are_of_the_steps_that_are_left(tiny, monkeypatch):
    monkeypatch.setattr(panel_plan, "estimate_speed", lambda setup, measure, anew: Speed(1.0, "slow"))
    train(tiny, step=6)
    tiny.refresh()
    assert "time here about 13 min 48 s" in plan_of(tiny)  # 10 steps of 82.75 tokens, one a second


def test_a_run_that_stopped_early_is_called_so(tiny):
    tiny.set(patience=1, min_delta=100.0)
    train(tiny)
    assert ": stopped early at step 6 of 16; to train longer, raise patience" in repr(tiny)


def test_a_folder_with_another_run_is_refused_in_the_words_of_training(tiny):
    tiny.set(name="mine")
    train(tiny)
    tiny.set(lr=1e-2)
    words = training_says(tiny)
    assert "of a run with other settings: lr 0.003 there, 0.01 here" in words
    assert repr(tiny).endswith(f"\nrefused: {words}")
    assert escape(words) in tiny.view.shown.value
    train(tiny, fresh=True)  # which the panel does not stand in the way of
    assert ": already finished" in repr(tiny)


def test_a_rate_that_has_decayed_is_refused_in_the_words_of_training(tiny):
    tiny.set(lr_schedule="cosine")
    train(tiny)
    assert ": already finished" in repr(tiny)
    tiny.set(epochs=3)
    words = training_says(tiny)
    assert "decays to its end at step 16, so going on to step 24 needs a new end: decay_steps = 24" in words
    assert repr(tiny).endswith(f"\nrefused: {words}")
    tiny.set(decay_steps=24)
    assert ": continues at step 16 of 24" in repr(tiny)
    assert "refused" not in repr(tiny)


def test_lost_checkpoints_and_damaged_records_are_refused_in_the_words_of_training(tiny):
    folder = train(tiny).folder
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    words = training_says(tiny)
    assert "the checkpoints of this run are gone (it was at step 16)" in words
    assert repr(tiny).endswith(f"\nrefused: {words}")
    (folder / "run.json").write_text("{")
    assert repr(tiny).endswith(f"\nrefused: {training_says(tiny)}")


def test_a_run_that_lies_in_the_copy_only_is_seen(tiny, tmp_path):
    drive = tmp_path / "drive"
    drive.mkdir()
    tiny.set(mirror_dir=str(drive))
    folder = train(tiny, step=5).folder
    folder.rename(tmp_path / "lost")
    assert ": continues at step 5 of 16" in repr(tiny)


@pytest.mark.parametrize("changes", [{"epochs": 3}, {"seed": 7}, {"epochs": None, "max_steps": 5}])
def test_a_run_that_lies_in_the_copy_only_is_refused_in_the_words_of_training(tiny, tmp_path, changes):
    drive = tmp_path / "drive"
    drive.mkdir()
    tiny.set(mirror_dir=str(drive), lr_schedule="cosine", name="mine")
    folder = train(tiny).folder
    folder.rename(tmp_path / "lost")
    tiny.set(**changes)
    if "max_steps" in changes:  # shorter than what is there, which is no fault
        assert "refused" not in repr(tiny)
    else:
        shown = repr(tiny)  # before training brings the copy back
        assert shown.endswith(f"\nrefused: {training_says(tiny)}")


# --- in a notebook ----------------------------------------------------------------------------------------------


def test_white_on_the_marks_is_legible():
    """Contrast of at least 4.5 to 1 (WCAG 2, level AA), whatever the page around them."""

    def luminance(colour):
        shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colour in (RED,):
        assert 1.05 / (luminance(colour) + 0.05) >= 4.5


def test_outside_a_notebook_it_is_text(tiny, capsys):
    tiny._ipython_display_()
    assert capsys.readouterr().out == repr(tiny) + "\n"
    assert "1,296 parameters" in repr(tiny)


@pytest.mark.slow
def test_run_all_in_a_real_kernel(text, tmp_path):
    settings_of = SHAPE | RECIPE | {"data": str(text), "results_dir": str(tmp_path / "runs"), "epochs": 1}
    cells = [
        f"import newllm_lib as nl\npanel = nl.Panel('quickstart', max_steps=4, **{settings_of!r})\npanel",
        "panel.settings['num_layers'].slider.value = 2",
        "run = nl.train(panel.config)",
        "import newllm_lib.notebook.panel_plan as plans\nprint(plans.state_of(panel._plan))",
        "panel = nl.Panel('quickstart', data='nowhere')\npanel",
        "print(panel._problem)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    first = notebook.cells[0].outputs[0].data
    assert first["text/plain"].startswith("newllm train quickstart --vocab-size 40 ")
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    assert first["application/vnd.jupyter.widget-view+json"]["model_id"] in states
    pages = [state["state"].get("value", "") for state in states.values() if state["model_name"] == "HTMLModel"]
    assert any("already finished: 4 of 4 steps" in page for page in pages)  # once its cell has ended
    assert notebook.cells[3].outputs[0].text == "already finished: 4 of 4 steps\n"
    assert notebook.cells[5].outputs[0].text.startswith("data nowhere: no such folder, file or pattern.")
    assert nl.load(next((tmp_path / "runs").iterdir())).config.model.num_layers == 3
