"""The one way from the commands to the terminal: messages and tables are escaped, what a program reads is exact."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

from newllm_lib.escaping import terminal_text, visible_text, write_if_possible
from newllm_lib.reporting.record import finite


def echo(text: Any = "", *, err: bool = False, nl: bool = True) -> None:
    """Print text for people; err: to standard error, where what cannot be written is lost (see `escaping.say`)."""
    if err:
        write_if_possible(terminal_text(text) + "\n" * nl, sys.stderr)
    else:
        click.echo(terminal_text(text), nl=nl)


def echo_json(value: Any, *, ascii_only: bool = True) -> None:
    """Print JSON: exact for the program that reads it, and without a character that a terminal obeys.

    Numbers that are not finite, which JSON has none for, are null.
    """
    text = json.dumps(finite(value), ensure_ascii=ascii_only, indent=2, allow_nan=False)
    click.echo(re.sub("[\x7f-\uffff]", lambda found: _in_json(found[0]), text))


def _in_json(character: str) -> str:
    """A character in JSON, written as a number where a terminal would not show it."""
    return character if visible_text(character) == character else f"\\u{ord(character):04x}"


def echo_written(folder: Path, names: str) -> None:
    """Tell which files a command has written: of those named, with commas between, what is there."""
    there = [name for name in names.split(", ") if "." not in name or (folder / name).is_file()]
    echo(f"written to {folder}/: {', '.join(there)}", err=True)


def echo_exact(text: str, *, nl: bool = True) -> None:
    """Print a text that a model wrote, or a file: escaped on a terminal, exact in a file and for another program."""
    shown = visible_text(text) if sys.stdout and sys.stdout.isatty() else text
    # half a surrogate pair, which no encoding has, is escaped everywhere
    whole = re.sub("[\\ud800-\\udfff]", lambda half: visible_text(half[0]), shown)
    click.echo(whole, nl=nl, color=True)  # else click leaves out what looks like a colour
