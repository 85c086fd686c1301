"""The literal `<unk>` of prepared corpora under a tokenizer that takes it for text: found, and left out of a score."""

import math

import numpy as np
import pytest
import torch

from newllm_lib.config import ModelConfig, RunConfig
from newllm_lib.data.dataset import prepare
from newllm_lib.data.sentencepiece_tokenizer import SentencePieceTokenizer
from newllm_lib.data.sequences import EncodedTexts
from newllm_lib.data.spelling import spelling
from newllm_lib.evaluation import MetricSums, evaluate_split
from newllm_lib.model.newllm import NewLLM
from newllm_lib.system.hardware import Precision

TRAIN = [f"the <unk> fox number {k} jumps over the <unk> dog" for k in range(40)]
VALID = ["the lazy <unk> jumps", "<unk>", "a fox number 7", "an<unk><unk>x <un k> \u65e5<unk>\u65e5"]


@pytest.mark.parametrize("vocab_size", [292, 400], ids=["pieces of <unk>", "<unk> in a piece"])
def test_an_id_is_marked_when_one_of_its_bytes_is_the_words(vocab_size):
    tokenizer = SentencePieceTokenizer.train(TRAIN, vocab_size)
    texts = EncodedTexts.from_lists([tokenizer.encode(text) for text in VALID])
    expected = []
    for text in VALID:
        raw, start = text.encode(), 0
        inside = raw.replace(b"<unk>", b"\0" * 5)
        for index in tokenizer.encode(text):
            size = tokenizer.token_bytes[index]
            expected.append(b"\0" in inside[start : start + size])
            start += size
    assert spelling(texts, tokenizer, "<unk>").tolist() == expected
    assert 0 < sum(expected) < len(expected)


@pytest.fixture
def config(write_corpus):
    folder = write_corpus(train=TRAIN, valid=VALID)
    return RunConfig().replace(
        data=str(folder), tokenizer="sentencepiece", vocab_size=400, sequence_length=8, stride=3, min_words=0
    )


@pytest.mark.parametrize("layout", ["windows", "stream"])
def test_marks_stand_where_their_ids_do(config, write_corpus, layout):
    plain = write_corpus("plain", train=TRAIN, valid=VALID[:3])
    prepared = prepare(config.replace(data=str(plain), layout=layout, eval_lanes=2))
    split = prepared.split("validation")
    texts = prepared.texts["validation"]
    marked = {int(index) for index in texts.ids[spelling(texts, prepared.tokenizer, "<unk>")]}
    other = {int(index) for index in texts.ids[~spelling(texts, prepared.tokenizer, "<unk>")]}
    assert not marked & other  # so that an id alone tells
    assert np.array_equal(split.spelled_unknown, np.isin(split.ids, list(marked)))


def test_a_text_without_it_and_a_tokenizer_of_words_have_no_marks(config, write_corpus):
    plain = write_corpus("plain", train=TRAIN, valid=["the lazy fox jumps"])
    assert prepare(config.replace(data=str(plain))).split("validation").spelled_unknown is None
    assert prepare(config.replace(tokenizer="words")).split("validation").spelled_unknown is None


def test_the_score_without_it_by_hand():
    # ids 4 and 5 stand for 2 and 3 bytes; the second target spells <unk>: 3 nats for 4 bytes are left
    sums = MetricSums(torch.tensor([0, 0, 0, 0, 2, 3]), bytes_per_word=2.5)
    nll, correct = torch.tensor([1.0, 0.25, 1.0, 1.0]), torch.tensor([True, False, True, True])
    sums.add(nll, correct, torch.tensor([4, 5, 4, 3]), torch.tensor([False, True, False, False]))
    scores = sums.result()
    assert scores.bits_per_byte_known == pytest.approx(3 / math.log(2) / 4)
    assert scores.unknown_bytes_share == pytest.approx(3 / 7)
    assert scores.bits_per_byte == pytest.approx(3.25 / math.log(2) / 7)


@pytest.mark.parametrize("batch_size", [1, 2, 256])
@pytest.mark.parametrize("layout", ["windows", "stream"])
def test_a_uniform_model_pays_for_every_other_target_alike(config, layout, batch_size):
    prepared = prepare(config.replace(layout=layout, eval_lanes=2))
    split, size = prepared.split("validation"), prepared.tokenizer.vocab_size
    model = NewLLM(ModelConfig(vocab_size=size, hidden_dim=8, context_dim=4, output_std=0.0))
    scores = evaluate_split(model, split, precision=Precision("fp32", "test"), batch_size=batch_size)
    targets, spelled = split.ids[..., 1:], split.spelled_unknown[..., 1:]
    known = targets[(targets != 0) & ~spelled]
    known_bytes = np.array(prepared.tokenizer.token_bytes)[known].sum()
    assert scores.bits_per_byte_known == pytest.approx(len(known) * math.log2(size) / known_bytes, rel=1e-5)


def test_the_plan_tells_the_share(config):
    size = sum(len(text.encode()) for text in VALID)
    assert prepare(config).warnings == (
        f"{5 * 5 / size:.1%} of the validation bytes are <unk> (the spaces before it not counted), which stands for "
        "rare words in this text and is easy to guess: bits per byte are given without it as well",
    )


# --- words of a text without spaces ------------------------------------------------------------------------------


def test_text_without_spaces_is_told_what_tokenizer_it_needs(write_corpus):
    text = "\u79c1\u306f\u732b\u3067\u3059\u3002\u540d\u524d\u306f\u307e\u3060\u306a\u3044\u3002" * 3
    config = RunConfig().replace(data=str(write_corpus(train=[text] * 3, valid=["\u540d\u524d"])), min_words=0)
    advice = (
        "42 characters between white space, on average: text without spaces between its words needs tokenizer "
        "sentencepiece (in the shell --tokenizer sentencepiece)"
    )
    assert prepare(config).warnings == (advice,)
    with pytest.raises(ValueError, match="no text of the train split has 5 words or more") as refused:
        prepare(config.replace(min_words=5)).split("train")
    assert str(refused.value).endswith(f"; {advice}")
    pieces = config.replace(tokenizer="sentencepiece", vocab_size=292)
    assert prepare(pieces).warnings == ()
