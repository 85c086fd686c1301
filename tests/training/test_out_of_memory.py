"""Memory that runs out: the same batches, updates and scores, in smaller parts. Equality is bit for bit."""

import dataclasses
import errno
import os
import signal
import weakref

import pytest
import torch
from click.testing import CliRunner
from tiny import (
    Quiet,
    continued_trainer,
    result_of,
    same,
    stopped_trainer,
    tiny_config,
    tiny_setup,
    tiny_trainer,
)

import newllm_lib as nl
from newllm_lib import evaluation
from newllm_lib.cli import main
from newllm_lib.errors import TrainingError
from newllm_lib.evaluation import MetricSums, evaluate_split
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import self_check
from newllm_lib.model.recurrence.self_check import choose_engine
from newllm_lib.reporting.progress import Progress
from newllm_lib.system.buffer_pool import BUFFERS
from newllm_lib.system.hardware import Precision
from newllm_lib.system.memory import fewer_rows
from newllm_lib.training import setup as setups
from newllm_lib.training import step as step_module
from newllm_lib.training.step import optimizer_step

WORDINGS = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of"),
    "driver": RuntimeError("CUDA error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError(),
    "system": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
}
SHORT = {"epochs": None, "max_steps": 3, "validate_every_steps": None, "eval_batch_size": 100}
STREAM = {"layout": "stream", "batch_size": 6, "eval_lanes": 4, "sequence_length": 16}


def with_engine(setup, wrap):
    """A setup whose engine is `wrap(the real one)`."""
    return dataclasses.replace(setup, engine=setup.engine._replace(run=wrap(setup.engine.run)))


def small_memory(rows, error=WORDINGS["CUDA"], training=True):
    """For `with_engine`: memory that does not suffice for more rows (while training, or while evaluating)."""

    def wrap(engine):
        def run(weights, tokens, *rest):
            if len(tokens) > rows and torch.is_grad_enabled() == training:
                raise error
            return engine(weights, tokens, *rest)

        return run

    return wrap


def trained(setup, folder):
    """A trainer that has trained to the end, and what it said."""
    said = Quiet()
    trainer = tiny_trainer(setup, folder, said)
    assert trainer.fit() == "finished"
    return trainer, said.messages


# --- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", WORDINGS.values(), ids=WORDINGS)
def test_in_any_wording_the_run_becomes_the_one_of_half_the_micro_batch(text, tmp_path, error):
    setup = tiny_setup(text, **SHORT)
    found, messages = trained(with_engine(setup, small_memory(4, error)), tmp_path / "a")
    expected, silence = trained(tiny_setup(text, micro_batch_size=4, **SHORT), tmp_path / "b")
    assert same(result_of(found), result_of(expected))
    assert (silence, messages) == (
        [],
        [
            "warning: memory ran out in training: the batch of 8 stays as it is, computed 4 sequences at a time; "
            "to start that way, set micro_batch_size = 4"
        ],
    )


@pytest.mark.parametrize(
    ("changes", "micro", "fits", "said"),
    [
        ({"optimizer": "muon"}, None, 2, [4, 2]),
        ({"precision": "fp16"}, 5, 4, [3]),
        ({"engine": "reference"}, 100, 7, [4]),
        (STREAM, None, 1, [3, 2, 1]),
    ],
)
def test_from_any_micro_batch_it_halves_as_often_as_it_must(text, tmp_path, changes, micro, fits, said):
    setup = tiny_setup(text, **SHORT | changes, micro_batch_size=micro)
    found, messages = trained(with_engine(setup, small_memory(fits)), tmp_path / "a")
    expected, _ = trained(tiny_setup(text, **SHORT | changes, micro_batch_size=said[-1]), tmp_path / "b")
    assert same(result_of(found), result_of(expected))
    assert [text.rsplit("micro_batch_size = ")[1].split()[0] for text in messages] == [str(rows) for rows in said]


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_where_memory_runs_out_in_the_middle_of_a_run_its_result_is_that_of_the_whole_batch(text, tmp_path, engine):
    """Up to rounding, dropout included; and every target is counted once."""
    setup = tiny_setup(text, engine=engine, epochs=1, validate_every_steps=None)
    whole, _ = trained(setup, tmp_path / "a")
    calls = iter(range(10_000))

    def later(engine):
        def run(*args):
            return small_memory(3 if next(calls) > 4 else 99)(engine)(*args)

        return run

    found, messages = trained(with_engine(setup, later), tmp_path / "b")
    assert len(messages) == 2
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)
    ours, theirs = found.state.history[-1], whole.state.history[-1]
    assert (ours["step"], ours["epoch"]) == (theirs["step"], theirs["epoch"]) == (8, 1.0)
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-6)
    assert not same(dict(found.model.state_dict()), dict(whole.model.state_dict()))  # it did run otherwise


