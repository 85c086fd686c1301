"""The trainer on a pretend GPU: every tensor on one device, few waits and launches, a pass that can be recorded."""

import inspect
import sys
import textwrap

import pytest
import torch
from pretend_cuda import GPU, CaptureError, OnGPU, WrongDeviceError, on_cpu, pretend_cuda
from tiny import continued_trainer, result_of, same, stopped_trainer, tiny_config, tiny_trainer

import newllm_lib as nl
from newllm_lib import evaluation
from newllm_lib.evaluation import evaluate_split
from newllm_lib.model.loss import _LossSum, softmax_less_target
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import ENGINES, dropout, time_loop
from newllm_lib.model.recurrence.dropout import Dropout
from newllm_lib.model.recurrence.packing import Packing
from newllm_lib.model.recurrence.static_packing import Envelope
from newllm_lib.reporting.progress import Progress
from newllm_lib.studies.bench.training_speed import Case, measure
from newllm_lib.system.buffer_pool import Buffers
from newllm_lib.training import batch_graph, graph_choice
from newllm_lib.training import step as step_module
from newllm_lib.training import trainer as trainer_module
from newllm_lib.training.batches import Batches
from newllm_lib.training.setup import Setup, make_setup
from newllm_lib.training.trainer import Trainer

STREAM = {"layout": "stream", "batch_size": 6, "eval_lanes": 4, "sequence_length": 16}
PLAIN = {"cuda_graph": "off"}

MOST_WAITS = {"plain": 3, "graph": 4}
"""Of one step. Plain: the counts of active rows, what the step reports, the copy of the batch's index. Graph: whether
the batch fits, what the step reports, and the copies of the index and of dropout's numbers."""
MOST_LAUNCHES_A_TIME_STEP = {"plain": 80, "graph": 80}
"""Forward and back, of two layers, in torch's own operations."""


def setup_of(text, **changes) -> Setup:
    setup = make_setup(tiny_config(text, emulate_precision=True, **{"device": "cuda"} | changes))
    assert setup.engine.name == changes.get("engine", "fused"), setup.engine.reason
    return setup


def gpu_trainer(text, folder, **changes) -> Trainer:
    return on_gpu(tiny_trainer, setup_of(text, **changes), folder)


