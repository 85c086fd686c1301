"""Training, stopping, continuing: equality here is bit for bit."""

import dataclasses
import math
import random
import signal
import threading

import numpy as np
import pytest
import torch
from tiny import (
    StopAt,
    continued_trainer,
    fail_on_warning,
    result_of,
    same,
    stopped_trainer,
    tiny_config,
    tiny_setup,
    tiny_trainer,
    write_text,
)

from newllm_lib.errors import CheckpointError, TrainingError
from newllm_lib.evaluation import evaluate_split
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import ENGINES
from newllm_lib.reporting.progress import Progress
from newllm_lib.system.hardware import Precision
from newllm_lib.training.checkpoint import load_checkpoint
from newllm_lib.training.optimizers import make_optimizers, scale_lr
from newllm_lib.training.setup import make_setup
from newllm_lib.training.step import optimizer_step

VARIANTS = {
    "adam": {},
    "muon_cosine": {"optimizer": "muon", "lr_schedule": "cosine", "warmup_steps": 4},
    "stream": {"layout": "stream", "batch_size": 6, "eval_lanes": 2, "sequence_length": 24},
    "micro_batches": {"micro_batch_size": 3},
    **{f"engine_{name}": {"engine": name} for name in ENGINES},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
long_variants = pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=() if name in ("adam", "stream") else pytest.mark.slow)
        for name, changes in VARIANTS.items()
    ],
)
"""For a test that takes seconds a variant."""


@variants
def test_the_same_seed_gives_the_same_bits(text, tmp_path, changes):
    runs = []
    for folder in "ab":
        torch.manual_seed(len(runs))  # the global generators do not matter
        trainer = tiny_trainer(tiny_setup(text, **changes), tmp_path / folder)
        assert trainer.fit() == "finished"
        runs.append(result_of(trainer))
    assert same(*runs)
    other = tiny_trainer(tiny_setup(text, seed=7, **changes), tmp_path / "c")
    other.fit()
    assert not same(runs[0], result_of(other))


@long_variants
def test_stopped_after_any_step_and_continued_equals_uninterrupted(text, tmp_path, changes):
    setup = tiny_setup(text, **changes)
    whole = tiny_trainer(setup, tmp_path / "whole")
    whole.fit()
    expected = result_of(whole)
    assert setup.steps_per_epoch >= 5
    for step in range(1, setup.total_steps):
        folder = tmp_path / f"stop{step}"
        stopped_trainer(setup, folder, step)
        continued = continued_trainer(setup, folder)
        assert continued.state.step == step
        assert continued.fit() == "finished"
        assert same(result_of(continued), expected), f"stopped after step {step}"


def _forget_batch(payload):
    payload["state"]["batch"] = 0


def _forget_optimizer(payload):
    payload["optimizers"][0]["state"][0]["exp_avg"].zero_()


def _forget_best(payload):
    payload["state"]["best_loss"] = -math.inf  # so that nothing is ever better


def _forget_weights_a_little(payload):
    payload["model"]["output.bias"][5] += 1e-6


def _forget_losses(payload):
    payload["state"]["nll_since_row"] = 0.0


@pytest.mark.parametrize(
    "damage", [_forget_batch, _forget_optimizer, _forget_best, _forget_weights_a_little, _forget_losses]
)
def test_control_a_continued_run_differs_when_one_saved_thing_is_lost(text, tmp_path, damage):
    setup = tiny_setup(text)
    whole = tiny_trainer(setup, tmp_path / "whole")
    whole.fit()
    stopped = stopped_trainer(setup, tmp_path / "stop", 5)
    continued = tiny_trainer(setup, tmp_path / "stop")
    path, payload = stopped.checkpoints.newest_valid(fail_on_warning)
    damage(payload)
    continued.restore(payload, path)
    continued.fit()
    assert not same(result_of(continued), result_of(whole))


def test_control_a_stream_continued_without_its_context_differs(text, tmp_path):
    setup = tiny_setup(text, **VARIANTS["stream"])
    whole = tiny_trainer(setup, tmp_path / "whole")
    whole.fit()
    stopped_trainer(setup, tmp_path / "stop", 3)
    continued = continued_trainer(setup, tmp_path / "stop")
    continued.context = None
    continued.fit()
    assert not same(result_of(continued), result_of(whole))


