"""How the steps of a run execute: what is timed, what wins, what is remembered and what a run keeps."""

import itertools
import json
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Quiet, tiny_config

import newllm_lib as nl
from newllm_lib.config import ModelConfig
from newllm_lib.notebook.panel_plan import Planner
from newllm_lib.reporting.progress import Progress
from newllm_lib.runs.folder import resolve_run
from newllm_lib.system.hardware import Machine, detect
from newllm_lib.training import setup as setups
from newllm_lib.training.setup import make_setup
from newllm_lib.tuning import execution
from newllm_lib.tuning.execution import (
    Execution,
    SharedExecution,
    Way,
    Work,
    is_steady,
    measure,
    preferred,
    race,
    settle_execution,
)

MODEL = ModelConfig(vocab_size=50, embed_dim=16, hidden_dim=32, context_dim=16, num_layers=2, dropout=0.1)
FP32, PLAIN32, BF16 = Way("fp32", True, 4), Way("fp32", False, 4), Way("bf16", True, 4)
PLAIN16, FP16 = Way("bf16", False, 4), Way("fp16", True, 4)


@pytest.fixture
def config(text, tmp_path):
    return tiny_config(text, precision="auto", results_dir=str(tmp_path / "results"), max_steps=4)


@pytest.fixture
def cpu(monkeypatch):
    """A processor with four threads and every format."""
    flags = frozenset({"avx512_bf16", "avx512_fp16"})

    def found(device="auto", threads=None):
        return Machine(device="cpu", name="Some CPU", memory_bytes=2**34, cpu_flags=flags, threads=threads or 4)

    monkeypatch.setattr(setups, "detect", found)
    monkeypatch.setattr(setups.os, "cpu_count", lambda: 4)
    return found()


@pytest.fixture
def answer(monkeypatch, tmp_path, cpu):
    """A function that sets what the next measurements find; it lists the ways of each."""
    asked = []
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "cache"))

    def set_to(way, steady=True):
        def measured(work, ways):
            asked.append(list(ways))
            rates = {way: 200.0, ways[0]: 100.0} if way != ways[0] else {way: 200.0}
            return Execution(way=way, rates=rates, rows=work.rows, product_rate=3e11, steady=steady)

        monkeypatch.setattr(execution, "measure", measured)
        monkeypatch.setattr(execution, "_MEASURED", {})
        return asked

    return set_to


# --- the race -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({FP32: 1.0, BF16: 0.98}, FP32),  # 2 % are not enough
        ({FP32: 1.03, BF16: 1.0}, BF16),
        ({FP32: 1.029, BF16: 1.0}, FP32),
        ({FP32: 1.0, PLAIN32: 0.98, BF16: 0.97, PLAIN16: 0.96}, BF16),  # its own format packed first
        ({FP32: 1.0, PLAIN32: 0.98, BF16: 0.99, PLAIN16: 0.96}, PLAIN16),
        ({FP32: 1.0, BF16: 0.5, PLAIN16: 0.48}, PLAIN16),
        ({FP32: 1.0, PLAIN32: 0.9, BF16: 0.89}, PLAIN32),  # faster than the usual way, but not than FP32 at its best
        ({FP32: 1.0, BF16: 2.0, FP16: 0.5}, FP16),
        ({BF16: 1.0, PLAIN16: 0.5}, PLAIN16),
    ],
)
def test_another_way_must_be_three_percent_faster(seconds, expected):
    assert preferred(seconds, next(iter(seconds))) == expected
    assert preferred(dict(reversed(seconds.items())), next(iter(seconds))) == expected


@given(st.lists(st.floats(0.1, 10), min_size=5, max_size=5))
def test_what_wins_is_never_slower_than_the_usual_way(times):
    seconds = dict(zip([FP32, PLAIN32, BF16, PLAIN16, FP16], times, strict=True))
    chosen = preferred(seconds, FP32)
    assert seconds[chosen] <= seconds[FP32]
    assert seconds[chosen] < 1.03 * min(times) * 1.0001  # within what is asked of another way


