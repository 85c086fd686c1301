import re
import shutil
import socket
import subprocess
import sys
import time

import datasets
import huggingface_hub
import pandas
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from newllm_lib.config import DataConfig
from newllm_lib.data import corpus
from newllm_lib.data.corpus import load_corpus, read_texts, split_texts, split_units
from newllm_lib.errors import ConfigError, DataError


def load(*sources, **fields):
    data = tuple(str(source) for source in sources)
    return load_corpus(DataConfig(data=data[0] if len(data) == 1 else data, **fields))


# --- the built-in text ------------------------------------------------------------------------------------------


def test_builtin_splits_are_disjoint_english_without_repeats():
    splits = load("builtin").splits
    assert list(splits) == ["train", "validation", "test"]
    texts = [text for split in splits.values() for text in split]
    assert len(texts) == len(set(texts))
    assert all(text.strip() for text in texts)
    assert sum(map(len, texts)) > 300_000
    assert all(len(split) > 50 for split in splits.values())


def test_builtin_is_the_same_in_every_process():
    script = "from newllm_lib.data.corpus import _builtin; print(_builtin().fingerprint)"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == load("builtin").fingerprint


# --- folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [
        ("train.txt", "valid.txt", "test.txt"),
        ("train.txt", "validation.txt", "test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"),
        ("Train.txt", "Validation.raw", "test.tokens"),
    ],
)
def test_names_of_the_files_in_a_folder(tmp_path, train, valid, test):
    for name, text in ((train, "one\n\n  \ntwo\n"), (valid, "three"), (test, "four\n"), ("notes.md", "not a split")):
        (tmp_path / name).write_text(text)
    (tmp_path / "train.d").mkdir()
    found = load(tmp_path)
    assert found.splits == {"train": ["one", "two"], "validation": ["three"], "test": ["four"]}
    assert found.name == tmp_path.name


def test_a_folder_may_be_a_path_and_the_current_one_has_its_name(write_corpus, monkeypatch):
    folder = write_corpus()
    assert DataConfig(data=folder).data == str(folder)
    monkeypatch.chdir(folder)
    assert load(".") == load(folder)
    assert load(".").name == "corpus"


def test_a_folder_needs_no_test_split(write_corpus):
    assert list(load(write_corpus(test=None)).splits) == ["train", "validation"]


def test_two_files_of_one_split_are_refused(write_corpus):
    folder = write_corpus()
    (folder / "validation.txt").write_text("more")
    with pytest.raises(ValueError, match=r"both valid\.txt and validation\.txt are the validation split; keep one"):
        load(folder)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("train", "no train split. Name it train.txt (or wiki.train.tokens, .raw); the folder holds test.txt, valid"),
        ("valid", "no validation split. Name it valid.txt (or wiki.valid.tokens, .raw); the folder holds test.txt, t"),
    ],
)
def test_a_missing_split_is_named_with_what_is_there(write_corpus, missing, message):
    folder = write_corpus(**{missing: None})
    with pytest.raises(ValueError) as refused:
        load(folder)
    assert message in str(refused.value)
    assert str(folder) in str(refused.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the folder holds nothing"):
        load(tmp_path)


# --- what a file may hold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
        (b"one\r\n\r\ntwo\r\n", ["one", "two"]),
        (b"one\rtwo", ["one", "two"]),
        (b" = Title = \n \nlast line without its end", [" = Title = ", "last line without its end"]),
        ("one\u2028two\x0cthree\x0bfour\x85five\x1csix\n".encode(), ["one\u2028two\x0cthree\x0bfour\x85five\x1csix"]),
    ],
    ids=["bom", "crlf", "cr", "blank-lines", "only-line-ends-separate"],
)
def test_lines_of_a_file(tmp_path, raw, texts):
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    assert read_texts(path, "line") == texts


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the file is empty; it must hold at least one non-blank line"),
        (b" \n\n\t\n", "the file is empty; it must hold at least one non-blank line"),
        (b"\x7fELF\x02\x01\x00\x00", "holds NUL bytes, so it is a binary file; give UTF-8 text"),
        (
            b"one\ntwo\ncaf\xe9\n",
            "not UTF-8 at byte 11 (line 3); it is probably CP1252 (Western European); convert it:",
        ),
        (b"\xef\xbb\xbfone\ncaf\xe9\n", "not UTF-8 at byte 10 (line 2); it is probably CP1252"),
        (b"\xef\xbb\xbfa\n\n\xe9\n", "not UTF-8 at byte 6 (line 3); "),
    ],
    ids=["empty", "blank", "binary", "latin-1", "latin-1-after-bom", "latin-1-after-bom-and-blank"],
)
def test_an_unreadable_file_says_where_and_what_to_do(tmp_path, raw, message):
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    with pytest.raises(ValueError) as refused:
        load(path)
    assert str(refused.value).startswith(f"data {path}: {message}")


