"""Which engine to run, after it has shown on a small random case that it agrees with the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from newllm_lib.model.recurrence import ENGINES, get_engine, reference
from newllm_lib.model.recurrence.dropout import Dropout
from newllm_lib.model.recurrence.weights import Weights
from newllm_lib.system.hardware import Precision, choose_precision, detect, exact_products

TOLERANCES = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
"""Largest relative distance, in norm, of a value or gradient from the reference's in FP32."""
_OF_THE_REFERENCE = 1.5
"""An engine may also be so many times as far away as the reference itself in the engine's format: how far 16 bits lead
on this small case differs from processor to processor."""

_LENGTHS = (6, 2, 0, 5, 6)


class EngineChoice(NamedTuple):
    """An engine to run, with its name and why it is this one."""

    name: str
    run: Callable
    reason: str
    packed: bool = True
    """Whether its products may use oneDNN's layout of the weights."""


def choose_engine(requested: str, precision: Precision, device: str, packed: bool = True) -> EngineChoice:
    """The engine called `requested` (auto = the best), or the reference where that one fails or disagrees.

    packed: whether its products may use oneDNN's layout of the weights. ConfigError for an unknown name.
    """
    name, run = get_engine(requested, packed)
    if run is reference.recurrence:
        return EngineChoice(name, run, "the oracle itself", packed)
    fault = _fault(run, precision, device)
    if fault is None:
        return EngineChoice(name, run, "agrees with the reference in its self-check", packed)
    return EngineChoice("reference", ENGINES["reference"], f"{name} failed its self-check ({fault})", packed)


def choose_numerics(
    device: str | torch.device, precision: str = "auto", engine: str = "auto"
) -> tuple[Precision, EngineChoice]:
    """Precision and engine for computing with a model on a device, outside of a run; `auto` = the best that is there.

    ConfigError for an unknown name, or a device that this machine does not have.
    """
    machine = detect(str(device))
    chosen = choose_precision(precision, machine)
    return chosen, choose_engine(engine, chosen, machine.device)


@lru_cache(maxsize=64)  # once a process for each engine, format and device
@exact_products()
def _fault(run: Callable, precision: Precision, device: str) -> str | None:
    """What is wrong with an engine, or None."""
    expected = _results(reference.recurrence, Precision("fp32", "as the measure"), device)
    try:
        found = _results(run, precision, device)
    except Exception as error:  # an engine that cannot run here must not stop a training run
        return f"{type(error).__name__}: {error}"
    tolerance = TOLERANCES[precision.name]
    far = {name: distance for name, distance in _distances(found, expected).items() if not distance <= tolerance}
    if not far:
        return None
    usual = _distances(_results(reference.recurrence, precision, device), expected)
    for name, distance in far.items():
        allowed = max(tolerance, _OF_THE_REFERENCE * usual[name])
        if not distance <= allowed:
            return f"{name} differs by {distance:.2g}, allowed is {allowed:.2g}"
    return None


def _distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """How far each tensor is from the expected one, relative to that one's norm."""
    return {
        name: float((found[name] - value).norm() / value.norm().clamp(min=1e-6)) for name, value in expected.items()
    }


@torch.inference_mode(False)  # whatever the caller does, gradients are compared
@torch.enable_grad()
def _results(run: Callable, precision: Precision, device: str) -> dict[str, Tensor]:
    """Values and gradients of a pass with padding, dropout and a context, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device).requires_grad_()

    vocab, embed, hidden, state = 11, 8, 16, 8
    weights = Weights(
        embedding=draw(vocab, embed),
        token=draw(hidden, embed, scale=0.3),
        token_bias=draw(hidden, scale=0.3),
        context=draw(hidden, state, scale=0.3),
        layers=tuple((draw(hidden, hidden, scale=0.3), draw(hidden, scale=0.3)) for _ in range(2)),
        heads=draw(3 * state, hidden, scale=0.3),
        heads_bias=draw(3 * state, scale=0.3),
        norm=draw(state),
        norm_bias=draw(state, scale=0.3),
        clamp=1.5,
    )
    context = draw(len(_LENGTHS), state)
    tokens = torch.randint(vocab, (len(_LENGTHS), max(_LENGTHS)), generator=generator).to(device)
    lengths = torch.tensor(_LENGTHS, device=device)
    kind = torch.device(device).type
    with precision.autocast(kind):
        out, after = run(weights, tokens, context, lengths, Dropout(0.2, 3, device))
    (out.float().square().sum() + after.square().sum()).backward()
    found = {"hidden": out, "context": after, "context's gradient": context.grad}
    for name, value in weights._asdict().items():
        tensors = [tensor for pair in value for tensor in pair] if name == "layers" else [value]
        for number, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor):
                found[f"gradient of {name}" + (f" {number}" if name == "layers" else "")] = tensor.grad
    return {name: tensor.detach().float().cpu() for name, tensor in found.items()}
