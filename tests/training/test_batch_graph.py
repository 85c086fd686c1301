"""The pass that a CUDA graph replays, computed without one: its gradients are those of the ordinary step."""

import dataclasses

import cuda_on_cpu
import pytest
import torch
from tiny import tiny_setup, tiny_trainer

from newllm_lib.config import PAD, ModelConfig
from newllm_lib.errors import ConfigError
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import ENGINES
from newllm_lib.model.recurrence.kernels import Kernels
from newllm_lib.model.recurrence.static_packing import most_active
from newllm_lib.system.hardware import DTYPES, Precision
from newllm_lib.training import graph_choice
from newllm_lib.training.batch_graph import BatchGraph, best_kernels
from newllm_lib.training.batches import Batches
from newllm_lib.training.step import eager_gradients

ROWS, LENGTH = 19, 9


def batch(seed: int = 1, rows: int = ROWS) -> torch.Tensor:
    """Ids (rows, S) with padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 40, (rows, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (rows, 1), generator=generator)
    return ids.masked_fill(torch.arange(LENGTH) >= lengths, PAD)


def make_model(dtype: torch.dtype = torch.float32) -> NewLLM:
    shape = {"vocab_size": 40, "embed_dim": 16, "hidden_dim": 32, "context_dim": 32, "num_layers": 2}
    config = ModelConfig(**shape, dropout=0.2, init_std=None, embedding_std=1.0, output_std=0.1)
    return NewLLM.fresh(config, 0).to(dtype).train()


def plain(model: NewLLM, ids: torch.Tensor, seed: int, precision: Precision, scale: float) -> list[torch.Tensor]:
    """Gradients of the ordinary step, then its summed loss and targets."""
    model.zero_grad()
    totals, _ = eager_gradients(
        model, ids, engine=ENGINES["fused"], precision=precision, scale=lambda loss: loss * scale, dropout_seed=seed
    )
    return [*(p.grad.clone() for p in model.parameters()), *totals]


def by_graph(graph: BatchGraph, ids: torch.Tensor, seed: int, scale: float) -> list[torch.Tensor]:
    totals = graph.compute(ids, seed, torch.tensor(scale))
    assert totals.fits.item() == 1
    return [*(p.grad.clone() for p in graph.model.parameters()), totals.nll, totals.tokens]


def graph_of(model: NewLLM, precision: Precision, kernels: Kernels | None = None) -> BatchGraph:
    lengths = [(batch(seed) != PAD).sum(1).numpy() - 1 for seed in (1, 2)]
    return BatchGraph(model, precision, ROWS + 2, most_active(lengths, ROWS + 2, LENGTH - 1), kernels)


@pytest.fixture
def float64(monkeypatch) -> Precision:
    monkeypatch.setitem(DTYPES, "fp64", torch.float64)
    return Precision("fp64", "of this test")


@pytest.mark.parametrize("rows", [ROWS, 5])
def test_the_gradients_are_those_of_the_ordinary_step(rows, float64):
    model = make_model(torch.float64)
    graph, fp32 = graph_of(model, float64), Precision("fp32", "autocast is off")
    for seed in (1, 2, 1):  # its buffers are used again
        ids = batch(seed, rows)
        expected = plain(model, ids, seed, fp32, 4.0)
        for value, wanted in zip(by_graph(graph, ids, seed, 4.0), expected, strict=True):
            torch.testing.assert_close(value, wanted.double(), rtol=1e-6, atol=1e-8)  # the scale is divided in FP32


def test_other_masks_give_other_gradients(float64):
    model = make_model(torch.float64)
    graph = graph_of(model, float64)
    first, other = (by_graph(graph, batch(), seed, 1.0)[0] for seed in (1, 2))
    assert not torch.allclose(first, other)


def test_a_batch_with_more_rows_than_the_envelope_says_so(float64):
    graph = graph_of(make_model(torch.float64), float64)
    full = torch.full((ROWS, LENGTH), 5)
    assert graph.compute(full, 1, torch.tensor(1.0)).fits.item() == 0
    assert graph.compute(batch(), 1, torch.tensor(1.0)).fits.item() == 1


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no g++ to compile the kernels with")
@pytest.mark.parametrize(("format", "tolerance"), [("fp32", 1e-5), pytest.param("bf16", 0.05, marks=pytest.mark.slow)])
def test_with_the_kernels_too(format, tolerance, monkeypatch, tmp_path):
    """In BF16 as near to FP32 as the ordinary step in BF16, or half as far again: this small case is a coarse one."""
    compiled = lambda source, name: cuda_on_cpu.compiled(source, name, tmp_path)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "_compile_kernel", compiled, raising=False)
    model, precision = make_model(), Precision(format, "of this test")
    kernels = Kernels(precision.dtype, 32, 32, model.config.context_clamp)
    monkeypatch.setattr("newllm_lib.model.recurrence.kernel_loop.kernels_of", lambda cell: kernels)
    graph = graph_of(model, precision, kernels)
    expected, usual = (plain(model, batch(), 3, each, 1.0) for each in (Precision("fp32", ""), precision))
    found = by_graph(graph, batch(), 3, 1.0)
    names = [name for name, _ in model.named_parameters()]
    for name, value, coarse, wanted in zip(names, found, usual, expected, strict=False):
        allowed = max(tolerance * float(wanted.norm()), 1.5 * float((coarse - wanted).norm()))
        assert float((value - wanted).norm()) <= allowed, name
    assert found[-2].item() == pytest.approx(expected[-2].item(), rel=tolerance)
    assert found[-1] == expected[-1]


def test_without_a_gpu_there_are_no_kernels_and_the_reason_is_said():
    assert best_kernels(make_model(), Precision("fp32", "")) == (None, "the kernels are for CUDA GPUs")


def with_graph(trainer, monkeypatch) -> list[int]:
    """Let a trainer on a CPU compute its batches by the pass of a graph; returns a list of the sizes it was given."""
    setup, used = trainer.setup, []
    active = most_active(graph_choice.first_lengths(setup), setup.config.train.batch_size, tokens_a_row(setup))
    graph = BatchGraph(trainer.model, setup.precision, setup.config.train.batch_size, active)
    compute = graph.compute
    monkeypatch.setattr(graph, "compute", lambda ids, *rest: (used.append(len(ids)), compute(ids, *rest))[1])
    trainer.training_step.graph = graph
    return used


def tokens_a_row(setup) -> int:
    return setup.train_split.ids.shape[1] - 1


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_run_by_the_graph_learns_as_one_without_it(text, tmp_path, monkeypatch, optimizer):
    setup = tiny_setup(text, optimizer=optimizer, epochs=2)
    usual, other = tiny_trainer(setup, tmp_path / "a"), tiny_trainer(setup, tmp_path / "b")
    used = with_graph(other, monkeypatch)
    assert usual.fit() == other.fit() == "finished"
    assert len(used) == usual.state.step and len(set(used)) == 2  # the last batch of an epoch is smaller
    for row, wanted in zip(other.state.history, usual.state.history, strict=True):
        assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-4)
        assert row["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-4)


def test_a_batch_that_does_not_fit_is_computed_without_the_graph(text, tmp_path, monkeypatch):
    setup = tiny_setup(text, epochs=1)
    usual, other = tiny_trainer(setup, tmp_path / "a"), tiny_trainer(setup, tmp_path / "b")
    other.training_step.graph = BatchGraph(other.model, setup.precision, setup.config.train.batch_size, [1] * 3)
    usual.fit(), other.fit()
    for name, value in usual.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value), name


def test_the_distance_from_the_plain_step_is_measured(text):
    setup = tiny_setup(text)
    model = NewLLM.fresh(setup.config.model, 0).train()
    batches = Batches(setup.train_split, setup.config.train.batch_size, 0)
    active = most_active(graph_choice.first_lengths(setup), setup.config.train.batch_size, tokens_a_row(setup))
    graph = BatchGraph(model, setup.precision, setup.config.train.batch_size, active)
    ids = batches.read(0, 0)
    assert graph_choice.distance_from_plain(setup, model, graph, ids) < 1e-5
    compute = graph.compute

    def with_fault(*arguments):
        totals = compute(*arguments)
        model.output.weight.grad.mul_(1.5)
        return totals

    graph.compute = with_fault
    assert graph_choice.distance_from_plain(setup, model, graph, ids) > 0.01
    narrow = BatchGraph(model, setup.precision, setup.config.train.batch_size, [1])
    assert graph_choice.distance_from_plain(setup, model, narrow, ids) == float("inf")


def test_a_cpu_has_no_graph_and_says_so_only_where_one_is_asked_for(text):
    setup = tiny_setup(text)
    assert graph_choice.choose_graph(setup, None, None) == graph_choice.GraphChoice(None, "")
    off = dataclasses.replace(setup, machine=dataclasses.replace(setup.machine, device="cuda:0"))
    off = dataclasses.replace(off, config=setup.config.replace(cuda_graph="off"))
    assert graph_choice.choose_graph(off, None, None).graph is None
    asked = dataclasses.replace(setup, config=setup.config.replace(cuda_graph="on"))
    with pytest.raises(ConfigError, match=r"cuda_graph = 'on': must be auto or off here: .* is no CUDA GPU"):
        graph_choice.choose_graph(asked, None, None)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layout": "stream"}, "layout stream carries the context from step to step"),
        ({"engine": "reference"}, "the engine is reference"),
        ({"micro_batch_size": 2}, "a batch is computed 2 sequences at a time"),
    ],
)
def test_on_a_gpu_the_reason_against_a_graph_is_said(text, changes, why):
    setup = tiny_setup(text, **changes)
    gpu = dataclasses.replace(setup, machine=dataclasses.replace(setup.machine, device="cuda:0"))
    chosen = graph_choice.choose_graph(gpu, None, None)
    assert chosen.graph is None
    assert chosen.reason == f"no CUDA graph ({why}): steps are launched operation by operation"


def test_a_gpu_that_fails_leaves_the_run_without_a_graph(text, monkeypatch):
    setup = tiny_setup(text)
    gpu = dataclasses.replace(setup, machine=dataclasses.replace(setup.machine, device="cuda:0"))
    model = NewLLM.fresh(setup.config.model, 0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = graph_choice.choose_graph(gpu, model, Batches(setup.train_split, setup.config.train.batch_size, 0))
    assert chosen.graph is None and "no CUDA graph (" in chosen.reason  # this build of torch, or machine, has no CUDA
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