def test_paragraphs_join_their_lines():
    text = "\n\n  one\n  two \n \t\n\n\nthree\r\nfour\r\n\r\nfive"
    assert split_units(text, "paragraph") == ["one two", "three four", "five"]
    assert split_units(text, "line") == ["  one", "  two ", "three", "four", "five"]


# --- text files and patterns ------------------------------------------------------------------------------------


def write_lines(path, start, count):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"line {number}\n" for number in range(start, start + count)))
    return path


def lines(start, stop):
    return [f"line {number}" for number in range(start, stop)]


def test_a_text_file_is_split_in_its_own_order(tmp_path):
    path = write_lines(tmp_path / "book.txt", 0, 20)
    found = load(path, validation_fraction=0.2, test_fraction=0.1)
    assert found.splits == {"train": lines(0, 14), "validation": lines(14, 18), "test": lines(18, 20)}
    assert found.name == "book"
    assert load(path, validation_fraction=0.2, test_fraction=0.1) == found


def test_each_of_several_files_gives_its_end_to_the_held_out_splits(tmp_path):
    first, second = write_lines(tmp_path / "a.txt", 0, 10), write_lines(tmp_path / "b.txt", 100, 4)
    found = load(first, second)
    assert found.splits == {
        "train": [*lines(0, 8), *lines(100, 102)],
        "validation": [*lines(8, 9), *lines(102, 103)],
        "test": [*lines(9, 10), *lines(103, 104)],
    }
    assert found.name == "a+1"


def test_a_recursive_pattern_reads_its_files_in_order(tmp_path):
    write_lines(tmp_path / "src" / "b" / "deep.py", 10, 4)
    write_lines(tmp_path / "src" / "a.py", 0, 4)
    write_lines(tmp_path / "src" / "a.md", 20, 4)
    (tmp_path / "src" / "folder.py").mkdir()
    found = load(tmp_path / "src" / "**" / "*.py")
    assert found.splits["train"] == [*lines(0, 2), *lines(10, 12)]
    assert load(tmp_path / "src" / "*.md", tmp_path / "src" / "a.py").splits["test"] == [*lines(23, 24), *lines(3, 4)]


def test_overlapping_sources_read_a_file_once(tmp_path):
    first, second = write_lines(tmp_path / "a.txt", 0, 10), write_lines(tmp_path / "b.txt", 100, 4)
    assert load(tmp_path / "*.txt", first, tmp_path / "b*") == load(first, second)


def test_paragraphs_of_a_text_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("one\ntwo\n\nthree\n\nfour\n")
    assert load(path, text_unit="paragraph").splits == {"train": ["one two"], "validation": ["three"], "test": ["four"]}