def test_ways_take_turns_after_two_warm_ups():
    calls = []
    taken = race([FP32, BF16], lambda way: calls.append(way) or (0.2, 0.8), time.perf_counter() + 60)
    assert calls == [FP32, BF16] * 7
    assert taken == {FP32: [(0.2, 0.8)] * 5, BF16: [(0.2, 0.8)] * 5}


def test_what_the_warm_up_shows_to_be_hopeless_is_not_timed_further():
    calls = []
    seconds = {FP32: iter([9.0, 1.25] + [1.0] * 5), BF16: iter([1.0, 1.26]), FP16: iter([1.0, 1.0] + [1.0] * 5)}
    times = lambda way: calls.append(way) or (0.0, next(seconds[way]))  # noqa: E731
    taken = race([FP32, BF16, FP16], times, time.perf_counter() + 60)
    assert taken == {FP32: [(0.0, 1.0)] * 5, BF16: [(0.0, 1.26)], FP16: [(0.0, 1.0)] * 5}
    assert calls.count(BF16) == 2


def test_no_round_begins_once_the_time_is_over(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(execution, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert race([FP32], lambda way: (0.0, 1.0), end=3) == {FP32: [(0.0, 1.0)] * 3}  # asked at 0, 1, 2, 3 and 4
    assert race([FP32], lambda way: (0.0, 7.0), end=0) == {FP32: [(0.0, 7.0)]}


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ({FP32: [1.0, 1.0, 1.0, 1.0, 1.2], BF16: [9.0]}, True),
        ({FP32: [1.0, 1.0, 1.0, 1.0, 1.21]}, False),
        ({FP32: [1.0] * 5, BF16: [1.0, 1.0, 1.0, 1.0, 0.7]}, False),
        ({FP32: [1.0] * 4}, False),  # cut short
        ({FP32: [1.0]}, False),
    ],
)
def test_rounds_that_differ_by_more_than_a_fifth_are_unsteady(rounds, expected):
    assert is_steady({way: [(0.25, total - 0.25) for total in totals] for way, totals in rounds.items()}) is expected


def test_a_real_measurement_times_every_way_and_disturbs_nothing():
    before, state = torch.get_num_threads(), torch.get_rng_state()
    machine = detect("cpu", 2)
    work = Work(MODEL, 6, 12, "fused", machine)
    ways = work.ways(["bf16", "fp32"])
    found = measure(work, ways)
    assert found.rates.keys() == set(ways[:4]) | {found.way._replace(threads=1), found.way}
    assert all(1 < rate < 1e9 for rate in found.rates.values())
    assert found.rows == 6
    assert (torch.get_num_threads(), torch.get_rng_state().equal(state)) == (before, True)
    again = Execution.from_dict(json.loads(json.dumps(found.to_dict())))
    assert (again.way, again.rates, again.rows, again.reason) == (found.way, found.rates, 6, found.reason)


def test_a_measurement_runs_inside_inference_mode_too():
    work = Work(MODEL, 2, 12, "fused", detect("cpu", 1))
    with torch.inference_mode():
        assert measure(work, work.ways(["fp32"])).rates


def test_a_large_batch_is_measured_in_part(monkeypatch):
    monkeypatch.setattr(execution, "_PIECE_SECONDS", 0.0)
    work = Work(MODEL, 100, 12, "fused", detect("cpu", 1))
    assert measure(work, work.ways(["fp32"])).rows == 32


def test_a_step_is_a_line_through_the_medians_of_both_pieces(monkeypatch):
    """Ten time steps in 1.0 s and two in 0.2 s: 0.1 s each, so the 11 of a sequence of 12 ids take 1.1 s."""
    piece = execution._Piece(Work(MODEL, 4, 12, "fused", detect("cpu", 1)))
    assert piece.step_seconds([(0.2, 1.0)]) == pytest.approx(1.1)
    assert piece.step_seconds([(0.2, 1.0), (0.2, 9.0), (9.0, 1.0)]) == pytest.approx(1.1)
    assert piece.step_seconds([(0.5, 0.4)]) == 0.5  # too uneven for a line
    assert piece.targets == 44
    monkeypatch.setattr(piece, "_time", lambda way, steps: {2: 0.2, 10: 1.0}[steps])
    assert piece.time(FP32) == (0.2, 1.0)


