"""Muon against torch's own, and its orthogonalisation against singular values computed one by one."""

import copy

import numpy as np
import pytest
import torch

from newllm_lib.training.muon import MUON_DTYPES, Muon, orthogonalized

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(24, 16), (24, 24), (24, 24), (16, 24), (24, 24), (24, 16)]
SETTINGS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.05}


def by_singular_values(matrix):
    """The quintic applied to each singular value, in float64: what Newton-Schulz computes without computing any."""
    a, b, c = COEFFICIENTS
    u, values, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return torch.from_numpy(u * values @ vt)


def matrices_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def difference(first, second):
    """The largest relative distance between the steps that two lists of matrices have made since `matrices_of()`."""
    begun = matrices_of()
    steps = [[(one - start).detach() for one, start in zip(each, begun, strict=True)] for each in (first, second)]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*steps, strict=True))


@pytest.mark.parametrize("shape", [(20, 20), (30, 12), (12, 30), (1, 7), (7, 1)])
def test_orthogonalized_equals_the_polynomial_of_the_singular_values(shape):
    generator = torch.Generator().manual_seed(1)
    matrices = torch.randn(3, *shape, generator=generator)
    found = orthogonalized(matrices, COEFFICIENTS, 5, 1e-7)
    for one, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(one.double(), by_singular_values(matrix), rtol=0, atol=2e-5)
    low = orthogonalized(matrices.bfloat16(), COEFFICIENTS, 5, 1e-7)
    assert float((low.float() - found).norm() / found.norm()) < 0.05


def test_a_zero_matrix_stays_zero():
    assert not orthogonalized(torch.zeros(2, 4, 4), COEFFICIENTS, 5, 1e-7).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 0.05)])
def test_updates_equal_those_of_torch(dtype, tolerance):
    """torch's are in bfloat16: the same type rounds alike, FP32 is as far from it as bfloat16 rounds."""
    ours, theirs = matrices_of(), matrices_of()
    optimizers = [Muon(ours, dtype=dtype, **SETTINGS), torch.optim.Muon(theirs, **SETTINGS)]
    for seed in range(1, 4):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(parameters, seed)
            optimizer.step()
    assert difference(ours, theirs) < tolerance
    buffers = [[optimizer.state[p]["momentum_buffer"] for p in each] for optimizer, each in zip(
        optimizers, (ours, theirs), strict=True)]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


def test_it_loads_the_state_of_torch_and_torch_loads_its():
    begun = matrices_of()
    theirs = torch.optim.Muon(begun, **SETTINGS)
    set_gradients(begun, 1)
    theirs.step()
    for first, second in ((torch.optim.Muon, Muon), (Muon, torch.optim.Muon)):
        parameters = [parameter.detach().clone().requires_grad_() for parameter in begun]
        middle, end = first(parameters, **SETTINGS), second(parameters, **SETTINGS)
        middle.load_state_dict(copy.deepcopy(theirs.state_dict()))
        set_gradients(parameters, 2)
        middle.step()
        end.load_state_dict(middle.state_dict())
        set_gradients(parameters, 3)
        end.step()
        whole = [parameter.detach().clone().requires_grad_() for parameter in begun]
        straight = torch.optim.Muon(whole, **SETTINGS)
        straight.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for seed in (2, 3):
            set_gradients(whole, seed)
            straight.step()
        assert difference(parameters, whole) < 0.02


def test_a_matrix_without_a_gradient_is_left_alone():
    parameters = matrices_of()
    set_gradients(parameters, 1)
    parameters[2].grad = None
    before = parameters[2].detach().clone()
    Muon(parameters, **SETTINGS).step()
    assert torch.equal(parameters[2], before)
    assert not torch.equal(parameters[1], matrices_of()[1])


def test_the_format_of_the_products_follows_that_of_the_run():
    assert {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float32} == MUON_DTYPES
