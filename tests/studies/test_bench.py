"""The bench: its subjects are what they claim to be, and it writes what it says."""

import itertools
import json

import pytest
import torch
from click.testing import CliRunner
from tiny import tiny_setup, tiny_trainer

from newllm_lib.cli import main
from newllm_lib.config import ModelConfig, TrainConfig
from newllm_lib.model.newllm import NewLLM
from newllm_lib.studies.bench import execution_choice, training_speed
from newllm_lib.studies.bench.baselines import LSTMModel, PublishedLoop, plain_step
from newllm_lib.studies.bench.training_speed import Case, make_step, memory_bytes, run_bench
from newllm_lib.system.hardware import Machine
from newllm_lib.training.estimates import matrix_parameters
from newllm_lib.tuning.execution import Execution, Way


def test_the_published_loop_has_the_published_parameters_and_formulas():
    config = ModelConfig(dropout=0.0, init_std=None, embedding_std=1.0)
    loop, model = PublishedLoop(config), NewLLM(config)
    assert sum(p.numel() for p in loop.parameters()) == 2_739_432
    state = dict(model.state_dict())
    heads, biases = state["context_heads.weight"].chunk(3), state["context_heads.bias"].chunk(3)
    named = {
        "token_embedding.weight": state["embedding.weight"],
        "fnn_layers.0.weight": torch.cat([state["from_token.weight"], state["from_context.weight"]], dim=1),
        "fnn_layers.0.bias": state["from_token.bias"],
        **{
            f"fnn_layers.{3 * n + 3}.{kind}": state[f"layers.{n}.{kind}"]
            for n in range(5)
            for kind in ("weight", "bias")
        },
        **{f"token_output.{kind}": state[f"output.{kind}"] for kind in ("weight", "bias")},
        **{f"context_norm.{kind}": state[f"context_norm.{kind}"] for kind in ("weight", "bias")},
    }
    for name, head, bias in zip(("context_update", "forget_gate", "input_gate"), heads, biases, strict=True):
        named |= {f"{name}.weight": head, f"{name}.bias": bias}
    loop.load_state_dict(named)
    tokens = torch.randint(0, 1000, (3, 20), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loop(tokens), model(tokens)[0], rtol=0, atol=2e-4)


def test_the_lstm_has_as_many_parameters_to_one_per_cent():
    for config in (ModelConfig(), ModelConfig(hidden_dim=1024), ModelConfig(num_layers=12, context_dim=512)):
        count = sum(p.numel() for p in LSTMModel(config).parameters())
        assert count == pytest.approx(config.num_parameters, rel=0.01)


def test_work_is_counted_as_in_the_formulas():
    assert matrix_parameters(ModelConfig()) == 2_347_008


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_make_step_performs_the_step_of_the_trainer(text, tmp_path, engine):
    setup = tiny_setup(text, dropout=0.0, engine=engine, lr=None, lr_base=1e-4, epochs=1)
    trainer = tiny_trainer(setup, tmp_path)
    ids = trainer._batches.read(0, 0)
    model = NewLLM(setup.config.model)
    model.load_state_dict(trainer.model.state_dict())
    loss = make_step(model, ids, engine=engine, precision="fp32", train=TrainConfig())()
    trainer._train_batch()
    assert loss == pytest.approx(trainer.state.nll_since_row / trainer.state.tokens_since_row)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_repeated_steps_learn_the_batch():
    model = NewLLM(ModelConfig(vocab_size=20, hidden_dim=32, dropout=0.1, init_std=None, embedding_std=1.0))
    ids = torch.randint(4, 20, (8, 64), generator=torch.Generator().manual_seed(0))
    step = make_step(model, ids, precision="fp32", train=TrainConfig(lr=3e-3))
    losses = [step() for _ in range(30)]
    assert losses[-1] < 0.95 * losses[0]