def test_continuing_restores_the_global_generators(text, tmp_path):
    setup = tiny_setup(text)
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    random.random(), np.random.rand(3), torch.rand(3)
    stopped_trainer(setup, tmp_path, 4)
    expected = random.random(), np.random.rand(2).tolist(), torch.rand(2).tolist()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    continued_trainer(setup, tmp_path)
    assert (random.random(), np.random.rand(2).tolist(), torch.rand(2).tolist()) == expected


def test_micro_batches_give_the_gradient_of_the_whole_batch(text):
    setup = tiny_setup(text, dropout=0.0)
    ids = torch.from_numpy(setup.train_split.ids[:8]).long()
    results = []
    for micro in (None, 8, 3, 1):
        model = NewLLM(setup.config.model).double()
        model.initialise(torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        common = {"engine": setup.engine.run, "precision": setup.precision, "clip": 1e9}
        optimizer_step(model, [optimizer], scaler, ids, micro_batch=micro, **common)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-12)


def test_clipping_bounds_the_update(text):
    setup = tiny_setup(text, dropout=0.0)
    ids = torch.from_numpy(setup.train_split.ids[:8]).long()
    model = NewLLM(setup.config.model).double()
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = optimizer_step(
        model, [optimizer], scaler, ids, engine=setup.engine.run, precision=setup.precision, clip=0.01
    )
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert result.grad_norm > 0.01
    assert (after - before).norm() == pytest.approx(0.01, rel=1e-4)


# --- precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_follows_float32(text, tmp_path, precision):
    exact = tiny_trainer(tiny_setup(text), tmp_path / "a")
    reduced = tiny_trainer(tiny_setup(text, precision=precision), tmp_path / "b")
    exact.fit(), reduced.fit()
    assert reduced.scaler.is_enabled() == (precision == "fp16")
    assert all(parameter.dtype == torch.float32 for parameter in reduced.model.parameters())
    losses = [trainer.state.history[-1]["val_loss"] for trainer in (exact, reduced)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]  # the control: it did run in another format


def test_fp16_continues_with_its_loss_scale(text, tmp_path):
    setup = tiny_setup(text, precision="fp16")
    stopped = stopped_trainer(setup, tmp_path, 5)
    stopped.scaler.update(1024.0)
    stopped.state.skipped_steps = 3
    stopped._save_step()
    continued = continued_trainer(setup, tmp_path)
    assert continued.scaler.get_scale() == 1024.0
    assert continued.scaler.state_dict() == stopped.scaler.state_dict()
    assert continued.state.skipped_steps == 3
    assert tiny_trainer(setup, tmp_path / "new").scaler.get_scale() == 65536.0


def spoiled(engine, calls: set[int]):
    """An engine choice whose gradient is not finite in the given calls."""
    count = iter(range(1_000_000))

    def run(*args):
        hidden, context = engine.run(*args)
        if hidden.requires_grad and next(count) in calls:
            hidden.register_hook(lambda gradient: gradient * math.nan)
        return hidden, context

    return engine._replace(run=run)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_non_finite_fp16_gradient_skips_the_step_and_changes_nothing_else(text, tmp_path, optimizer):
    setup = tiny_setup(text, precision="fp16", optimizer=optimizer)
    setup = dataclasses.replace(setup, engine=spoiled(setup.engine, {2}))
    trainer = stopped_trainer(setup, tmp_path, 2)
    before, rates = result_of(trainer), [group["lr"] for o in trainer.optimizers for group in o.param_groups]
    trainer._train_batch()
    after = result_of(trainer)
    assert same(after["model"], before["model"])
    assert same([o["state"] for o in after["optimizers"]], [o["state"] for o in before["optimizers"]])
    assert [group["lr"] for o in trainer.optimizers for group in o.param_groups] == rates
    assert (trainer.state.step, trainer.state.batch, trainer.state.skipped_steps) == (2, 3, 1)
    assert trainer.scaler.get_scale() == 65536.0 / 2
    trainer._train_batch()
    assert not same(result_of(trainer)["model"], before["model"])
    assert (trainer.state.step, trainer.state.skipped_in_a_row) == (3, 0)


