import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from newllm_lib.model import loss as loss_module
from newllm_lib.model.loss import softmax_less_target, summed_loss, token_losses


def case(dtype, rows=3, length=7, width=5, vocab=9):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, length, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows, length), generator=generator)
    assert (targets == 0).any()
    return hidden, weight, bias, targets


@pytest.mark.parametrize(("row_step", "chunk_logits"), [(1, 1), (1, 40), (4, 40), (5, 1), (256, 1 << 23)])
def test_token_losses_equal_cross_entropy_in_values_and_gradients(row_step, chunk_logits, monkeypatch):
    monkeypatch.setattr(loss_module, "_ROW_STEP", row_step)
    monkeypatch.setitem(loss_module._CHUNK_LOGITS, "cpu", chunk_logits)
    hidden, weight, bias, targets = case(torch.float64)
    scale = torch.randn(int((targets != 0).sum()), dtype=torch.float64)
    nll, correct = token_losses(hidden, (weight, bias), targets)
    found = torch.autograd.grad((nll * scale).sum(), (hidden, weight, bias))
    logits = linear(hidden, weight, bias)[targets != 0]
    expected_nll = cross_entropy(logits, targets[targets != 0], reduction="none")
    expected = torch.autograd.grad((expected_nll * scale).sum(), (hidden, weight, bias))
    torch.testing.assert_close(nll, expected_nll, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(correct, logits.argmax(1) == targets[targets != 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_losses_under_autocast_stay_near_float64(dtype):
    hidden, weight, bias, targets = case(torch.float32, rows=8, length=30, width=64, vocab=50)
    with torch.autocast("cpu", dtype=dtype):
        nll, _ = token_losses(hidden, (weight, bias), targets)
    assert nll.dtype == torch.float32
    found = torch.autograd.grad(nll.mean(), (hidden, weight, bias))
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    exact, _ = token_losses(exact_inputs[0], tuple(exact_inputs[1:]), targets)
    expected = torch.autograd.grad(exact.mean(), exact_inputs)
    torch.testing.assert_close(nll.double(), exact, rtol=0.02, atol=0.2)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("scale", [65536.0, 1.0, 1e-3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_the_heads_gradients_of_70000_targets_of_one_class_stay_in_range(dtype, bound, scale):
    """Their sums over the targets pass 65,504, where FP16 ends; float64 is the measure."""
    generator = torch.Generator().manual_seed(1)
    hidden = (torch.rand(700, 100, 16, generator=generator) * 4).requires_grad_()
    weight = (torch.randn(20, 16, generator=generator) * 0.02).requires_grad_()
    bias = torch.zeros(20).requires_grad_()
    targets = torch.ones(700, 100, dtype=torch.int64)
    with torch.autocast("cpu", dtype=dtype):
        nll, _ = token_losses(hidden, (weight, bias), targets)
    found = torch.autograd.grad(scale * nll.mean(), (weight, bias))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    logits = linear(*exact).flatten(0, 1)
    expected = torch.autograd.grad(scale * cross_entropy(logits, targets.flatten()), exact[1:])
    assert expected[0].abs().max() * 70_000 / scale > 65_504  # the control: the sum itself is beyond FP16
    for got, wanted in zip(found, expected, strict=True):
        assert got.isfinite().all()
        assert got.dtype == torch.float32
        assert (got.double() - wanted).norm() < bound * wanted.norm()


def test_the_heads_gradients_can_be_asked_for_twice():
    hidden, weight, bias, targets = case(torch.float64)
    scale = torch.rand(int((targets != 0).sum()), dtype=torch.float64)
    loss = (token_losses(hidden, (weight, bias), targets)[0] * scale).sum()
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (hidden, weight, bias))))


def test_the_likeliest_token_is_the_first_of_equals():
    values = torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0], [5.0, 5.0, 5.0], [0.0, 1.0, 2.0]])
    for index in (torch.tensor([1, 0, 0, 2]), torch.tensor([2, 1, 1, 2]), torch.tensor([0, 0, 2, 0])):
        assert loss_module._is_first_largest(values, index).tolist() == (values.argmax(1) == index).tolist()


@pytest.mark.parametrize("chunk_logits", [1, 1 << 20])
def test_the_summed_loss_equals_cross_entropy_in_value_and_gradients(chunk_logits, monkeypatch):
    monkeypatch.setitem(loss_module._CHUNK_LOGITS, "cpu", chunk_logits)
    torch.manual_seed(0)
    shapes = ((700, 6), (11, 6), (11,))
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    targets = torch.randint(0, 11, (700,))  # 0 is PAD
    found = summed_loss(inputs[0], tuple(inputs[1:]), targets, softmax_less_target)
    logits = linear(*inputs)
    expected = cross_entropy(logits, targets, ignore_index=0, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for value, wanted in zip(
        torch.autograd.grad(0.25 * found, inputs), torch.autograd.grad(0.25 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)