def test_plain_steps_learn_too():
    config = ModelConfig(vocab_size=20, hidden_dim=32, embed_dim=16, context_dim=16, dropout=0.0)
    ids = torch.randint(4, 20, (8, 12), generator=torch.Generator().manual_seed(0))
    for model in (PublishedLoop(config), LSTMModel(config)):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = [plain_step(model, optimizer, ids, torch.autocast("cpu", enabled=False)) for _ in range(30)]
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(text):
    small = memory_bytes(Case(subject="fused", batch=8, hidden_dim=64, num_layers=2, precision="fp32"), str(text))
    large = memory_bytes(Case(subject="fused", batch=512, hidden_dim=256, num_layers=2, precision="fp32"), str(text))
    assert 0 < small < large
    assert large > 8e6


@pytest.mark.slow
def test_the_command_writes_json_table_and_plot(text, tmp_path, monkeypatch):
    subjects = [("fused", 2), ("published", 4), ("fused", 4)]  # a process for each: the others are no different
    cases = [Case(subject=subject, batch=batch, hidden_dim=16, precision="fp32") for subject, batch in subjects]
    monkeypatch.setattr(training_speed, "PARTS", {"batch": cases})
    arguments = ["bench", "--data", str(text), "--rounds", "1", "--no-memory", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "| fused | fp32 | 0.1 | 4 | 64 | 16 | 6 |" in result.stdout
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert [(row["subject"], row["batch"]) for row in rows] == subjects
    assert all(row["seconds"] > 0 and row["tokens_per_second"] < row["slots_per_second"] for row in rows)
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "bench.md").read_text() == result.stdout.rstrip("\n") + "\n"


def test_an_unknown_part_is_named(text, tmp_path):
    with pytest.raises(
        ValueError, match="unknown part 'speed': must be one of batch, fp32, length, hidden_dim, num_layers"
    ):
        run_bench(str(text), tmp_path, ["speed"])


@pytest.mark.slow
def test_the_part_on_the_choice_writes_its_table(text, tmp_path, monkeypatch):
    monkeypatch.setattr(execution_choice, "BATCHES", (2,))
    result = run_bench(str(text), tmp_path, ["execution"], rounds=1, memory=False, report=lambda text: None)
    (row,) = result["execution"]
    assert row["batch"] == 2 and row["chosen"] == ["fp32 on 1 thread"] * 3
    assert 0 < row["chosen_by_best"] <= 1
    assert f" {1000 * row['ways'][0]['seconds']:,.0f} | " in (tmp_path / "bench.md").read_text()


def test_the_choice_is_compared_with_the_best_way(monkeypatch):
    """Two threads: FP32 takes 4 s (3 s unpacked), on one thread 2 s and 8 s; each of three choices counts."""
    ways = [Way("fp32", True, 2), Way("fp32", False, 2), Way("fp32", True, 1), Way("fp32", False, 1)]
    seconds = itertools.cycle([4.0, 3.0, 2.0, 8.0])
    chosen = iter([ways[1], ways[0], ways[2]])

    def choose(work, open_ways, remeasure):
        assert remeasure and open_ways == [*ways[:2], ways[2]]
        way = next(chosen)
        return Execution(way=way, rates={way: 1.0}, rows=2, product_rate=1e9, steady=True)

    monkeypatch.setattr(execution_choice, "BATCHES", (2,))
    monkeypatch.setattr(execution_choice, "fastest_way", choose)
    monkeypatch.setattr(execution_choice, "timed", lambda step, machine: next(seconds))
    machine = Machine(device="cpu", name="Some CPU", threads=2)
    (row,) = execution_choice.measure_choice(lambda batch: torch.ones(batch, 4).long(), machine, 5, lambda text: None)
    assert row["best"] == "fp32 on 1 thread"
    assert row["chosen"] == ["fp32 unpacked on 2 threads", "fp32 on 2 threads", "fp32 on 1 thread"]
    assert row["chosen_by_best"] == pytest.approx(2 / 3)  # of 2/3, 2/4 and 2/2
    table = execution_choice.choice_text([row])
    assert "| 2 | 2,000 | 4,000 | 8,000 | 3,000 | fp32 unpacked on 2 threads, " in table
    assert table.splitlines()[2].endswith(", fp32 on 1 thread | 0.667 |")


def test_nothing_is_chosen_on_a_gpu():
    gpu = Machine(device="cuda:0", name="T4", capability=(7, 5))
    assert execution_choice.measure_choice(pytest.fail, gpu, 1, pytest.fail) == []