def test_the_ways_that_are_open():
    four = Machine(device="cpu", name="Some CPU", threads=4)
    two, one = Way("fp32", True, 2), Way("fp32", True, 1)
    assert Work(MODEL, 8, 12, "fused", four).ways(["bf16", "fp32", "fp16"]) == [
        FP32, PLAIN32, BF16, PLAIN16, FP16, two, one,
    ]  # fmt: skip
    assert Work(MODEL, 8, 12, "fused", four).ways(["bf16"], any_threads=False) == [BF16, PLAIN16]
    assert Work(MODEL, 8, 12, "reference", four).ways(["fp32"]) == [FP32, two, one]


# --- what a run takes, keeps and says -----------------------------------------------------------------------------


def decided_by(setup):
    return setup.precision.name, setup.machine.threads, setup.engine.packed


@pytest.mark.slow
def test_plan_panel_and_training_take_what_was_measured(config, answer):
    asked = answer(Way("bf16", False, 2))
    planned, lines = nl.plan(config)
    assert decided_by(planned) == ("bf16", 2, False)
    assert decided_by(Planner().plan(config).setup) == ("bf16", 2, False)
    run = nl.train(config, progress=Quiet())
    assert run.record["decided"] == {
        "batch_size": 8, "micro_batch_size": None, "precision": "bf16", "engine": "fused", "threads": 2,
        "layout": "plain", "device": "cpu",
    }  # fmt: skip
    assert (
        dict(lines)["precision"]
        == dict(run.record["plan"])["precision"]
        == (
            "bf16: measured here, tokens/s by short pieces of a step (8 sequences): bf16 unpacked on 2 threads 200, "
            "fp32 on 4 threads 100; bf16 products 300 GFLOP/s"
        )
    )
    assert len(asked) == 1


def test_make_setup_never_measures(config, monkeypatch, cpu):
    monkeypatch.setattr(execution, "measure", lambda *args: pytest.fail("measured"))
    assert decided_by(make_setup(config)) == ("bf16", 4, True)  # by the flag, torch's threads


