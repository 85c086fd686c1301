import ast
import dataclasses
import json

import numpy as np
import pytest
import torch

from newllm_lib.config import DataConfig, ModelConfig, RunConfig, TrainConfig, flat_fields, presets
from newllm_lib.config.fields import field_docs
from newllm_lib.errors import ConfigError

NOT_IN_IDENTITY = {
    "epochs", "max_steps", "decay_steps", "patience", "min_delta", "micro_batch_size", "validate_every_steps",
    "checkpoint_every_epochs", "checkpoint_every_minutes", "max_skipped_steps", "eval_batch_size", "device", "engine",
    "threads", "preset", "name", "results_dir", "emulate_precision", "mirror_dir", "cuda_graph",
}  # fmt: skip

IDENTITY_DEFAULTS = {
    "vocab_size": 1000, "embed_dim": 256, "hidden_dim": 512, "num_layers": 6, "context_dim": 256, "dropout": 0.1,
    "context_clamp": 10.0, "init_std": 0.02, "init_gain": 1.0, "embedding_std": 0.02, "output_std": 0.02,
    "forget_gate_bias": 0.0,
    "data": "wikitext-2", "text_unit": "line", "tokenizer": "words", "sentencepiece_model": "bpe",
    "layout": "windows", "sequence_length": 64, "stride": 32,
    "min_words": 5, "validation_fraction": 0.05, "test_fraction": 0.05, "eval_lanes": 32,
    "batch_size": 32, "batch_policy": "recipe", "optimizer": "adam", "lr": None, "lr_rule": "none", "lr_base": 1e-4,
    "batch_base": 32,
    "scale_lr_by_model_size": False, "muon_lr": 0.02, "muon_momentum": 0.95, "beta1": 0.9, "beta2": 0.999,
    "weight_decay": 0.0, "lr_schedule": "constant", "warmup_steps": 0, "lr_final_fraction": 0.0,
    "clip_by_epoch": ((0, 0.5), (10, 1.0), (30, 2.0)), "seed": 42, "precision": "auto",
}  # fmt: skip

