"""Every fast engine against the reference: values and every gradient."""

import pytest
import torch
from pretend_cuda import pretend_cuda

from newllm_lib.config import ModelConfig
from newllm_lib.model.loss import token_losses
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import ENGINES, Dropout, fused, reference
from newllm_lib.model.recurrence import packed_linear as products_module

fast = pytest.mark.parametrize("engine", [e for n, e in ENGINES.items() if n != "reference"], ids=list(ENGINES)[1:])

SHAPES = {
    "usual": {"rows": 5, "length": 9},
    "one row": {"rows": 1, "length": 7},
    "one token": {"rows": 3, "length": 1},
    "one layer": {"rows": 3, "length": 5, "num_layers": 1},
    "two layers": {"rows": 3, "length": 5, "num_layers": 2},
    "twelve layers": {"rows": 3, "length": 4, "num_layers": 12},
    "odd sizes": {"rows": 7, "length": 11, "embed_dim": 3, "hidden_dim": 13, "context_dim": 5, "vocab_size": 17},
    "wide context": {"rows": 2, "length": 6, "context_dim": 31, "hidden_dim": 8},
}


def model_of(**changes) -> NewLLM:
    shape = {
        "vocab_size": 40,
        "embed_dim": 6,
        "hidden_dim": 16,
        "num_layers": 4,
        "context_dim": 8,
        "context_clamp": 1.5,
        "dropout": 0.0,
    }
    model = NewLLM(ModelConfig(**(shape | {"init_std": None, "embedding_std": 1.0, "output_std": 0.3} | changes)))
    model.initialise(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3)
    return model


def results(model, engine, rows, length, dtype, rate=0.0, padded=True, autocast=None) -> dict[str, torch.Tensor]:
    """Hidden, context, loss and all gradients of one pass, in float64 for comparing."""
    generator = torch.Generator().manual_seed(rows * 100 + length)
    vocab = model.config.vocab_size
    tokens = torch.randint(1, vocab, (rows, length), generator=generator)
    targets = torch.randint(1, vocab, (rows, length), generator=generator)
    context = torch.randn(rows, model.config.context_dim, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1 if rows < 3 else 0, length + 1, (rows,), generator=generator) if padded else None
    if padded:
        lengths[0] = length
        targets[torch.arange(length) >= lengths[:, None]] = 0
    model = model.to(dtype)
    model.zero_grad()
    context = context.to(dtype).requires_grad_()
    dropout = Dropout(rate, 5) if rate else None
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        hidden, after = model.hidden(tokens, context, lengths, dropout, engine)
        nll, _ = token_losses(hidden, model.head, targets)
    (nll.sum() + (after * after).sum()).backward()
    found = {"hidden": hidden, "after": after, "nll": nll, "context": context.grad}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: tensor.detach().double().clone() for name, tensor in found.items()}


@fast
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_in_float64(engine, shape, padded, rate):
    sizes = {key: value for key, value in shape.items() if key not in ("rows", "length")}
    case = {"rows": shape["rows"], "length": shape["length"], "dtype": torch.float64, "rate": rate, "padded": padded}
    expected = results(model_of(**sizes), reference.recurrence, **case)
    found = results(model_of(**sizes), engine, **case)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def errors(found: dict, exact: dict) -> dict[str, float]:
    """Relative error of each tensor, in norm."""
    return {name: float((found[name] - exact[name]).norm() / (exact[name].norm() + 1e-12)) for name in exact}


WIDE = {"embed_dim": 32, "hidden_dim": 64, "context_dim": 32, "vocab_size": 100, "num_layers": 6, "context_clamp": 10.0}


@fast
def test_the_error_in_float32_is_at_most_four_times_that_of_the_reference(engine):
    exact = results(model_of(**WIDE), reference.recurrence, 16, 20, torch.float64, rate=0.1)
    usual = errors(results(model_of(**WIDE), reference.recurrence, 16, 20, torch.float32, rate=0.1), exact)
    found = errors(results(model_of(**WIDE), engine, 16, 20, torch.float32, rate=0.1), exact)
    for name, error in found.items():
        assert error <= 4 * usual[name] + 1e-7, (name, error, usual[name])


@fast
@pytest.mark.parametrize(("autocast", "bound"), [(torch.bfloat16, 0.08), (torch.float16, 0.012)])
def test_the_error_in_reduced_precision_is_bounded(engine, autocast, bound):
    """Bound: relative, in norm, of every value and gradient against float64; the reference's own is as large."""
    exact = results(model_of(**WIDE), reference.recurrence, 16, 20, torch.float64, rate=0.1)
    usual = errors(
        results(model_of(**WIDE), reference.recurrence, 16, 20, torch.float32, 0.1, autocast=autocast), exact
    )
    found = errors(results(model_of(**WIDE), engine, 16, 20, torch.float32, 0.1, autocast=autocast), exact)
    for name, error in found.items():
        assert error < max(bound, 1.5 * usual[name]), (name, error, usual[name])
    assert max(found.values()) > 1e-4  # the control: it did run in the reduced type