def on_gpu(make, setup, folder, *more) -> Trainer:
    """A trainer whose model is on the setup's device."""
    usual = Trainer.__init__

    def placed(self, setup, model, *rest):
        usual(self, setup, model.to(setup.machine.device), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", placed)
        return make(setup, folder, *more)


OPTIMIZERS = ("adam", "adamw", "muon")
RUNS = [
    ("fp32", {}),
    ("fp16", STREAM),
    *(
        pytest.param(precision, {"optimizer": OPTIMIZERS[(row + column) % 3], **changes}, marks=pytest.mark.slow)
        for row, precision in enumerate(("fp32", "bf16", "fp16"))
        for column, changes in enumerate(({}, PLAIN, {"micro_batch_size": 3}, STREAM))
    ),
]


@pytest.mark.parametrize(("precision", "changes"), RUNS)
def test_a_run_on_the_gpu_learns_as_the_run_on_the_cpu(text, tmp_path, precision, changes):
    """Not to the bit: on a GPU sums are made in other pieces, and the 16-bit products of weights have 32 bits."""
    changes = {"precision": precision, "epochs": 1, **changes}
    expected = tiny_trainer(setup_of(text, device="cpu", **changes), tmp_path / "cpu")
    assert expected.fit() == "finished"
    with pretend_cuda() as gpu:
        found = gpu_trainer(text, tmp_path / "gpu", **changes)
        assert found.fit() == "finished"
        assert {parameter.device for parameter in found.model.parameters()} == {GPU}
        used_graph = found.training_step.graph is not None
    assert used_graph == (changes.get("cuda_graph") != "off" and not {"layout", "micro_batch_size"} & set(changes))
    assert gpu.launches > 0
    rounding = {"fp32": 1e-4, "bf16": 0.02, "fp16": 0.01}[precision]
    for row, wanted in zip(found.state.history, expected.state.history, strict=True):
        assert row["step"] == wanted["step"]
        assert row["val_loss"] == pytest.approx(wanted["val_loss"], rel=rounding)


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, pytest.param(STREAM, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(text, tmp_path, changes):
    with pretend_cuda((7, 5)):
        setup = setup_of(text, precision="fp16", epochs=None, max_steps=7, **changes)
        whole = on_gpu(tiny_trainer, setup, tmp_path / "whole")
        whole.fit()
        on_gpu(stopped_trainer, setup, tmp_path / "parts", 4)
        rest = on_gpu(continued_trainer, setup, tmp_path / "parts")
        rest.fit()
        assert same(on_cpu(result_of(rest)), on_cpu(result_of(whole)))


def third_step(text, folder, **changes):
    """The waits and launches of a run's third step."""
    seen = []
    with pretend_cuda((7, 5)) as gpu:
        trainer = gpu_trainer(text, folder, precision="fp16", validate_every_steps=None, **changes)

        def on_step(result):
            seen.append((dict(gpu.waits), gpu.launches))
            gpu.reset()
            if len(seen) == 3:
                trainer.request_stop()

        trainer.on_step = on_step
        trainer.fit()
    return seen[2]


@pytest.mark.parametrize(("kind", "changes"), [("plain", PLAIN), ("graph", {})])
def test_waits_do_not_grow_with_the_sequence_and_launches_only_in_proportion(text, tmp_path, kind, changes):
    (waits, short), (more_waits, long) = (
        third_step(text, tmp_path / str(length), sequence_length=length, stride=length // 2, **changes)
        for length in (12, 23)
    )
    assert sum(waits.values()) == sum(more_waits.values()) <= MOST_WAITS[kind], waits
    assert (long - short) / 11 <= MOST_LAUNCHES_A_TIME_STEP[kind]


def test_generation_and_evaluation_take_no_tensor_of_the_cpu(text, tmp_path):
    with pretend_cuda((8, 0)) as gpu:
        trainer = gpu_trainer(text, tmp_path, precision="bf16")
        setup, model = trainer.setup, trainer.model.eval()
        evaluate_split(model, setup.validation_split, precision=setup.precision, engine=setup.engine.run)
        tokenizer = setup.prepared.tokenizer
        for options in ({"temperature": 0}, {"top_k": 3, "top_p": 0.9}, {"stop": ["w1"]}):
            nl.generate_texts(model, tokenizer, ["w1 w2", "w3"], seed=1, max_new_tokens=4, **options)
        list(nl.stream_text(model, tokenizer, "w1", seed=1, max_new_tokens=4))
        assert gpu.launches > 0
        with pytest.raises(ValueError, match="tokens are on cpu: must be on cuda:0, where the model is"):
            model(torch.ones(1, 2, dtype=torch.int64))


class WrongKernels:
    """Losses that are off by a tenth, or no loop at all."""

    def __init__(self, error: Exception | None):
        self._error = error

    def losses(self, logits, targets, nll):
        if self._error:
            raise self._error
        softmax_less_target(logits, targets, nll)
        logits.mul_(1.1)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, "the kernels failed: ValueError: its gradients are 0.1 away from the plain step's, allowed is 0.001"),
        (RuntimeError("no kernel image"), "the kernels failed: RuntimeError: no kernel image"),
    ],
)
def test_kernels_that_fail_or_disagree_give_way_to_torchs_operations(text, monkeypatch, error, said):
    monkeypatch.setattr(graph_choice, "best_kernels", lambda *_args: (WrongKernels(error), ""))
    monkeypatch.setattr(batch_graph, "kernel_loop", time_loop)
    with pretend_cuda():
        setup = setup_of(text)
        model = NewLLM.fresh(setup.config.model, 1, setup.machine.device).train()
        batch_of = Batches(setup.train_split, setup.config.train.batch_size, 1, setup.machine.device)
        chosen = graph_choice.choose_graph(setup, model, batch_of)
    assert chosen.graph is not None
    assert chosen.reason.startswith(f"steps are replayed as one CUDA graph with torch's operations ({said}); gradients")


