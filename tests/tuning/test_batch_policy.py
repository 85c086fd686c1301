"""The batch of a run: found by a policy, recorded and kept, or a recipe's own in pieces; what stand-in GPUs decide."""

import dataclasses
import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from tiny import Quiet, tiny_config, tiny_setup, write_text

import newllm_lib as nl
from newllm_lib.cli import main
from newllm_lib.config import RunConfig, presets
from newllm_lib.data.dataset import cache_folder
from newllm_lib.errors import CheckpointError
from newllm_lib.model.recurrence import fused
from newllm_lib.model.recurrence.self_check import EngineChoice
from newllm_lib.system.hardware import Precision, detect
from newllm_lib.system.memory import memory_of
from newllm_lib.training import setup as setups
from newllm_lib.training.estimates import Speed, memory_estimate_bytes
from newllm_lib.training.plan import plan_lines
from newllm_lib.training.setup import make_setup
from newllm_lib.tuning import batch_finder, settle_batch, trial

GIB = 1 << 30


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
    monkeypatch.setattr(trial, "_STEPS", 1)
    monkeypatch.setattr(batch_finder, "_START", 32)
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(text, tmp_path):
    rule = {"lr": None, "lr_rule": "sqrt", "lr_base": 1e-3, "batch_base": 8}
    return tiny_config(text, results_dir=str(tmp_path / "results"), max_steps=2, **rule)


def lines_of(config, **overrides):
    setup, lines = nl.plan(config, report=lambda text: None, **overrides)
    return setup, dict(lines)


# --- found by a policy ------------------------------------------------------------------------------------------


def test_a_batch_that_was_found_is_recorded_and_never_sought_again(config, monkeypatch):
    said = Quiet()
    run = nl.train(config, batch_policy="fill", max_steps=1, progress=said)
    assert [line.split(":")[0] for line in said.messages[:2]] == ["batch 32", "batch 62"]
    record = json.loads((run.folder / "run.json").read_text())
    assert record["decided"]["batch_size"] == 62
    assert (record["config"]["train"]["batch_size"], record["requested"]["train"]["batch_size"]) == (62, 8)
    plan = dict(record["plan"])
    assert plan["batch"].startswith("62 sequences, about ")
    assert plan["batch"].endswith(
        "; fill (the recipe has 8): the largest that was tried and fits; all that the data have; "
        "max_steps = 1 counts steps, so 7.75 times as much text is read"
    )
    assert plan["learning rate"].startswith(
        "0.00278: 0.001 at batch 8, sqrt rule to batch 62"
    )  # 0.001 x (62 / 8) ** 0.5
    assert "measured here for this very configuration" in plan["time"]

    shutil.rmtree(cache_folder())
    monkeypatch.setattr(batch_finder, "run_try", refuse)
    again = nl.train(config, batch_policy="fill", max_steps=2, progress=said)
    assert (again.folder, again.record["step"], again.record["decided"]["batch_size"]) == (run.folder, 2, 62)
    assert dict(again.record["plan"])["batch"].endswith("; fill: as this run began")
    setup, plan = lines_of(config, batch_policy="fill")
    assert (setup.config.train.batch_size, plan["batch"]) == (62, dict(again.record["plan"])["batch"])


def test_lanes_of_a_stream_are_found_too(config):
    setup, plan = lines_of(config, batch_policy="fill", layout="stream")
    assert (setup.config.train.batch_size, setup.train_split.ids.shape[1]) == (56, 56)
    assert "in 56 lanes" in plan["sequences"]
    assert plan["learning rate"].startswith(
        "0.00265: 0.001 at batch 8, sqrt rule to batch 56"
    )  # 0.001 x (56 / 8) ** 0.5


def refuse(*_args):
    raise AssertionError("a try was run")


def test_plan_searches_where_nothing_is_known_and_says_each_try(config, monkeypatch, capsys):
    said = []
    setup, _ = nl.plan(config, report=said.append, batch_policy="fill")
    assert [line.split(":")[0] for line in said] == ["batch 32", "batch 62"]
    assert setup.config.train.batch_size == 62
    monkeypatch.setattr(batch_finder, "run_try", refuse)
    nl.plan(config, batch_policy="fill")
    assert "batch 62: found earlier on this machine" in capsys.readouterr().err


