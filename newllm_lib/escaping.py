"""Text from outside, written for the place where people see it: a page, Markdown, a terminal, a table, a picture.

Words of a vocabulary, names, texts, settings and error messages may come from a stranger's file. They are kept as they
are, and escaped only here, where they appear. One function for each kind of place.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterable
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from pandas import DataFrame

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler


_ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that act instead of being seen: controls (ESC among them), those that turn the direction of writing or
end a line, and halves of a surrogate pair, which cannot be encoded. Tab and line feed are left to the caller."""


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


# --- a terminal -------------------------------------------------------------------------------------------------


def visible_text(value: Any) -> str:
    r"""Text of any number of lines, exact but for characters that act: ESC is written as \x1b."""
    return _ACTING.sub(_escaped, str(value))


def terminal_text(value: Any) -> str:
    """Text of any number of lines that a terminal shows and never obeys, without what belongs to this user alone."""
    return visible_text(impersonal(str(value)))


_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^\s/@]+(?=@)")
"""Tokens of the hub, and what stands before the host in an address."""
_SECRET_FIELD = re.compile(r"(?i)([?&][\w.-]*(?:token|key|password|secret|signature)[\w.-]*=)[^\s&]+")
"""A field of an address by whose name its value is nobody else's business."""


def impersonal(text: str) -> str:
    """A text with paths under the home as ~/..., and without tokens and passwords: screens are shared."""
    text = _SECRET_FIELD.sub(r"\1***", _SECRET.sub("***", text))
    home = _home()
    if not home or home not in text:
        return text
    return re.sub(rf"(?<![\w./~-]){re.escape(home)}(?![\w.~-])", "~", text)


def one_line(value: Any) -> str:
    r"""The same in one line: a tab is written as \t, the end of a line as \n."""
    return terminal_text(value).replace("\t", "\\t").replace("\n", "\\n")


def _home() -> str:
    """The user's home; '' where there is none, or where it is everything."""
    home = os.path.expanduser("~")
    return "" if home in ("~", "/") else home


def say(text: Any, file: TextIO | None = None, *, err: bool = False) -> None:
    """Print a message for people, to standard output or, with `err`, to standard error. It never fails.

    A message that cannot be written (a closed terminal, a full disk behind a log) must not end what it tells of.
    """
    write_if_possible(terminal_text(text) + "\n", file or (sys.stderr if err else sys.stdout))


def write_if_possible(text: str, file: TextIO | None) -> None:
    """Write and flush; characters that the file's encoding lacks are escaped, and what cannot be written is lost."""
    if file is None:  # as Python has it where the stream was closed before it started
        return
    with contextlib.suppress(OSError, ValueError):  # the latter of a file that is closed
        try:
            file.write(text)
        except UnicodeEncodeError:
            encoding = file.encoding or "ascii"
            file.write(text.encode(encoding, "backslashreplace").decode(encoding))
        file.flush()


# --- a page -----------------------------------------------------------------------------------------------------


_MATHS = {"$": "<span>$</span>", "\\": "<span>\\</span>"}
r"""MathJax, which notebooks run over every output, pairs $ with $ and \( with \) within one element only. Its \href
would make a link of any kind, javascript: too."""


def html_text(value: Any) -> str:
    """Text between the tags of a page: no tag, no entity and no formula of its own. Line ends stay."""
    return re.sub(r"\$|\\(?=\S)", lambda match: _MATHS[match[0]], html_attribute(impersonal(str(value))))


def html_attribute(value: Any) -> str:
    """Text between the quotes of an attribute. An address needs `urllib.parse.quote` first."""
    return escape(visible_text(value), quote=True)


# --- Markdown ---------------------------------------------------------------------------------------------------


_MARKDOWN = re.compile(
    r"""[&<>$\\`*\[\]|~@]       # HTML, formulas, code, emphasis, links, cells of a table, mail addresses
    | (?<![^\W_])_ | _(?![^\W_])  # an underscore that could begin or end emphasis: not the one in cpu_baseline
    | :(?=//) | (?<=www)\.        # addresses that would become links
    | ^[#=] | ^(?:[+-]|\d{1,9}[.)])(?=[\s-]|$)  # what makes a heading or a list at the start of a line
    """,
    re.VERBOSE,
)


def markdown_text(value: Any) -> str:
    """Text within a line of Markdown, as JupyterLab, Colab and GitHub render it: the same characters, in one line.

    Entities, since a backslash before `$` or `(` leaves a formula that MathJax finds later. Names such as
    `cpu_baseline` stay as they are, so that a table can be read in a terminal as well.
    """

    def entity(match: re.Match[str]) -> str:
        number, character = match[0][:-1], match[0][-1]
        if character in _MATHS:
            return f"<span>&#{ord(character)};</span>"
        named = escape(character)
        return named if named != character else f"{number}&#{ord(character)};"

    return _MARKDOWN.sub(entity, one_line(value))


