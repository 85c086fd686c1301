"""Two tokenizers on the words that both know: what is paid for a word, and that nothing is lost or counted twice."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny import SHAPE, tiny_config, write_text

import newllm_lib as nl
from newllm_lib.cli import Messages, compare
from newllm_lib.config import BOS, EOS, UNK, ModelConfig, RunConfig
from newllm_lib.data.dataset import prepare
from newllm_lib.data.sentencepiece_tokenizer import SentencePieceTokenizer
from newllm_lib.data.tokenizer import WordTokenizer
from newllm_lib.evaluation import evaluate_split
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.pretrained import export_model
from newllm_lib.reporting.progress import Progress
from newllm_lib.reporting.record import read_record, write_record
from newllm_lib.runs.run import Loaded
from newllm_lib.studies import shared_words
from newllm_lib.studies.shared_words import compare_models, shared_word_bits, word_bits
from newllm_lib.system.hardware import Precision

ENGLISH = [f"The cat number {k} sat on\tthe mat , and so did the Other cat ." for k in range(60)]
WORDS = WordTokenizer(["the", "cat", "sat", ".", "日本", "é"])  # 10 ids
TEXTS = [
    "The cat sat on the mat .",
    "  two  spaces,\ttabs\nand lines  \n",
    "日本 é \N{FAMILY}\u3000the e\u0301nd\u2028.",
    "<unk> THE <PAD> .",
    "é",
    "the cat sat on the mat and the cat sat on the other mat , and so did the other cat , and so did the dog .",
    " \n ",
]
"""Words between white space of many kinds: 7, 5, 6, 4, 1, 28 and none."""


@pytest.fixture(scope="module")
def pieces():
    return SentencePieceTokenizer.train(ENGLISH, 400)


def loaded(tokenizer, seed=0, **changes):
    """A model with weights large enough for every token to have a probability of its own."""
    shape = SHAPE | {"vocab_size": tokenizer.vocab_size, "init_std": None, "embedding_std": 1.0, "output_std": 0.5}
    torch.manual_seed(seed)
    return Loaded(NewLLM(ModelConfig(**shape | changes)).eval(), tokenizer, None, None)


# --- known numbers ----------------------------------------------------------------------------------------------


def test_a_uniform_word_model_pays_the_logarithm_of_its_vocabulary_a_word(pieces):
    uniform, other = loaded(WORDS, output_std=0.0), loaded(pieces)
    found = shared_word_bits(uniform, other, ["The cat sat on the mat .", "SAT Other"])
    assert (found.words, found.all_words, found.share) == (6, 9, pytest.approx(2 / 3))  # not: on mat Other
    assert found.bytes == 3 + 3 + 3 + 3 + 1 + 3 + 6
    bits = math.log2(10)
    assert found.first.bits == pytest.approx(6 * bits)
    assert found.first.bits_per_word == pytest.approx(bits)
    assert found.first.bits_per_byte == pytest.approx(6 * bits / 22)
    assert found.first.other_bits == pytest.approx((3 + 2) * bits)  # three words and two ends
    assert found.first.tokens == 11
    assert found.second.bits_per_word > 1.5 * bits  # a control: not every model pays this


def test_a_uniform_piece_model_pays_for_each_piece_and_each_byte(pieces):
    """Characters that the training text lacks are their UTF-8 bytes; a space before a word belongs to it."""
    uniform = loaded(pieces, output_std=0.0)
    texts = ["日本 é", "日  é \r", " 日"]
    assert [len(pieces.encode(text)) for text in texts] == [9, 9, 4]
    found = word_bits(uniform, texts)
    counts = [text.words / math.log2(pieces.vocab_size) for text in found]
    np.testing.assert_allclose(np.concatenate(counts), [6, 3, 3, 4, 4], rtol=1e-6)
    rest = [text.rest / math.log2(pieces.vocab_size) for text in found]
    np.testing.assert_allclose(rest, [1, 3, 1], rtol=1e-6)  # the end; a space and a line end as well
    assert all(text.known.all() for text in found)
    both = shared_word_bits(loaded(WORDS), uniform, texts)
    assert (both.words, both.bytes) == (3, 6 + 2 + 2 + 3)  # 日 alone is not a word of the word model
    assert both.second.bits == pytest.approx((6 + 3 + 4) * math.log2(pieces.vocab_size))
    assert both.second.tokens == 10 + 10 + 5


def test_a_piece_of_several_words_is_shared_by_their_bytes():
    sizes = np.array([0, 0, 0, 0, 4, 3, 1, 2])
    found = shared_words._by_word("ab\tcd e\n", [4, 5, 6], np.array([6.0, 4.0, 5.0, 1.0]), sizes)  # ab_c, d_e, _
    np.testing.assert_array_equal(found.words, [4, 2 + 2, 2])
    assert found.rest == 5 + 1
    found = shared_words._by_word("\n ab", [7, 7], np.array([3.0, 4.0, 1.0]), sizes)  # white space first
    np.testing.assert_array_equal(found.words, [7])


def test_words_are_known_in_lower_case_and_unknown_ones_are_not_counted(pieces):
    texts = ["THE Cat dog <unk> <UNK> <BOS> sat"]
    known = word_bits(loaded(WORDS), texts)[0].known.tolist()
    assert known == [True, True, False, False, False, False, True]
    fewer = loaded(WordTokenizer(["the", "sat"]))
    assert shared_word_bits(loaded(WORDS), fewer, texts).words == 2
    assert shared_word_bits(fewer, loaded(pieces), texts).all_words == 7


# --- against slow oracles ---------------------------------------------------------------------------------------


def slow(model, tokenizer, text):
    """Bits of each word and of the rest: one text, one token and one byte after the other."""
    ids = tokenizer.encode(text)
    with torch.no_grad():
        logits, _ = model.double()(torch.tensor([[BOS, *ids]]))
    paid = [
        -float(row.log_softmax(0)[target]) / math.log(2) for row, target in zip(logits[0], [*ids, EOS], strict=True)
    ]
    words, rest = [0.0] * len(text.split()), paid.pop()
    if tokenizer.token_bytes is None:
        return paid, rest
    owners, number, inside = [], -1, False
    for character in text:
        number += not inside and not character.isspace()
        inside = not character.isspace()
        owners += [(number, inside)] * len(character.encode())
    for index, bits in zip(ids, paid, strict=True):
        mine, owners = owners[: tokenizer.token_bytes[index]], owners[tokenizer.token_bytes[index] :]
        parts = [number for number, inside in mine if inside]
        if not parts and mine[-1][0] + 1 < len(words):
            parts = [mine[-1][0] + 1]
        for number in parts:
            words[number] += bits / len(parts)
        rest += 0 if parts else bits
    assert not owners
    return words, rest


@pytest.mark.parametrize("slots", [shared_words._SLOTS, 64, 7], ids=["one pass", "several", "parts of a text"])
@pytest.mark.parametrize("kind", ["words", "sentencepiece"])
def test_each_word_of_each_text_as_a_slow_loop_finds_it(pieces, monkeypatch, kind, slots):
    monkeypatch.setattr(shared_words, "_SLOTS", slots)
    one = loaded(WORDS if kind == "words" else pieces)
    found = word_bits(one, TEXTS)
    assert [len(text.words) for text in found] == [7, 5, 6, 4, 1, 28, 0]
    for text, fast in zip(TEXTS, found, strict=True):
        words, rest = slow(one.model, one.tokenizer, text)
        np.testing.assert_allclose(fast.words, words, rtol=1e-4)
        assert fast.rest == pytest.approx(rest, rel=1e-4)
    spread = np.concatenate([text.words for text in found])
    assert spread.std() > 0.1 * spread.mean()  # so that a wrong word would be seen


def test_words_and_rest_are_all_that_the_evaluation_counts(tmp_path):
    """Nothing lost, nothing twice: windows longer than any text give the same total."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "train.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    (folder / "valid.txt").write_text("\n".join(ENGLISH[:9]) + "\n日本 é  \nthe\n", encoding="utf-8")
    for kind in ("words", "sentencepiece"):
        config = RunConfig().replace(
            data=str(folder), tokenizer=kind, vocab_size=400, sequence_length=100, min_words=0, text_unit="line"
        )
        prepared = prepare(config)
        one = loaded(prepared.tokenizer)
        metrics = evaluate_split(one.model, prepared.split("validation"), precision=Precision("fp32", "test"))
        found = word_bits(one, (folder / "valid.txt").read_text(encoding="utf-8").splitlines())
        total = sum(text.words.sum() + text.rest for text in found)
        assert total == pytest.approx(metrics.loss * metrics.tokens / math.log(2), rel=1e-5)
        assert sum(text.tokens for text in found) == metrics.tokens


