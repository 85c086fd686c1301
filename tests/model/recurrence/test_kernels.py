"""The CUDA kernels, run on the CPU thread by thread, beside torch's own operations in float64."""

import cuda_on_cpu
import pytest
import torch
from torch.nn.functional import layer_norm

from newllm_lib.model.loss import softmax_less_target
from newllm_lib.model.recurrence.cell import mix
from newllm_lib.model.recurrence.kernels import Kernels

pytestmark = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="no g++ to compile the kernels with")

ROWS, CONTEXT, HIDDEN, CLAMP = 5, 64, 24, 1.5
TYPES = [torch.float32, torch.bfloat16]
"""FP16 is converted by instructions that only a GPU has."""


@pytest.fixture(params=TYPES, ids=str)
def kernels(request, monkeypatch, tmp_path_factory) -> tuple[Kernels, torch.dtype]:
    folder = tmp_path_factory.getbasetemp()
    monkeypatch.setattr(
        torch.cuda, "_compile_kernel", lambda source, name: cuda_on_cpu.compiled(source, name, folder), raising=False
    )
    return Kernels(request.param, CONTEXT, HIDDEN, CLAMP), request.param


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for rounding in the type that was found."""
    rounding = {torch.float32: 2e-6, torch.bfloat16: 8e-3}[found.dtype]
    return float((found.double() - expected.double()).norm()) <= rounding * float(expected.double().norm())


@pytest.mark.parametrize("is_bias", [True, False])
@pytest.mark.parametrize("drops", [True, False])
def test_activate_is_relu_and_dropout(kernels, is_bias, drops):
    kernel, dtype = kernels
    torch.manual_seed(0)
    y, add = draw(ROWS, HIDDEN, dtype=dtype), draw(*((HIDDEN,) if is_bias else (ROWS, HIDDEN)), dtype=dtype)
    bits = torch.randint(-(2**15), 2**15, (ROWS, HIDDEN), dtype=torch.int16)
    step = torch.tensor([12345, -77], dtype=torch.int16)
    out = torch.full_like(y, 9.0)
    kernel.activate(y, add, (bits, step, -20000) if drops else None, out)
    expected = (y.double() + add.double()).relu()
    if drops:
        mixed = (bits.long() * 12345 - 77 + 2**15) % 2**16 - 2**15  # int16 arithmetic by hand
        assert 0 < (mixed < -20000).sum() < mixed.numel()
        expected = expected * (mixed >= -20000)
    assert close(out, expected)


def test_not_a_number_passes_the_activation(kernels):
    kernel, dtype = kernels
    y, add = torch.full((1, HIDDEN), torch.nan, dtype=dtype), torch.zeros(HIDDEN, dtype=dtype)
    out = torch.zeros_like(y)
    kernel.activate(y, add, None, out)
    assert out.isnan().all()


def cell_case(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "heads": draw(ROWS, 3 * CONTEXT, dtype=dtype),
        "state": draw(ROWS + 2, CONTEXT),
        "norm": draw(CONTEXT),
        "norm_bias": draw(CONTEXT),
    }


def forward(kernel: Kernels, case: dict[str, torch.Tensor], read_rows: int = 3):
    """What `cell_forward` changes and fills: state, (after, mean, rstd), read."""
    state = case["state"].clone()
    kept = torch.empty(ROWS, CONTEXT), torch.empty(ROWS, 1), torch.empty(ROWS, 1)
    read = torch.empty(read_rows, CONTEXT, dtype=case["heads"].dtype)
    kernel.cell_forward(case["heads"], state, (case["norm"], case["norm_bias"]), kept, read)
    return state, kept, read


def test_the_cell_is_gates_layer_norm_and_clamp(kernels):
    kernel, dtype = kernels
    case = cell_case(dtype)
    mixed = mix(case["heads"].double(), case["state"][:ROWS].double())[0]
    expected = layer_norm(mixed, (CONTEXT,), case["norm"].double(), case["norm_bias"].double()).clamp(-CLAMP, CLAMP)
    state, (after, mean, rstd), read = forward(kernel, case)
    assert (expected.abs() == CLAMP).any() and (expected.abs() < CLAMP).any()
    assert close(after, expected) and close(state[:ROWS], expected) and close(read, expected[:3])
    assert torch.equal(state[ROWS:], case["state"][ROWS:])
    assert close(mean, mixed.mean(1, keepdim=True))
    assert close(rstd, (mixed.var(1, keepdim=True, correction=0) + 1e-5).rsqrt())


def test_the_cell_backwards_equals_autograd_in_float64(kernels):
    kernel, dtype = kernels
    case = cell_case(dtype)
    _, kept, _ = forward(kernel, case)
    carry, product = draw(ROWS + 2, CONTEXT), draw(3, CONTEXT, dtype=dtype)
    exact = {name: value.double().requires_grad_() for name, value in case.items()}
    mixed = mix(exact["heads"], exact["state"][:ROWS])[0]
    after = layer_norm(mixed, (CONTEXT,), exact["norm"], exact["norm_bias"]).clamp(-CLAMP, CLAMP)
    grad = carry[:ROWS].double()
    grad[:3] += product.double()
    after.backward(grad)

    sums, delta, rest = kernel.new_sums(ROWS, carry), torch.empty(ROWS, 3 * CONTEXT, dtype=dtype), carry.clone()
    state = case["state"][:ROWS]
    kernel.cell_backward(case["heads"], (state, *kept), case["norm"], product, rest, delta, sums)
    assert close(delta, exact["heads"].grad)
    assert close(rest[:ROWS], exact["state"].grad[:ROWS])
    assert torch.equal(rest[ROWS:], carry[ROWS:])
    norm, norm_bias = sums.sum(1)
    assert close(norm, exact["norm"].grad) and close(norm_bias, exact["norm_bias"].grad)


@pytest.mark.parametrize("vocab", [3, 130, 300])
def test_losses_are_those_of_torch(kernels, vocab):
    kernel, dtype = kernels
    torch.manual_seed(2)
    logits = 3 * draw(4, vocab, dtype=dtype)
    targets = torch.tensor([1, 0, vocab - 1, 2])
    expected, expected_nll = logits.double(), torch.empty(4, dtype=torch.float64)
    softmax_less_target(expected, targets, expected_nll)
    nll = torch.full((4,), 9.0)
    kernel.losses(logits, targets, nll)
    assert close(logits, expected) and close(nll, expected_nll)
    assert not logits[1].any() and nll[1] == 0


@pytest.mark.parametrize(
    ("context", "hidden", "dtype"),
    [(48, 24, torch.float32), (64, 22, torch.float32), (2048, 24, torch.float32), (64, 24, torch.float64)],
)
def test_shapes_and_types_without_kernels_are_refused(context, hidden, dtype):
    with pytest.raises(ValueError, match=f"no kernels for {dtype}, context_dim {context} and hidden_dim {hidden}"):
        Kernels(dtype, context, hidden, CLAMP)