CLIP_RULE = (
    "must be (epoch, norm) pairs with rising epochs, the first 0, and norms above 0, for example ((0, 0.5), (10, 1.0))"
)
NAME_RULE = (
    'must be a plain folder name of at most 220 bytes, without / \\ : * ? " < > | or control characters, and not '
    "starting with a dot"
)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (TrainConfig, {"lr": -0.5}, "lr = -0.5: must be above 0 and at most 100, or none"),
        (TrainConfig, {"lr": float("nan")}, "lr = nan: must be above 0 and at most 100, or none"),
        (TrainConfig, {"lr": 0}, "lr = 0.0: must be above 0 and at most 100, or none"),
        (TrainConfig, {"lr": True}, "lr = True: must be a number, above 0 and at most 100, or none"),
        (ModelConfig, {"vocab_size": 4}, "vocab_size = 4: must be a whole number from 5 to 1,000,000"),
        (ModelConfig, {"dropout": 1.0}, "dropout = 1.0: must be at least 0 and below 1"),
        (ModelConfig, {"num_layers": True}, "num_layers = True: must be a whole number from 1 to 1,000"),
        (ModelConfig, {"hidden_dim": 8.0}, "hidden_dim = 8.0: must be a whole number from 1 to 65,536"),
        (TrainConfig, {"epochs": "3"}, "epochs = '3': must be a whole number from 1 to 1,000,000, or none"),
        (TrainConfig, {"lr_base": "fast"}, "lr_base = 'fast': must be a number, above 0 and at most 100"),
        (TrainConfig, {"seed": None}, "seed = none: must be a whole number from 0 to 9,223,372,036,854,775,807"),
        (TrainConfig, {"optimizer": "sgd"}, "optimizer = 'sgd': must be one of adam, adamw, muon"),
        (TrainConfig, {"scale_lr_by_model_size": 1}, "scale_lr_by_model_size = 1: must be true or false"),
        (DataConfig, {"layout": "rows"}, "layout = 'rows': must be one of windows, stream"),
        (DataConfig, {"data": 3}, "data = 3: must be text"),
        (
            TrainConfig,
            {"epochs": None},
            "epochs = none and max_steps = none: give at least one of them",
        ),
        (RunConfig, {"name": "a/b"}, f"name = 'a/b': {NAME_RULE}"),
        (RunConfig, {"name": ".."}, f"name = '..': {NAME_RULE}"),
        (RunConfig, {"name": ""}, f"name = '': {NAME_RULE}"),
        (RunConfig, {"name": "a\nb"}, f"name = 'a\\nb': {NAME_RULE}"),
        (RunConfig, {"name": "a\0b"}, f"name = 'a\\x00b': {NAME_RULE}"),
        (RunConfig, {"name": "ü" * 111}, f"name = '{'ü' * 111}': {NAME_RULE}"),
        (RunConfig, {"results_dir": "a\0b"}, "'a\\x00b': no path may hold a NUL character"),
        (
            TrainConfig,
            {"clip_by_epoch": 5},
            "clip_by_epoch = 5: must be pairs of numbers such as ((0, 0.5), (10, 1))",
        ),
        (RunConfig, {"model": {}}, "model = {}: must be ModelConfig"),
    ],
)
def test_a_bad_value_is_refused_by_field_value_and_range(cls, values, message):
    with pytest.raises(ValueError) as refused:
        cls(**values)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "pairs",
    [
        (),
        ((1, 0.5),),
        ((0, 0.5), (0, 1.0)),
        ((0, 0.5), (30, 2.0), (10, 1.0)),
        ((0, 0.0),),
        ((0, float("nan")),),
        ((0, 0.5), (5,)),
        ((0, "x"),),
        (0, 0.5),
    ],
)
def test_malformed_clipping_is_refused(pairs):
    with pytest.raises(ValueError) as refused:
        TrainConfig(clip_by_epoch=pairs)
    assert str(refused.value) == f"clip_by_epoch = {pairs!r}: {CLIP_RULE}"


def test_whole_numbers_become_floats_and_lists_become_tuples():
    train = TrainConfig(lr=1, clip_by_epoch=[[0, 1.0]])
    assert (train.lr, type(train.lr), train.clip_by_epoch) == (1.0, float, ((0, 1.0),))


def test_numbers_of_numpy_and_torch_are_numbers():
    train = TrainConfig(
        lr=np.float32(0.5), seed=np.int64(7), batch_size=np.uint8(4), max_steps=torch.tensor(9), lr_base=np.int32(1),
        scale_lr_by_model_size=np.bool_(True), optimizer=np.str_("muon"), clip_by_epoch=((np.int64(0), np.float64(1)),),
    )  # fmt: skip
    plain = TrainConfig(
        lr=0.5, seed=7, batch_size=4, max_steps=9, lr_base=1.0, scale_lr_by_model_size=True, optimizer="muon",
        clip_by_epoch=((0, 1.0),),
    )  # fmt: skip
    assert train == plain
    assert repr(train) == repr(plain)  # and of the same types
    assert RunConfig(train=train).identity("x") == RunConfig(train=plain).identity("x")
    for wrong in (np.float64(4), np.array([4]), np.bool_(True)):
        with pytest.raises(ConfigError, match=r"batch_size = "):
            TrainConfig(batch_size=wrong)


def test_the_home_is_put_in_place_of_a_tilde_where_a_field_is_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = RunConfig().replace(data=("~/a.txt", "b~.txt"), results_dir="~/runs", mirror_dir="~", name="~")
    assert (config.data.data, config.results_dir) == (("/home/me/a.txt", "b~.txt"), "/home/me/runs")
    assert (config.mirror_dir, config.name) == ("/home/me", "~")


def test_replace_routes_flat_names_to_their_sections():
    before = RunConfig()
    after = before.replace(name="mine", dropout=0.0, stride=16, lr=1e-3)
    assert (after.name, after.model.dropout, after.data.stride, after.train.lr) == ("mine", 0.0, 16, 1e-3)
    assert (before.name, before.model.dropout, before.data.stride, before.train.lr) == (None, 0.1, 32, None)
    assert after.replace(name=None, dropout=0.1, stride=32, lr=None) == before


