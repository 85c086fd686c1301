"""One option for every configuration field, made from the field itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from newllm_lib.config import FlatField, flat_fields
from newllm_lib.config.fields import allowed_types, describe_allowed
from newllm_lib.config.parsing import parse
from newllm_lib.errors import ConfigError

SECTIONS = {"run": "Run", "data": "Data", "model": "Model", "train": "Recipe and machine"}


class FieldValue(click.ParamType):
    """A configuration field's value as typed in a shell; its range is checked by the configuration itself."""

    def __init__(self, item: FlatField):
        self.item = item
        self.name = _metavar(item)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to the field's type; 'none' where the field allows it."""
        if not isinstance(value, str):
            return value
        try:
            parsed = parse(self.item, value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)
        return _NONE if parsed is None else parsed


_NONE = object()
"""What 'none' becomes, until it is told apart from an option that was not given."""


def _metavar(item: FlatField) -> str:
    if item.metadata["choices"]:
        return "|".join(item.metadata["choices"])
    kinds = allowed_types(item.type)
    return "INT" if int in kinds else "NUMBER" if float in kinds else "TEXT"


class Sectioned(click.Command):
    """A command whose options stand under the part of the configuration that they change."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options first, then a section for each part."""
        fields = flat_fields()
        groups: dict[str, list[tuple[str, str]]] = {"Options": []} | {title: [] for title in SECTIONS.values()}
        for parameter in self.get_params(ctx):
            line = parameter.get_help_record(ctx)
            if line and isinstance(parameter, click.Option):
                item = fields.get(parameter.name or "")
                groups[SECTIONS[item.section] if item else "Options"].append(line)
        for title, lines in groups.items():
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)


def field_options(function: Callable) -> Callable:
    """An option for every configuration field, none of which has a default: the preset has it."""
    return options_of([item for item in flat_fields().values() if item.name != "preset"], function)


def options_of(items: list[FlatField], function: Callable) -> Callable:
    """An option for each of some fields."""
    for item in reversed(items):
        flag = "--" + item.name.replace("_", "-")
        if item.type is bool:
            option = click.option(f"{flag}/--no-{flag[2:]}", item.name, default=None, help=item.doc)
        else:
            repeated = item.name == "data"
            kind = FieldValue(item)
            option = click.option(
                flag, item.name, type=kind, multiple=repeated, metavar=kind.name, default=None, help=_help(item)
            )
        function = option(function)
    return function


def _help(item: FlatField) -> str:
    repeated = " Repeat the option for several files." if item.name == "data" else ""
    text = describe_allowed(item.type, item.metadata)
    plain = item.metadata["choices"] or text in ("text", "text, or none") or item.name in ("data", "clip_by_epoch")
    return item.doc + repeated + ("" if plain else f" [{text}]")


def overrides_of(options: dict[str, Any]) -> dict[str, Any]:
    """The fields that were given, by name."""
    given = {key: value for key, value in options.items() if value is not None and value != ()}
    if "data" in given and len(given["data"]) == 1:
        given["data"] = given["data"][0]
    return {key: None if value is _NONE else value for key, value in given.items()}
