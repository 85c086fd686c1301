"""How a field of a configuration is declared, checked and described; those of a run are in `configs`.

A field's unit is in the docstring under it, its allowed values are in its metadata: the checks, the shell's options and
the notebook's panel are all made from these two.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import os
import textwrap
import types
import typing
from dataclasses import field
from functools import cache
from typing import Any

from newllm_lib.config.places import expanded
from newllm_lib.errors import ConfigError


def setting(default, low=None, high=None, *, open_low=False, open_high=False, choices=None, identity=True, path=False):
    """A dataclass field with its allowed range.

    `identity=False` where it does not define a run's result, `path=True` where it names a place on one machine.
    """
    limits = dict(low=low, high=high, open_low=open_low, open_high=open_high, choices=choices)
    return field(default=default, metadata=limits | dict(identity=identity, path=path))


class Checked:
    """Base of the configuration classes: validation, documentation and serialisation from the fields alone."""

    def __post_init__(self):
        hints = field_types(type(self))
        for item in dataclasses.fields(self):
            value = _convert(getattr(self, item.name), hints[item.name])
            if item.metadata.get("path"):
                value = _expanded(value)
            object.__setattr__(self, item.name, value)
            if wrong := refusal(item.name, value, hints[item.name], item.metadata):
                raise ConfigError(wrong)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Resolved annotations of a configuration class."""
    return typing.get_type_hints(cls)


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a configuration class, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    docs = {}
    for line, following in itertools.pairwise(body):
        if isinstance(line, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[line.target.id] = inspect.cleandoc(following.value.value)
    return docs


def build(cls: type, values: dict[str, Any]):
    """`cls(**values)`, where an unknown key is an error that names it and the known ones."""
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__}: must be a dictionary of its fields, not {values!r:.60}")
    known = {item.name for item in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return cls(**values)


def allowed_types(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _convert(value: Any, hint: Any) -> Any:
    """Whole numbers where a float is wanted, and lists (as JSON has them) where a tuple is; NumPy's are Python's."""
    kinds = allowed_types(hint)
    value = plain_number(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list):
        value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
    if isinstance(value, tuple):
        return tuple(os.fspath(item) if isinstance(item, os.PathLike) else item for item in value)
    return value


def plain_number(value: Any) -> Any:
    """A number of NumPy or torch as Python's own; anything else as it is."""
    return value.item() if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0 else value


def _expanded(value: Any) -> Any:
    """A path, or several, with the home in place of `~`; anything else is for the check to refuse."""
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    return expanded(value) if isinstance(value, str) else value


def refusal(name: str, value: Any, hint: Any, allowed: typing.Mapping[str, Any]) -> str:
    """Why a field cannot have a value, whatever the others are: its name, the value, what would be right; else ""."""
    kinds = allowed_types(hint)
    plain = tuple(typing.get_origin(kind) or kind for kind in kinds)
    right_kind = isinstance(value, plain) and not (isinstance(value, bool) and bool not in plain)
    good = right_kind
    if good and value is not None and not isinstance(value, bool):
        if isinstance(value, (int, float)) and allowed:
            good = _in_range(value, allowed)
        if allowed.get("choices"):
            good = value in allowed["choices"]
    if good:
        return ""
    must = "a number, " if float in kinds and not right_kind else ""
    said = "none" if value is None else repr(value)
    return f"{name} = {said}: must be {must}{describe_allowed(hint, allowed)}"


def _in_range(value: float, allowed: typing.Mapping[str, Any]) -> bool:
    low, high = allowed["low"], allowed["high"]
    above = low is None or (value > low if allowed["open_low"] else value >= low)
    below = high is None or (value < high if allowed["open_high"] else value <= high)
    return above and below


def describe_allowed(hint: Any, allowed: typing.Mapping[str, Any]) -> str:
    """What a field accepts, in words: 'a whole number from 1 to 65,536, or none', 'at least 0 and below 1'."""
    kinds = allowed_types(hint)
    if allowed.get("choices"):
        text = "one of " + ", ".join(allowed["choices"])
    elif int in kinds:
        text = f"a whole number from {allowed['low']:,} to {allowed['high']:,}"
    elif float in kinds:
        high = f" and {'below' if allowed['open_high'] else 'at most'} {allowed['high']:,.10g}"
        text = f"{'above' if allowed['open_low'] else 'at least'} {allowed['low']:g}{high}"
    elif bool in kinds:
        text = "true or false"
    elif str in kinds:
        text = "text"
    elif typing.get_origin(hint) is tuple:
        text = "pairs of numbers such as ((0, 0.5), (10, 1))"
    else:
        text = hint.__name__
    return text + (", or none" if type(None) in kinds else "")
