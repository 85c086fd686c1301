"""Text from outside, in each kind of place: written out by hand, and as the reader of that place understands it."""

import csv
import io
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm_lib import escaping as f

SCRIPT = '<script a="1">x</script>'
TEXTS = st.text(st.characters(codec=None, exclude_categories=()), max_size=60)
ODD = st.text(st.sampled_from("<>&\"'`$\\|*_[](){}~#=+-@!.:/w \t\n\r\x1b\x7f\x9b\u202e\ud800a1"), max_size=40)


class Read(HTMLParser):
    """What a browser would make of a text: its elements, and its characters."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, attributes))

    def handle_data(self, data):
        self.text += data


# --- a terminal -------------------------------------------------------------------------------------------------


def test_a_terminal_sees_what_would_act():
    assert f.terminal_text("a\x1b[31mb\x07\x9b2J\x7f\u202e\ud83dz") == r"a\x1b[31mb\x07\x9b2J\x7f\u202e\ud83dz"
    assert f.terminal_text("é\tü\n漢😀") == "é\tü\n漢😀"
    assert f.one_line("a\tb\nc\rd") == r"a\tb\nc\x0dd"


@given(TEXTS | ODD)
def test_nothing_that_a_terminal_obeys_is_left(text):
    shown = f.terminal_text(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    shown.encode()  # no half of a surrogate pair
    assert "\n" not in f.one_line(text)


# --- a page -----------------------------------------------------------------------------------------------------


def test_a_page_shows_tags_and_formulas_as_text():
    assert f.html_text(SCRIPT) == "&lt;script a=&quot;1&quot;&gt;x&lt;/script&gt;"
    assert f.html_text("$5 \\(x") == "<span>$</span>5 <span>\\</span>(x"
    assert f.html_attribute("' onload='x") == "&#x27; onload=&#x27;x"
    assert f.html_text("a\nb") == "a\nb"


@given(TEXTS | ODD)
def test_a_page_gives_the_text_back_and_no_tag(text):
    found = Read(f.html_text(text))
    assert set(map(str, found.tags)) <= {"('span', [])"}
    assert found.text == f.terminal_text(text)
    (link,) = Read(f'<a title="{f.html_attribute(text)}">').tags
    assert link == ("a", [("title", f.terminal_text(text))])


# --- Markdown ---------------------------------------------------------------------------------------------------

RENDERED = {
    SCRIPT: '&lt;script a="1"&gt;x&lt;/script&gt;',
    "[a](javascript:b)": "&#91;a&#93;(javascript:b)",
    "![a](b)": "!&#91;a&#93;(b)",
    "*a* _b_ ~c~ `d`": "&#42;a&#42; &#95;b&#95; &#126;c&#126; &#96;d&#96;",
    "cpu_baseline-2.5": "cpu_baseline-2.5",
    "a|b": "a&#124;b",
    "a\n# b": "a<span>&#92;</span>n# b",
    "# a": "&#35; a",
    "1. a": "1&#46; a",
    "12) a": "12&#41; a",
    "30.00": "30.00",
    "- a": "&#45; a",
    "-0.5": "-0.5",
    "$x$ \\(y\\)": "<span>&#36;</span>x<span>&#36;</span> <span>&#92;</span>(y<span>&#92;</span>)",
    "https://a.b www.a.b a@b.c": "https&#58;//a.b www&#46;a.b a&#64;b.c",
    "&lt;": "&amp;lt;",
}


@pytest.mark.parametrize("text", RENDERED)
def test_markdown_by_hand(text):
    assert f.markdown_text(text) == RENDERED[text]


@given(TEXTS | ODD)
def test_markdown_holds_nothing_that_marks(text):
    written = f.markdown_text(text)
    assert Read(written).text == f.one_line(text)
    assert {tag for tag, _ in Read(written).tags} <= {"span"}
    rest = re.sub(r"</?span>|&#?\w+;", "", written)
    assert not set(rest) & set("<>$\\`*[]|~@\n")


def test_code_and_blocks_are_fenced_by_more_backticks_than_they_hold():
    assert f.markdown_code("a b") == "`a b`"
    assert f.markdown_code("a``b") == "```a``b```"
    assert f.markdown_code("`a") == "`` `a ``"
    assert f.markdown_block("a\n```\n<b>") == "````text\na\n```\n<b>\n````"
    assert f.markdown_list(["a", "<b>"]) == "- a\n- &lt;b&gt;"


@given(ODD)
def test_a_fence_is_never_closed_inside(text):
    fence, *body, last = f.markdown_block(text).split("\n")
    assert last == fence.removesuffix("text")
    assert not any(re.match(r"\s*" + last, line) for line in body)


# --- a shell ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["x; touch y", "d$(touch y)", "`touch y`", "a'b", "--", "*", "~", "", 'a"b\\', "é"])
def test_a_command_is_quoted(word):
    assert shlex.split(f.shell_command(["printf", word])) == ["printf", word]


WORD = TEXTS.filter(lambda text: "\0" not in text and not re.search("[\ud800-\udfff]", text))


@given(st.lists(WORD, min_size=1, max_size=4))
def test_a_command_gives_the_words_back_in_a_shell(words):
    plain = [word for word in words if f.one_line(word) == word]
    assert shlex.split(f.shell_command(plain)) == plain
    assert f.one_line(f.shell_command(words)) == f.shell_command(words)  # as people can paste it


@pytest.mark.parametrize("word", ["a\nb", "\x1b[31m'x'", "tab\there", "é\x7f\\", "漢\u202e"])
def test_bash_reads_control_characters_back(word, tmp_path):
    script = f"{f.shell_command(['printf', '%s', word])}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout.decode() == word


# --- a table of values ------------------------------------------------------------------------------------------


def test_a_spreadsheet_calculates_nothing():
    cells = ["=1+1", "+1-cmd", "-x", "@a", "\tb", "\rc", "'=d", "＝e", "plain", "-0.5", "1e-3", "'e", "", None, -1, 2.5]
    assert [f.csv_cell(cell) for cell in cells] == [
        "'=1+1", "'+1-cmd", "'-x", "'@a", "'\tb", "'\rc", "''=d", "'＝e", "plain", "-0.5", "1e-3", "'e", "",
        None, -1, 2.5,
    ]  # fmt: skip


@given(ODD | TEXTS)
def test_a_cell_comes_back(text):
    written = f.csv_cell(text)
    assert f.csv_value(written) == text
    number = bool(re.fullmatch(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan|infinity)", written.lower()))
    assert written[:1] not in tuple("=+-@\t\r") or number or not written.isascii()


def test_a_table_is_read_as_it_was_written():
    frame = pandas.DataFrame({"label": ["=a", "b"], "=loss": [-1.5, 2.0], "n": [1, -2]})
    text = f.csv_text(frame, index=False)
    assert text == "label,'=loss,n\n'=a,-1.5,1\nb,2.0,-2\n"
    assert next(csv.reader(io.StringIO(text))) == ["label", "'=loss", "n"]
    pandas.testing.assert_frame_equal(f.read_csv(io.StringIO(text)), frame)


# --- DataFrames in a notebook -----------------------------------------------------------------------------------


def test_cells_index_and_columns_of_a_styler_are_text():
    frame = pandas.DataFrame({SCRIPT: [f"{SCRIPT}\n$x$", ["<i>"]], "n": [0.5, 1.0]}, index=["<b>", "<u>"])
    assert "<script" in frame.style.to_html()  # the control: pandas leaves it
    for html in (f.styled(frame).to_html(), f.text_table(frame).style.set_properties(color="red").to_html()):
        tags = {tag for tag, _ in Read(html).tags}
        assert tags <= {"style", "table", "thead", "tbody", "tr", "th", "td", "span"}
        assert "<span>$</span>x<span>$</span>" in html


def test_a_table_of_texts_stays_one():
    table = f.text_table({"a": ["<b>"], "n": [1]})
    assert type(table[["a"]].astype(object)) is type(table)
    assert "<b>" not in table._repr_html_()
    assert "tex2jax_ignore" in table._repr_html_()
    assert table.equals(pandas.DataFrame({"a": ["<b>"], "n": [1]}))


# --- a picture --------------------------------------------------------------------------------------------------


@given(ODD)
def test_a_picture_draws_every_text_as_it_is(text):
    from matplotlib import cbook

    assert not cbook.is_math_text(f.plot_text(text))
    shown = f.plot_text(text).replace("\\$", "$")  # what matplotlib draws of a text that is no formula
    assert shown == f.one_line(text)


def test_a_title_with_dollars_is_drawn():
    from matplotlib.figure import Figure

    figure = Figure()
    figure.suptitle(f.plot_text("US$5_{$10"))
    figure.savefig(io.BytesIO())
    with pytest.raises(ValueError, match=r"ParseSyntaxException|Expected"):  # the control
        bad = Figure()
        bad.suptitle("US$5_{$10")
        bad.savefig(io.BytesIO())


def test_say_writes_a_line(capsys):
    f.say("a\x1b")
    f.say("b", sys.stderr)
    assert capsys.readouterr() == ("a\\x1b\n", "b\n")