@given(st.integers(0, 60), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
@example(3, 0.5, 0.5)
@example(7, 0.5, 0.5)
def test_parts_of_a_file_never_overlap(count, validation_fraction, test_fraction):
    texts = [str(number) for number in range(count)]
    train, validation, test = split_texts(texts, validation_fraction, test_fraction)
    assert train + validation + test == texts
    assert count < 3 or (validation and test)


@pytest.mark.parametrize(
    ("raw", "unit", "subject", "way_out"),
    [
        ("a b c", "line", "1 text (one a line) is", "if its lines are long, cut them: fold -s -w 1000 -- "),
        ("a\nb\n", "line", "2 texts (one a line) are", "if its lines are long, cut them: fold -s -w 1000 -- "),
        ("a\nb\nc\n", "paragraph", "1 text (one a paragraph) is", "use text_unit line (in the shell --text-unit). Or"),
        (
            "a\nb\nc\n",
            "file",
            "1 text (one a file) is",
            "use text_unit line or paragraph (in the shell --text-unit). Or",
        ),
    ],
)
def test_too_few_texts_are_refused_with_what_makes_more_of_them(tmp_path, raw, unit, subject, way_out):
    path = tmp_path / "short.txt"
    path.write_text(raw)
    with pytest.raises(DataError) as refused:
        load(path, text_unit=unit)
    reason = "too few for train, validation and test (validation would be empty)"
    assert f"short.txt: {subject} {reason}; {way_out}" in str(refused.value)


def test_one_long_line_can_be_cut_by_the_command_that_is_named(tmp_path):
    path = tmp_path / "text8 of mine.txt"
    path.write_text("one of several words in a very long line " * 200)
    with pytest.raises(DataError) as refused:
        load(path)
    command = re.search(r"fold .* NEW\.txt", str(refused.value))[0]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    splits = load(tmp_path / "NEW.txt").splits
    assert {split: len(texts) for split, texts in splits.items()} == {"train": 7, "validation": 1, "test": 1}
    assert "".join(text for texts in splits.values() for text in texts) == path.read_text()


def test_shares_that_leave_nothing_to_train_on_are_named(tmp_path):
    with pytest.raises(DataError) as refused:
        load(write_lines(tmp_path / "a.txt", 0, 4), validation_fraction=0.5, test_fraction=0.5)
    assert "validation_fraction = 0.5 and test_fraction = 0.5 leave none of 4 texts (one a line) to" in str(
        refused.value
    )


@pytest.mark.parametrize(("name", "unit"), [("builtin", "file"), ("wikitext-2", "paragraph")])
def test_a_named_text_comes_in_its_own_unit(name, unit):
    with pytest.raises(ConfigError, match=rf"text_unit = '{unit}': the texts of {name} are (paragraph|line)s"):
        load(name, text_unit=unit)
    assert load("builtin", text_unit="paragraph") == load("builtin")


# --- a text that is only scored ---------------------------------------------------------------------------------


def test_only_the_split_that_is_scored_has_to_be_there(write_corpus):
    folder = write_corpus(train=None, valid=None, test=["a", "b"])
    assert load_corpus(DataConfig(data=folder), "test").splits == {"test": ["a", "b"]}
    assert load_corpus(DataConfig(data=folder), "all").splits == {"test": ["a", "b"]}
    with pytest.raises(DataError, match=r"no validation split\..* To score all that is there: split='all'"):
        load_corpus(DataConfig(data=folder), "validation")


def test_files_that_are_scored_as_a_whole_are_not_cut(tmp_path):
    first, second = write_lines(tmp_path / "a.txt", 0, 1), write_lines(tmp_path / "b.txt", 10, 4)
    whole = load_corpus(DataConfig(data=f"{tmp_path}/*.txt"), "all")
    assert whole.splits == {"all": [*lines(0, 1), *lines(10, 14)]}
    assert load_corpus(DataConfig(data=str(first)), "all").splits == {"all": ["line 0"]}
    assert whole.fingerprint != load_corpus(DataConfig(data=str(second)), "all").fingerprint


# --- what is told of a text -------------------------------------------------------------------------------------


def test_validation_texts_that_stand_in_training_are_told(write_corpus):
    texts = [f"this is the text number {number}" for number in range(10)]
    (note,) = load(write_corpus(train=texts, valid=["some other text", texts[3], f" {texts[4]}"])).notes
    assert note == (
        "2 of 3 validation texts (76.9% of the characters) also stand in training, word for word, so the scores are "
        "better than on new text"
    )
    assert load(write_corpus("good", train=texts, valid=["some other text"])).notes == ()


def test_the_headings_of_wikitext_are_no_reason_to_warn(wikitext):
    assert load(wikitext).notes == ()


def test_an_unknown_source_says_what_would_do(tmp_path):
    with pytest.raises(FileNotFoundError) as refused:
        load(tmp_path / "nowhere")
    assert str(refused.value) == (
        f"data {tmp_path}/nowhere: no such folder, file or pattern. Give a folder with train.txt and valid.txt, text "
        "files, or one of: builtin, wikitext-2, wikitext-103"
    )


def test_no_source_and_a_folder_among_files_are_refused(tmp_path, write_corpus):
    with pytest.raises(ValueError, match=r"data = \(\): must be a corpus"):
        load_corpus(DataConfig(data=()))
    with pytest.raises(ValueError, match="a folder stands alone"):
        load(write_lines(tmp_path / "a.txt", 0, 10), write_corpus())


# --- the fingerprint --------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_content_not_the_place(write_corpus, tmp_path):
    here = write_corpus()
    there = tmp_path / "elsewhere"
    there.mkdir()
    for split in ("train", "valid", "test"):
        windows_file = b"\xef\xbb\xbf\r\n" + (here / f"{split}.txt").read_bytes().replace(b"\n", b"\r\n")
        (there / f"wiki.{split}.tokens").write_bytes(windows_file)
    assert load(here).fingerprint == load(there).fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"train": ["a b", "c", "D"]},
        {"train": ["a b", "d", "c"]},
        {"train": ["a b", "c"], "valid": ["d", "e", "f"]},
        {"valid": ["e"], "test": ["f", "g"]},
        {"train": ["a", "b", "c", "d"]},
        {"test": None},
        {"train": ["a b", "c", "de", "f"], "valid": ["g"], "test": None},
    ],
    ids=["a-letter", "order", "moved-to-valid", "moved-to-test", "cut-otherwise", "no-test", "ends-of-splits"],
)
def test_the_fingerprint_tells_other_content(write_corpus, changed):
    texts = {"train": ["a b", "c", "d"], "valid": ["e", "f"], "test": ["g"]}
    before, after = load(write_corpus("before", **texts)), load(write_corpus("after", **texts | changed))
    assert before.fingerprint != after.fingerprint


# --- the Hugging Face hub ---------------------------------------------------------------------------------------

