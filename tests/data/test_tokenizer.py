import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm_lib.data.tokenizer import WordTokenizer, tokenizer_from_dict

TEXTS = ["The cat saw the <unk> dog .", "A dog , a CAT\tand <UNK> <unk> <unk>", "zebra the"]
# the 3; cat, dog, a 2 each (first seen in this order); saw . , and zebra 1 each; <unk> 4, but it takes no place


def test_ids_by_frequency_then_first_seen():
    tokenizer = WordTokenizer.train(TEXTS, 100)
    expected = ["<PAD>", "<UNK>", "<BOS>", "<EOS>", "the", "cat", "dog", "a", "saw", ".", ",", "and", "zebra"]
    assert list(tokenizer.words) == expected
    assert tokenizer.vocab_size == 13


def test_encode_lowers_splits_at_white_space_and_knows_what_it_does_not_know():
    tokenizer = WordTokenizer.train(TEXTS, 8)
    assert tokenizer.words[4:] == ("the", "cat", "dog", "a")
    assert tokenizer.encode("  THE cat\u00a0saw <unk>\na Dog. <BOS> ") == [4, 5, 1, 1, 7, 1, 1]
    assert tokenizer.encode("") == []


def test_decode_hides_padding_and_the_marks_of_beginning_and_end():
    tokenizer = WordTokenizer.train(TEXTS, 8)
    assert tokenizer.decode([2, 4, 5, 1, 6, 3, 0, 0]) == "the cat <UNK> dog"


def test_the_smallest_vocabulary():
    assert WordTokenizer.train(TEXTS, 5).words[4:] == ("the",)
    with pytest.raises(ValueError, match=r"^vocab_size = 4: must be at least 5$"):
        WordTokenizer.train(TEXTS, 4)


@pytest.mark.parametrize("texts", [[], ["  "], ["<unk> <UNK>"]])
def test_a_text_without_a_word_is_refused(texts):
    with pytest.raises(ValueError, match=r"^the training text holds no word$"):
        WordTokenizer.train(texts, 100)


def test_a_vocabulary_with_a_word_twice_is_refused():
    with pytest.raises(ValueError, match=r"^the vocabulary holds a word twice$"):
        WordTokenizer(["a", "b", "a"])


def test_round_trip_through_json():
    tokenizer = WordTokenizer.train(TEXTS, 9)
    stored = json.loads(json.dumps(tokenizer.to_dict()))
    assert stored == {"kind": "words", "words": ["the", "cat", "dog", "a", "saw"]}
    assert tokenizer_from_dict(stored) == tokenizer
    assert tokenizer_from_dict(stored).encode("a saw") == [7, 8]
    assert tokenizer != WordTokenizer.train(TEXTS, 8)


@pytest.mark.parametrize("stored", [{"kind": "pieces", "words": []}, {"words": []}])
def test_an_unknown_kind_is_refused(stored):
    with pytest.raises(ValueError, match=r"^tokenizer kind (None|'pieces'): this version knows 'words' and 'sent"):
        tokenizer_from_dict(stored)


@given(st.text(max_size=50), st.sampled_from([WordTokenizer.train(TEXTS, size) for size in (5, 8, 100)]))
def test_ids_are_in_range(text, tokenizer):
    ids = tokenizer.encode(f"{text} the {text}")
    assert ids[len(ids) // 2] == 4
    assert all(index == 1 or 4 <= index < tokenizer.vocab_size for index in ids)


@given(st.text().filter(lambda text: text.split() and "<unk>" not in text.lower()))
def test_known_words_come_back_lowered(text):
    tokenizer = WordTokenizer.train([text], 1000)
    assert tokenizer.decode(tokenizer.encode(text)) == " ".join(text.lower().split())