def test_skipped_steps_shorten_a_run_given_in_epochs_and_not_one_given_in_steps(text, tmp_path):
    def trained(folder, **changes):
        setup = tiny_setup(text, precision="fp16", **changes)
        setup = dataclasses.replace(setup, engine=spoiled(setup.engine, {2, 7, 15}))  # 7 and 15 end an epoch
        trainer = tiny_trainer(setup, tmp_path / folder)
        assert trainer.fit() == "finished"
        return trainer.state

    epochs, steps = trained("epochs", epochs=2), trained("steps", epochs=None, max_steps=14)
    assert (epochs.epoch, epochs.batch, epochs.step, epochs.skipped_steps) == (2, 0, 13, 3)
    assert (epochs.history[-1]["epoch"], epochs.history[-1]["step"]) == (2.0, 13)
    assert (steps.epoch, steps.batch, steps.step, steps.skipped_steps) == (2, 1, 14, 3)


def test_a_checkpoint_without_a_loss_scale_goes_on_in_fp16(text, tmp_path):
    stopped_trainer(tiny_setup(text), tmp_path, 5)
    continued = continued_trainer(tiny_setup(text, precision="fp16"), tmp_path)
    assert continued.scaler.get_scale() == 65536.0
    assert continued.fit() == "finished"
    back = continued_trainer(tiny_setup(text, epochs=3), tmp_path)  # and a loss scale does not hinder FP32
    assert back.fit() == "finished"


def test_many_skipped_steps_in_a_row_stop_with_a_diagnosis(text, tmp_path):
    setup = tiny_setup(text, precision="fp16", max_skipped_steps=4)
    trainer = tiny_trainer(dataclasses.replace(setup, engine=spoiled(setup.engine, set(range(99)))), tmp_path)
    with pytest.raises(
        TrainingError, match=r"4 steps in a row were skipped.*The gradient of embedding\.weight, .* more"
    ):
        trainer.fit()


def test_a_good_step_now_and_then_does_not_hide_that_most_are_skipped(text, tmp_path):
    """As the short last batch of an epoch did: of every three steps, two are skipped."""
    setup = tiny_setup(text, precision="fp16", max_skipped_steps=4)
    calls = {number for number in range(99) if number % 3}
    trainer = tiny_trainer(dataclasses.replace(setup, engine=spoiled(setup.engine, calls)), tmp_path)
    with pytest.raises(TrainingError, match="5 of the last 8 steps were skipped"):
        trainer.fit()
    half = {number for number in range(99) if number % 2}  # half of the steps is not more than half
    trainer = tiny_trainer(dataclasses.replace(setup, engine=spoiled(setup.engine, half)), tmp_path / "half")
    assert trainer.fit() == "finished"
    assert trainer.state.skipped_steps > 4


def test_a_skip_below_a_loss_scale_of_1_stops_at_once(text, tmp_path):
    setup = tiny_setup(text, precision="fp16")
    trainer = tiny_trainer(dataclasses.replace(setup, engine=spoiled(setup.engine, {1, 2})), tmp_path)
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 1.0})
    with pytest.raises(TrainingError, match=r"skipped at a loss scale of 0.5, below 1: no loss scale makes"):
        trainer.fit()
    assert trainer.state.skipped_steps == 2  # the first, at a scale of 1, did not stop it


def test_the_skips_that_are_remembered_survive_a_stop(text, tmp_path):
    setup = tiny_setup(text, precision="fp16", max_skipped_steps=3)
    stopped_trainer(dataclasses.replace(setup, engine=spoiled(setup.engine, {0, 1, 3})), tmp_path, 2)
    one_more = dataclasses.replace(setup, engine=spoiled(setup.engine, {0}))
    continued = continued_trainer(one_more, tmp_path)
    assert continued.state.recent_skips == [1, 1, 0, 1, 0]
    with pytest.raises(TrainingError, match="4 of the last 6 steps were skipped"):
        continued.fit()
    forgetful = continued_trainer(one_more, tmp_path)
    forgetful.state.recent_skips = []
    assert forgetful.fit() == "finished"  # the control


def test_a_checkpoint_from_before_skips_were_remembered_starts_with_none(text, tmp_path):
    setup = tiny_setup(text, precision="fp16")
    stopped = stopped_trainer(setup, tmp_path, 5)
    payload = stopped.payload()
    del payload["recent_skips"]
    trainer = tiny_trainer(setup, tmp_path)
    trainer.restore(payload, tmp_path)
    assert trainer.state.recent_skips == []
    assert trainer.fit() == "finished"


