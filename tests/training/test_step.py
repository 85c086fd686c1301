"""One optimizer step: the same update however the batch is cut."""

import math
import weakref

import pytest
import torch
from tiny import SHAPE, same, tiny_setup

from newllm_lib.config import ModelConfig
from newllm_lib.errors import PartialUpdateError, TrainingError
from newllm_lib.model.loss import token_losses
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import ENGINES, Dropout
from newllm_lib.system.hardware import Precision
from newllm_lib.training import step as step_module
from newllm_lib.training.optimizers import make_optimizers
from newllm_lib.training.step import TrainingStep, optimizer_step

FP16 = Precision("fp16", "")
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


def batch(rows=9, length=8) -> torch.Tensor:
    """Ids (rows, length) of every length from one real target on; one row in three is full."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, SHAPE["vocab_size"], (rows, length), generator=generator)
    for row in range(rows):
        if row % 3:
            ids[row, 2 + row % (length - 2) :] = 0
    return ids


def stepped(ids, micro, *, engine=ENGINES["fused"], dropout=0.3, context=None):
    """Weights and context after a plain gradient step in float64, its loss, tokens and norm."""
    model = NewLLM(ModelConfig(**SHAPE, dropout=dropout, init_std=None, embedding_std=1.0, output_std=0.3)).double()
    model.initialise(torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result = optimizer_step(
        model, [optimizer], scaler, ids, engine=engine, precision=Precision("fp32", ""), clip=1e9, micro_batch=micro,
        dropout_seed=5, context=context,
    )  # fmt: skip
    return [*model.parameters(), result.context, torch.tensor([result.nll, result.tokens, result.grad_norm])]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@engines
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("carried", [False, True], ids=["windows", "stream"])
def test_the_update_does_not_depend_on_how_the_batch_is_cut(engine, dropout, carried):
    ids = batch()
    context = torch.randn(9, SHAPE["context_dim"], generator=torch.Generator().manual_seed(2)).double()
    common = {"engine": engine, "dropout": dropout, "context": context if carried else None}
    whole = stepped(ids, None, **common)
    for micro in (9, 20, 5, 4, 1):
        close(stepped(ids, micro, **common), whole)


def test_control_masks_of_each_part_by_itself_would_change_the_update(monkeypatch):
    whole = stepped(batch(), None)
    monkeypatch.setattr(step_module, "Dropout", lambda rate, seed, device, rows: Dropout(rate, seed, device))
    close(stepped(batch(), None), whole)
    with pytest.raises(AssertionError):
        close(stepped(batch(), 5), whole)


@engines
def test_a_part_of_a_stream_may_hold_no_target(engine):
    """Lanes that end early are all padding in the last chunk; their context stays."""
    ids = batch()
    ids[6:] = 0
    context = torch.randn(9, SHAPE["context_dim"], generator=torch.Generator().manual_seed(2)).double()
    whole = stepped(ids, None, engine=engine, context=context)
    for micro in (1, 3):
        found = stepped(ids, micro, engine=engine, context=context)
        close(found, whole)
        assert torch.equal(found[-2][6:], context[6:])


def test_a_part_is_let_go_before_the_next_one_begins():
    outputs, alive = [], []

    def engine(*args):
        alive.append(sum(output() is not None for output in outputs))
        hidden, context = ENGINES["fused"](*args)
        outputs.append(weakref.ref(hidden))
        return hidden, context

    stepped(batch(), 3, engine=engine)
    assert alive == [0, 0, 0]


# --- memory that runs out ---------------------------------------------------------------------------------------


def initialised_model():
    model = NewLLM(ModelConfig(**SHAPE, dropout=0.0, init_std=None, embedding_std=1.0))
    model.initialise(torch.Generator().manual_seed(1))
    return model


def replace_gradient(model, name, value):
    """Every number of the gradient of a parameter ends as `value`."""
    model.get_parameter(name).register_hook(lambda gradient: torch.full_like(gradient, value))


@pytest.mark.parametrize("names", [("output.bias",), ("from_token.weight", "layers.0.bias")])
def one_step(model, precision):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=precision.name == "fp16")
    optimizers = [torch.optim.Adam(model.parameters())]
    return optimizer_step(model, optimizers, scaler, batch(), engine=ENGINES["fused"], precision=precision, clip=1.0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("names", [("output.bias",), ("from_token.weight", "layers.0.bias")])
def test_a_skipped_step_names_the_parameters_whose_gradient_was_not_finite(names, value):
    model = initialised_model()
    for name in names:
        replace_gradient(model, name, value)
    result = one_step(model, FP16)
    assert (result.skipped, result.not_finite) == (True, names)
    with pytest.raises(TrainingError, match=f"Not finite is the gradient of {', '.join(names)};"):
        one_step(model, Precision("fp32", ""))


def test_a_step_that_is_not_skipped_names_none():
    result = one_step(initialised_model(), FP16)
    assert (result.skipped, result.not_finite) == (False, ())


def test_a_norm_that_overflows_alone_names_the_parameter_with_the_largest_gradient():
    model = initialised_model()
    replace_gradient(model, "embedding.weight", 1e30)
    replace_gradient(model, "output.bias", 1e36)
    result = one_step(model, FP16)
    assert (result.grad_norm, result.skipped, result.not_finite) == (float("inf"), True, ("output.bias",))


def failing(call, error):
    """A callable that does what `call` does, then raises."""

    def fail(*args, **kwargs):
        call(*args, **kwargs)
        raise error

    return fail


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, ZeroDivisionError()], ids=["memory", "other"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("place", ["clipping", "first optimizer", "second optimizer", "scaler"])
def test_memory_that_runs_out_in_the_update_is_told_from_what_came_before_it(monkeypatch, place, precision, error):
    model = NewLLM(ModelConfig(**SHAPE, dropout=0.0))
    parameters = list(model.parameters())
    optimizers = [torch.optim.Adam(parameters[:4]), torch.optim.Adam(parameters[4:])]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=precision == "fp16")
    owner, name = {
        "clipping": (torch.nn.utils, "clip_grads_with_norm_"),
        "first optimizer": (optimizers[0], "step"),
        "second optimizer": (optimizers[1], "step"),
        "scaler": (scaler, "update"),
    }[place]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), error))
    with pytest.raises((PartialUpdateError, ZeroDivisionError)) as caught:
        optimizer_step(
            model, optimizers, scaler, batch(), engine=ENGINES["fused"], precision=Precision(precision, ""), clip=1.0
        )
    if error is OUT_OF_MEMORY:
        assert isinstance(caught.value, PartialUpdateError)
        assert str(caught.value) == "CUDA out of memory. Tried to allocate 2 GiB"
    else:
        assert caught.value is error


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("place", ["forward", "loss", "backward"])
def test_memory_that_runs_out_earlier_changes_nothing_and_the_step_can_be_done_again(monkeypatch, place, number):
    """`number`: in which of the three parts of the batch."""
    calls = iter(range(99))

    def engine(*args):
        if place == "forward" and next(calls) == number:
            raise OUT_OF_MEMORY
        return ENGINES["fused"](*args)

    def losses(hidden, head, targets):
        now = place != "forward" and next(calls) == number
        if now and place == "loss":
            raise OUT_OF_MEMORY
        if now:
            hidden.register_hook(failing(lambda gradient: gradient, OUT_OF_MEMORY))
        return token_losses(hidden, head, targets)

    def step(engine):
        return optimizer_step(
            model, optimizers, scaler, batch(), engine=engine, precision=Precision("fp32", ""), clip=1.0,
            micro_batch=3, dropout_seed=4,
        )  # fmt: skip

    def fresh():
        model = NewLLM(ModelConfig(**SHAPE, dropout=0.2))
        model.initialise(torch.Generator().manual_seed(1))
        return model, [torch.optim.Adam(model.parameters())], torch.amp.GradScaler("cpu")

    model, optimizers, scaler = fresh()
    once, expected = step(ENGINES["fused"]), dict(model.state_dict())
    model, optimizers, scaler = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(step_module, "token_losses", losses)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        step(engine)
    assert caught.value is OUT_OF_MEMORY
    assert same(dict(model.state_dict()), before)
    assert not optimizers[0].state_dict()["state"]
    again = step(engine)
    assert (again.nll, again.tokens, again.grad_norm) == (once.nll, once.tokens, once.grad_norm)
    assert same(dict(model.state_dict()), expected)


# --- the object that holds what a step needs --------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon"}, {"micro_batch_size": 3}], ids=["adam", "muon", "micro"])
def test_the_step_of_a_run_is_the_one_with_its_parts_given_by_hand(text, changes):
    setup, results = tiny_setup(text, clip_by_epoch=((0, 0.5), (1, 9.0)), **changes), []
    ids = torch.from_numpy(setup.train_split.ids[:8]).long()
    for by_hand in (False, True):
        model, train = NewLLM.fresh(setup.config.model, 1), setup.config.train
        if by_hand:
            optimizers = make_optimizers(model, train, setup.rate.value)
            result = optimizer_step(
                model, optimizers, torch.amp.GradScaler("cpu", enabled=False), ids, engine=setup.engine.run,
                precision=setup.precision, clip=0.5, micro_batch=train.micro_batch_size, dropout_seed=7,
            )  # fmt: skip
        else:
            result = TrainingStep.for_run(setup, model)(ids, dropout_seed=7)
        results.append([dict(model.state_dict()), result.nll, result.grad_norm, result.tokens])
    assert same(*results)


def test_learning_rate_clipping_and_context_are_those_that_were_set(text):
    setup = tiny_setup(text, dropout=0.0)
    ids = torch.from_numpy(setup.train_split.ids[:8]).long()

    def moved(clip, factor, context=None):
        model = NewLLM.fresh(setup.config.model, 1)
        before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        sgd = torch.optim.SGD(model.parameters(), lr=2.0)
        sgd.param_groups[0]["peak_lr"] = 2.0
        step = TrainingStep(model, [sgd], setup.precision, setup.engine.run)
        step.clip = clip
        step.set_lr(factor)
        result = step(ids, context=context)
        after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        return float((after - before).norm()), result

    unclipped, result = moved(math.inf, 1.0)
    assert unclipped == pytest.approx(2.0 * result.grad_norm, rel=1e-4)
    assert moved(0.01, 1.0)[0] == pytest.approx(2.0 * 0.01, rel=1e-3)
    assert moved(math.inf, 0.25)[0] == pytest.approx(0.25 * unclipped, rel=1e-4)
    assert moved(math.inf, 0.0)[0] == 0.0
    assert moved(math.inf, 1.0, torch.ones(8, SHAPE["context_dim"]))[1].nll != result.nll


def test_a_renewed_scaler_knows_nothing_of_a_step_that_was_not_finished(text):
    setup = tiny_setup(text, "fp16", dropout=0.0)
    ids = torch.from_numpy(setup.train_split.ids[:8]).long()
    step = TrainingStep.for_run(setup, NewLLM.fresh(setup.config.model, 1), init_scale=8.0)
    assert step.scaler.get_scale() == 8.0
    step.scaler.update = failing(lambda: None, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        step(ids)
    with pytest.raises(RuntimeError, match="unscale_"):  # the control
        step(ids)
    step.renew_scaler()
    assert step.scaler.get_scale() == 65536.0
    assert step(ids).tokens > 0
