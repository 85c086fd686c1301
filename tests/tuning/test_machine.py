import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from newllm_lib import tuning as room
from newllm_lib.cli import main
from newllm_lib.model.recurrence.packed_linear import Product
from newllm_lib.system.hardware import choose_precision, detect
from newllm_lib.tuning import machine as machine_room


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine_room, "_SECONDS", 0.01)


def test_it_tells_what_auto_would_take():
    found, machine = room.probe("cpu", threads=1), detect("cpu", 1)
    chosen = choose_precision("auto", machine)
    assert (found["precision"], found["precision_reason"]) == (chosen.name, chosen.reason)
    assert found["threads"] == 1
    assert 0 < found["free_memory_bytes"] <= found["memory_bytes"]
    assert found["product_rate"].keys() >= {"fp32"}
    assert all(1e8 < rate < 1e16 for rate in found["product_rate"].values())


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    room.probe("cpu", threads=2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("each", "products"),
    [
        (2**-13, 2 + 205 * 20),  # half a second is 204.8 entries of 20
        (2**-6, 2 + 6 * 6),  # 20 would take 0.31 s: five entries of 6 take 0.47 s
        (2**-4, 2 + 8 * 1),
        (1.0, 2 + 5 * 1),  # of which no half second is the median
        (0.0, 2 + 205 * 20),  # a clock too coarse to tell
    ],
)
def test_a_rate_is_measured_for_half_a_second(monkeypatch, each, products):
    clock = SimpleNamespace(now=0.0, calls=0)

    class Timed(Product):
        def __call__(self, x):
            clock.calls += 1
            clock.now += each or 2**-13 * (clock.calls > 2)
            return super().__call__(x)

    monkeypatch.setattr(machine_room, "_SECONDS", 0.5)
    monkeypatch.setattr(machine_room, "Product", Timed)
    monkeypatch.setattr(machine_room, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    rate = machine_room.product_rate(detect("cpu", 1), "fp32", 2)
    assert clock.calls == products
    assert rate == pytest.approx(1_048_576 / (each or 2**-13))  # 2 x 2 x 512 x 512


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