def test_a_non_finite_gradient_without_a_scaler_stops_before_the_update(text, tmp_path):
    setup = tiny_setup(text)
    trainer = stopped_trainer(dataclasses.replace(setup, engine=spoiled(setup.engine, {3})), tmp_path, 3)
    before = result_of(trainer)["model"]
    with pytest.raises(TrainingError, match="gradient norm is nan"):
        trainer.fit()
    assert same(trainer.model.state_dict(), before)


def test_a_non_finite_loss_stops_before_the_update_and_nan_is_never_best(text, tmp_path):
    trainer = stopped_trainer(tiny_setup(text), tmp_path, 5)
    best = trainer.state.best_loss
    with torch.no_grad():
        trainer.model.output.bias[7] = math.nan
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer._validate()
    assert trainer.state.best_loss == best
    with pytest.raises(TrainingError, match="the loss is nan"):
        trainer.fit()
    assert torch.equal(trainer.model.output.weight, before["output.weight"])


# --- when to validate, stop and save ----------------------------------------------------------------------------


def test_validation_by_steps_and_at_the_end_of_each_epoch(text, tmp_path):
    setup = tiny_setup(text, validate_every_steps=4)
    trainer = tiny_trainer(setup, tmp_path)
    trainer.fit()
    per_epoch, total = setup.steps_per_epoch, setup.total_steps
    expected = sorted({*range(4, total + 1, 4), per_epoch, total})
    assert [row["step"] for row in trainer.state.history] == expected
    assert trainer.state.history[-1]["epoch"] == 2.0


def test_the_training_loss_of_a_row_is_the_mean_over_tokens_since_the_last(text, tmp_path):
    seen = []

    class Watch(Progress):
        def step(self, step, total, epoch, loss, speed):
            seen.append(loss)

    setup = tiny_setup(text, validate_every_steps=1, epochs=1)
    trainer = tiny_trainer(setup, tmp_path, Watch())
    trainer.fit()
    assert [row["train_loss"] for row in trainer.state.history] == pytest.approx(seen)


def test_early_stopping_counts_validations_without_improvement(text, tmp_path):
    setup = tiny_setup(text, patience=3, min_delta=50.0, epochs=50)  # no fall is that large, so only the first counts
    trainer = tiny_trainer(setup, tmp_path)
    assert trainer.fit() == "stopped early"
    assert len(trainer.state.history) == 4
    patient = tiny_trainer(tiny_setup(text, patience=None, min_delta=50.0), tmp_path / "patient")
    assert patient.fit() == "finished"


def test_patience_survives_a_stop(text, tmp_path):
    setup = tiny_setup(text, patience=3, min_delta=50.0, epochs=50, validate_every_steps=2)
    stopped_trainer(setup, tmp_path, 5)
    continued = continued_trainer(setup, tmp_path)
    assert continued.state.stale_validations == 1
    continued.fit()
    assert len(continued.state.history) == 4


def test_a_worse_validation_after_a_stop_does_not_replace_the_best(text, tmp_path):
    setup = tiny_setup(text)
    trainer = stopped_trainer(setup, tmp_path, 5)
    best = trainer.checkpoints.best.read_bytes()
    continued = continued_trainer(setup, tmp_path)
    with torch.no_grad():
        continued.model.output.weight.normal_(0, 3)
    continued._validate()
    assert continued.checkpoints.best.read_bytes() == best
    assert continued.state.best_step == trainer.state.best_step


def test_checkpoint_files_best_periodic_final_and_the_last_two_by_time(text, tmp_path):
    setup = tiny_setup(text, epochs=5, checkpoint_every_epochs=2, checkpoint_every_minutes=1e-9)
    trainer = tiny_trainer(setup, tmp_path)
    trainer.fit()
    total = setup.total_steps
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert {"best_tiny.pt", "tiny_epoch_2.pt", "tiny_epoch_4.pt", "tiny_final.pt"} < set(names)
    by_time = [name for name in names if "_step_" in name]
    assert by_time == sorted([f"tiny_step_{total - 1}.pt", f"tiny_step_{total}.pt"])


