"""SentencePiece: nothing is lost, the same text gives the same model, damaged or foreign models are refused."""

import io
import math

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from newllm_lib.config import DataConfig, ModelConfig, RunConfig
from newllm_lib.data.dataset import Split, prepare
from newllm_lib.data.sentencepiece_tokenizer import SentencePieceTokenizer
from newllm_lib.data.tokenizer import tokenizer_from_dict, train_tokenizer
from newllm_lib.evaluation import MetricSums, evaluate_split
from newllm_lib.model.newllm import NewLLM
from newllm_lib.system.hardware import Precision

ENGLISH = [f"the quick brown fox number {k} jumps over the lazy dog , again and again ." for k in range(60)]
JAPANESE = ["私は猫です。名前はまだない。", "どこで生れたかとんと見当がつかぬ。"] * 30
CODE = ["def add(a, b):\n    return a + b\n\n\nclass Box:\n\tpass\n"] * 20


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request):
    return SentencePieceTokenizer.train([*ENGLISH, *CODE], 400, request.param)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@example("")
@example("  two  spaces, and one at the end ")
@example("tab\tline\nreturn\r\nnext\u2028line\x85")
@example("\u2581 is its own sign for a space \u2581\u2581")
@example("nul \0 and \ufffd and \ufeff")
@example("<0x41> <PAD> <UNK> <s> </s>")
@example("\N{FAMILY} e\u0301 \u00e9 \uff21 \U0001f468\u200d\U0001f469")
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(4 <= index < tokenizer.vocab_size for index in ids)
    assert sum(tokenizer.token_bytes[index] for index in ids) == len(text.encode())


def test_pieces_are_longer_than_characters_where_the_training_text_taught_them(tokenizer):
    assert len(tokenizer.encode("the quick brown fox jumps over the lazy dog")) < 41  # characters: 43
    assert len(tokenizer.encode("日")) == 3  # never seen: its UTF-8 bytes


def test_the_same_text_gives_the_same_model():
    first, second = (SentencePieceTokenizer.train(ENGLISH, 330) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != SentencePieceTokenizer.train(JAPANESE, 330)


def test_a_large_alphabet_in_a_small_vocabulary_is_met_by_bytes():
    text = ["".join(chr(0x4E00 + k) for k in range(start, start + 40)) for start in range(0, 4000, 40)]
    tokenizer = SentencePieceTokenizer.train(text, 330)
    assert tokenizer.vocab_size <= 330
    assert tokenizer.decode(tokenizer.encode(text[7])) == text[7]


def test_a_tokenizer_is_kept_as_plain_data(tokenizer):
    again = tokenizer_from_dict(tokenizer.to_dict())
    assert again == tokenizer
    assert again.encode("the fox") == tokenizer.encode("the fox")


def test_damaged_and_foreign_models_are_refused(tokenizer):
    with pytest.raises(ValueError, match="damaged"):
        SentencePieceTokenizer(tokenizer.model[: len(tokenizer.model) // 2])
    foreign = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH), model_writer=foreign, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"special ids .* and no byte pieces: must be"):
        SentencePieceTokenizer(foreign.getvalue())


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (ENGLISH, 291, "vocab_size = 291: must be at least 292 for a SentencePiece tokenizer"),
        ([], 400, "the training text holds no character"),
    ],
)
def test_what_cannot_be_trained_is_said(texts, vocab_size, message):
    with pytest.raises(ValueError) as error:
        SentencePieceTokenizer.train(texts, vocab_size)
    assert message in str(error.value)


def test_the_configuration_names_the_kind():
    kinds = {}
    for config in (DataConfig(), DataConfig(tokenizer="sentencepiece", sentencepiece_model="unigram")):
        kinds[config.tokenizer] = train_tokenizer(config, ENGLISH, 330).kind
    assert kinds == {"words": "words", "sentencepiece": "sentencepiece"}


@pytest.fixture
def folder(tmp_path):
    for name, texts in (("train", ENGLISH), ("valid", ["a brown dog jumps .", "the fox  sleeps"])):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return tmp_path


def test_only_the_training_split_teaches_the_pieces(folder):
    config = RunConfig().replace(data=str(folder), tokenizer="sentencepiece", vocab_size=330)
    prepared = prepare(config)
    assert prepared.tokenizer == SentencePieceTokenizer.train(ENGLISH, 330)
    assert prepared.config.model.vocab_size == prepared.tokenizer.vocab_size
    assert prepare(config).tokenizer == prepared.tokenizer  # from the cache
    assert prepare(config.replace(sentencepiece_model="unigram")).tokenizer != prepared.tokenizer


def test_a_split_knows_its_bytes_a_word(folder):
    for layout in ("windows", "stream"):
        config = RunConfig().replace(data=str(folder), tokenizer="sentencepiece", vocab_size=330, layout=layout)
        for _ in range(2):  # fresh, and from the cache
            split = prepare(config).split("validation")
            assert split.bytes_per_word == (len("a brown dog jumps .") + len("the fox  sleeps")) / 8


def test_bits_per_byte_and_word_perplexity_by_hand():
    # ids 4 and 5 stand for 2 and 3 bytes; EOS (3) for none. nll: 1 + 2 + 1 = 4 nats for 5 bytes
    sums = MetricSums(torch.tensor([0, 0, 0, 0, 2, 3]), bytes_per_word=2.5)
    sums.add(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([True, False, True]), torch.tensor([4, 5, 3]))
    scores = sums.result()
    assert scores.bits_per_byte == pytest.approx(4 / math.log(2) / 5)
    assert scores.word_perplexity == pytest.approx(math.exp(4 / 2))  # 5 bytes are 2 words


def test_words_have_neither():
    sums = MetricSums()
    sums.add(torch.tensor([1.0]), torch.tensor([True]), torch.tensor([4]))
    assert (sums.result().bits_per_byte, sums.result().word_perplexity) == (None, None)


def test_a_uniform_model_has_the_bits_of_its_vocabulary():
    """Every token costs log2(V) bits, so with one byte a token that is the score; the stream pays for every byte."""
    model = NewLLM(ModelConfig(vocab_size=8, hidden_dim=8, context_dim=4, output_std=0.0))
    ids = np.array([[2, 4, 5, 6, 7, 4]], dtype=np.int32)
    split = Split(ids, False, np.array([0, 0, 0, 0, 1, 1, 1, 1]), bytes_per_word=5.0)
    scores = evaluate_split(model, split, precision=Precision("fp32", "test"))
    assert scores.bits_per_byte == pytest.approx(3.0)
    assert scores.word_perplexity == pytest.approx(8**5, rel=1e-5)