def test_a_policy_belongs_to_the_identity_and_what_it_finds_does_not(config):
    recipe, fill = (make_setup(config.replace(batch_policy=policy)) for policy in ("recipe", "fill"))
    assert recipe.identity != fill.identity
    assert settle_batch(fill, {}, lambda text: None).identity == fill.identity
    assert recipe.identity == make_setup(config).identity


def test_another_policy_under_the_same_name_is_refused(config):
    nl.train(config, name="mine", progress=Quiet())
    with pytest.raises(CheckpointError, match="batch_policy 'recipe' there, 'fill' here"):
        nl.train(config, name="mine", batch_policy="fill", progress=Quiet())


def test_a_search_starts_from_the_recipe_as_far_as_the_data_go(text):
    setup = make_setup(tiny_config(text, batch_size=5000, batch_policy="fill"))
    assert (setup.config.train.batch_size, setup.batch_reason) == (62, "")


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("a100_fp16", "0.0011: set directly (0.0001 at batch 32, sqrt rule to batch 62 would give 0.000139); "
                      "it does not follow the batch that was found, unless lr is none"),
        ("l4_fp16", "0.000139: 0.0001 at batch 32, sqrt rule to batch 62"),
    ],
)  # fmt: skip
def test_a_plan_says_whether_the_rate_follows(text, preset, said):
    shape = {"sequence_length": 12, "stride": 6, "hidden_dim": 12, "num_layers": 2, "context_dim": 6}
    config = presets.get(preset).replace(data=text, device="cpu", batch_policy="fill", **shape)
    _, plan = lines_of(config)
    assert plan["learning rate"].split("; constant")[0] == said


# --- a recipe in pieces -----------------------------------------------------------------------------------------


def with_memory(monkeypatch, usable):
    monkeypatch.setattr(batch_finder, "memory_of", lambda machine: SimpleNamespace(usable_bytes=usable))


def test_a_recipe_is_taken_in_pieces_where_memory_is_short(text, monkeypatch):
    setup = tiny_setup(text, batch_size=60)
    needs = {rows: memory_estimate_bytes(setups.with_batch(setup, 60, rows)) for rows in (60, 30, 15, 8)}
    assert sorted(needs.values(), reverse=True) == list(needs.values())
    for rows, usable in ((None, needs[60]), (30, needs[30]), (15, needs[15]), (8, needs[8]), (1, 1)):
        with_memory(monkeypatch, round(usable / 0.9) + 2)
        settled = settle_batch(setup, {}, lambda text: None)
        train = settled.config.train
        assert (train.batch_size, train.micro_batch_size) == (60, rows)
        assert settled.steps_per_epoch == setup.steps_per_epoch
        line = dict(plan_lines(settled, "x"))["batch"]
        told = f", {rows} at a time; all at once would take about 0.1 GiB, and there is room for "
        assert (told in line) == (rows is not None)
    with_memory(monkeypatch, 1)
    assert settle_batch(setup, {"micro_batch_size": 20}, lambda text: None) is setup  # as this run began
    settled = settle_batch(setup, {"micro_batch_size": None}, lambda text: None)  # with more memory than is here now
    assert settled.config.train.micro_batch_size == 1
    found = tiny_setup(text, batch_size=60, batch_policy="fill")
    for fits, rows in ((60, None), (30, 30)):  # as the estimate says, which may be a quarter too high, no more
        with_memory(monkeypatch, round(needs[fits] / (0.9 * 1.25)) + 2)
        settled = settle_batch(found, {"batch_size": 60}, lambda text: None)
        assert (settled.config.train.batch_size, settled.config.train.micro_batch_size) == (60, rows)
    asked = tiny_setup(text, batch_size=60, micro_batch_size=25)
    assert settle_batch(asked, {}, lambda text: None) is asked


