import math

import pytest
import torch
from torch.nn.functional import linear

from newllm_lib.config import BOS, EOS, PAD, UNK, ModelConfig
from newllm_lib.data.tokenizer import WordTokenizer
from newllm_lib.generation import generate_text
from newllm_lib.model.decoding import generate, sample
from newllm_lib.model.newllm import NewLLM


@pytest.fixture
def model():
    model = NewLLM(ModelConfig(vocab_size=12, hidden_dim=16, context_dim=8, init_std=None, embedding_std=1.0))
    model.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.output.bias[EOS] = -50.0  # so that no text ends unless a test wants it to
    return model.eval()


PROMPT = torch.tensor([[BOS, 5, 6], [BOS, 7, 8]])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_greedy_tokens_equal_a_full_pass_over_the_whole_text(model):
    new = model.generate(PROMPT, max_new_tokens=6, temperature=0, allow_unknown=True).tokens
    logits = model(torch.cat([PROMPT, new], dim=1))[0]
    logits[..., [PAD, BOS]] = -math.inf
    assert torch.equal(logits[:, 2:-1].argmax(-1), new)


def test_going_on_with_the_carried_context_equals_one_long_call(model):
    whole = model.generate(PROMPT, max_new_tokens=10, temperature=0)
    first = model.generate(PROMPT, max_new_tokens=4, temperature=0)
    second = model.generate(first.tokens[:, -1:], max_new_tokens=6, temperature=0, context=first.context)
    assert torch.equal(torch.cat([first.tokens, second.tokens], dim=1), whole.tokens)
    torch.testing.assert_close(second.context, whole.context, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_text_and_the_global_generator_is_left_alone(model):
    before = torch.get_rng_state()
    first, second, other = (model.generate(PROMPT, 20, generator=seeded(s)).tokens for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_smallest_temperature_is_greedy(model):
    greedy = model.generate(PROMPT, 8, temperature=0).tokens
    assert torch.equal(model.generate(PROMPT, 8, temperature=1e-42, generator=seeded(0)).tokens, greedy)
    assert not torch.equal(model.generate(PROMPT, 8, temperature=5.0, generator=seeded(0)).tokens, greedy)


def test_special_ids_are_never_drawn_and_unknown_only_when_allowed(model):
    with torch.no_grad():
        model.output.bias[[PAD, UNK, BOS]] = 30.0  # by far the likeliest
    assert not set(model.generate(PROMPT, 50, temperature=1.0).tokens.flatten().tolist()) & {PAD, UNK, BOS}
    assert set(model.generate(PROMPT, 50, allow_unknown=True).tokens.flatten().tolist()) == {UNK}


def test_a_row_ends_at_its_end_of_text(model):
    with torch.no_grad():
        model.output.bias[EOS] = 2.0
    tokens = model.generate(PROMPT, 200, temperature=1.0, generator=seeded(3)).tokens
    assert tokens.shape[1] < 200
    for row in tokens.tolist():
        end = row.index(EOS)
        assert all(token == PAD for token in row[end + 1 :])


def test_dropout_is_off_while_generating_and_the_mode_is_put_back(model):
    model.train()
    first, second = (model.generate(PROMPT, 8, temperature=0).tokens for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


LOGITS = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))


def drawn(draws: int = 4000, **options) -> torch.Tensor:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    tokens = sample(LOGITS.expand(draws, -1), generator=seeded(0), **settings)
    return torch.bincount(tokens, minlength=4) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.81}, [0.526, 0.316, 0.158, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),  # squares, made to sum to one
        ({"temperature": 0}, [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(options, expected):
    torch.testing.assert_close(drawn(**options), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.025)
    assert [share == 0 for share in drawn(**options).tolist()] == [share == 0 for share in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: must be a number from 0"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1: must be a whole number from 0"),
        ({"top_p": 0.0}, "top_p = 0.0: must be a number above 0 to 1"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be a whole number from 1"),
    ],
)
def test_options_out_of_range_are_named(model, options, message):
    with pytest.raises(ValueError) as error:
        generate(model, PROMPT, **options)
    assert message in str(error.value)


def test_text_in_and_out(model):
    tokenizer = WordTokenizer([f"w{k}" for k in range(8)])
    text = generate_text(model, tokenizer, "W1 w2 other", seed=1, max_new_tokens=5)
    assert text.startswith("w1 w2 <UNK> w")
    assert len(text.split()) == 8
    assert text == generate_text(model, tokenizer, "w1 w2 other", seed=1, max_new_tokens=5)
    assert len(generate_text(model, tokenizer, "", seed=1, max_new_tokens=5).split()) == 5


def test_the_memory_of_a_step_does_not_depend_on_what_was_read(model):
    short, long = (model.hidden(torch.randint(4, 12, (1, length)))[1] for length in (2, 300))
    assert short.shape == long.shape
    assert linear(model.hidden(torch.tensor([[5]]), long)[0], *model.head).shape == (1, 1, 12)
