"""The rate of matrix products."""

from types import SimpleNamespace

import pytest

from newllm_lib.model.recurrence.packed_linear import Product
from newllm_lib.system.hardware import detect
from newllm_lib.tuning import products


@pytest.mark.parametrize(
    ("each", "count"),
    [
        (2**-13, 2 + 205 * 20),  # half a second is 204.8 entries of 20
        (2**-6, 2 + 6 * 6),  # 20 would take 0.31 s: five entries of 6 take 0.47 s
        (2**-4, 2 + 8 * 1),
        (1.0, 2 + 5 * 1),  # of which no half second is the median
        (0.0, 2 + 205 * 20),  # a clock too coarse to tell
    ],
)
def test_a_rate_is_measured_for_half_a_second(monkeypatch, each, count):
    clock = SimpleNamespace(now=0.0, calls=0)

    class Timed(Product):
        def __call__(self, x):
            clock.calls += 1
            clock.now += each or 2**-13 * (clock.calls > 2)
            return super().__call__(x)

    monkeypatch.setattr(products, "_SECONDS", 0.5)
    monkeypatch.setattr(products, "Product", Timed)
    monkeypatch.setattr(products, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    rate = products.product_rate(detect("cpu", 1), "fp32", 2)
    assert clock.calls == count
    assert rate == pytest.approx(1_048_576 / (each or 2**-13))  # 2 x 2 x 512 x 512