def fail_once(call, number, *, after=False, error=WORDINGS["CUDA"]):
    """A callable as `call` that runs out of memory in one call, before or after its work."""
    calls = iter(range(10_000))

    def run(*args, **kwargs):
        now = next(calls) == number
        if now and not after:
            raise error
        found = call(*args, **kwargs)
        if now:
            raise error
        return found

    return run


def fail_in(place, trainer, patch, step):
    """Let memory run out once, in a part of a step (counted from 0)."""
    if place == "batch":
        trainer._batches.read = fail_once(trainer._batches.read, step)
    elif place == "clip":
        clip = torch.nn.utils.clip_grads_with_norm_
        patch.setattr(torch.nn.utils, "clip_grads_with_norm_", fail_once(clip, step, after=True))
    elif place == "first optimizer":
        trainer.optimizers[0].step = half_done(trainer.optimizers[0], step)
    elif place == "last optimizer":
        trainer.optimizers[-1].step = fail_once(trainer.optimizers[-1].step, step, after=True)
    elif place == "scaler":
        trainer.scaler.update = fail_once(trainer.scaler.update, step, after=True)


def half_done(optimizer, number):
    """Its step, which in one call changes half of its weights and then runs out of memory."""
    calls, step = iter(range(10_000)), optimizer.step

    def run(*args, **kwargs):
        if next(calls) != number:
            return step(*args, **kwargs)
        parameters = optimizer.param_groups[0]["params"]
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters[len(parameters) // 2 :]:
            parameter.grad = None
        step(*args, **kwargs)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        raise WORDINGS["CUDA"]

    return run


PLACES = ("batch", "clip", "first optimizer", "last optimizer", "scaler")


@pytest.mark.parametrize("place", PLACES)
def test_at_the_first_step_it_starts_over_in_smaller_parts(text, tmp_path, monkeypatch, place):
    """Wherever it was, and though there is no checkpoint: nothing of the torn update is left."""
    changes, said = {"optimizer": "muon", "precision": "fp16"}, Quiet()
    found = tiny_trainer(tiny_setup(text, **SHORT | changes), tmp_path / "a", said)
    with monkeypatch.context() as patch:
        fail_in(place, found, patch, 0)
        assert found.fit() == "finished"
    expected, _ = trained(tiny_setup(text, **SHORT | changes, micro_batch_size=4), tmp_path / "b")
    assert same(result_of(found), result_of(expected))
    torn = [] if place == "batch" else ["memory ran out during the update: resumed from step 0"]
    assert said.messages[1:] == torn


@pytest.mark.parametrize("place", PLACES)
def test_at_a_later_step_a_torn_update_goes_back_to_the_newest_checkpoint(text, tmp_path, monkeypatch, place):
    """The best one, of step 3; a batch that was not begun comes again by itself."""
    changes = {"optimizer": "muon", "precision": "fp16", "epochs": 1}
    at = 5 if place == "batch" else 3
    found = tiny_trainer(tiny_setup(text, **changes), tmp_path / "a")
    with monkeypatch.context() as patch:
        fail_in(place, found, patch, 5)
        assert found.fit() == "finished"
    stopped_trainer(tiny_setup(text, **changes), tmp_path / "b", at)
    expected = continued_trainer(tiny_setup(text, **changes, micro_batch_size=4), tmp_path / "b")
    assert expected.fit() == "finished"
    assert same(result_of(found), result_of(expected))
    assert [row["step"] for row in found.state.history] == [3, 6, 8]


@pytest.mark.parametrize("fault", ["doubled", "lost", "torn"])
def test_control_a_batch_that_is_doubled_lost_or_half_applied_is_noticed(text, tmp_path, monkeypatch, fault):
    """What the tests above would see if the trainer did not tell a finished update from one that never began."""
    expected, _ = trained(tiny_setup(text, **SHORT, micro_batch_size=4), tmp_path / "b")
    found = tiny_trainer(tiny_setup(text, **SHORT), tmp_path / "a")
    if fault == "doubled":  # memory runs out once all is done, and is not said to have torn the update
        monkeypatch.setattr(step_module, "optimizer_step", fail_once(optimizer_step, 0, after=True))
    elif fault == "lost":
        halve = found._micro_batch.halve
        found._micro_batch.halve = lambda *args: setattr(found.state, "batch", 1) or halve(*args)
        fail_in("batch", found, monkeypatch, 0)
    else:
        fail_in("first optimizer", found, monkeypatch, 0)
        found._restore_newest = lambda: None
    found.fit()
    assert not same(result_of(found)["model"], result_of(expected)["model"])


def test_a_continued_run_finds_its_micro_batch_again(text, tmp_path):
    setup = with_engine(tiny_setup(text), small_memory(4))
    whole, _ = trained(setup, tmp_path / "a")
    stopped_trainer(setup, tmp_path / "b", 5)
    continued = continued_trainer(setup, tmp_path / "b")
    continued.progress = said = Quiet()
    continued._micro_batch.log = said.message
    assert continued.fit() == "finished"
    assert same(result_of(continued), result_of(whole))
    assert len(said.messages) == 1


def test_nothing_of_the_failed_try_is_held_when_the_batch_comes_again(text, tmp_path):
    """Neither its tensors, not even those in a cycle, nor the gradients of its first part, nor the pool of buffers."""
    tensors, held, calls = [], [], iter(range(10_000))

    def wrap(engine):
        def run(*args):
            if next(calls) != 1:  # all but the second part of the first batch
                return engine(*args)
            activations = torch.empty(100)
            cycle = [activations]
            cycle.append(cycle)
            tensors.append(weakref.ref(activations))
            BUFFERS.empty(1 << 20, like=activations)
            raise MemoryError  # a new one: the others would keep their traceback, and with it the tensors

        return run

    trainer = tiny_trainer(with_engine(tiny_setup(text, micro_batch_size=4), wrap), tmp_path)
    zero_grad = trainer.optimizers[0].zero_grad

    def watched(**options):  # the first thing of a step
        gradients = sum(parameter.grad is not None for parameter in trainer.model.parameters())
        held.append((sum(found() is not None for found in tensors), gradients, BUFFERS.kept_bytes))
        zero_grad(**options)

    trainer.optimizers[0].zero_grad = watched
    assert trainer._step() is None
    assert trainer._step().tokens > 0
    trainer._step()
    assert len(tensors) == 1
    assert held[1] == (0, 0, 0)
    assert held[2][1] > 0  # the control: a step leaves its gradients


def test_one_sequence_that_does_not_fit_is_a_clear_error(text, tmp_path):
    said = Quiet()
    trainer = tiny_trainer(with_engine(tiny_setup(text), small_memory(0)), tmp_path, said)
    with pytest.raises(TrainingError) as caught:
        trainer.fit()
    assert str(caught.value).startswith(
        "training: memory ran out with one sequence at a time (CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 "
        "has a total capacity of). Less is needed by a smaller model (hidden_dim, num_layers, vocab_size) and by a "
        "shorter sequence_length. At most "
    )
    assert "GiB were in use, of " in str(caught.value)
    assert len(said.messages) == 3  # 4, 2, 1
    assert (trainer.state.step, trainer.state.history) == (0, [])


def test_a_run_that_does_not_fit_says_where_it_stopped_and_nothing_of_rates(text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        setups,
        "choose_engine",
        lambda *args: (found := choose_engine(*args))._replace(run=small_memory(0)(found.run)),
    )
    config = tiny_config(text, results_dir=str(tmp_path), name="big")
    with pytest.raises(TrainingError, match=r"Stopped at step 0; there is no checkpoint yet$") as caught:
        nl.train(config, progress=Progress())
    assert "lower lr" not in str(caught.value)
    assert nl.load(tmp_path / "big").record["status"] == "failed"


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert triggered"), KeyboardInterrupt()])
def test_other_errors_and_interrupts_are_left_alone(text, tmp_path, error):
    said = Quiet()
    trainer = tiny_trainer(with_engine(tiny_setup(text), small_memory(4, error)), tmp_path, said)
    with pytest.raises(type(error)) as caught:
        trainer.fit()
    assert caught.value is error
    assert said.messages == []


def test_ctrl_c_while_memory_runs_out_saves_the_state_before_the_batch(text, tmp_path):
    setup = tiny_setup(text, **SHORT)
    calls = iter(range(10_000))

    def wrap(engine):
        def run(*args):
            if next(calls) == 1:
                signal.raise_signal(signal.SIGINT)
                raise WORDINGS["CUDA"]
            return engine(*args)

        return run

    stopped = tiny_trainer(with_engine(setup, wrap), tmp_path / "a")
    assert stopped.fit() == "interrupted"
    assert (tmp_path / "a" / "tiny_step_1.pt").exists()
    continued = continued_trainer(setup, tmp_path / "a")
    assert continued.fit() == "finished"
    whole, _ = trained(setup, tmp_path / "b")
    assert same(result_of(continued), result_of(whole))


# --- evaluation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "tried"), [({}, [7, 3]), (STREAM | {"eval_lanes": 5}, [5, 2])], ids=["windows", "stream"]
)
def test_an_evaluation_in_smaller_parts_gives_the_same_scores(text, changes, tried):
    """Memory runs out in the second batch (7 windows after 16, or 5 lanes), and again in its second part."""
    setup = tiny_setup(text, **changes)
    model = NewLLM(setup.config.model).double()
    common = {"precision": Precision("fp32", ""), "batch_size": 16}
    expected = evaluate_split(model, setup.validation_split, engine=setup.engine.run, **common)
    seen, calls = [], iter(range(10_000))

    def fewer(rows, failure):
        seen.append((rows, failure))
        return fewer_rows(rows, failure)

    def engine(*args):
        if next(calls) in (1, 3):
            raise WORDINGS["CPU"]
        return setup.engine.run(*args)

    found = evaluate_split(model, setup.validation_split, engine=engine, fewer=fewer, **common)
    scores = {name: value for name, value in expected.to_dict().items() if value is not None}
    assert {name: getattr(found, name) for name in scores} == pytest.approx(scores, rel=1e-12)
    assert found.tokens == expected.tokens == setup.validation_split.num_tokens
    assert seen == [(rows, str(WORDINGS["CPU"])) for rows in tried]


