"""newllm lr-find, as a shell sees it."""

import json
import re
import shlex

import pytest
from click.testing import CliRunner
from tiny import RECIPE, SHAPE, write_text

from newllm_lib.cli import main

TINY = [
    part
    for name, value in (SHAPE | RECIPE | {"init_std": "none"}).items()
    for part in ("--" + name.replace("_", "-"), str(value))
]


@pytest.fixture
def newllm(tmp_path, monkeypatch):
    write_text(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, list(arguments))


def test_the_suggested_command_trains_with_every_rate_that_was_tested(newllm):
    found = newllm("lr-find", "quickstart", "--data", "text", *TINY, "--steps", "20")
    assert found.exit_code == 0, found.output
    tested, suggested = found.stdout.splitlines()[:2]
    assert tested.startswith("tested: 1e-05 to ")
    assert ", and with each of them Muon's rate on the hidden matrices: 6.67e-05 to " in tested  # 0.02 / 0.003
    rate, muon = re.fullmatch(r"suggested rate: (\S+), Muon (\S+)", suggested).groups()
    assert float(muon) == pytest.approx(float(rate) * 0.02 / 3e-3, rel=0.01)
    command = re.search(r"to use it: newllm (train .*) \(with", found.stdout)[1]
    base = [word for word in TINY if word not in ("--lr", "0.003")]
    plan = json.loads(newllm(*shlex.split(command), *base, "--data", "text", "--plan", "--json").stdout)
    assert plan["learning rate"].startswith(f"{float(rate):.3g}: set directly")
    assert f"Muon {float(muon):g} on the hidden matrices" in plan["learning rate"]


def test_without_muon_there_is_one_rate_and_json_has_them_all(newllm):
    arguments = ["lr-find", "quickstart", "--data", "text", *TINY, "--steps", "12", "--json", "--optimizer"]
    adam, muon = (json.loads(newllm(*arguments, name).stdout) for name in ("adam", "muon"))
    assert (adam["muon_rates"], adam["suggested"]) == (None, {"lr": adam["suggestion"]})
    assert muon["muon_rates"] == pytest.approx([rate * 0.02 / 3e-3 for rate in muon["rates"]])
    assert muon["suggested"].keys() == {"lr", "muon_lr"}
    shown = newllm(*arguments[:-2], "--optimizer", "adam").stdout
    assert "muon" not in shown.lower()
