import math

import numpy as np
import pytest
import torch

from newllm_lib.config import BOS, EOS, UNK, ModelConfig
from newllm_lib.data.tokenizer import WordTokenizer
from newllm_lib.errors import ConfigError
from newllm_lib.generation import Pieces, Writer, generate_text, generate_texts, stream_text
from newllm_lib.model.decoding import Decoding, Sampling
from newllm_lib.model.newllm import NewLLM

TOKENIZER = WordTokenizer([f"w{k}" for k in range(8)])  # ids 4 to 11


@pytest.fixture
def model():
    model = NewLLM(ModelConfig(vocab_size=12, hidden_dim=16, context_dim=8, init_std=None, embedding_std=1.0))
    model.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.output.bias[EOS] = -50.0
    return model.eval()


class Bytes:
    """A tokenizer of UTF-8 bytes, for characters that need several ids."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def test_pieces_wait_for_whole_characters():
    pieces, text = Pieces(Bytes()), "aé日b"
    found = [pieces.push(byte) for byte in text.encode()]
    assert found == ["a", "", "é", "", "", "日", "b"]
    assert pieces.flush() == ""


def test_pieces_give_out_an_unfinished_character_at_the_end():
    pieces = Pieces(Bytes())
    assert [pieces.push(byte) for byte in "日".encode()[:2]] == ["", ""]
    assert pieces.flush() == "\N{REPLACEMENT CHARACTER}"


def test_words_are_joined_as_a_whole_text_would_be():
    pieces = Pieces(TOKENIZER, before=[5])
    assert [pieces.push(token) for token in (6, UNK, 7)] == [" w2", " <UNK>", " w3"]
    pieces = Pieces(TOKENIZER, before=[BOS])
    assert [pieces.push(token) for token in (6, 7)] == ["w2", " w3"]


def test_a_stop_text_over_several_pieces_is_never_shown():
    pieces = Pieces(Bytes(), stop=["END", "ENOUGH"])
    shown = [pieces.push(byte) for byte in b"aENbEN"]
    assert "".join(shown) == "aENb"
    assert shown[1] == ""  # could have been the beginning of a stop text
    assert pieces.push(ord("D")) == ""
    assert pieces.stopped
    assert pieces.flush() == ""


def test_what_looked_like_a_stop_text_is_given_out_at_the_end():
    pieces = Pieces(Bytes(), stop=["END"])
    assert "".join(pieces.push(byte) for byte in b"xEN") == "x"
    assert pieces.flush() == "EN"
    assert not pieces.stopped


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match="stop = ''"):
        Pieces(TOKENIZER, stop=["a", ""])


def test_many_prompts_give_what_each_gives_alone(model):
    prompts = ["w1 w2 w3 w4", "", "w5"]
    together = generate_texts(model, TOKENIZER, prompts, temperature=0, max_new_tokens=9)
    alone = [generate_texts(model, TOKENIZER, [prompt], temperature=0, max_new_tokens=9)[0] for prompt in prompts]
    assert [text.tokens for text in together] == [text.tokens for text in alone]
    assert [text.prompt for text in together] == prompts
    for one, other in zip(together, alone, strict=True):
        assert one.text == other.text
        torch.testing.assert_close(one.log_probs, other.log_probs, rtol=0, atol=1e-5)


def test_log_probabilities_are_those_of_a_full_pass(model):
    text = generate_texts(model, TOKENIZER, ["w1 w2"], seed=3, temperature=1.5, max_new_tokens=6)[0]
    ids = [BOS, 5, 6, *text.tokens]
    shares = model(torch.tensor([ids]))[0].log_softmax(-1)[0]
    expected = [float(shares[2 + k, token]) for k, token in enumerate(text.tokens)]
    assert text.log_probs == pytest.approx(expected, abs=1e-5)
    assert text.ended_by == "length"


def test_a_text_ends_before_its_stop_text_and_the_others_go_on(model):
    free = generate_texts(model, TOKENIZER, ["w1 w2", "w6"], seed=5, max_new_tokens=12, temperature=3.0)
    word = free[0].text.split()[4]
    stopped = generate_texts(model, TOKENIZER, ["w1 w2", "w6"], seed=5, max_new_tokens=12, temperature=3.0, stop=[word])
    assert stopped[0].ended_by == "stop"
    assert word not in stopped[0].text
    assert free[0].text.startswith(stopped[0].text)


def test_a_text_ends_at_the_end_of_text(model):
    with torch.no_grad():
        model.output.bias[EOS] = 50.0
    text = generate_texts(model, TOKENIZER, ["w1"], seed=1)[0]
    assert (text.text, text.tokens, text.ended_by) == ("", [EOS], "end of text")
    assert text.log_probs == pytest.approx([0.0], abs=1e-6)


def test_a_stream_is_the_same_text_in_pieces(model):
    whole = generate_text(model, TOKENIZER, "w1 w2", seed=4, max_new_tokens=10)
    pieces = list(stream_text(model, TOKENIZER, "w1 w2", seed=4, max_new_tokens=10))
    assert "w1 w2" + "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) == 10


def test_a_writer_goes_on_where_it_stopped(model):
    whole = generate_text(model, TOKENIZER, "w1 w2", max_new_tokens=10, temperature=0)
    writer = Writer(model, TOKENIZER)
    first = "".join(writer.write("w1 w2", 4, temperature=0))
    second = "".join(writer.write("", 6, temperature=0))
    assert "w1 w2" + first + second == whole
    writer.reset()
    assert "".join(writer.write("w1 w2", 4, temperature=0)) == first


def test_a_stream_left_early_can_be_continued(model):
    whole = "".join(stream_text(model, TOKENIZER, "w1", max_new_tokens=8, temperature=0))
    writer = Writer(model, TOKENIZER)
    stream = writer.write("w1", 8, temperature=0)
    head = "".join(next(stream) for _ in range(3))
    assert head + "".join(writer.write("", 5, temperature=0)) == whole


def test_a_prompt_longer_than_a_chunk_is_read_whole(model):
    prompt = torch.randint(4, 12, (2, 600), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([600, 257])
    step = next(Decoding(model, prompt, Sampling(temperature=0), lengths=lengths))
    for row, length in enumerate(lengths.tolist()):
        logits, context = model(prompt[row : row + 1, :length])
        torch.testing.assert_close(step.context[row], context[0], rtol=0, atol=1e-5)
        logits[0, -1, :3] = -math.inf
        assert int(step.token[row]) == int(logits[0, -1].argmax())


def test_a_row_that_has_ended_reads_nothing_more(model):
    decoding = Decoding(model, torch.tensor([[BOS, 5], [BOS, 6]]), Sampling(temperature=0))
    first = next(decoding)
    decoding.ended[0] = True
    second = next(decoding)
    assert torch.equal(second.context[0], first.context[0])
    assert not torch.equal(second.context[1], first.context[1])
    assert (int(second.token[0]), float(second.log_prob[0])) == (0, 0.0)


@pytest.mark.parametrize("lengths", [[0, 2], [1, 3], [2]])
def test_lengths_out_of_range_are_named(model, lengths):
    with pytest.raises(ValueError, match=r"lengths = .*: must be 2 whole numbers from 1 to 2"):
        Decoding(model, torch.tensor([[BOS, 5], [BOS, 6]]), Sampling(), lengths=torch.tensor(lengths))


class ByteTokenizer(Bytes):
    """Ids 4 to 11 as the words of TOKENIZER would be, but three bytes of one character each time."""

    euro = "€".encode()

    def encode(self, text):
        return [4] * len(text)

    def decode(self, ids):
        return bytes(self.euro[(int(index) - 4) % 3] for index in ids if int(index) > 3).decode(errors="replace")


@pytest.mark.parametrize("first", [1, 2, 3, 4, 5])
def test_a_character_cut_by_the_limit_is_given_out_whole_by_the_next_call(model, first, monkeypatch):
    ids = iter([4, 5, 6] * 3)
    monkeypatch.setattr("newllm_lib.model.decoding.sample", lambda *rest: torch.tensor([next(ids)]))
    writer = Writer(model, ByteTokenizer())
    parts = ["".join(writer.write("", count)) for count in (first, 9 - first)]
    assert "".join(parts) == "€€€"
    assert parts[0] == "€" * (first // 3)


def test_a_call_that_is_refused_changes_nothing(model):
    writer, other = Writer(model, TOKENIZER), Writer(model, TOKENIZER)
    for options in ({"temperature": -1}, {"stop": [""]}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError):
            next(writer.write("w1 w2", **options))
    texts = ["".join(one.write("w1 w2", 5, temperature=0)) for one in (writer, other)]
    assert texts[0] == texts[1]


def test_one_stop_text_may_stand_alone_and_one_prompt_may_not(model):
    free = generate_texts(model, TOKENIZER, ["w1"], seed=5, max_new_tokens=9, temperature=3.0)[0]
    word = free.text.split()[3]
    alone, listed = (
        generate_texts(model, TOKENIZER, ["w1"], seed=5, max_new_tokens=9, temperature=3.0, stop=stop)[0]
        for stop in (word, [word])
    )
    assert alone == listed
    with pytest.raises(ValueError, match="prompts = 'w1': must be a list of texts"):
        generate_texts(model, TOKENIZER, "w1")


def test_a_stream_left_within_a_character_gives_it_out_whole_later(model, monkeypatch):
    ids = iter([4, 5, 6] * 2)
    monkeypatch.setattr("newllm_lib.model.decoding.sample", lambda *rest: torch.tensor([next(ids)]))
    writer = Writer(model, ByteTokenizer())
    stream = writer.write("", 9)
    assert [next(stream), next(stream)] == ["", ""]
    stream.close()
    assert "".join(writer.write("", 4)) == "€€"


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, "1", True])
def test_what_is_no_seed_gets_a_sentence(model, seed):
    with pytest.raises(ConfigError) as refused:
        generate_text(model, TOKENIZER, "w1", seed=seed)
    assert str(refused.value) == (
        f"seed = {seed!r}: must be a whole number from -9223372036854775808 to 18446744073709551615, or none"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: must be a number from 0"),
        ({"temperature": math.inf}, "temperature = inf: must be a number from 0"),
        ({"temperature": "hot"}, "temperature = 'hot': must be a number from 0"),
        ({"temperature": None}, "temperature = None: must be a number from 0"),
        ({"top_k": 2.5}, "top_k = 2.5: must be a whole number from 0 (0 = all)"),
        ({"top_p": math.nan}, "top_p = nan: must be a number above 0 to 1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens = 2.0: must be a whole number from 1"),
    ],
)
def test_options_that_cannot_be_get_a_sentence(model, options, message):
    with pytest.raises(ConfigError) as refused:
        generate_text(model, TOKENIZER, "w1", seed=1, **options)
    assert str(refused.value) == message


def test_numbers_of_numpy_draw_the_same_text(model):
    options = {"temperature": 0.75, "top_k": 5, "top_p": 0.5, "max_new_tokens": 6}
    numpys = {"temperature": np.float32(0.75), "top_k": np.int64(5), "top_p": np.float16(0.5)}
    expected = generate_text(model, TOKENIZER, "w1", seed=3, **options)
    assert generate_text(model, TOKENIZER, "w1", seed=np.int64(3), max_new_tokens=np.int32(6), **numpys) == expected
    for lowest_and_highest in (-(2**63), 2**64 - 1):
        assert generate_text(model, TOKENIZER, "w1", seed=lowest_and_highest)
