"""Bytes to text: UTF-8, or one sentence that says what they are instead, and the command that converts them."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path

from newllm_lib.errors import DataError
from newllm_lib.escaping import shell_command, shell_word

_SAMPLE = 1 << 20
"""Bytes that are enough to tell an encoding by."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip
_FORMATS = (
    (b"\x1f\x8b", "a gzip file", ("gzip", "-dc")),
    (b"BZh", "a bzip2 file", ("bzip2", "-dc")),
    (b"\xfd7zXZ\0", "an xz file", ("xz", "-dc")),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", ("zstd", "-dc")),
    (b"PK\x03\x04", "a zip archive", ("unzip", "-p")),
    (b"PAR1", "a Parquet table", "read_parquet({path!r})"),
)
"""First bytes, what they mean, and what writes the text: a command, or what pandas calls to read the table."""
_TABLES = {
    ".csv": ("a table (CSV)", "read_csv({path!r})"),
    ".tsv": ("a table (TSV)", "read_csv({path!r}, sep='\\t')"),
    ".jsonl": ("JSON Lines", "read_json({path!r}, lines=True)"),
    ".ndjson": ("JSON Lines", "read_json({path!r}, lines=True)"),
}


def decoded(raw: bytes, label: str, path: Path | str) -> str:
    """The text of UTF-8 bytes, with or without a byte order mark.

    label: what the sentence begins with; path: the file, for the command in it. DataError says where the bytes stop
    being UTF-8 text, what they probably are, and how they are converted.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if known := _known(raw, path):
            raise DataError(f"{label}: {known}") from error
        start = error.start + len(raw) - len(error.object)  # the decoder counts from behind a byte order mark
        line = raw.count(b"\n", 0, start) + 1
        raise DataError(f"{label}: not UTF-8 at byte {start} (line {line}); {_likely(raw, start, path)}") from error
    if "\0" in text[:65_536]:
        raise DataError(f"{label}: {_known(raw, path) or 'holds NUL bytes, so it is a binary file; give UTF-8 text'}")
    return text


def _known(raw: bytes, path: Path | str) -> str | None:
    """What bytes that are no UTF-8 text are for certain, and the way out."""
    for start, what, way in _FORMATS:
        if raw.startswith(start):
            return f"is {what}, not text. {_way_out(way, path)}"
    wide = _wide(raw)
    return wide and f"is {wide}, not UTF-8; convert it: {_iconv(wide, path)}"


def table_note(text: str, path: Path) -> str | None:
    """A sentence on a table that was given as text, whose marks and names would be learned too; None for other files.

    A table is told by the file's name, and JSON Lines by their first line as well: source text may be anything.
    """
    what, way = _TABLES.get(path.suffix.lower(), (None, ""))
    if what == "JSON Lines" and not _is_object(text):
        what = None
    return what and f"{path.name} is {what}, and is read as plain text, its marks included. {_way_out(way, path.name)}"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _way_out(way: tuple[str, ...] | str, path: Path | str) -> str:
    """How the text in a file of another format gets into a file of its own."""
    if isinstance(way, tuple):
        return f"Unpack it first: {shell_command([*way, path])} > NEW.txt"
    script = f"import pandas; print(*pandas.{way.format(path=str(path))}['text'], sep='\\n')"
    command = shell_command(["python", "-c", script])
    return f"Write its text, here of the column 'text', to a file first: {command} > NEW.txt"


def _iconv(encoding: str, path: Path | str) -> str:
    return f"iconv -f {encoding} -t UTF-8 -- {shell_word(path)} > NEW.txt"


def _wide(raw: bytes) -> str | None:
    """The name of UTF-16 or UTF-32: by its byte order mark, or by where it has its NUL bytes."""
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return name
    sample = raw[:4096]
    if len(sample) < 4 or b"\0" not in sample:
        return None
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    name, few, many = ("UTF-16LE", even, odd) if odd > even else ("UTF-16BE", odd, even)
    return name if many > len(sample) // 8 and not few and _reads(raw[:_SAMPLE], name) is not None else None


# --- one byte, or two, a character ------------------------------------------------------------------------------

_JAPANESE = re.compile("[\u3000-\u30ff\u4e00-\u9fff\uff01-\uff5e]")
_KANA = re.compile("[\u3041-\u3096]")
_WESTERN = re.compile("[\xc0-\xd6\xd8-\xf6\xf8-\xff\u0152-\u0178\u2013-\u2026\u20ac\xa0-\xbf]")
_FOREIGN = re.compile("[^\0-\x7f]")
_VALID = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")


def _likely(raw: bytes, start: int, path: Path | str) -> str:
    """What bytes that are not UTF-8 probably are, by trial, and what makes UTF-8 of them."""
    sample = raw[:_SAMPLE] if start < _SAMPLE else raw[start - _SAMPLE // 2 : start + _SAMPLE // 2]
    sample = sample.removeprefix(codecs.BOM_UTF8)
    if len(_VALID.findall(sample)) > 4 * len(re.findall("\ufffd", sample.decode("utf-8", errors="replace"))):
        return (
            "the rest is, so some characters are damaged; to leave them out: "
            f"iconv -c -f UTF-8 -t UTF-8 -- {shell_word(path)} > NEW.txt"
        )
    scores = {name: _japanese(_reads(sample, name)) for name in ("CP932", "EUC-JP")}
    name = max(scores, key=scores.__getitem__)
    if scores[name] > 0.5:
        return f"it is probably {name} (Japanese); convert it: {_iconv(name, path)}"
    foreign = _FOREIGN.findall(western) if (western := _reads(sample, "CP1252")) else []
    if foreign and len(_WESTERN.findall(western)) >= 0.9 * len(foreign) and len(foreign) < 0.7 * len(western):
        return f"it is probably CP1252 (Western European); convert it: {_iconv('CP1252', path)}"
    return "save it as UTF-8 with the program that wrote it, or convert it from its encoding: iconv -l names them"


def _reads(sample: bytes, encoding: str) -> str | None:
    """The bytes in an encoding, a character that is cut at the end left out; None where they are none of it."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(sample, final=False)
    except UnicodeDecodeError:
        return None


def _japanese(text: str | None) -> float:
    """How much of what is not ASCII is Japanese; 0 without hiragana, which no Japanese sentence does without."""
    foreign = _FOREIGN.findall(text or "")
    return (
        len(_JAPANESE.findall(text)) / len(foreign) if foreign and len(_KANA.findall(text)) > len(foreign) / 20 else 0
    )
