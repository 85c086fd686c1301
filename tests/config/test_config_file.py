"""Settings as a file: written with their meaning, read back as the same run, mistakes named."""

import json
import tomllib

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from newllm_lib.cli import main
from newllm_lib.config import RunConfig, flat_fields, presets
from newllm_lib.config.config_file import config_text, read_config
from newllm_lib.errors import ConfigError


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_the_file_of_a_preset_is_that_preset(preset):
    text = config_text(presets.get(preset))
    assert read_config(text, "run.toml") == presets.get(preset)
    assert read_config(text, "run.toml").identity("x") == presets.get(preset).identity("x")
    assert set(flat_fields()) == {key for part in flat(tomllib.loads(text)) for key in part}


def flat(found: dict) -> list[dict]:
    return [{key: value for key, value in found.items() if not isinstance(value, dict)}, *(
        value for value in found.values() if isinstance(value, dict)
    )]  # fmt: skip


def test_every_setting_stands_below_what_it_means():
    text = config_text(RunConfig())
    assert "# Share of hidden units dropped while training (0 to below 1).\ndropout = 0.1\n" in text
    assert text.index("[data]") < text.index("[model]") < text.index("[train]")


@settings(max_examples=50, deadline=None)
@given(
    name=st.text(st.characters(codec="utf-8", exclude_characters='/\\:*?"<>|'), max_size=20).filter(
        lambda text: text.isprintable() and text and not text.startswith(".") and text.lower() != "none"
    ),
    lr=st.floats(1e-300, 100, exclude_min=True),
    pairs=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=3),
    data=st.lists(st.text("ab/é\"\\' \t", min_size=1), min_size=2, max_size=3),
)
def test_any_configuration_comes_back(name, lr, pairs, data):
    pairs = tuple((10 * number, norm) for number, norm in enumerate(pairs))
    config = RunConfig().replace(name=name, lr=lr, clip_by_epoch=pairs, data=tuple(data), epochs=None, max_steps=3)
    assert read_config(config_text(config), "x") == config


def test_what_a_file_leaves_out_is_the_presets():
    config = read_config('preset = "quickstart"\nlr = "none"\n[model]\ndropout = 0.25\n', "run.toml")
    assert config == presets.get("quickstart").replace(dropout=0.25, lr=None)
    assert read_config("[train]\nclip_by_epoch = [[0, 0.5], [10, 1.0]]", "x").train.clip_by_epoch == (
        (0, 0.5),
        (10, 1.0),
    )
    assert read_config("", "x") == RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = ", "run.toml: is not TOML: Invalid value (at end of document)"),
        ("[train]\nlrr = 1", "run.toml: unknown setting 'lrr'. Did you mean 'lr'?"),
        ("[trian]\nlr = 1", "run.toml: unknown section [trian]: must be one of data, model, train"),
        ("lr = 0.1\n[train]\nlr = 0.2", "run.toml: lr is set twice"),
        ('[train]\nlr = "fast"', "run.toml: lr = 'fast': must be a number, above 0 and at most 100, or none"),
        ('preset = "quikstart"', "run.toml: unknown preset 'quikstart'. Did you mean 'quickstart'?"),
        ("preset = 5", "run.toml: preset = 5: must be text"),
        ("{}", "run.toml: is no run.json of a run"),
        ("{", "run.toml: is no run.json of a run"),
        ('{"config": {"model": {"depth": 3}}}', "run.toml: ModelConfig has no field 'depth'"),
    ],
)
def test_mistakes_are_named_with_the_file(text, message):
    with pytest.raises(ConfigError) as refused:
        read_config(text, "run.toml")
    assert str(refused.value).startswith(message)


def test_a_runs_own_record_is_what_was_asked_for():
    config = presets.get("quickstart").replace(lr=1e-3)
    record = {"requested": config.to_dict(), "config": config.replace(batch_size=7).to_dict()}
    assert read_config(json.dumps(record), "run.json") == config


def newllm(*arguments: str, **options):
    return CliRunner().invoke(main, arguments, **options)


@pytest.mark.parametrize("preset", ["quickstart", "cpu_baseline"])
def test_the_command_writes_what_the_command_reads(preset):
    written = newllm("config", preset, "--lr", "0.002")
    assert read_config(written.stdout, "x") == presets.get(preset).replace(lr=0.002)
    plan = newllm("train", "--config", "-", "--data", "builtin", "--plan", "--json", input=written.stdout)
    usual = newllm("train", preset, "--lr", "0.002", "--data", "builtin", "--plan", "--json")
    assert json.loads(plan.stdout) == json.loads(usual.stdout)


def test_options_on_the_command_line_win(tmp_path):
    (tmp_path / "run.toml").write_text('preset = "quickstart"\nlr = 0.1\nmax_steps = 7\n')
    plan = newllm(
        "train", "--config", str(tmp_path / "run.toml"), "--lr", "0.002", "--data", "builtin", "--plan", "--json"
    )
    lines = json.loads(plan.stdout)
    assert lines["learning rate"].startswith("0.002: ") and lines["steps"].startswith("7 (")


def test_usage_mistakes_end_with_status_2(tmp_path):
    (tmp_path / "run.toml").write_text("lrr = 1")
    both = newllm("train", "quickstart", "--config", str(tmp_path / "run.toml"))
    assert both.exit_code == 2 and "PRESET is 'quickstart' and --config" in both.stderr
    wrong = newllm("train", "--config", str(tmp_path / "run.toml"))
    assert wrong.exit_code == 2 and "unknown setting 'lrr'. Did you mean 'lr'?" in wrong.stderr
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    damaged = newllm("train", "--config", str(tmp_path / "run.toml"))
    assert damaged.exit_code == 2 and "is no text in UTF-8" in damaged.stderr
    assert newllm("train", "--config", str(tmp_path / "none.toml")).exit_code == 2
