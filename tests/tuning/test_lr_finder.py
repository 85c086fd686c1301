import csv
import math

import pytest
import torch
from tiny import tiny_config, write_text

from newllm_lib.data.dataset import prepare
from newllm_lib.model.newllm import NewLLM
from newllm_lib.system.buffer_pool import BUFFERS
from newllm_lib.training.setup import make_setup
from newllm_lib.training.step import optimizer_step
from newllm_lib.tuning.lr_finder import RangeTest, lr_find, suggest


@pytest.fixture
def config(tmp_path):
    return tiny_config(write_text(tmp_path / "text"), dropout=0.0)


def test_rates_rise_evenly_in_their_logarithm(config):
    found = lr_find(config, low=1e-4, high=1e-1, steps=31)
    assert found.rates == pytest.approx([1e-4 * 10 ** (k / 10) for k in range(31)])
    assert len(found.losses) == len(found.smoothed) == 31
    assert 1e-4 < found.suggestion < 1e-1


def test_the_first_loss_is_that_of_the_untouched_weights(config):
    found = lr_find(config, low=1e-9, high=2e-9, steps=10)
    assert max(found.losses) - min(found.losses) < 0.3  # other batches, the same weights
    assert found.suggestion is None or found.suggestion <= 2e-9
    assert found.smoothed[0] == found.losses[0]
    # 0.9 x 0.1 x l0 + 0.1 x l1, over 1 - 0.81
    assert found.smoothed[1] == pytest.approx((0.09 * found.losses[0] + 0.1 * found.losses[1]) / 0.19)


def test_it_ends_where_the_loss_runs_away(config):
    seen = []
    found = lr_find(config, low=1e-2, high=1e4, steps=60, report=lambda step, rate, loss: seen.append(step))
    assert len(found.losses) < 60
    assert seen == list(range(1, len(found.losses) + 1))


def test_weights_and_generators_stay_as_they_are(config, tmp_path):
    model = NewLLM(make_setup(config).config.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    model.eval()
    tokenizer = prepare(config).tokenizer
    lr_find(config, model=model, tokenizer=tokenizer, low=1e-3, high=1.0, steps=12)
    assert BUFFERS.kept_bytes == 0
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_test_gives_the_same_losses(config):
    first, second = (lr_find(config, steps=12, low=1e-4, high=1e-2) for _ in range(2))
    assert first == second


def test_it_reads_a_stream_too(config):
    found = lr_find(config.replace(layout="stream", batch_size=4), steps=12, low=1e-4, high=1e-2)
    assert len(found.losses) == 12


def test_the_suggestion_is_the_steepest_place_before_the_lowest():
    rates = [10.0**k for k in range(-6, 1)]
    found, reason = suggest(rates, [7.0, 6.9, 6.0, 4.5, 4.0, 3.9, 9.0])
    assert found == 1e-4  # from 6.9 at 1e-5 to 4.5 at 1e-3: 1.2 nats a decade
    assert "by 1.20 nats a decade; it is lowest at 0.1" in reason
    assert suggest(rates, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])[0] is None
    assert suggest([], [])[0] is None


def test_the_rates_that_are_told_are_those_that_were_trained_with(config, monkeypatch):
    seen = []

    def step(model, optimizers, *arguments, **options):
        seen.append({type(one).__name__: {group["lr"] for group in one.param_groups} for one in optimizers})
        return optimizer_step(model, optimizers, *arguments, **options)

    monkeypatch.setattr("newllm_lib.training.step.optimizer_step", step)
    found = lr_find(config.replace(optimizer="muon", lr=1e-3, muon_lr=0.02), low=1e-4, high=1e-2, steps=12)
    assert [one for rates in seen for one in rates["AdamW"]] == pytest.approx(found.rates)
    assert [one for rates in seen for one in rates["Muon"]] == pytest.approx(found.muon_rates)
    assert found.muon_rates[0] == pytest.approx(20 * 1e-4)  # 0.02 / 1e-3 times the other rate
    assert found.suggested == {"lr": found.suggestion, "muon_lr": pytest.approx(20 * found.suggestion)}
    adam = lr_find(config, low=1e-4, high=1e-2, steps=12)
    assert (adam.muon_rates, adam.suggested) == (None, {"lr": adam.suggestion})


def test_what_it_leaves_in_a_folder(tmp_path):
    RangeTest([1e-3, 1e-2], [2.0, 1.5], [2.0, 1.7], 1e-2, "a reason").write(tmp_path / "out")
    assert (tmp_path / "out" / "lr_find.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "out" / "lr_find.csv") as file:
        assert list(csv.reader(file)) == [["rate", "loss", "smoothed"], ["0.001", "2.0", "2.0"], ["0.01", "1.5", "1.7"]]
    RangeTest([1e-3, 1e-2], [2.0, 1.5], [2.0, 1.7], 1e-2, "a reason", 20.0).write(tmp_path / "muon")
    header, first, _ = (tmp_path / "muon" / "lr_find.csv").read_text().splitlines()
    assert (header, first) == ("rate,loss,smoothed,muon_rate", "0.001,2.0,2.0,0.02")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0}, "low = 0: must be a number above 0"),
        ({"low": math.nan}, "low = nan: must be a number above 0"),
        ({"high": math.inf}, "high = inf: must be a number above 0"),
        ({"high": -1.0}, "high = -1.0: must be a number above 0"),
        ({"low": 2.0}, "low = 2.0: must be below high = 1.0"),
        ({"low": 1.0}, "low = 1.0: must be below high = 1.0"),
        ({"steps": 9}, "steps = 9: must be a whole number from 10"),
    ],
)
def test_options_out_of_range_are_named(config, options, message):
    with pytest.raises(ValueError) as error:
        lr_find(config, **options)
    assert message in str(error.value)


def test_a_model_of_another_vocabulary_is_refused(config):
    model = NewLLM(config.replace(vocab_size=17).model)
    with pytest.raises(ValueError, match="the model has 17 ids, the data's tokenizer"):
        lr_find(config, model=model, tokenizer=prepare(config).tokenizer)
    with pytest.raises(ValueError, match="needs the tokenizer that it was trained with"):
        lr_find(config, model=model)
