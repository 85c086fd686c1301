"""A setting as people type it, in the shell and in a notebook's panel: text to value, and back."""

from __future__ import annotations

from typing import Any

from newllm_lib.config.configs import FlatField, flat_fields
from newllm_lib.config.fields import allowed_types, describe_allowed
from newllm_lib.errors import ConfigError
from newllm_lib.escaping import shell_command


def parse(item: FlatField, text: str) -> Any:
    """The value that a text stands for: none, a number, (epoch, norm) pairs as in 0:0.5,10:1, or the text itself.

    Its range is for the configuration to check; ConfigError where the text is no number and the field wants one.
    """
    kinds = allowed_types(item.type)
    if text.lower() == "none" and type(None) in kinds:
        return None
    if item.name == "clip_by_epoch":
        return tuple(_pair(part) for part in text.split(","))
    try:
        if int in kinds:
            return int(text)
        return float(text) if float in kinds else text
    except ValueError as error:
        raise ConfigError(f"{text!r}: must be {describe_allowed(item.type, item.metadata)}") from error


def _pair(text: str) -> tuple:
    """(epoch, norm); the parts as they are where they are no numbers, which the configuration refuses in its words."""
    try:
        epoch, norm = text.split(":")
        return int(epoch), float(norm)
    except ValueError:
        return tuple(text.split(":"))


def shown(item: FlatField, value: Any) -> str:
    """The text that `parse` takes for a value; a value that no field may have is shown as Python writes it."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if item.name == "clip_by_epoch":
        try:
            return ",".join(f"{epoch}:{_number(norm)}" for epoch, norm in value)
        except (TypeError, ValueError):
            return repr(value)
    return _number(value)


def _number(value: Any) -> str:
    """As short as it can be without being another number."""
    return repr(value).removesuffix(".0")


def command(preset: str, overrides: dict[str, Any]) -> str:
    """The `newllm train` command of a preset with some fields changed."""
    words = ["newllm", "train", preset]
    for name, value in overrides.items():
        item, flag = flat_fields()[name], name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif name == "data" and isinstance(value, tuple):
            words += [word for source in value for word in (f"--{flag}", source)]
        else:
            words += [f"--{flag}", shown(item, value)]
    return shell_command(words)