def sums(engine, fp16: bool) -> dict[str, torch.Tensor]:
    """Gradients over 2,048 tokens of a loss whose own gradient is 32 at every hidden unit."""
    model, generator = model_of(**WIDE), torch.Generator().manual_seed(0)
    tokens = torch.randint(1, WIDE["vocab_size"], (128, 16), generator=generator)
    context = torch.randn(128, WIDE["context_dim"], generator=generator)
    with torch.autocast("cpu", dtype=torch.float16, enabled=fp16):
        hidden, after = model.hidden(tokens, context, None, None, engine)
    (32 * (hidden.float().sum() + 16 * after.sum())).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@fast
def test_fp16_gradients_of_weights_and_biases_beyond_65504_are_those_of_fp32(engine):
    """Where FP16 ends: they are sums over tokens, and large where the loss scale and the batch are."""
    exact, found = sums(engine, fp16=False), sums(engine, fp16=True)
    beyond = {name for name, gradient in exact.items() if gradient.abs().max() > 65_504}
    layers = {f"layers.{number}.{kind}" for number in range(5) for kind in ("weight", "bias")}
    assert beyond >= layers | {"from_context.weight", "context_heads.weight", "context_heads.bias", "from_token.bias"}
    for name in beyond:
        assert (found[name] - exact[name]).norm() < 0.01 * exact[name].norm(), name


@fast
def test_control_a_wrong_gradient_is_noticed(engine, monkeypatch):
    """The comparison above sees one part in a million."""
    case = {"rows": 3, "length": 5, "dtype": torch.float64}
    expected = results(model_of(), reference.recurrence, **case)
    found = results(model_of(), engine, **case)
    found["layers.1.weight"] = found["layers.1.weight"] * (1 + 1e-6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found["layers.1.weight"], expected["layers.1.weight"], rtol=1e-10, atol=1e-10)


@fast
def test_without_gradients_the_values_are_the_same_and_nothing_is_kept(engine):
    model, tokens = model_of(), torch.randint(1, 40, (4, 12), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([12, 3, 0, 7])
    with_gradient, after = model.hidden(tokens, lengths=lengths, engine=engine)
    with torch.no_grad():
        without, after_without = model.hidden(tokens, lengths=lengths, engine=engine)
    assert torch.equal(with_gradient, without)
    assert torch.equal(after, after_without)
    assert without.grad_fn is None


@fast
def test_no_real_token_at_all(engine):
    model, context = model_of(), torch.randn(3, 8)
    hidden, after = model.hidden(
        torch.ones(3, 4, dtype=torch.int64), context, torch.zeros(3, dtype=torch.int64), None, engine
    )
    assert torch.equal(after, context)
    assert not hidden.any()


def test_products_equal_linear_with_and_without_the_packed_layout(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 40, generator=generator), torch.randn(24, generator=generator)
    x, other = torch.randn(7, 40, generator=generator), torch.randn(7, 24, generator=generator)
    expected = torch.relu(x @ weight.T + bias)
    packed = [
        products_module.Product(weight, bias, rows=7, relu=True)(x),
        products_module.Product(weight, rows=7)(x, other),
    ]
    monkeypatch.setattr(products_module, "packs", lambda weight, rows: False)
    plain = [
        products_module.Product(weight, bias, rows=7, relu=True)(x),
        products_module.Product(weight, rows=7)(x, other),
    ]
    for found in (packed, plain):
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(found[1], x @ weight.T + other, rtol=0, atol=1e-4)


def test_few_embedding_gradients_on_a_gpu_avoid_the_path_in_which_threads_race():
    """Up to 3,072 rows CUDA's gradient of an embedding takes one (pytorch #187687): zeros make them more."""
    values, words = torch.arange(10.0).view(5, 2), torch.tensor([1, 0, 1, 3, 1])
    expected = torch.tensor([[2.0, 3.0], [0 + 4 + 8.0, 1 + 5 + 9.0], [0.0, 0.0], [6.0, 7.0]])
    assert torch.equal(fused._sums_by_word(values, words, 4), expected)
    with pretend_cuda() as gpu:
        found = fused._sums_by_word(values.to("cuda"), words.to("cuda"), 4)
        assert gpu.kernels["constant_pad_nd"] == 2
        assert torch.equal(found.cpu(), expected)
        gpu.reset()
        many = torch.ones(fused._SAFE_LOOKUPS, 2, device="cuda"), torch.zeros(fused._SAFE_LOOKUPS, device="cuda").long()
        assert fused._sums_by_word(*many, 4)[0].tolist() == [3073.0, 3073.0]
        assert not gpu.kernels["constant_pad_nd"]