def test_replace_checks_values_too():
    with pytest.raises(ValueError, match=r"num_layers = 0: must be a whole number from 1 to 1,000"):
        RunConfig().replace(num_layers=0)


def test_an_unknown_setting_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown setting 'droput'\. Did you mean 'dropout'"):
        RunConfig().replace(droput=0.3)


def test_an_unknown_key_of_a_stored_configuration_is_named():
    with pytest.raises(ValueError, match="ModelConfig has no field 'depth'; it has context_clamp, "):
        RunConfig.from_dict({"model": {"depth": 3}})


@pytest.mark.parametrize("name", presets.PRESETS)
def test_round_trip_through_json(name):
    config = presets.get(name).replace(name="kept", seed=7)
    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_round_trip_of_several_files():
    config = RunConfig().replace(data=("a.txt", "b.txt"))
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def another_value(item):
    """A valid value of a field that differs from its default."""
    chosen = {"clip_by_epoch": ((0, 1.0),), "lr": 0.5, "name": "other", "mirror_dir": "drive"}
    if item.metadata["choices"]:
        return next(choice for choice in item.metadata["choices"] if choice != item.default)
    if item.name in chosen:
        return chosen[item.name]
    return {
        bool: lambda default: not default,
        int: lambda default: default + 1,
        float: lambda default: default / 2 or 0.5,
        str: lambda default: default + "-other",
        type(None): lambda default: 7,
    }[type(item.default)](item.default)


@pytest.mark.parametrize("name", flat_fields())
def test_identity_depends_on_what_defines_the_result(name):
    config = RunConfig()
    changed = config.replace(**{name: another_value(flat_fields()[name])})
    assert changed != config
    same = name in NOT_IN_IDENTITY or name == "data"  # the text counts by its fingerprint, not by its place
    assert (changed.identity("x") == config.identity("x")) == same
    assert changed.identity("x") != changed.identity("y")


def test_equal_configurations_have_equal_identities():
    whole, real = (RunConfig().replace(clip_by_epoch=((0, norm),)) for norm in (1, 1.0))
    assert whole == real
    assert whole.identity("x") == real.identity("x")


def test_pinned_identities():
    """Runs on disk are found by these: where one changes, every user's runs start over under new names."""
    assert presets.get("cpu_baseline").identity("x")[:12] == "d5a4f0a835b1"
    assert presets.get("quickstart").identity("x")[:12] == "9d17efb202ee"


def test_defaults_that_identities_leave_out_are_pinned():
    """An identity holds no default: one that changes needs a higher IDENTITY_VERSION (a new field does not)."""
    defaults = {name: item.default for name, item in flat_fields().items() if item.metadata["identity"]}
    assert defaults == IDENTITY_DEFAULTS


def unread_names(names, sources):
    """The names that no source reads as an attribute."""
    nodes = (node for source in sources for node in ast.walk(ast.parse(source)))
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    return sorted(set(names) - read)


def test_every_field_is_read(repository):
    paths = sorted((repository / "newllm_lib").rglob("*.py"))
    sources = [path.read_text(encoding="utf-8") for path in paths if path.name != "config.py"]
    assert unread_names(flat_fields(), sources) == []
    assert unread_names([*flat_fields(), "made_up_field"], sources) == ["made_up_field"]


@pytest.mark.parametrize("cls", [ModelConfig, DataConfig, TrainConfig, RunConfig])
def test_every_field_has_a_docstring(cls):
    docs = field_docs(cls)
    assert list(docs) == [item.name for item in dataclasses.fields(cls)]
    assert all(len(doc) > 10 and doc.endswith((".", "...")) for doc in docs.values())


def test_num_parameters():
    assert ModelConfig().num_parameters == 2_739_432
    assert ModelConfig(context_dim=512, num_layers=12).num_parameters == 4_840_936