@pytest.mark.parametrize(
    ("engine", "precision", "batch_size", "expected"),
    [
        ("fused", "bf16", 2048, 2_602_883_916),  # 2.42 GiB; a process grew by 2.44
        ("fused", "fp32", 512, 1_731_620_480),  # 1.61; 1.57 to 1.58
        ("reference", "bf16", 512, 1_636_648_576),  # 1.52; 1.68
    ],
)
def test_the_memory_estimate_of_the_published_shape(text, engine, precision, batch_size, expected):
    """Worked out by hand from the shapes; beside it what steps on full rows took (two cores of an AMD EPYC)."""
    setup = dataclasses.replace(
        tiny_setup(text, engine=engine),
        config=RunConfig().replace(batch_size=batch_size),
        precision=Precision(precision, ""),
    )
    assert memory_estimate_bytes(setup) == expected


def test_pieces_are_recorded_and_kept(config, monkeypatch):
    with_memory(monkeypatch, 1)
    run = nl.train(config, max_steps=1, progress=Quiet())
    decided = run.record["decided"]
    assert (decided["batch_size"], decided["micro_batch_size"]) == (8, 1)
    with_memory(monkeypatch, 10**12)
    assert nl.plan(config)[0].config.train.micro_batch_size == 1


# --- stand-in GPUs ----------------------------------------------------------------------------------------------

GPUS = {
    "Tesla T4": ((7, 5), 14.6, "fp16",
                 "Tesla T4, compute capability 7.5, has float16 but no native bfloat16 (below 8.0)"),
    "NVIDIA L4": ((8, 9), 22.2, "bf16", "NVIDIA L4, compute capability 8.9, has native bfloat16 (8.0 or above)"),
    "NVIDIA A100-SXM4-40GB": ((8, 0), 39.5, "bf16",
                              "NVIDIA A100-SXM4-40GB, compute capability 8.0, has native bfloat16 (8.0 or above)"),
    "NVIDIA H100 80GB HBM3": ((9, 0), 79.3, "bf16",
                              "NVIDIA H100 80GB HBM3, compute capability 9.0, has native bfloat16 (8.0 or above)"),
}  # fmt: skip
"""Compute capability, GiB, the precision that auto takes, and why."""


@pytest.fixture(params=GPUS)
def gpu(request, monkeypatch):
    """torch as it is where such a GPU has all of its memory free; the engine is not checked on it."""
    capability, memory, *_ = GPUS[request.param]
    properties = SimpleNamespace(
        name=request.param, major=capability[0], minor=capability[1], total_memory=int(memory * GIB)
    )
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda index: properties,
        "mem_get_info": lambda device: (int(memory * GIB) - GIB // 2, int(memory * GIB)),
        "memory_reserved": lambda device: GIB // 4,
        "is_bf16_supported": lambda: True,  # as torch says on a T4, which emulates it
        "empty_cache": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(
        setups, "choose_engine", lambda *_args: EngineChoice("fused", fused.recurrence, "of the stand-in")
    )
    return request.param


def test_a_gpu_is_known_by_its_properties(gpu, text):
    capability, memory, precision, why = GPUS[gpu]
    machine = detect("auto")
    assert (machine.device, machine.name, machine.capability) == ("cuda:0", gpu, capability)
    setup = make_setup(presets.get("auto").replace(data=text))
    assert setup.config.train.batch_size == 40  # 256 sequences, as far as the data go
    plan = dict(plan_lines(setup, "x"))
    assert plan["device"].startswith(f"{gpu} (cuda:0, ")
    assert plan["precision"] == f"{precision}: {why}"
    assert plan["memory"].endswith(f"GiB for training, of {memory} GiB (an estimate from the shapes)")
    usable = memory_of(machine)
    assert (usable.usable_bytes, usable.overcommits) == (int(memory * GIB) - GIB // 4, False)


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({}, {"Tesla T4": None, "NVIDIA L4": None, "NVIDIA A100-SXM4-40GB": None, "NVIDIA H100 80GB HBM3": None}),
        ({"batch_size": 4096, "hidden_dim": 2048},
         {"Tesla T4": 2048, "NVIDIA L4": None, "NVIDIA A100-SXM4-40GB": None, "NVIDIA H100 80GB HBM3": None}),
        ({"batch_size": 4096, "sequence_length": 512, "hidden_dim": 1024},
         {"Tesla T4": 512, "NVIDIA L4": 1024, "NVIDIA A100-SXM4-40GB": 2048, "NVIDIA H100 80GB HBM3": None}),
    ],
)  # fmt: skip
def test_a_recipe_keeps_its_batch_on_every_gpu(gpu, many, changes, pieces):
    setup = make_setup(presets.get("l4_fp16").replace(data=many, vocab_size=34, min_words=1, **changes))
    settled = settle_batch(setup, {}, lambda text: None)
    assert settled.config.train.micro_batch_size == pieces[gpu]
    assert settled.config.train.batch_size == changes.get("batch_size", 2048)
    assert settled.rate == setup.rate


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("many"), texts=4200)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def newllm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        return CliRunner().invoke(main, [str(word) for word in words])

    return call