def test_a_finished_run_has_nothing_left_and_a_constant_rate_just_goes_on(text, tmp_path):
    trainer = tiny_trainer(tiny_setup(text), tmp_path)
    trainer.fit()
    again = continued_trainer(tiny_setup(text), tmp_path)
    assert again.ended() == "finished"
    longer = continued_trainer(tiny_setup(text, epochs=4), tmp_path)
    assert longer.fit() == "finished"
    whole = tiny_trainer(tiny_setup(text, epochs=4), tmp_path / "whole")
    whole.fit()
    first, second = result_of(longer), result_of(whole)
    assert same(first["model"], second["model"])
    assert same(first["optimizers"], second["optimizers"])


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_damaged_final_file_is_written_anew(text, tmp_path, epochs):
    final = tiny_trainer(tiny_setup(text), tmp_path)
    final.fit()
    path = final.checkpoints.final
    path.write_bytes(path.read_bytes()[:1000])
    again, warnings = tiny_trainer(tiny_setup(text, epochs=epochs), tmp_path), []
    again.restore(*reversed(again.checkpoints.newest_valid(warnings.append)))
    assert again.fit() == "finished"
    assert load_checkpoint(path, fail_on_warning)["state"]["step"] == 8 * epochs


def test_extending_a_decaying_run_needs_a_new_end(text, tmp_path):
    cosine = {"lr_schedule": "cosine", "validate_every_steps": 100}
    tiny_trainer(tiny_setup(text, **cosine), tmp_path).fit()
    total = tiny_setup(text, epochs=3, **cosine).total_steps
    with pytest.raises(CheckpointError, match=rf"going on to step {total} needs a new end: decay_steps = {total}"):
        continued_trainer(tiny_setup(text, epochs=3, **cosine), tmp_path)
    longer = continued_trainer(tiny_setup(text, epochs=3, decay_steps=total, **cosine), tmp_path)
    assert longer.fit() == "finished"


# --- other runs' checkpoints ------------------------------------------------------------------------------------


def test_a_checkpoint_of_other_settings_is_refused_with_both_values(text, tmp_path):
    stopped_trainer(tiny_setup(text), tmp_path, 3)
    other = tiny_trainer(tiny_setup(text, batch_size=4, lr=1e-3), tmp_path)
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    path, payload = other.checkpoints.newest_valid(fail_on_warning)
    with pytest.raises(CheckpointError, match=r"batch_size 8 there, 4 here; lr 0.003 there, 0.001 here"):
        other.restore(payload, path)
    assert same(other.model.state_dict(), before)


def test_a_checkpoint_of_other_data_is_refused(text, tmp_path):
    stopped_trainer(tiny_setup(text), tmp_path / "run", 3)
    changed = write_text(tmp_path / "text", texts=39)
    other = tiny_trainer(tiny_setup(changed), tmp_path / "run")
    path, payload = other.checkpoints.newest_valid(fail_on_warning)
    with pytest.raises(CheckpointError, match="the data have changed since this checkpoint"):
        other.restore(payload, path)


# --- signals ----------------------------------------------------------------------------------------------------


class SignalAt(StopAt):
    def step(self, step, *_rest):
        if step == self.at:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_the_step_saves_and_puts_the_handlers_back(text, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer = tiny_trainer(tiny_setup(text), tmp_path, SignalAt(5))
    assert trainer.fit() == "interrupted"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert (tmp_path / "tiny_step_5.pt").exists()
    assert trainer.fit() == "finished"  # fit can be called again


def test_a_second_ctrl_c_stops_at_once(text, tmp_path):
    class Twice(Progress):
        def step(self, *_args):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tiny_setup(text), tmp_path, Twice()).fit()
    assert signal.getsignal(signal.SIGINT) == before


def torn_trainer(setup, folder, call):
    """Interrupted within a step, after the weights of one optimizer have changed and before those of the other."""
    trainer = tiny_trainer(setup, folder)
    step, calls = trainer.optimizers[1].step, iter(range(1_000))

    def interrupted(*args):
        if next(calls) == call:
            raise KeyboardInterrupt
        return step(*args)

    trainer.optimizers[1].step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    return trainer


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_after_an_interrupt_within_a_step_fit_goes_on_from_the_newest_checkpoint(text, tmp_path, precision):
    setup = tiny_setup(text, precision=precision, optimizer="muon")
    whole = tiny_trainer(setup, tmp_path / "whole")
    whole.fit()
    torn = torn_trainer(setup, tmp_path / "torn", 7)
    assert torn.state.step == 7
    assert torn.fit() == "finished"
    assert same(result_of(torn), result_of(whole))


