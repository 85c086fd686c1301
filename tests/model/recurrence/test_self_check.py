import pytest
import torch

from newllm_lib.errors import ConfigError
from newllm_lib.model import recurrence
from newllm_lib.model.recurrence import ENGINES, fused, reference, self_check
from newllm_lib.model.recurrence.self_check import choose_engine, choose_numerics
from newllm_lib.system.hardware import Precision


def test_every_engine_passes_in_every_format():
    for name in ENGINES:
        for precision in ("fp32", "bf16", "fp16"):
            assert choose_engine(name, Precision(precision, ""), "cpu").name == name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_reference_under_another_name_passes(monkeypatch, precision):
    """Also where the processor's own rounding leads it further than the tolerance, as 0.11 in bf16 on one with AMX."""

    def copy(*arguments):
        return reference.recurrence(*arguments)

    monkeypatch.setitem(recurrence.ENGINES, "copy", copy)
    monkeypatch.setitem(self_check.TOLERANCES, precision, 1e-9)
    assert choose_engine("copy", Precision(precision, ""), "cpu").name == "copy"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_engine_twice_as_far_away_as_the_reference_is_replaced(monkeypatch, precision):
    def scaled(*arguments):
        hidden, context = reference.recurrence(*arguments)
        hidden.register_hook(lambda gradient: gradient * 1.5)
        return hidden, context

    monkeypatch.setitem(recurrence.ENGINES, "scaled", scaled)
    assert choose_engine("scaled", Precision(precision, ""), "cpu").name == "reference"


def test_auto_is_the_best_engine_and_the_check_leaves_the_generators_alone():
    before = torch.get_rng_state()
    choice = choose_engine("auto", Precision("fp32", ""), "cpu")
    assert (choice.name, choice.reason) == ("fused", "agrees with the reference in its self-check")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_engine_that_disagrees_is_replaced_and_the_reason_kept(monkeypatch):
    def forgets_padding(weights, tokens, context, lengths, dropout):
        return fused.recurrence(weights, tokens, context, None, dropout)

    monkeypatch.setitem(recurrence.ENGINES, "broken", forgets_padding)
    choice = choose_engine("broken", Precision("fp32", ""), "cpu")
    assert choice.name == "reference"
    assert choice.run is ENGINES["reference"]
    assert choice.reason.startswith("broken failed its self-check (hidden differs by ")


def test_an_engine_with_a_slightly_wrong_gradient_is_replaced(monkeypatch):
    def scaled(weights, *rest):
        hidden, context = fused.recurrence(weights, *rest)
        hidden.register_hook(lambda gradient: gradient * 1.01)
        return hidden, context

    monkeypatch.setitem(recurrence.ENGINES, "scaled", scaled)
    assert "gradient" in choose_engine("scaled", Precision("fp32", ""), "cpu").reason


def test_an_engine_that_cannot_run_is_replaced(monkeypatch):
    def missing(*_args):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setitem(recurrence.ENGINES, "missing", missing)
    choice = choose_engine("missing", Precision("bf16", ""), "cpu")
    assert choice.name == "reference"
    assert choice.reason == "missing failed its self-check (RuntimeError: no kernel for this device)"


def test_numerics_of_a_device_are_the_format_and_engine_that_were_asked_for():
    precision, engine = choose_numerics(torch.device("cpu"), "fp32", "reference")
    assert (precision.name, precision.reason, engine.run) == ("fp32", "as requested", ENGINES["reference"])
    precision, engine = choose_numerics("cpu", "fp16")  # which no CPU has
    assert (precision.substituted, engine.name) == (True, "fused")
    for arguments in (("cpu", "fp8"), ("cpu", "fp32", "nothing"), ("cuda:99",)):
        with pytest.raises(ConfigError):
            choose_numerics(*arguments)