def test_control_a_part_that_is_scored_twice_is_noticed(text, monkeypatch):
    setup = tiny_setup(text)
    model = NewLLM(setup.config.model)
    monkeypatch.setattr(evaluation, "_score", fail_once(evaluation._score, 0, after=True))
    found = evaluate_split(model, setup.validation_split, precision=setup.precision, batch_size=16)
    assert found.tokens > setup.validation_split.num_tokens


def test_scores_are_counted_whole_or_not_at_all():
    sums = MetricSums(token_bytes=torch.ones(4, dtype=torch.int64))
    with pytest.raises(IndexError):  # in the last of its sums, where memory could run out as well
        sums.add(torch.ones(2), torch.ones(2, dtype=torch.bool), torch.tensor([3, 9]))
    with pytest.raises(ValueError, match="no token to score"):
        sums.result()


def test_validation_goes_on_in_smaller_parts_and_says_so_once(text, tmp_path):
    setup = with_engine(tiny_setup(text), small_memory(4, training=False))
    found, messages = trained(setup, tmp_path / "a")
    expected, _ = trained(tiny_setup(text, eval_batch_size=4), tmp_path / "b")
    assert len(found.state.history) > 3
    ours, theirs = ([row["val_loss"] for row in run.state.history] for run in (found, expected))
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert ours[1:] == theirs[1:]
    assert same(dict(found.model.state_dict()), dict(expected.model.state_dict()))
    assert [text.rsplit("eval_batch_size = ")[1] for text in messages] == ["8", "4"]
    assert messages[0].startswith(
        "warning: memory ran out in validation: what is scored stays as it is, computed 8 seq"
    )


def test_validation_that_cannot_take_one_sequence_is_a_clear_error(text, tmp_path):
    trainer = tiny_trainer(with_engine(tiny_setup(text), small_memory(0, training=False)), tmp_path)
    with pytest.raises(TrainingError, match="validation: memory ran out with one sequence at a time"):
        trainer.fit()


@pytest.mark.slow
def test_scoring_a_run_that_does_not_fit_is_a_clear_error(text, monkeypatch, tmp_path):
    run = nl.train(tiny_config(text, results_dir=str(tmp_path), epochs=1), progress=Progress())
    monkeypatch.setattr(
        self_check,
        "choose_engine",
        lambda *args: (found := choose_engine(*args))._replace(run=small_memory(0, training=False)(found.run)),
    )
    with pytest.raises(MemoryError, match="memory ran out with one sequence at a time"):
        nl.evaluate(run)
    result = CliRunner().invoke(main, ["evaluate", str(run.folder)])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: memory ran out with one sequence at a time (CUDA out of memory.")