def test_the_plan_says_why_there_is_no_graph(text, tmp_path):
    with pretend_cuda():
        setup = setup_of(text, **STREAM)
        assert graph_choice.choose_graph(setup, None, None).reason.startswith("no CUDA graph (layout stream")


@pytest.mark.slow
def test_everything_that_trains_or_scores_runs_on_the_gpu(text, tmp_path):
    """Batch search, range test, studies, bench, a run with its bundle and its scores, a plan."""
    steps = {"epochs": None, "max_steps": 4, "validate_every_steps": 2}
    config = tiny_config(text, device="cuda", precision="fp16", name="run", results_dir=str(tmp_path), **steps)
    with pretend_cuda((7, 5)) as gpu:
        for policy in ("fast", "fill"):
            assert nl.find_batch(config, policy=policy, seconds=2.0, report=lambda line: None).batch_size >= 8
        assert len(nl.lr_find(config, steps=10).losses) > 0
        study = nl.compare_precisions(config, "fp32,fp16", progress=Progress(), report=lambda line: None)
        assert [run["precision"] for run in study.record["runs"]][:2] == ["fp32", "fp16"]
        cases = [Case(subject=name, batch=4, hidden_dim=16, num_layers=2, precision="fp16") for name in ENGINES]
        rows = measure([*cases, Case(subject="graph", batch=4, hidden_dim=16, num_layers=2)], str(text), 1, print)
        assert all(row["memory_bytes"] >= 0 and row["product_share"] > 0 for row in rows)
        run = nl.train(config, progress=Progress())
        assert dict(nl.plan(config)[1])["device"].startswith("Pretend GPU (cuda:0, ")
        before = gpu.launches
        on_gpu_scores = nl.evaluate(run)
        assert gpu.launches > before and run.model.device.type == "cpu"
        opened = nl.open_bundle(nl.bundle(run), tmp_path / "opened")
    assert {"cuda", "driver", "fp32_products"} < run.record.environment.keys()
    assert nl.evaluate(opened.folder, str(text), device="cpu").loss == pytest.approx(on_gpu_scores.loss, rel=1e-4)


# --- controls: what only a GPU would show is seen ------------------------------------------------------------------


def fit(text, folder, **changes):
    with pretend_cuda() as gpu:
        trainer = gpu_trainer(text, folder, precision="fp16", epochs=None, max_steps=4, **changes)
        trainer.fit()
        if changes.get("cuda_graph") != "off":
            assert trainer.training_step.graph is not None, "the run has no graph"
        return gpu


def waiting(function):
    """The same function, after the host has asked the device for a number."""
    return lambda *arguments: (bool((arguments[-1] > 0).any()), function(*arguments))[1]


def plant(monkeypatch, owner, name: str, old: str, new: str, users=()) -> None:
    """Replace a function or method by itself with `old` changed to `new`; users: modules that imported it by name."""
    found = inspect.getattr_static(owner, name)
    source = textwrap.dedent(inspect.getsource(getattr(found, "__func__", found)))
    assert source.count(old) == 1, (name, source.count(old))
    namespace = dict(vars(sys.modules[getattr(found, "__func__", found).__module__]))
    exec(source.replace(old, new), namespace)
    for place in (owner, *users):
        monkeypatch.setattr(place, name, namespace[name])