def test_shares_and_sums_over_the_counted_words_alone(pieces):
    first, second = loaded(WORDS), loaded(pieces, seed=1)
    found, turned = shared_word_bits(first, second, TEXTS), shared_word_bits(second, first, TEXTS)
    assert (turned.second, turned.first) == (found.first, found.second)
    shared = [np.array(WORDS.encode(text), dtype=int) != UNK for text in TEXTS]
    for model, one in ((found.first, first), (found.second, second)):
        slowly = [slow(one.model, one.tokenizer, text) for text in TEXTS]
        counted = sum(np.array(words)[known].sum() for (words, _), known in zip(slowly, shared, strict=True))
        everything = sum(sum(words) + rest for words, rest in slowly)
        assert model.bits == pytest.approx(counted, rel=1e-4)
        assert model.bits + model.other_bits == pytest.approx(everything, rel=1e-4)
    assert found.words == 5 + 0 + 4 + 2 + 1 + 12
    assert found.all_words == 51


def test_a_model_in_training_is_scored_without_dropout_and_left_in_training():
    one = loaded(WORDS, dropout=0.9)
    expected = word_bits(one, TEXTS)
    one.model.train()
    for before, after in zip(expected, word_bits(one, TEXTS), strict=True):
        np.testing.assert_array_equal(before.words, after.words)
    assert one.model.training