TINY = ("--sequence-length", 12, "--stride", 6, "--hidden-dim", 12, "--num-layers", 2, "--vocab-size", 40)


def test_the_command_tells_each_try_and_what_to_type(newllm, text):
    result = newllm("probe", "cpu_baseline", "--data", text, *TINY, "--policy", "fill")
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["batch 32", "batch 62"]
    first, _, last = result.stdout.splitlines()
    assert first == "batch 62 (fill): the largest that was tried and fits; all that the data have"
    assert last == "  to use it: newllm train cpu_baseline --batch-policy fill (with your other options)"
    again = newllm("probe", "cpu_baseline", "--data", text, *TINY, "--batch-policy", "fill", "--json")
    assert again.stderr.startswith("batch 62: found earlier on this machine for this configuration (")
    found = json.loads(again.stdout)
    assert (found["batch_size"], found["cached"], len(found["tries"])) == (62, True, 2)
    other = newllm("probe", "cpu_baseline", "--data", text, *TINY, "--policy", "fill", "--memory-share", 0.8)
    assert other.stdout.splitlines()[-1] == (
        "  to use it: newllm train cpu_baseline --batch-size 62 (with your other options)"
    )
    train = newllm("train", "cpu_baseline", "--data", text, *TINY, "--batch-policy", "fill", "--plan")
    assert "62 sequences" in train.stdout
    recipe = newllm("probe", "cpu_baseline", "--data", text, *TINY, "--policy", "recipe")
    assert recipe.stdout.splitlines()[-1] == "  to use it: newllm train cpu_baseline (with your other options)"
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--policy", "fill"], 2, "name a PRESET to find a batch for"),
        (["--data", "builtin"], 2, "name a PRESET to find a batch for"),
        (["--threads", "0"], 2, "threads = 0: must be a whole number from 1 to 4,096, or none"),
        (["nothing"], 2, "unknown preset 'nothing'"),
        (["auto", "--memory-share", "1.5"], 2, "1.5 is not in the range 0<x<=1"),
        (["auto", "--policy", "large"], 2, "'large' is not one of 'fast', 'fill', 'recipe'"),
        (["auto", "--data", "builtin", "--micro-batch-size", "4"], 1, "must be none with batch_policy fast"),
    ],
)
def test_wrong_usage_is_told(newllm, words, status, said):
    result = newllm("probe", *words)
    assert (result.exit_code, said in result.stderr) == (status, True), result.stderr


# --- a plan's time ----------------------------------------------------------------------------------------------


def test_a_plan_counts_the_tokens_of_the_whole_run(text):
    setup = tiny_setup(text, batch_size=31, epochs=4, max_steps=3)  # two steps an epoch, all 540 tokens
    tokens = setup.train_split.num_tokens
    assert Speed(100.0, "measured").training_seconds(setup) == pytest.approx(tokens * 1.5 / 100)
    speed = Speed(tokens / 30, "measured here for this very configuration")
    assert dict(plan_lines(setup, "x", speed=speed))["time"] == (
        f"about 45 s, validation and saving not counted ({tokens / 30:,.0f} tokens/s, measured here for this very "
        "configuration)"
    )
    assert "time" not in dict(plan_lines(setup, "x"))
    assert dataclasses.replace(setup, batch_reason="") == setup
