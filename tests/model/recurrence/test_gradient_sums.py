"""Gradients of weights and biases, summed over more tokens than FP16 could hold the sum of."""

import pytest
import torch

from newllm_lib.model.recurrence.gradient_sums import bias_gradient, weight_gradient

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-5}
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


@dtypes
@pytest.mark.parametrize("rows", [0, 1, 2048, 2049, 40_000])  # around the blocks that are converted at a time
def test_gradients_equal_the_float64_product_of_the_same_numbers(dtype, rows):
    generator = torch.Generator().manual_seed(rows)
    deltas = torch.randn(rows, 5, generator=generator).to(dtype)
    inputs = torch.rand(rows, 7, generator=generator).to(dtype)
    expected = deltas.double().t() @ inputs.double()
    bound = BOUNDS[dtype] * (1 + float(expected.norm()))
    found = weight_gradient(deltas, inputs)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found.double() - expected).norm() <= bound
    assert (bias_gradient(deltas).double() - deltas.double().sum(0)).norm() <= bound


@dtypes
def test_sums_beyond_65504_are_what_they_are(dtype):
    deltas, inputs = torch.full((70_000, 2), -1.0, dtype=dtype), torch.full((70_000, 3), 4.0, dtype=dtype)
    exact = {"rel": 1e-3 if dtype == torch.bfloat16 else 0}  # bfloat16 rounds the sum of each block
    assert weight_gradient(deltas, inputs).flatten().tolist() == pytest.approx([-280_000.0] * 6, **exact)
    assert bias_gradient(deltas).tolist() == pytest.approx([-70_000.0] * 2, **exact)


def test_control_the_plain_product_in_fp16_overflows():
    deltas, inputs = torch.full((70_000, 2), -1.0).half(), torch.full((70_000, 3), 4.0).half()
    assert (deltas.t() @ inputs).isinf().all()