ON_CPU = {
    "a row number": (Packing, "of", "row = torch.arange(rows, device=device)", "row = torch.arange(rows)"),
    "a step number": (Packing, "of", "torch.arange(steps, device=device).repeat", "torch.arange(steps).repeat"),
    "a place": (Packing, "of", "torch.arange(offsets[-1], device=device)", "torch.arange(offsets[-1])"),
    "the index of a batch": (Batches, "_windows", ".to(self._ids.device)", ""),
    "the generator of dropout": (dropout, "random_bits", "torch.Generator(device)", "torch.Generator()"),
    "the bits of dropout": (dropout, "random_bits", "dtype=torch.int64, device=device)", "dtype=torch.int64)"),
    "the masks of dropout": (Dropout, "next_masks", "dtype=dtype, device=mixed.device", "dtype=dtype"),
    "the gradient of the head": (_LossSum, "forward", "torch.zeros_like(weight, dtype=wide)",
                                 "torch.zeros(weight.shape, dtype=wide)"),
    "the rows of an evaluation": (evaluation, "evaluate_split", ".to(device, torch.int64)", ".long()",
                                  [trainer_module]),
    "the bytes of tokens": (evaluation, "evaluate_split", "split.token_bytes).to(device)", "split.token_bytes)",
                            [trainer_module]),
    "the sum of the losses": (step_module, "eager_gradients", "dtype=torch.float64, device=device)",
                              "dtype=torch.float64)"),
    "the first context": (NewLLM, "initial_context", ", device=weight.device", ""),
    "a block of memory": (Buffers, "empty", 'like.device.type != "cpu" or size < _LEAST', "size < 64"),
    "numbers for NumPy": (Packing, "of", "]).tolist()", "]).numpy().tolist()"),
    "the envelope of a graph": (Envelope, "of", "most.to(device)", "most"),
}  # fmt: skip


@pytest.mark.parametrize(
    "fault", [name if number < 3 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(ON_CPU)]
)
def test_control_what_is_left_on_the_cpu_is_noticed(text, tmp_path, monkeypatch, fault):
    owner, name, old, new, *users = ON_CPU[fault]
    plant(monkeypatch, owner, name, old, new, *users)
    pieces = {"tokenizer": "sentencepiece", "vocab_size": 300} if fault == "the bytes of tokens" else {}
    graph = {} if "graph" in fault else PLAIN
    with pytest.raises((WrongDeviceError, AssertionError, ValueError, TypeError), match=r"cuda:0|has no graph"):
        fit(text, tmp_path, **graph, **pieces)


def test_control_a_wait_in_every_time_step(text, tmp_path, monkeypatch):
    monkeypatch.setattr(time_loop, "mix", waiting(time_loop.mix))
    (short, _), (long, _) = (
        third_step(text, tmp_path / str(length), sequence_length=length, stride=length // 2, **PLAIN)
        for length in (12, 23)
    )
    assert sum(long.values()) > sum(short.values()) + 11
    assert any("test_on_a_pretend_gpu.py" in line for line in long)


def test_control_a_pass_that_waits_cannot_be_recorded(text, tmp_path, monkeypatch):
    monkeypatch.setattr(time_loop, "mix", waiting(time_loop.mix))
    with pretend_cuda():
        setup = setup_of(text)
        model = NewLLM(setup.config.model).to(setup.machine.device)
        read = Batches(setup.train_split, 8, 1, setup.machine.device)
        chosen = graph_choice.choose_graph(setup, model, read)
    assert chosen.graph is None
    assert chosen.reason.startswith("no CUDA graph (CaptureError: _local_scalar_dense at ")


def test_control_the_layout_of_onednn(text, tmp_path, monkeypatch):
    monkeypatch.setattr("newllm_lib.model.recurrence.packed_linear.packs", lambda weight, rows: True)
    with pytest.raises(AssertionError, match=r"failed its self-check \(NotImplementedError: mkldnn::"):
        fit(text, tmp_path)


def test_control_numpy_of_a_tensor_on_the_gpu():
    with pretend_cuda(), pytest.raises(TypeError, match="can't convert cuda:0"):
        torch.ones(2, device="cuda").numpy()


def test_the_pretence_ends():
    with pretend_cuda() as gpu:
        assert torch.cuda.is_available() and isinstance(torch.ones(1, device="cuda"), OnGPU)
        gpu.capturing = True
        with pytest.raises(CaptureError):
            torch.ones(1, device="cuda").item()
    assert not torch.cuda.is_available() or torch.version.cuda
    assert type(torch.ones(1)) is torch.Tensor