@pytest.mark.slow
def test_a_run_keeps_its_way_when_another_has_become_faster(config, answer, tmp_path):
    """Bit for bit: the cache deleted and the timings reversed between stop and continue."""
    answer(Way("bf16", False, 1))
    whole = nl.train(config, results_dir=str(tmp_path / "whole"), decay_steps=4, progress=Quiet())
    nl.train(config, max_steps=2, decay_steps=4, progress=Quiet())
    asked = answer(Way("fp32", True, 4))
    for path in (tmp_path / "cache").glob("probe-*"):
        path.unlink()
    assert len(asked) == 1
    again = nl.train(config, max_steps=4, decay_steps=4, progress=Quiet())
    assert len(asked) == 1
    assert again.record["decided"] == whole.record["decided"]
    weights = [run.model.state_dict() for run in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    control = nl.train(config, results_dir=str(tmp_path / "control"), decay_steps=4, progress=Quiet())
    assert control.record["decided"]["precision"] == "fp32"
    assert not all(torch.equal(weights[0][name], value) for name, value in control.model.state_dict().items())


def test_the_checkpoint_alone_keeps_the_way(config, answer):
    answer(Way("fp32", False, 2))
    run = nl.train(config, name="r", max_steps=2, decay_steps=4, progress=Quiet())
    (run.folder / "run.json").unlink()
    answer(Way("bf16", True, 4))
    again = nl.train(config, name="r", decay_steps=4, progress=Quiet())
    assert (again.record["decided"]["precision"], again.record["decided"]["threads"]) == ("fp32", 2)
    assert again.record["decided"]["layout"] == "plain"


@pytest.mark.slow
def test_a_record_of_an_earlier_version_continues_by_the_old_rules(config, answer):
    asked = answer(Way("fp32", False, 2))
    run = nl.train(config, max_steps=2, decay_steps=4, progress=Quiet())
    record = json.loads((run.folder / "run.json").read_text())
    record["decided"] = {"batch_size": 8, "micro_batch_size": None, "precision": "bf16", "engine": "fused"}
    (run.folder / "run.json").write_text(json.dumps(record))
    assert len(asked) == 1
    again = nl.train(config, decay_steps=4, progress=Quiet())
    assert decided_by(resolve_run(config.replace(decay_steps=4)).setup) == ("bf16", 4, True)
    assert (again.record["decided"]["threads"], len(asked)) == (4, 1)


def test_another_kind_of_device_decides_again_and_says_so(config, answer):
    answer(Way("bf16", True, 2))
    run = nl.train(config, max_steps=2, decay_steps=4, progress=Quiet())
    record = json.loads((run.folder / "run.json").read_text())
    record["decided"] |= {"device": "cuda", "precision": "fp16", "threads": 16}
    (run.folder / "run.json").write_text(json.dumps(record))
    said = Quiet()
    again = nl.train(config, decay_steps=4, progress=said)
    assert (
        "this run was trained on cuda and continues on cpu: precision, engine, threads, layout are decided again"
        in (said.messages)
    )
    decided = again.record["decided"]
    assert (decided["precision"], decided["threads"], decided["device"]) == ("bf16", 2, "cpu")


@pytest.mark.parametrize("threads", [0, -1, 5, 10**9, "2", True, 2.0, None])
def test_threads_that_this_machine_cannot_have_are_not_kept(config, cpu, threads):
    setup = make_setup(config, {"batch_size": 8, "precision": "fp32", "engine": "fused", "threads": threads})
    assert setup.machine.threads == 4


def test_what_is_given_is_not_measured(config, answer):
    asked = answer(Way("fp32", True, 1))
    setup = resolve_run(config.replace(precision="bf16", threads=2)).setup
    assert (decided_by(setup), asked) == (("bf16", 2, True), [])
    resolve_run(config.replace(precision="bf16"))
    assert asked.pop() == [BF16, PLAIN16, Way("bf16", True, 2), Way("bf16", True, 1)]
    resolve_run(config.replace(threads=4))
    assert asked.pop() == [FP32, PLAIN32, BF16, PLAIN16, FP16]


def test_a_format_that_the_machine_lacks_gives_way_to_the_fastest(config, answer, monkeypatch):
    answer(Way("fp32", True, 4))
    found = setups.detect()
    without = Machine(device="cpu", name="Some CPU", cpu_flags=frozenset({"avx512_bf16"}), threads=4)
    monkeypatch.setattr(setups, "detect", lambda *_args: without)
    precision = resolve_run(config.replace(precision="fp16")).setup.precision
    assert (precision.name, precision.substituted) == ("fp32", True)
    assert precision.reason.startswith("fp16 is not native to Some CPU; measured here, tokens/s")
    assert found.cpu_flags > without.cpu_flags


# --- the cache ----------------------------------------------------------------------------------------------------


def test_a_steady_answer_is_remembered_by_other_processes_and_an_unsteady_one_by_this(config, answer):
    asked = answer(Way("fp32", True, 2), steady=False)
    assert decided_by(resolve_run(config).setup) == decided_by(resolve_run(config).setup)
    assert len(asked) == 1
    asked = answer(Way("fp32", True, 2))  # forgets what this process knew
    resolve_run(config)
    assert len(asked) == 2  # the unsteady one was not in the cache
    answer(Way("bf16", True, 4))
    assert decided_by(resolve_run(config).setup) == ("fp32", 2, True)
    assert len(asked) == 2
    assert decided_by(resolve_run(config, remeasure=True).setup) == ("bf16", 4, True)


@pytest.mark.slow
def test_a_damaged_entry_is_measured_again(config, answer, tmp_path):
    asked = answer(Way("fp32", True, 2))
    resolve_run(config)
    (path,) = (tmp_path / "cache").glob("probe-*.json")
    kept = json.loads(path.read_text())
    for damage in ({}, {"way": 1}, {"way": ["fp32", True, 2], "rates": [], "rows": 1, "product_rate": 1}, [], "x"):
        kept["choices"] = dict.fromkeys(kept["choices"], damage)
        path.write_text(json.dumps(kept))
        execution._MEASURED.clear()
        assert decided_by(resolve_run(config).setup) == ("fp32", 2, True)
    assert len(asked) == 6


def test_a_slider_does_not_measure_at_each_position(config, answer):
    asked, planner = answer(FP32), Planner()
    for hidden in (30, 32, 36, 40, 44):
        planner.plan(config.replace(hidden_dim=hidden))
    assert len(asked) == 1
    planner.plan(config.replace(hidden_dim=64))
    assert len(asked) == 2


def test_without_memory_the_old_rules_decide(config, answer, monkeypatch):
    answer(FP32)

    def exhausted(work, ways):
        raise MemoryError

    monkeypatch.setattr(execution, "measure", exhausted)
    assert decided_by(resolve_run(config).setup) == ("bf16", 4, True)


def test_a_gpu_is_judged_by_its_capability(config, answer):
    asked = answer(FP32)
    gpu = Machine(device="cuda:0", name="T4", capability=(7, 5), memory_bytes=2**34, threads=4)
    setup = SimpleNamespace(machine=gpu)
    assert settle_execution(setup, {}) is setup
    assert asked == []


# --- studies ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_runs_of_a_study_share_one_way(config, answer):
    asked = answer(Way("bf16", False, 2))
    arguments = {"batch_sizes": (4, 8), "rules": ("none",), "initialisations": ("published",), "name": "grid"}
    study = nl.lr_scaling(config.replace(lr=None, lr_base=1e-3), **arguments)
    found = [nl.load(path.parent).record for path in sorted(study.folder.glob("*/run.json"))]
    assert [record["decided"]["batch_size"] for record in found] == [4, 8]
    for record in found:
        decided = record["decided"]
        assert (decided["precision"], decided["threads"], decided["layout"]) == ("bf16", 2, "plain")
        assert dict(record["plan"])["precision"] == "bf16: as every run of this study"
    answer(Way("fp32", True, 4))
    arguments["batch_sizes"] = (4, 8, 16)
    nl.lr_scaling(config.replace(lr=None, lr_base=1e-3), **arguments)
    (added,) = [nl.load(path.parent).record for path in study.folder.glob("*batch-16*/run.json")]
    assert (added["decided"]["precision"], added["decided"]["threads"], len(asked)) == ("bf16", 2, 1)


@pytest.mark.slow
def test_a_study_of_an_earlier_version_goes_on_by_the_old_rules(config, answer):
    asked = answer(Way("fp32", False, 2))
    arguments = {"rules": ("none",), "initialisations": ("published",), "name": "grid"}
    study = nl.lr_scaling(config.replace(lr=None, lr_base=1e-3), batch_sizes=(4,), **arguments)
    settings = json.loads((study.folder / "settings.json").read_text())
    assert settings.pop("execution") == {"precision": "fp32", "threads": 2, "layout": "plain"}
    (study.folder / "settings.json").write_text(json.dumps(settings))
    nl.lr_scaling(config.replace(lr=None, lr_base=1e-3), batch_sizes=(4, 8), **arguments)
    (added,) = [nl.load(path.parent).record for path in study.folder.glob("*batch-8*/run.json")]
    assert (added["decided"]["precision"], added["decided"]["threads"], len(asked)) == ("bf16", 4, 1)


@pytest.mark.slow
def test_the_formats_of_a_comparison_share_threads_and_layout(config, answer):
    answer(Way("fp32", False, 2))
    study = nl.compare_precisions(config, ("fp32", "bf16"), control_seed=False, progress=Progress(), report=str)
    found = [nl.load(path.parent).record["decided"] for path in study.folder.glob("*/run.json")]
    assert sorted(decided["precision"] for decided in found) == ["bf16", "fp32"]
    assert {(decided["threads"], decided["layout"]) for decided in found} == {(2, "plain")}


@pytest.mark.parametrize(
    "damage", [None, [], {}, {"precision": "fp64", "threads": 1, "layout": "packed"},
               {"precision": "fp32", "threads": 10**6, "layout": "packed"},
               {"precision": "fp32", "threads": 1, "layout": "round"}],
)  # fmt: skip
def test_what_a_study_never_wrote_is_not_shared(damage):
    assert SharedExecution.from_dict(damage) is None
