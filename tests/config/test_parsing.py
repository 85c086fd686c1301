"""Settings as text: what people type, and the command that makes the same run."""

import dataclasses
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm_lib.cli.options import overrides_of
from newllm_lib.cli.training import train
from newllm_lib.config import RunConfig, flat_fields, presets
from newllm_lib.config.parsing import command, parse, shown

FIELDS = flat_fields()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("lr", 4e-3, "0.004"),
        ("lr", 1.1e-3, "0.0011"),
        ("lr", 1e-5, "1e-05"),
        ("lr", None, "none"),
        ("init_gain", 1.0, "1"),
        ("batch_size", 128, "128"),
        ("seed", 2**63 - 1, "9223372036854775807"),
        ("data", "my texts/a.txt", "my texts/a.txt"),
        ("name", None, "none"),
        ("clip_by_epoch", ((0, 0.5), (10, 1.0)), "0:0.5,10:1"),
    ],
)
def test_values_as_text_and_back(name, value, text):
    assert shown(FIELDS[name], value) == text
    assert parse(FIELDS[name], text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lr", "fast", "'fast': must be above 0 and at most 100, or none"),
        ("seed", "none", "'none': must be a whole number from 0 to 9,223,372,036,854,775,807"),
        ("hidden_dim", "8.0", "'8.0': must be a whole number from 1 to 65,536"),
    ],
)
def test_text_that_is_no_number_is_refused(name, text, message):
    with pytest.raises(ValueError) as refused:
        parse(FIELDS[name], text)
    assert str(refused.value) == message


@pytest.mark.parametrize("text", ["abc", "0:x", "0:0.5,", "", "0:1:2"])
def test_clipping_that_is_no_pairs_is_refused_in_the_words_of_the_configuration(text):
    with pytest.raises(ValueError, match=r"clip_by_epoch = .*: must be \(epoch, norm\) pairs with rising"):
        RunConfig().replace(clip_by_epoch=parse(FIELDS["clip_by_epoch"], text))


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-9, 1e9)), max_size=5, unique_by=lambda pair: pair[0]))
def test_clipping_keeps_every_digit(pairs):
    value = ((0, 0.1 + 0.2), *sorted(pairs))
    assert parse(FIELDS["clip_by_epoch"], shown(FIELDS["clip_by_epoch"], value)) == value


CHANGES = {
    "lr": 1.1e-3, "epochs": None, "max_steps": 7, "scale_lr_by_model_size": True, "data": ("a b.txt", "c.txt"),
    "clip_by_epoch": ((0, 0.5), (3, 2.25)), "forget_gate_bias": -1.0, "name": "mine", "optimizer": "adamw",
}  # fmt: skip


def test_a_command():
    assert command("quickstart", CHANGES) == (
        "newllm train quickstart --lr 0.0011 --epochs none --max-steps 7 --scale-lr-by-model-size --data 'a b.txt' "
        "--data c.txt --clip-by-epoch 0:0.5,3:2.25 --forget-gate-bias -1 --name mine --optimizer adamw"
    )


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_the_shell_reads_a_command_as_it_was_meant(preset):
    config = presets.get(preset).replace(**CHANGES | {"scale_lr_by_model_size": False})
    parts = {"run": config, "model": config.model, "data": config.data, "train": config.train}
    values = {name: getattr(parts[item.section], name) for name, item in FIELDS.items() if name != "preset"}
    _, _, *words = shlex.split(command(preset, values))
    read = train.make_context("train", words).params
    options = {name: value for name, value in read.items() if name in FIELDS and name != "preset"}
    assert presets.get(read["preset"]).replace(**overrides_of(options)) == dataclasses.replace(config, preset=preset)