ROWS = {
    "train": ["", " = Title = \n", "", " one two\u2028three \n", " four <unk> five , six \n", ""],
    "validation": ["", " = Other = \n", " seven @-@ eight \n"],
    "test": [" nine \n", ""],
}
CARD = "---\nconfigs:\n- config_name: wikitext-2-v1\n  data_files:\n" + "".join(
    f"  - split: {split}\n    path: wikitext-2-v1/{split}-*\n" for split in ROWS
)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A folder laid out as Salesforce/wikitext is on the hub, in its place; datasets' cache is empty."""
    folder = tmp_path / "wikitext"
    (folder / "wikitext-2-v1").mkdir(parents=True)
    (folder / "README.md").write_text(f"{CARD}---\n")
    for split, rows in ROWS.items():
        table = pandas.DataFrame({"text": rows})
        table.to_parquet(folder / "wikitext-2-v1" / f"{split}-00000-of-00001.parquet", index=False)
    monkeypatch.setattr(corpus, "HUB_REPOSITORY", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf_cache"))
    return folder


@pytest.fixture(params=["refuses", "hangs"])
def no_hub(request, tmp_path, monkeypatch):
    """A hub that refuses connections, or takes them and never answers; datasets' cache is empty."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "hangs":
            server.listen()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(corpus, "HUB_TIMEOUT_SECONDS", 0.3)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf_cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield


def test_the_hubs_rows_and_a_local_file_are_the_same_text(hub_folder, tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    for split, rows in ROWS.items():
        (local / f"wiki.{split}.tokens").write_text("".join(row or " \n" for row in rows), encoding="utf-8")
    from_hub, from_files = load("wikitext-2"), load(local)
    assert from_hub.splits == from_files.splits
    assert from_hub.splits["train"] == [" = Title = ", " one two\u2028three ", " four <unk> five , six "]
    assert from_hub.fingerprint == from_files.fingerprint
    assert from_hub.name == "wikitext-2"


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_the_message_comes_soon_and_names_the_ways_out(no_hub, monkeypatch, offline):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    with pytest.raises(ConnectionError) as refused:
        load("wikitext-2")
    assert time.monotonic() - start < 5  # 10 with the real timeout of 5 seconds in place of 0.3
    assert str(refused.value).startswith("data wikitext-2: cannot be loaded from the Hugging Face hub")
    assert "set data (in the shell --data) to a folder with train.txt and valid.txt" in str(refused.value)
    assert "or to builtin" in str(refused.value)
    assert "[no connection to the hub: " in str(refused.value)
    assert "OfflineModeIsEnabled" not in str(refused.value)  # a flag that only the loading itself had set
    assert datasets.config.HF_HUB_OFFLINE is offline


def test_in_a_notebook_the_message_names_the_notebooks_fields(no_hub, monkeypatch):
    monkeypatch.setattr(corpus, "in_kernel", lambda: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError) as refused:
        load("wikitext-2")
    assert "set DATA in the settings, or data in the panel, to a folder with train.txt" in str(refused.value)
    assert "--data" not in str(refused.value)
    assert "[HF_HUB_OFFLINE is set, so the hub is not asked]" in str(refused.value)


def test_without_a_network_the_local_cache_serves(hub_folder, no_hub, tmp_path, monkeypatch):
    online = load("wikitext-2")
    cache = tmp_path / "hf_cache"
    (built,) = (cache / "wikitext").glob("wikitext-2-v1*")
    shutil.copytree(built, cache / "Salesforce___wikitext" / "wikitext-2-v1")  # where a download from the hub lies
    monkeypatch.setattr(corpus, "HUB_REPOSITORY", "Salesforce/wikitext")
    monkeypatch.chdir(tmp_path)
    assert load("wikitext-2") == online


def test_empty_files_of_a_pattern_are_passed_over(tmp_path):
    for number in range(4):
        (tmp_path / f"m{number}.py").write_text(f"x = {number}\n\ny = {number}\n")
    (tmp_path / "__init__.py").write_text("\n")
    found = load_corpus(DataConfig(data=f"{tmp_path}/*.py", text_unit="file"))
    assert [found.splits[split] for split in ("train", "validation", "test")] == [
        ["x = 0\n\ny = 0\n", "x = 1\n\ny = 1\n"],
        ["x = 2\n\ny = 2\n"],
        ["x = 3\n\ny = 3\n"],
    ]
    for number in range(4):
        (tmp_path / f"m{number}.py").write_text("")
    with pytest.raises(ValueError, match="all of these files are empty"):
        load_corpus(DataConfig(data=f"{tmp_path}/*.py"))


def test_where_texts_end_is_part_of_the_fingerprint():
    first, second = (corpus.Corpus("x", {"train": texts}) for texts in (["a\nb", "c"], ["a", "b\nc"]))
    assert first.fingerprint != second.fingerprint
