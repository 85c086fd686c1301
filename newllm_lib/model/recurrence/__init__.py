"""The time loop of New-LLM: one signature, several engines.

    recurrence(weights, tokens, context, lengths, dropout) -> (hidden, context)

`reference` is the readable oracle. An engine is a module with a function of that signature and a line in ENGINES.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from newllm_lib.errors import ConfigError
from newllm_lib.model.recurrence import fused, reference
from newllm_lib.model.recurrence.dropout import Dropout
from newllm_lib.model.recurrence.weights import Weights

__all__ = ["ENGINES", "Dropout", "Weights", "get_engine"]

ENGINES: dict[str, Callable] = {"reference": reference.recurrence, "fused": fused.recurrence}
"""By name, the best last: `auto` takes the last one."""

_PLAIN: dict[str, Callable] = {"fused": partial(fused.recurrence, packed=False)}
"""Those that can also do without oneDNN's packed layout of the weights."""


def get_engine(name: str, packed: bool = True) -> tuple[str, Callable]:
    """The engine called `name` ('auto' = the best), with its real name; ConfigError where there is none.

    packed: whether its products may use oneDNN's layout of the weights, where it knows one.
    """
    if name == "auto":
        name = list(ENGINES)[-1]
    if name not in ENGINES:
        raise ConfigError(f"engine = {name!r}: must be auto or one of {', '.join(ENGINES)}")
    return name, ENGINES[name] if packed else _PLAIN.get(name, ENGINES[name])