def markdown_list(values: Iterable[Any]) -> str:
    """A list of sentences, each of which is plain text."""
    return "\n".join(f"- {markdown_text(value)}" for value in values)


def markdown_code(value: Any) -> str:
    """Code within a line of Markdown, between more backticks than it holds in a row."""
    text = one_line(value)
    fence = "`" * (_longest_run(text) + 1)
    edge = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{edge}{text}{edge}{fence}"


def markdown_block(value: Any) -> str:
    """A block of text in Markdown, shown as it is: its fence is longer than any row of backticks inside."""
    text = terminal_text(value)
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}text\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


# --- a shell ----------------------------------------------------------------------------------------------------


def shell_word(word: Any) -> str:
    r"""A word of a command that people paste into bash or zsh.

    With a control character in it the word is written as $'\x1b': a terminal could not show it otherwise.
    """
    word = str(word)
    home = _home()
    if home and word == home:
        return "~"
    if home and word.startswith(f"{home}/"):
        return "~/" + shell_word(word.removeprefix(f"{home}/"))  # a quoted tilde would be a file's name
    if visible_text(word) == word and not set(word) & {"\t", "\n"}:
        return shlex.quote(word)
    plain = word.replace("\\", "\\\\").replace("'", "\\'").encode("utf-8", "surrogateescape").decode("latin-1")
    return "$'" + "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in plain) + "'"


def shell_command(words: Iterable[Any]) -> str:
    """A command to paste."""
    return " ".join(map(shell_word, words))


# --- a table of values ------------------------------------------------------------------------------------------


_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff0b\uff0d\uff1d\uff20]")
"""How a cell begins that a spreadsheet would calculate; with apostrophes before it one that `csv_cell` has marked."""


def csv_cell(value: Any) -> Any:
    """A value of a CSV file: text that a spreadsheet would calculate gets an apostrophe; `csv_value` takes it away."""
    if not isinstance(value, str) or not _FORMULA.match(value) or _is_number(value):
        return value
    return f"'{value}"


def csv_value(value: Any) -> Any:
    """What `csv_cell` was given."""
    marked = isinstance(value, str) and value.startswith("'") and _FORMULA.match(value)
    return value[1:] if marked else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.strip() == text


def csv_text(frame: DataFrame, **options: Any) -> str:
    """A DataFrame as CSV, its texts and the names of its columns through `csv_cell`; options as for `to_csv`."""
    safe = frame.rename(columns=csv_cell)
    for name in safe.columns:
        if safe[name].dtype.kind not in "biufc":
            safe[name] = safe[name].map(csv_cell)
    return safe.to_csv(lineterminator="\n", **options)


def read_csv(source: Any, **options: Any) -> DataFrame:
    """What `csv_text` wrote; options as for `pandas.read_csv`."""
    import pandas

    frame = pandas.read_csv(source, **options).rename(columns=csv_value)
    for name in frame.columns:
        if frame[name].dtype.kind not in "biufc":
            frame[name] = frame[name].map(csv_value)
    return frame


def styled(frame: DataFrame) -> Styler:
    """A DataFrame's Styler whose cells, row names and column names are text, never HTML."""
    import pandas

    texts = [name for name in frame.columns if frame[name].dtype.kind not in "biufc"]
    style = pandas.DataFrame.style.fget(frame)
    style = style.format(html_text, subset=texts, na_rep="") if texts else style
    for axis in (0, 1):
        if frame.axes[axis].dtype.kind not in "biufc":
            style = style.format_index(html_text, axis=axis)
    return style


@cache
def _text_table() -> type:
    import pandas

    class TextTable(pandas.DataFrame):
        """A DataFrame of texts from anywhere, which a notebook shows as text: by itself, and through `.style`."""

        @property
        def _constructor(self) -> type:
            return TextTable

        @property
        def style(self) -> Styler:
            """As of a DataFrame, every text escaped."""
            return styled(self)

        def _repr_html_(self) -> str | None:
            with pandas.option_context("display.html.use_mathjax", False):
                return super()._repr_html_()

    return TextTable


def text_table(*args: Any, **options: Any) -> DataFrame:
    """A DataFrame that a notebook shows as text, its `.style` too; arguments as for pandas.DataFrame."""
    return _text_table()(*args, **options)


# --- a picture --------------------------------------------------------------------------------------------------


def plot_text(value: Any) -> str:
    """Text in a picture of matplotlib, to which an even number of `$` would be formulas."""
    return one_line(value).replace("$", "\\$")
