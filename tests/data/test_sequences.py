import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from newllm_lib.config import RunConfig, published
from newllm_lib.data.dataset import prepare
from newllm_lib.data.sequences import EncodedTexts, stream, target_lengths, used_share, windows

PAD, BOS, EOS = 0, 2, 3

texts_of_ids = st.lists(st.lists(st.sampled_from([1, 4, 5, 6, 7]), max_size=40), max_size=8)


def rows_of(texts, **settings):
    return windows(EncodedTexts.from_lists(texts), **settings).tolist()


def test_encoded_texts_keep_texts_apart():
    texts = EncodedTexts.from_lists([[4, 5], [], [6]])
    assert (len(texts), [texts[index].tolist() for index in range(3)]) == (3, [[4, 5], [], [6]])
    assert texts.ids.dtype == np.int32


# --- windows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ([4, 5], []),
        ([4, 5, 6], [[2, 4, 5, 6, 3, 0]]),
        ([4, 5, 6, 7], [[2, 4, 5, 6, 7, 3]]),
        ([4, 5, 6, 7, 8], [[2, 4, 5, 6, 7, 8]]),
        ([4, 5, 6, 7, 8, 9], [[2, 4, 5, 6, 7, 8], [5, 6, 7, 8, 9, 3]]),
        ([4, 5, 6, 7, 8, 9, 10], [[2, 4, 5, 6, 7, 8], [5, 6, 7, 8, 9, 10]]),
    ],
    ids=["below-min-words", "padded", "exact", "long-tail-dropped", "two-windows", "two-windows-tail-dropped"],
)
def test_windows_of_one_text(text, rows):
    assert rows_of([text], length=6, stride=2, min_words=3) == rows


def test_windows_of_several_texts_follow_one_another():
    texts = [[4], [4, 5, 6, 7, 8], [], [9, 9]]
    assert rows_of(texts, length=4, stride=3, min_words=1) == [[2, 4, 3, 0], [2, 4, 5, 6], [6, 7, 8, 3], [2, 9, 9, 3]]


def test_no_text_gives_no_window():
    none = windows(EncodedTexts.from_lists([[4]]), 6, 2, 5)
    assert (none.shape, none.dtype) == ((0, 6), np.int32)


def published_windows(texts, length, stride, min_words):
    """The published protocol once more, slowly."""
    rows = []
    for text in texts:
        if len(text) < min_words:
            continue
        ids = [BOS, *text, EOS]
        if len(ids) <= length:
            rows.append(ids + [PAD] * (length - len(ids)))
            continue
        start = 0
        while start + length <= len(ids):
            rows.append(ids[start : start + length])
            start += stride
    return rows


@given(texts_of_ids, st.integers(2, 20), st.integers(1, 25), st.integers(0, 6))
def test_windows_are_the_published_protocol(texts, length, stride, min_words):
    assert rows_of(texts, length=length, stride=stride, min_words=min_words) == published_windows(
        texts, length, stride, min_words
    )


@given(texts_of_ids, st.integers(2, 9), st.integers(0, 20), st.integers(0, 4))
def test_the_share_of_the_targets_that_a_long_stride_uses(texts, length, more, least):
    stride = length - 1 + more
    rows = windows(EncodedTexts.from_lists(texts), length, stride, least)
    targets = sum(len(text) + 1 for text in texts if len(text) >= least)
    expected = int(target_lengths(rows).sum()) / targets if targets else 0
    assert used_share(EncodedTexts.from_lists(texts), length, stride, least) == pytest.approx(expected)


def test_three_windows_of_eight_every_thirty_two_use_a_quarter():
    texts = EncodedTexts.from_lists([[4] * 83])  # 84 targets, of which the windows at 0, 32 and 64 have 7 each
    assert used_share(texts, 8, 32, 5) == 21 / 84


def test_texts_of_several_splits_are_joined_in_their_order():
    joined = EncodedTexts.joined([EncodedTexts.from_lists([[4, 5], []], 2), EncodedTexts.from_lists([[6]], 1)])
    assert ([list(joined[index]) for index in range(len(joined))], joined.num_words) == ([[4, 5], [], [6]], 3)


# --- the stream -------------------------------------------------------------------------------------------------


def test_stream_by_hand():
    texts = EncodedTexts.from_lists([[4, 5], [6, 7, 8]])  # 2 4 5 3 6 7 8 3: 7 targets, 4 in the first lane
    assert stream(texts, length=3, lanes=2).tolist() == [
        [[2, 4, 5], [6, 7, 8]],
        [[5, 3, 6], [8, 3, 0]],
    ]


@given(texts_of_ids, st.integers(2, 12), st.integers(1, 10))
def test_every_token_of_a_stream_is_a_target_once_after_the_token_before_it(texts, length, lanes):
    line = [BOS]
    for text in texts:
        line += [*text, EOS]
    ids = stream(EncodedTexts.from_lists(texts), length, lanes)
    assert ids.shape[1:] == (lanes, length)
    read = []
    for lane in range(lanes):
        rows = [row[row != PAD].tolist() for row in ids[:, lane]]
        assert [len(row) == length for row in rows] == sorted((len(row) == length for row in rows), reverse=True)
        read += [pair for row in rows for pair in itertools.pairwise(row)]
    assert read == list(itertools.pairwise(line))
    assert target_lengths(ids).sum() == len(line) - 1


@given(texts_of_ids, st.integers(2, 12), st.integers(1, 10))
def test_padding_of_a_stream_is_at_the_end_of_rows(texts, length, lanes):
    ids = stream(EncodedTexts.from_lists(texts), length, lanes).reshape(-1, length)
    real = ids != PAD
    assert (real[:, 1:] <= real[:, :-1]).all()


def test_target_lengths():
    ids = np.array([[2, 4, 5, 3], [2, 4, 3, 0], [2, 0, 0, 0], [0, 0, 0, 0]], dtype=np.int32)
    assert target_lengths(ids).tolist() == [3, 2, 0, 0]
    assert target_lengths(ids.reshape(2, 2, 4)).tolist() == [[3, 2], [0, 0]]


# --- WikiText-2 by the published protocol -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def wikitext_2(wikitext):
    return prepare(RunConfig().replace(data=str(wikitext)))


def test_wikitext_2_gives_the_published_counts(wikitext_2):
    assert (len(wikitext_2.texts["train"]), len(wikitext_2.texts["validation"])) == (23_767, 2_461)
    assert wikitext_2.split("train").ids.shape == (51_026, 64)
    assert wikitext_2.split("validation").ids.shape == (5_272, 64)
    assert wikitext_2.tokenizer.vocab_size == 1000
    assert wikitext_2.tokenizer.words[4:9] == ("the", ",", ".", "of", "and")


def test_wikitext_2_gives_the_published_validation_set(wikitext_2):
    assert wikitext_2.split("validation").digest == published.VALIDATION_DIGEST


def test_wikitext_2_padding_and_unknown_words(wikitext_2):
    train, validation = wikitext_2.split("train"), wikitext_2.split("validation")
    assert (train.ids == PAD).mean() == pytest.approx(0.143, abs=0.0005)
    assert validation.unknown_share == pytest.approx(0.3044, abs=0.00005)
    assert 100 * validation.unknown_share == pytest.approx(published.UNKNOWN_ACCURACY, abs=0.1)  # its is by rows
