"""The model against the published formulas, and the properties that make it what it is."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from formulas import published_logits
from torch.nn.functional import linear

from newllm_lib.config import ModelConfig
from newllm_lib.model.loss import token_losses
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import ENGINES, Dropout

engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


def small(dtype=torch.float64, **changes) -> NewLLM:
    shape = {"vocab_size": 11, "embed_dim": 5, "hidden_dim": 7, "num_layers": 3, "context_dim": 4, "dropout": 0.0}
    model = NewLLM(ModelConfig(**(shape | {"init_std": None, "embedding_std": 1.0, "output_std": 0.5} | changes)))
    model.initialise(torch.Generator().manual_seed(3))
    with torch.no_grad():  # so that no bias or LayerNorm parameter is at a value that hides a mistake
        generator = torch.Generator().manual_seed(4)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype)


def some_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: NewLLM) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_published_parameter_counts():
    assert sum(p.numel() for p in NewLLM(ModelConfig()).parameters()) == 2_739_432
    assert sum(p.numel() for p in NewLLM(ModelConfig(context_dim=512, num_layers=12)).parameters()) == 4_840_936


@pytest.mark.parametrize("num_layers", [1, 2, 6])
def test_logits_and_context_are_those_of_the_published_formulas(num_layers):
    model = small(num_layers=num_layers)
    tokens = some_tokens(2, 9)
    logits, context = model(tokens)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for row in range(2):
        expected_logits, expected_context = published_logits(weights, num_layers, tokens[row].tolist())
        np.testing.assert_allclose(logits[row].detach(), expected_logits, atol=1e-12)
        np.testing.assert_allclose(context[row].detach(), expected_context, atol=1e-12)


def test_the_context_is_clamped():
    model = small(context_clamp=0.25)
    assert model(some_tokens(3, 6))[1].abs().max() == 0.25


@engines
def test_a_later_token_never_changes_an_earlier_logit(engine):
    model = small()
    tokens = some_tokens(2, 8)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = (linear(model.hidden(t, engine=engine)[0], *model.head) for t in (tokens, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])  # the control: it does change what follows


@engines
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 4, 3], [11, 1]])
def test_one_pass_equals_pieces_with_a_carried_context(engine, cuts):
    model = small()
    tokens = some_tokens(3, 12)
    start = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9), requires_grad=True)
    probe = torch.randn(3, 12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(8))

    def run(pieces):
        model.zero_grad()
        start.grad = None
        context, parts = start, []
        for piece in tokens.split(pieces, dim=1):
            hidden, context = model.hidden(piece, context, engine=engine)
            parts.append(hidden)
        hidden = torch.cat(parts, dim=1)
        ((hidden * probe).sum() + linear(hidden, *model.head).square().sum() + (context**3).sum()).backward()
        return hidden.detach(), context.detach(), gradients(model) | {"context": start.grad.clone()}

    whole, pieces = run([12]), run(cuts)
    torch.testing.assert_close(whole, pieces, rtol=0, atol=1e-11)
    assert whole[2]["context"].abs().max() > 1e-3  # the control: the first context matters at all


@engines
def test_rows_and_padding_do_not_touch_each_other(engine):
    model = small()
    tokens, lengths = some_tokens(4, 10), torch.tensor([10, 3, 1, 7])
    start = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def run(ids, context, real):
        model.zero_grad()
        hidden, after = model.hidden(ids, context, real, engine=engine)
        (hidden.sum() + after.square().sum()).backward()
        return hidden.detach(), after.detach(), gradients(model)

    hidden, after, grads = run(tokens, start, lengths)
    alone = [run(tokens[r : r + 1, : lengths[r]], start[r : r + 1], None) for r in range(4)]
    for row, (row_hidden, row_after, _) in enumerate(alone):
        torch.testing.assert_close(hidden[row, : lengths[row]], row_hidden[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(after[row], row_after[0], rtol=0, atol=1e-12)
        assert not hidden[row, lengths[row] :].any()
    for name, value in grads.items():
        torch.testing.assert_close(value, sum(row_grads[name] for _, _, row_grads in alone), rtol=0, atol=1e-11)
    other = tokens.clone()
    other[1, 3:] = 7  # what stands in the padding is never read
    assert torch.equal(run(other, start, lengths)[0], hidden)


@engines
def test_a_row_without_tokens_keeps_its_context(engine):
    model = small()
    start = torch.randn(2, 4, dtype=torch.float64)
    hidden, after = model.hidden(some_tokens(2, 5), start, torch.tensor([0, 5]), engine=engine)
    assert torch.equal(after[0], start[0])
    assert not hidden[0].any()


def test_the_state_does_not_grow_with_the_text():
    model = small()
    sizes = {length: model(some_tokens(1, length))[1].shape for length in (1, 10, 500)}
    assert set(sizes.values()) == {(1, 4)}


@engines
def test_gradcheck_in_float64(engine):
    model = small(num_layers=2, hidden_dim=4, embed_dim=3, context_dim=3)
    tokens, lengths = some_tokens(2, 4), torch.tensor([4, 2])
    names = [name for name, _ in model.named_parameters()]

    def run(context, *values):
        def loss():
            hidden, after = model.hidden(tokens, context, lengths, Dropout(0.3, 5), engine)
            nll, _ = token_losses(hidden, model.head, torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]))
            return nll, after

        return torch.func.functional_call(
            _Wrapper(model, loss), {f"model.{n}": v for n, v in zip(names, values, strict=True)}, ()
        )

    start = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    values = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    assert torch.autograd.gradcheck(run, (start, *values), eps=1e-6, atol=1e-6)


class _Wrapper(torch.nn.Module):
    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self):
        return self.function()


def spread(layer: torch.nn.Module) -> float:
    return layer.weight.std().item()


def test_published_and_variance_preserving_initial_values():
    model = NewLLM(ModelConfig(hidden_dim=800, embed_dim=300, context_dim=500))
    assert spread(model.from_token) == pytest.approx(0.02, rel=0.02)
    assert spread(model.embedding) == pytest.approx(0.02, rel=0.02)
    assert model.context_heads.bias.abs().max() == 0
    tuned = NewLLM(
        ModelConfig(
            hidden_dim=800, embed_dim=300, context_dim=500, init_std=None, init_gain=2.0, forget_gate_bias=1.0,
            embedding_std=1.0, output_std=0.0,
        )
    )  # fmt: skip
    assert spread(tuned.from_token) == pytest.approx(2 * math.sqrt(2 / 800), rel=0.02)
    assert spread(tuned.from_context) == pytest.approx(2 * math.sqrt(2 / 800), rel=0.02)
    assert spread(tuned.layers[0]) == pytest.approx(2 * math.sqrt(2 / 800), rel=0.02)
    assert spread(tuned.context_heads) == pytest.approx(2 * math.sqrt(1 / 800), rel=0.02)
    assert spread(tuned.embedding) == pytest.approx(1.0, rel=0.02)
    assert not tuned.output.weight.any()
    assert tuned.context_heads.bias.tolist() == [0.0] * 500 + [1.0] * 500 + [0.0] * 500


def test_a_generator_decides_the_initial_values_and_the_global_one_is_left_alone():
    first, second = NewLLM(ModelConfig()), NewLLM(ModelConfig())
    before = torch.get_rng_state()
    first.initialise(torch.Generator().manual_seed(1))
    second.initialise(torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_fresh_weights_are_a_function_of_the_seed_alone_and_lie_where_they_should():
    config = ModelConfig(vocab_size=11, hidden_dim=8)
    by_hand = NewLLM(config)
    by_hand.initialise(torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    first, other = NewLLM.fresh(config, 5), NewLLM.fresh(config, 6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), by_hand.parameters(), strict=True))
    assert not torch.equal(first.output.weight, other.output.weight)
    assert first.device == torch.device("cpu")
    assert NewLLM.fresh(config, 5, "meta").device == torch.device("meta")


def test_training_mode_drops_units_and_evaluation_mode_does_not():
    model, tokens = small(dropout=0.5), some_tokens(2, 5)
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[0, 11]]), "tokens range from 0 to 11: must be 0 to 10"),
        (torch.tensor([[-1, 2]]), "tokens range from -1 to 2: must be 0 to 10"),
        (torch.tensor([[1.0]]), "tokens is torch.float32 of shape (1, 1): must be int64"),
        (torch.tensor([1, 2]), "must be int64 of shape (rows, length)"),
        (torch.empty(1, 0, dtype=torch.int64), "not empty"),
    ],
)
def test_bad_tokens_are_named(tokens, message):
    with pytest.raises(ValueError) as error:
        small()(tokens)
    assert message in str(error.value)


def test_a_context_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"context has shape \(2, 3\): must be \(2, 4\)"):
        small()(some_tokens(2, 3), torch.zeros(2, 3, dtype=torch.float64))


def test_save_and_from_pretrained_give_the_same_logits(tmp_path):
    model = small(dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    again = NewLLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(some_tokens(2, 6))[0], model(some_tokens(2, 6))[0])


def test_tokens_and_generators_of_another_device_are_named():
    model = NewLLM(ModelConfig(vocab_size=10, hidden_dim=8))
    with pytest.raises(ValueError, match="tokens are on meta: must be on cpu, where the model is"):
        model(torch.zeros(1, 2, dtype=torch.int64, device="meta"))
    generator = SimpleNamespace(device=torch.device("cuda:0"))
    with pytest.raises(ValueError, match="generator is on cuda:0: must be on cpu, where the tokens are"):
        model.generate(torch.ones(1, 2, dtype=torch.int64), 1, generator=generator)


def test_a_backward_pass_under_the_callers_autocast_is_that_of_the_forward_pass():
    """A loop of a user's own may call `backward` inside `with torch.autocast`."""
    torch.manual_seed(0)
    model = NewLLM(ModelConfig(vocab_size=30, hidden_dim=16, dropout=0.0, init_std=None, embedding_std=1.0))
    tokens = torch.randint(4, 30, (3, 6))
    found = []
    for inside in (False, True):
        model.zero_grad()
        hidden, _ = model.hidden(tokens, engine=ENGINES["fused"])
        nll, _ = token_losses(hidden, model.head, tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            nll.sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(outside, within) for outside, within in zip(*found, strict=True))
