"""Bytes that are not UTF-8 text: what they are said to be, and that the command in the message makes UTF-8 of them."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas
import pytest

from newllm_lib.config import DataConfig
from newllm_lib.data.corpus import load_corpus, read_texts
from newllm_lib.errors import DataError

TYPOGRAPHIC = "\u201cquoted\u201d it\u2019s caf\xe9 \u2026\n" * 20
GERMAN = "Gr\xf6\xdfe und H\xe4user, na\xefve \xc9tudes\n" * 20
JAPANESE = "\u3053\u308c \u306f \u65e5\u672c\u8a9e \u306e \u6587\u7ae0 \u3067\u3059\n" * 20
PLAIN = "the fox runs\nand the dog sleeps\n" * 20


def refusal(path) -> str:
    with pytest.raises(DataError) as refused:
        read_texts(path, "line")
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        (TYPOGRAPHIC, "cp1252", "CP1252 (Western European)"),
        (GERMAN, "cp1252", "CP1252 (Western European)"),
        (JAPANESE, "cp932", "CP932 (Japanese)"),
        (JAPANESE, "euc-jp", "EUC-JP (Japanese)"),
        (PLAIN, "utf-16", "is UTF-16, not UTF-8"),
        (JAPANESE, "utf-16", "is UTF-16, not UTF-8"),
        (PLAIN, "utf-16-le", "is UTF-16LE, not UTF-8"),
        (GERMAN, "utf-16-be", "is UTF-16BE, not UTF-8"),
        (PLAIN, "utf-32", "is UTF-32, not UTF-8"),
    ],
)
def test_the_command_in_the_message_gives_the_text_back(tmp_path, text, encoding, named):
    path = tmp_path / "my text.txt"
    path.write_bytes(text.encode(encoding))
    message = refusal(path)
    assert named in message
    command = re.search(r"iconv .* > NEW\.txt$", message)[0]
    if shutil.which("iconv"):
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert (tmp_path / "NEW.txt").read_text("utf-8-sig") == text


def test_a_long_text_in_two_bytes_a_character_is_told_from_its_beginning(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" + (JAPANESE * 3000).encode("cp932"))  # the sample ends within a character
    assert "it is probably CP932 (Japanese)" in refusal(tmp_path / "a.txt")


def test_utf8_with_a_few_damaged_bytes_is_not_called_another_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes(GERMAN.encode() + b"\xff\n" + GERMAN.encode())
    assert "not UTF-8 at byte 720 (line 21); the rest is, so some characters are damaged" in refusal(tmp_path / "a.txt")


def test_bytes_of_no_encoding_that_was_tried_get_no_wrong_advice(tmp_path):
    (tmp_path / "a.txt").write_bytes("\u043f\u0440\u0438\u0432\u0435\u0442\n".encode("koi8-r") * 20)  # Russian
    message = refusal(tmp_path / "a.txt")
    assert "save it as UTF-8 with the program that wrote it" in message
    assert "iconv -f" not in message


def as_gzip(path):
    path.write_bytes(gzip.compress(PLAIN.encode()))


def as_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", PLAIN)


def as_parquet(path):
    pandas.DataFrame({"text": PLAIN.splitlines()}).to_parquet(path)


@pytest.mark.parametrize(
    ("write", "named", "tool"),
    [
        (as_gzip, "is a gzip file, not text. Unpack it first: ", "gzip"),
        (as_zip, "is a zip archive, not text. Unpack it first: ", "unzip"),
        (as_parquet, "is a Parquet table, not text. Write its text, here of the column 'text', to a file", "python"),
    ],
)
def test_a_file_of_another_format_is_named_with_the_way_out(tmp_path, write, named, tool):
    path = tmp_path / "a file"
    write(path)
    message = refusal(path)
    assert named in message
    run_way_out(message, tool, tmp_path)


def run_way_out(message, tool, folder):
    command = re.search(rf"\b{tool} -.* > NEW\.txt", message)[0]
    if shutil.which(tool):
        here = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(command, shell=True, check=True, cwd=folder, env=here)
        assert (folder / "NEW.txt").read_text() == PLAIN


def test_a_table_that_is_read_as_text_is_said_to_be_one(tmp_path):
    rows = PLAIN.splitlines()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    pandas.DataFrame({"text": rows, "n": 1}).to_csv(tmp_path / "a.csv", index=False)
    for name, what in (("a.jsonl", "JSON Lines"), ("a.csv", "a table (CSV)")):
        (note, *_) = load_corpus(DataConfig(data=tmp_path / name)).notes
        assert note.startswith(f"{name} is {what}, and is read as plain text, its marks included. Write its text")
        run_way_out(note, "python", tmp_path)
    (tmp_path / "b.jsonl").write_text(PLAIN)  # not what its name says
    assert not any("JSON" in note for note in load_corpus(DataConfig(data=tmp_path / "b.jsonl")).notes)
