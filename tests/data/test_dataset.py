import numpy as np
import pytest

from newllm_lib.config import RunConfig
from newllm_lib.data.dataset import Split, cache_folder, prepare
from newllm_lib.data.tokenizer import WordTokenizer

TEXTS = {"train": ["a b c a b a", "x a"], "valid": ["a b new a"], "test": ["c c c"]}
# ids by frequency: a 4, b 5, c 6, x 7


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def config(write_corpus):
    folder = write_corpus(**TEXTS)
    return RunConfig().replace(data=str(folder), vocab_size=7, sequence_length=6, stride=3, min_words=3)


@pytest.fixture
def no_training(monkeypatch):
    """A function after whose call a vocabulary can only come from the cache."""

    def refuse(*_):
        raise AssertionError("the vocabulary was made again")

    return lambda: monkeypatch.setattr(WordTokenizer, "train", refuse)


def content(prepared):
    splits = {name: prepared.split(name).ids.tolist() for name in ("train", "validation", "test")}
    return prepared.tokenizer.words, prepared.fingerprint, splits


def test_windows_of_a_small_corpus(cache, config):
    words, _, splits = content(prepare(config))
    assert words[4:] == ("a", "b", "c")
    assert splits == {
        "train": [[2, 4, 5, 6, 4, 5]],  # BOS a b c a b a EOS without its tail; "x a" is too short
        "validation": [[2, 4, 5, 1, 4, 3]],
        "test": [[2, 6, 6, 6, 3, 0]],
    }


def test_a_stream_takes_its_lanes_from_the_batch_or_the_evaluation(cache, config):
    prepared = prepare(config.replace(layout="stream", eval_lanes=2))
    split = prepared.split("test")
    assert (split.ids.tolist(), split.carries_context) == ([[[2, 6, 6, 0, 0, 0], [6, 6, 3, 0, 0, 0]]], True)
    assert prepared.split("test", lanes=1).ids.tolist() == [[[2, 6, 6, 6, 3, 0]]]
    assert not prepare(config).split("test", lanes=1).carries_context


def test_facts_of_a_split():
    split = Split(np.array([[2, 4, 1, 3, 0, 0], [2, 1, 1, 5, 6, 3]], dtype=np.int64), False)
    assert (split.num_tokens, split.num_slots, split.unknown_share) == (8, 10, 3 / 8)
    assert split.digest == "644ef2da5c0a308a63e22b3bd1589ae13ec37872669bb07769d17f63368cc8f3"
    assert split.digest == Split(np.asfortranarray(split.ids.astype(">i4")), True).digest
    assert split.digest != Split(split.ids + 1, False).digest


def test_a_second_preparation_reads_the_cache(cache, config, no_training):
    first = content(prepare(config))
    no_training()
    assert content(prepare(config)) == first
    assert content(prepare(config.replace(name="other", lr=1.0))) == first
    assert len(list(cache.iterdir())) == 1


def test_the_cache_knows_text_by_its_content(cache, config, write_corpus, no_training):
    first = content(prepare(config))
    no_training()
    assert content(prepare(config.replace(data=str(write_corpus("copy", **TEXTS))))) == first


def test_changed_text_or_vocabulary_gives_a_new_entry(cache, config, write_corpus):
    prepare(config)
    changed = prepare(config.replace(data=str(write_corpus("changed", **TEXTS | {"train": ["b b b a a"]}))))
    assert changed.tokenizer.words[4:] == ("b", "a")
    assert prepare(config.replace(vocab_size=6)).tokenizer.words[4:] == ("a", "b")
    assert len(list(cache.iterdir())) == 3


def test_a_damaged_cache_file_is_made_again(cache, config):
    first = content(prepare(config))
    (path,) = cache.iterdir()
    good = path.read_bytes()
    header = good.index(b"PK\x01\x02")  # of the first member in the archive's directory: 46 bytes
    places = [*range(header, header + 46), *range(0, len(good), 101)]
    flipped = [good[:at] + bytes([good[at] ^ bits]) + good[at + 1 :] for at in places for bits in (0x01, 0x08, 0xFF)]
    cut = [good[:length] for length in (*range(0, len(good), 97), len(good) - 1)]
    for damaged in (*flipped, *cut, b"not an archive"):
        path.write_bytes(damaged)
        assert content(prepare(config)) == first
        assert list(cache.iterdir()) == [path]
    path.write_bytes(b"")
    prepare(config)
    assert len(path.read_bytes()) == len(good)


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path, config, monkeypatch, cache):
    first = content(prepare(config))
    place = tmp_path / "a-file"
    place.write_text("in the way")
    for folder in (place, place / "below"):
        monkeypatch.setenv("NEWLLM_CACHE", str(folder))
        assert content(prepare(config)) == first
    assert place.read_text() == "in the way"


def test_the_vocabulary_shrinks_to_the_words_there_are(cache, config):
    prepared = prepare(config.replace(vocab_size=1000))
    assert prepared.config.model.vocab_size == prepared.tokenizer.vocab_size == 8
    assert prepare(prepared.config).config == prepared.config
    assert prepare(config).config == config


def test_a_given_tokenizer_only_encodes(cache, config, no_training):
    tokenizer = WordTokenizer(["new", "c", "a"])
    no_training()
    for _ in range(2):  # the second time from the cache
        prepared = prepare(config, tokenizer)
        assert prepared.tokenizer == tokenizer
        assert prepared.split("validation").ids.tolist() == [[2, 6, 1, 4, 6, 3]]


def test_a_split_that_is_not_there_is_named(cache, config, write_corpus):
    prepared = prepare(config.replace(data=str(write_corpus("two", **TEXTS | {"test": None}))))
    with pytest.raises(ValueError, match=r"^split 'test': the data two has train, validation"):
        prepared.split("test")


def test_a_split_of_short_texts_only_names_the_setting(cache, config):
    prepared = prepare(config.replace(min_words=5))
    message = r"^data corpus: no text of the validation split has 5 words or more \(min_words\)$"
    with pytest.raises(ValueError, match=message):
        prepared.split("validation")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NEWLLM_CACHE", "/somewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_folder()) == "/somewhere"
    monkeypatch.delenv("NEWLLM_CACHE")
    assert str(cache_folder()) == "/xdg/newllm_lib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "newllm_lib"