def test_passes_hold_texts_of_similar_length_and_all_of_them_once(monkeypatch):
    monkeypatch.setattr(shared_words, "_SLOTS", 100)
    lengths = [5, 300, 40, 41, 7, 6, 20, 33, 1, 100]
    batches = list(shared_words._batches(lengths))
    assert batches == [[1], [9], [3, 2], [7, 6, 4], [5, 0, 8]]
    assert list(shared_words._batches([])) == []


# --- bad input --------------------------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_said(pieces):
    with pytest.raises(ValueError, match="2 words, none of which both tokenizers know"):
        shared_word_bits(loaded(WORDS), loaded(pieces), ["nothing known"])
    with pytest.raises(ValueError, match="0 words"):
        shared_word_bits(loaded(WORDS), loaded(pieces), [])
    wrong = loaded(WORDS)._replace(tokenizer=pieces)
    with pytest.raises(ValueError, match=rf"the tokenizer has {pieces.vocab_size} ids, the model 10"):
        shared_word_bits(wrong, loaded(pieces), ["the"])


# --- by place, and in a shell -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text, and a run with each tokenizer on it."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        write_text(place / "text")
        changes = {"results_dir": "results", "max_steps": 3, "epochs": None}
        nl.train(tiny_config("text", name="words", **changes), progress=Progress())
        pieces = {"tokenizer": "sentencepiece", "vocab_size": 320}
        nl.train(tiny_config("text", name="pieces", **pieces, **changes), progress=Progress())
    return place


@pytest.fixture
def newllm(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "copy"))
    group = Messages(commands={"compare": compare.compare})
    return lambda *arguments: CliRunner().invoke(group, ["compare", *map(str, arguments), "--shared-words"])


def test_the_command_scores_two_runs_on_their_own_text(newllm):
    result = newllm("results/words", "results/pieces", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    models = (nl.load("results/words"), nl.load("results/pieces"))
    texts = Path("text/valid.txt").read_text(encoding="utf-8").splitlines()
    expected = shared_word_bits(*(Loaded(run.model, run.tokenizer, None, None) for run in models), texts)
    assert found == json.loads(json.dumps(expected.to_dict()))
    assert (found["first"]["tokenizer"], found["second"]["tokenizer"]) == ("words", "sentencepiece")
    assert (found["words"], found["share"]) == (found["all_words"], 1.0)
    printed = newllm("results/words", "results/pieces").stdout
    assert f"| results/pieces | sentencepiece | {expected.second.bits_per_byte:11.4f} |" in printed
    assert "reads <UNK>" in printed
    assert "predicts case" in printed


def test_other_text_and_other_splits(newllm, write_corpus):
    other = write_corpus("other", valid=["w1 W2 w3", "nothing else"], test=["w4"])
    found = json.loads(newllm("results/words", "results/pieces", "--data", other, "--json").stdout)
    assert (found["words"], found["all_words"], found["bytes"]) == (3, 5, 9)
    found = json.loads(newllm("results/words", "results/words", "--data", other, "--split", "test", "--json").stdout)
    assert (found["words"], found["bytes"]) == (1, 3)
    assert found["first"] == found["second"]
    assert len(found["caveats"]) == 2
    result = newllm("results/words", "results/pieces", "--split", "tests")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "split 'tests': the data text has train, validation" in result.stderr


def test_models_without_a_known_or_a_common_text_need_to_be_told_which(newllm, write_corpus, tmp_path):
    one = loaded(WORDS)
    export_model(tmp_path / "model", one.model, one.tokenizer)
    result = newllm(tmp_path / "model", tmp_path / "model")
    assert result.exit_code == 1
    assert (
        "do not know what text they were trained on: say which to score with data= (in the shell --data)"
        in result.stderr
    )
    assert newllm(tmp_path / "model", "results/words", "--data", write_corpus(valid=["the w1 ."])).exit_code == 1
    Path("text/valid.txt").write_text("w1 w2\n")
    assert "the text has changed since the runs were trained" in newllm("results/words", "results/pieces").stderr
    record = read_record(Path("results/words"))
    record["data"]["fingerprint"] = "0" * 64
    write_record(Path("results/words"), record)
    assert "were trained on different texts: say which" in newllm("results/words", "results/pieces").stderr
    with pytest.raises(ValueError, match="were trained on different texts"):
        compare_models("results/words", "results/pieces")
