"""Which files a source stands for: compared with `glob` where there are no links, and by hand where there are."""

import glob
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm_lib.config import DataConfig
from newllm_lib.data.corpus import load_corpus
from newllm_lib.data.sources import real_files
from newllm_lib.errors import DataError, FileMissingError


def write(path, start=0, count=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"line {start + number} of {path.name}\n" for number in range(count)))
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """lib/ with four files, lib64 a link to it, and a link that leads back up."""
    for number in range(4):
        write(tmp_path / "lib" / f"m{number}.py", 100 * number)
    (tmp_path / "lib64").symlink_to("lib")
    (tmp_path / "lib" / "up").symlink_to("..")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_is_read_once_whatever_links_lead_to_it(project):
    names = [f"lib/m{number}.py" for number in range(4)]
    assert real_files(["**/*.py"]) == ([Path(name) for name in names], 4)
    found, plain = load_corpus(DataConfig(data="**/*.py")), load_corpus(DataConfig(data="lib/*.py"))
    assert found == plain
    assert not set(found.splits["validation"]) & set(found.splits["train"])
    assert found.notes == (
        "4 paths that lead, through links, to files that are in the data already are left out: each file is read once",
    )
    assert plain.notes == ()


def test_a_link_to_a_folder_elsewhere_is_followed_and_overlapping_patterns_are_no_news(project, tmp_path_factory):
    books = tmp_path_factory.mktemp("books")
    write(books / "b.txt")
    (project / "lib" / "books").symlink_to(books)
    assert real_files(["lib/**/*.txt", "lib/books/b.txt"]) == ([Path("lib/books/b.txt")], 0)


TREE = ("a.txt", "b.py", "d/a.txt", "d/e/a.txt", "d/e/f/b.py", "d/.h/a.txt", ".x.txt", "e/d/c.txt")
PARTS = st.sampled_from(["**", "*", "*.txt", "d", "e", "[de]", "a*", ".h"])


@given(st.lists(PARTS, min_size=1, max_size=4))
def test_patterns_find_what_glob_finds(tmp_path_factory, parts):
    root = tmp_path_factory.getbasetemp() / "tree"
    if not root.exists():
        for name in TREE:
            write(root / name)
    pattern = os.path.join(glob.escape(str(root)), *parts)
    expected = sorted({path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)})
    try:
        found, left_out = real_files([pattern])
    except (FileMissingError, ValueError):  # the folder alone is refused by its own message
        found, left_out = [], 0
        expected = [path for path in expected if not os.path.isdir(pattern)]
    assert (sorted(map(str, found)), left_out) == (expected, 0)


def test_hidden_files_are_nobodys_text(tmp_path):
    for name in ("train.txt", "valid.txt", "._train.txt", "._wiki.train.txt"):
        write(tmp_path / name)
    assert load_corpus(DataConfig(data=tmp_path)).splits["train"][0] == "line 0 of train.txt"
    assert [path.name for path in real_files([f"{tmp_path}/**/*.txt"])[0]] == ["train.txt", "valid.txt"]
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(DataError, match=r"the folder holds train\.txt\. For"):
        load_corpus(DataConfig(data=tmp_path))


def test_a_link_to_nothing_is_said_to_be_one(tmp_path):
    write(tmp_path / "train.txt")
    (tmp_path / "valid.txt").symlink_to("gone.txt")
    for source in (tmp_path, tmp_path / "valid.txt", f"{tmp_path}/v*.txt"):
        with pytest.raises(DataError, match=r"valid\.txt: is a link to gone\.txt, which is not there; mend or remove"):
            load_corpus(DataConfig(data=source))
    assert real_files([f"{tmp_path}/*.txt"]) == ([tmp_path / "train.txt"], 0)  # another file of a pattern will do
    (tmp_path / "valid.txt").rename(tmp_path / "test.txt")
    write(tmp_path / "valid.txt")
    with pytest.raises(DataError, match=r"test\.txt: is a link to gone\.txt"):  # a split that is not needed as well
        load_corpus(DataConfig(data=tmp_path))


def test_a_pipe_is_refused_in_words(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match=r"pipe: is a pipe or a device, which can be read once only"):
        load_corpus(DataConfig(data=pipe))


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "texts" / "a.txt")
    expected = load_corpus(DataConfig(data=tmp_path / "texts" / "a.txt"))
    assert load_corpus(DataConfig(data="~/texts/a.txt")) == load_corpus(DataConfig(data="~/texts/*.txt")) == expected
