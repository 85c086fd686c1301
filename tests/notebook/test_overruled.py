"""Which fields have no effect, and why."""

import pytest
from tiny import tiny_config, tiny_setup, write_text

from newllm_lib.notebook.overruled import overruled
from newllm_lib.notebook.panel import Panel


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(
    ("changes", "name", "why"),
    [
        ({"lr": 1e-3}, "lr_rule", "Not used: lr = 0.001 sets the learning rate"),
        ({"lr": 1e-3}, "batch_base", "Not used: lr = 0.001 sets the learning rate"),
        ({"lr": None, "lr_rule": "sqrt"}, "lr_rule", None),
        (
            {"lr": None, "lr_rule": "none"},
            "batch_base",
            "Not used: lr_rule = none does not scale the learning rate with the batch",
        ),
        ({"optimizer": "adam"}, "muon_lr", "Not used: optimizer = adam"),
        ({"optimizer": "muon"}, "muon_lr", None),
        ({"lr_schedule": "constant"}, "decay_steps", "Not used: lr_schedule = constant does not decay"),
        ({"lr_schedule": "cosine"}, "decay_steps", None),
        ({"layout": "stream"}, "stride", "Not used: layout = stream does not cut windows"),
        ({"layout": "windows"}, "eval_lanes", "Not used: layout = windows has no lanes"),
        ({"init_std": 0.1}, "init_gain", "Not used: init_std = 0.1 sets the initial weights"),
        ({"init_std": None}, "init_gain", None),
        ({"batch_policy": "fast"}, "batch_size", "Not used: batch_policy = fast finds the batch"),
        ({"patience": None}, "min_delta", "Not used: patience = none never stops early"),
        ({"tokenizer": "words"}, "sentencepiece_model", "Not used: tokenizer = words"),
        ({"precision": "auto"}, "emulate_precision", "Not used: precision = auto takes a format that the hardware has"),
    ],
    ids=str,
)
def test_by_other_fields(text, changes, name, why):
    assert overruled(tiny_config(text, **changes)).get(name) == why


@pytest.mark.parametrize(
    ("changes", "expected"),
    [  # 8 steps an epoch
        (
            {"epochs": 2, "max_steps": 12},
            {"epochs": "Not used: max_steps = 12 ends the run first (epochs would at 16)"},
        ),
        ({"epochs": 1, "max_steps": 12}, {"max_steps": "Not used: epochs = 1 ends the run first, at step 8"}),
        ({"epochs": 1, "max_steps": 8}, {}),
        ({"epochs": None, "max_steps": 8}, {}),
        (
            {"warmup_steps": 30},
            {"warmup_steps": "Longer than the run (16 steps): the learning rate does not reach its peak"},
        ),
        ({"warmup_steps": 15}, {}),
        (
            {"warmup_steps": 15, "lr_schedule": "cosine"},
            {"warmup_steps": "The run is short: its warm-up takes 1 steps, a tenth of the decay"},
        ),
    ],
    ids=str,
)
def test_by_the_length_of_the_run(text, changes, expected):
    setup = tiny_setup(text, **changes)
    found = overruled(setup.config, setup)
    assert {name: found[name] for name in ("epochs", "max_steps", "warmup_steps") if name in found} == expected


@pytest.mark.parametrize(("data", "overruled_there"), [("wikitext-2", True), ("builtin", False), ("a.txt", False)])
def test_a_text_with_splits_of_its_own(data, overruled_there):
    assert ("validation_fraction" in overruled(tiny_config(data))) is overruled_there


def test_the_panel_dims_them_and_says_why(text):
    panel = Panel(tiny_config(text, epochs=2, max_steps=12))
    panel.refresh()
    row = panel.settings["epochs"]
    assert "newllm-overruled" in row.row._dom_classes
    assert "Not used: max_steps = 12 ends the run first (epochs would at 16)." in row.note.value
    panel.set(max_steps=40)
    assert "newllm-overruled" not in row.row._dom_classes
    assert "newllm-overruled" in panel.settings["max_steps"].row._dom_classes