def test_an_interrupt_within_a_step_before_the_first_checkpoint_needs_a_new_trainer(text, tmp_path):
    torn = torn_trainer(tiny_setup(text, optimizer="muon"), tmp_path, 1)
    with pytest.raises(TrainingError, match="left no checkpoint: make a new Trainer"):
        torn.fit()


def test_training_works_outside_the_main_thread(text, tmp_path):
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(tiny_trainer(tiny_setup(text), tmp_path).fit()))
    thread.start()
    thread.join()
    assert outcome == ["finished"]


def test_the_threads_of_the_configuration_are_used_and_put_back(text, tmp_path):
    seen = []

    class Watch(Progress):
        def step(self, *_args):
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    tiny_trainer(tiny_setup(text, threads=2, epochs=1), tmp_path, Watch()).fit()
    assert set(seen) == {2}
    assert torch.get_num_threads() == before != 2


# --- it learns --------------------------------------------------------------------------------------------------

WORDS, STOP = 6, 0.1
SHIFTS = (0.7, 0.2, 0.1, 0.0, 0.0, 0.0)


def markov_texts(count: int, seed: int) -> list[str]:
    """Texts whose words follow the word before the last by a random shift: only a memory can tell."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        words = [rng.integers(WORDS)]
        while rng.random() >= STOP:
            drawn = rng.integers(WORDS) if len(words) == 1 else (words[-2] + rng.choice(WORDS, p=SHIFTS)) % WORDS
            words.append(drawn)
        texts.append(" ".join(f"w{word}" for word in words))
    return texts


def markov_entropy() -> float:
    """Expected nats a target: two free words, shifts from the third on, and after each word the choice to stop."""
    more = 1 - STOP
    shift = -sum(p * math.log(p) for p in SHIFTS if p)
    choice = -(STOP * math.log(STOP) + more * math.log(more))
    free = (1 + more) * math.log(WORDS)  # the first word, and the second where there is one
    total = free + choice / STOP + shift * more**2 / STOP
    return total / (1 + 1 / STOP)  # the words and the end of the text


@pytest.mark.slow
def test_a_markov_chain_of_second_order_is_learned_to_its_entropy(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(markov_texts(20_000, 1)))
    (tmp_path / "valid.txt").write_text("\n".join(markov_texts(10_000, 2)))
    recipe = {
        "optimizer": "muon", "lr": 5e-3, "lr_schedule": "cosine", "max_steps": 300, "epochs": None, "batch_size": 128,
        "dropout": 0.0, "min_words": 0, "sequence_length": 64, "stride": 32, "hidden_dim": 48, "context_dim": 24,
        "embed_dim": 16, "beta2": 0.95, "warmup_steps": 10, "validate_every_steps": 300, "eval_batch_size": 1000,
    }  # fmt: skip
    setup = make_setup(tiny_config(tmp_path, **recipe))
    trainer = tiny_trainer(setup, tmp_path / "run")
    trainer.fit()
    loss, entropy = trainer.state.history[-1]["val_loss"], markov_entropy()
    assert loss == pytest.approx(entropy, rel=0.03)
    with torch.no_grad():  # the control: cut off the context, and the entropy is out of reach
        trainer.model.from_context.weight.zero_()
    cut = evaluate_split(trainer.model, setup.validation_split, precision=Precision("fp32", ""))
    assert cut.loss > 1.1 * entropy


# --- the parts of a step ----------------------------------------------------------------------------------------


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    config = tiny_config("unused", optimizer="muon", muon_lr=0.05)
    model = NewLLM(config.model)
    muon, adamw = make_optimizers(model, config.train, 1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {names[id(parameter)] for parameter in muon.param_groups[0]["params"]}
    assert taken == {"from_token.weight", "from_context.weight", "layers.0.weight", "context_heads.weight"}
    rest = {names[id(parameter)] for parameter in adamw.param_groups[0]["params"]}
    assert taken | rest == set(names.values())
    assert not taken & rest
    scale_lr([muon, adamw], 0.5)
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.025, 0.0005)
