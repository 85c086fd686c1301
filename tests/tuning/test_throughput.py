"""How fast a run will be: known, scaled, or not known; and what of it is remembered."""

import gc
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config, tiny_setup, write_text

import newllm_lib as nl
from newllm_lib.config import ModelConfig
from newllm_lib.reporting.progress import Progress
from newllm_lib.runs import recorder
from newllm_lib.system.memory import _container_bytes
from newllm_lib.training.estimates import matrix_parameters
from newllm_lib.tuning import estimate_speed, throughput, trial
from newllm_lib.tuning.cache import Store
from newllm_lib.tuning.throughput import at_rows


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """Measuring collects garbage each time: not through all that the test process has loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "_SECONDS", 0.0)
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"), texts=100)


def entries(**speeds):
    return [{"rows": int(rows[1:]), "tokens_per_second": float(value)} for rows, value in speeds.items()]


@pytest.mark.parametrize(
    ("speeds", "rows", "expected"),
    [
        ({"_64": 100}, 64, 100),
        ({"_64": 100}, 7, 100),
        ({"_64": 100}, 5000, 100),
        ({"_16": 100, "_64": 200}, 64, 200),
        # steps of 16 / 100 = 0.16 and 64 / 200 = 0.32: 0.1066 for a step and 0.0033 for a row
        ({"_16": 100, "_64": 200}, 32, 150),
        ({"_16": 100, "_64": 200}, 128, 240),
        ({"_16": 100, "_64": 200}, 8, 60),
        ({"_16": 100, "_64": 200}, 10**9, 300),
        ({"_16": 100, "_64": 400}, 10**6, 800),  # no longer by the step alone: at most twice the best
        ({"_16": 100, "_64": 90}, 128, 90),  # slower with more rows: no line
        ({"_8": 1, "_16": 100, "_64": 200, "_128": 240}, 32, 150),
    ],
)
def test_a_step_costs_something_and_a_row_costs_something(speeds, rows, expected):
    assert at_rows(entries(**speeds), rows) == pytest.approx(expected)


@given(st.floats(0, 10), st.floats(1e-6, 10), st.lists(st.integers(1, 4096), min_size=2, max_size=5, unique=True))
def test_a_line_is_found_again(each_step, each_row, sizes):
    known = [{"rows": rows, "tokens_per_second": rows / (each_step + each_row * rows)} for rows in sizes]
    for low, high in pairwise(sorted(sizes)):
        between = (low + high) // 2
        assert at_rows(known, between) == pytest.approx(between / (each_step + each_row * between), rel=1e-3)


def test_matrix_parameters():
    assert matrix_parameters(ModelConfig()) == 2_347_008  # 512 x (256 + 5 x 512 + 3 x 256 + 1000)


def test_nothing_is_known_without_measuring(text, monkeypatch):
    monkeypatch.setattr(throughput, "time_steps", refuse)
    assert estimate_speed(tiny_setup(text), measure=False) is None


def refuse(*_args):
    raise AssertionError("something was measured")


def test_the_very_configuration_is_measured_once(text, monkeypatch):
    monkeypatch.setattr(throughput, "_LONG_SECONDS", float("inf"))  # on a busy machine a step may be long
    first = estimate_speed(tiny_setup(text, batch_size=48))
    assert first.tokens_per_second > 100
    assert first.basis == "scaled from batch 32 and 48 measured here" or first.basis.startswith("measured here")
    assert {entry["rows"] for entry in Store(tiny_setup(text).machine).speeds()} == {32, 48}
    monkeypatch.setattr(throughput, "time_steps", refuse)
    again = estimate_speed(tiny_setup(text, batch_size=48, lr=1e-4, epochs=7), measure=False)
    assert again[:2] == (first.tokens_per_second, "measured here for this very configuration")


def test_a_measurement_of_a_busy_moment_can_be_made_anew(text, monkeypatch):
    setup = tiny_setup(text, batch_size=16)
    for speed_then in (50.0, 800.0):
        monkeypatch.setattr(throughput, "time_steps", lambda setup, taken=speed_then: (taken, 1e-3))
        assert estimate_speed(setup, anew=True).tokens_per_second == speed_then
    monkeypatch.setattr(throughput, "time_steps", refuse)
    assert estimate_speed(setup)[:2] == (800.0, "measured here for this very configuration")


def test_a_run_that_trained_long_enough_here_is_what_later_plans_go_by(text, tmp_path, monkeypatch):
    config = tiny_config(text, results_dir=str(tmp_path / "results"))
    monkeypatch.setattr(throughput, "time_steps", refuse)
    nl.train(config, progress=Progress())
    assert estimate_speed(tiny_setup(text), measure=False) is None  # seconds are too few to go by
    monkeypatch.setattr(recorder, "LEAST_SECONDS", 0)
    nl.train(config, progress=Progress())
    assert estimate_speed(tiny_setup(text), measure=False) is None  # nothing was trained
    longer = nl.train(config, epochs=3, progress=Progress())
    expected = (longer.history.tokens_per_second.iloc[-1], "measured here for this very configuration")
    assert estimate_speed(tiny_setup(text), measure=False)[:2] == expected


def test_a_larger_batch_is_scaled_from_small_ones(text, monkeypatch):
    taken = {32: (1600.0, 1e-3), 128: (3200.0, 2e-3)}
    monkeypatch.setattr(throughput, "time_steps", lambda setup: taken[setup.config.train.batch_size])
    found = estimate_speed(tiny_setup(text, batch_size=160))  # 13.3 ms a step and 0.208 ms a row
    assert found[:2] == (pytest.approx(160 / 0.0466667), "scaled from batch 32 and 128 measured here")
    assert estimate_speed(tiny_setup(text, batch_size=160, micro_batch_size=64))[:2] == (
        2400.0, "scaled from batch 32 and 128 measured here",
    )  # fmt: skip


def test_another_model_is_scaled_by_its_work(text, monkeypatch):
    monkeypatch.setattr(throughput, "time_steps", lambda setup: (1000.0, 1e-3))
    setup = tiny_setup(text, batch_size=16)
    estimate_speed(setup)
    monkeypatch.setattr(throughput, "time_steps", refuse)
    there = 12 * 6 + 12 * 12 + 3 * 6 * 12 + 34 * 12
    here = 24 * 6 + 24 * 24 + 3 * 6 * 24 + 34 * 24
    other = tiny_setup(text, batch_size=16, hidden_dim=24)
    found = estimate_speed(other, measure=False)
    assert found.tokens_per_second == pytest.approx(1000 * there / here)
    assert found.basis == "scaled by the work for a token from another model measured here"
    assert estimate_speed(tiny_setup(text, precision="bf16"), measure=False) is None  # another format says nothing
    # 40 units are 4.7 times the work and 6 units 1 / 2.2 of it: beyond 4 times, what is not work decides the time
    assert estimate_speed(tiny_setup(text, batch_size=16, hidden_dim=40), measure=False) is None
    assert estimate_speed(tiny_setup(text, batch_size=16, hidden_dim=6), measure=False) is not None


def test_the_nearest_model_is_taken(text, monkeypatch):
    for width, taken in ((8, 800.0), (32, 100.0)):
        monkeypatch.setattr(throughput, "time_steps", lambda setup, taken=taken: (taken, 1e-3))
        estimate_speed(tiny_setup(text, batch_size=16, hidden_dim=width))
    work = {h: h * 6 + h * h + 3 * 6 * h + 34 * h for h in (30, 32)}
    found = estimate_speed(tiny_setup(text, batch_size=16, hidden_dim=30), measure=False)
    assert found.tokens_per_second == pytest.approx(100 * work[32] / work[30])


def test_memory_that_runs_out_leads_to_a_smaller_measurement(text, monkeypatch):
    asked = []

    def time_steps(setup):
        asked.append(setup.config.train.batch_size)
        if asked[-1] > 10:
            raise RuntimeError("CUDA error: out of memory")
        return 500.0, 1e-3

    monkeypatch.setattr(throughput, "time_steps", time_steps)
    assert estimate_speed(tiny_setup(text, batch_size=16))[:2] == (500.0, "scaled from batch 8 measured here")
    assert asked == [16, 8]
    monkeypatch.setattr(throughput, "time_steps", out_of_memory)
    assert estimate_speed(tiny_setup(text, engine="reference")) is None


def out_of_memory(*_args):
    raise MemoryError


def test_a_slow_machine_is_measured_once(text, monkeypatch):
    asked = []
    monkeypatch.setattr(throughput, "time_steps", lambda setup: asked.append(setup) or (5.0, 60.0))
    assert estimate_speed(tiny_setup(text, batch_size=100))[:2] == (5.0, "scaled from batch 32 measured here")
    assert len(asked) == 1


def test_entries_of_another_kind_are_passed_over(text):
    setup = tiny_setup(text, batch_size=16)
    store = Store(setup.machine)
    estimate_speed(setup)
    kept = json.loads(store.path.read_text())
    kept["speeds"] |= {
        "x": 3,
        "y": {"rows": 1},
        "z": {"facts": {}, "batch_size": 1, "rows": 1, "tokens_per_second": 1.0},
    }
    store.path.write_text(json.dumps(kept))
    assert estimate_speed(setup, measure=False).basis == "measured here for this very configuration"


def test_what_is_kept_is_bounded_and_the_newest(text, monkeypatch):
    monkeypatch.setattr("newllm_lib.tuning.cache._MOST", 3)
    setup = tiny_setup(text)
    store = Store(setup.machine)
    for number in (1, 2, 3, 1, 4):
        store.keep_choice(f"key {number}", {"number": number})
    assert [store.choice(f"key {number}") is not None for number in (1, 2, 3, 4)] == [True, False, True, True]


# --- containers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "used", "statistics", "expected"),
    [
        ("1000000\n", "400000\n", "anon 300000\ninactive_file 100000\n", [700000]),
        ("1000000\n", "2000000\n", "anon 5\n", [0]),
        ("max\n", "400000\n", "inactive_file 100000\n", []),
        ("1000000\n", "400000\n", "not what it was\n", []),
    ],
)
def test_what_a_container_may_still_take(tmp_path, monkeypatch, limit, used, statistics, expected):
    for name, content in (("memory.max", limit), ("memory.current", used), ("memory.stat", statistics)):
        (tmp_path / name).write_text(content)
    there = (str(tmp_path), "memory.max", "memory.current", "inactive_file")
    missing = (str(tmp_path / "no"), "memory.max", "memory.current", "inactive_file")
    monkeypatch.setattr("newllm_lib.system.memory._CONTROL_GROUPS", (missing, there))
    assert _container_bytes() == expected
