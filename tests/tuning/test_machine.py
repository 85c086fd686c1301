import json

import pytest
import torch
from click.testing import CliRunner

from newllm_lib import tuning as room
from newllm_lib.cli import main
from newllm_lib.tuning import products


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(products, "_SECONDS", 0.01)


def test_it_tells_what_auto_would_take():
    found = room.probe("cpu", threads=1)
    assert (found["precision"], found["threads"]) == ("fp32", 1)
    assert found["precision_reason"] == (
        "measured here, tokens/s by short pieces of a step (128 sequences): fp32 on 1 thread 1; fp32 products 1 GFLOP/s"
    )
    assert 0 < found["free_memory_bytes"] <= found["memory_bytes"]
    assert found["product_rate"].keys() >= {"fp32"}
    assert all(1e8 < rate < 1e16 for rate in found["product_rate"].values())


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    room.probe("cpu", threads=2)
    assert torch.get_num_threads() == before


def test_the_command_prints_lines_and_json():
    lines = CliRunner().invoke(main, ["probe"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "device", "memory", "precision", "engine", "batch", "products", "versions",
    ]  # fmt: skip
    assert "GFLOP/s" in lines[5]
    assert json.loads(CliRunner().invoke(main, ["probe", "--json"]).stdout)["engine"] in ("fused", "reference")


def test_a_device_that_is_not_there_is_named():
    result = CliRunner().invoke(main, ["probe", "--device", "cuda:7"])
    assert result.exit_code == 1
    assert "cuda:7" in result.stderr
