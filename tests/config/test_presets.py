import math

import pytest

from newllm_lib.config import RunConfig, presets, published
from newllm_lib.data.dataset import prepare
from newllm_lib.training.schedule import peak_rate

FAITHFUL = {  # batch, peak rate, epochs, precision, patience, parameters
    "cpu_baseline": (32, 1e-4, 50, "fp32", 15, 2_739_432),
    "t4_fp16": (512, 1e-4, 50, "fp16", 15, 2_739_432),
    "l4_fp16_unscaled": (2048, 1e-4, 50, "fp16", 15, 2_739_432),
    "l4_fp16_linear": (2048, 4e-4, 50, "fp16", 15, 2_739_432),
    "l4_fp16": (2048, 8e-4, 50, "fp16", 15, 2_739_432),
    "l4_fp16_extended": (2048, 8e-4, 150, "fp16", 30, 2_739_432),
    "l4_5_layers": (2048, 8e-4, 150, "fp16", 30, 2_476_776),
    "l4_advanced": (2048, 4e-4, 50, "fp16", 15, 4_840_936),
    "a100_fp16": (4096, 1.1e-3, 50, "fp16", 15, 2_739_432),
}
TUNED = {"quickstart", "auto"}


def test_presets_are_the_faithful_and_the_tuned_ones():
    assert set(presets.PRESETS) == FAITHFUL.keys() | TUNED
    assert FAITHFUL.keys() == presets.FAITHFUL


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_builds_carries_its_name_and_reads_small_data(name, write_corpus):
    config = presets.get(name)
    assert isinstance(config, RunConfig)
    assert config.preset == name
    prepared = prepare(config.replace(data=str(write_corpus())))
    assert prepared.config.preset == name
    assert prepared.split("train").ids.shape == (36, 64)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_says_what_it_is(name):
    assert presets.PRESETS[name].__doc__.startswith("Tuned" if name in TUNED else "Faithful: ")


@pytest.mark.parametrize("name", FAITHFUL)
def test_a_faithful_preset_is_the_published_recipe(name):
    config = presets.get(name)
    train, model = config.train, config.model
    batch_size, rate, *rest = FAITHFUL[name]
    assert train.batch_size == batch_size
    assert peak_rate(train, model.num_parameters).value == pytest.approx(rate, rel=1e-9)
    assert [train.epochs, train.precision, train.patience, model.num_parameters] == rest
    assert (train.optimizer, train.weight_decay, train.lr_schedule, train.warmup_steps) == ("adam", 0, "constant", 0)
    assert (train.clip_by_epoch, train.min_delta) == (((0, 0.5), (10, 1.0), (30, 2.0)), 0.001)
    assert (model.dropout, model.init_std, model.embedding_std, model.output_std) == (0.1, 0.02, 0.02, 0.02)
    assert (model.forget_gate_bias, model.context_clamp) == (0, 10)
    data = config.data
    assert (data.data, data.layout, data.sequence_length, data.stride) == ("wikitext-2", "windows", 64, 32)
    assert (data.min_words, model.vocab_size) == (5, 1000)


def test_rates_come_from_their_rules():
    """Where the rule gives the published rate exactly, the preset leaves it to the rule."""
    explicit = {name for name in FAITHFUL if presets.get(name).train.lr is not None}
    assert explicit == {"l4_advanced", "a100_fp16"}
    assert presets.get("l4_advanced").model.num_layers == 12
    assert presets.get("l4_advanced").model.context_dim == 512
    assert presets.get("l4_5_layers").model.num_layers == 5


def test_quickstart_is_bounded_in_steps():
    train = presets.get("quickstart").train
    assert (train.epochs, train.max_steps, train.batch_size) == (None, 390, 128)


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(
        ValueError, match=r"unknown preset 'l4_fp61'\. Did you mean 'l4_fp16'\? Presets: quickstart, auto"
    ):
        presets.get("l4_fp61")


def test_published_table():
    table = {name: (run.batch_size, run.lr, run.epochs, run.best_ppl) for name, run in published.RUNS.items()}
    assert table == {
        "cpu_baseline": (32, 1e-4, 27, 23.34),
        "l4_fp16_unscaled": (2048, 1e-4, 29, 46.7),
        "l4_fp16_linear": (2048, 4e-4, 50, 30.78),
        "l4_fp16": (2048, 8e-4, 50, 26.03),
        "l4_fp16_extended": (2048, 8e-4, 150, 20.60),
        "l4_5_layers": (2048, 8e-4, 150, 20.50),
        "l4_advanced": (2048, 4e-4, 50, 40.93),
    }


@pytest.mark.parametrize("name", published.RUNS)
def test_a_published_run_has_the_preset_that_repeats_it(name):
    config, run = presets.get(name), published.RUNS[name]
    rate = peak_rate(config.train, config.model.num_parameters)
    assert (config.train.batch_size, rate.value) == (run.batch_size, pytest.approx(run.lr, rel=1e-9))
    assert config.train.epochs >= run.epochs


@pytest.mark.parametrize("name", [name for name, run in published.RUNS.items() if run.curve])
def test_a_published_curve_ends_at_the_best_perplexity(name):
    run = published.RUNS[name]
    epochs = [epoch for epoch, _ in run.curve]
    assert epochs == sorted(set(epochs))
    assert epochs[-1] == run.epochs
    assert run.curve[-1][1] == pytest.approx(run.best_ppl, abs=0.05)
    assert min(ppl for _, ppl in run.curve) == run.curve[-1][1]


def test_published_losses_are_the_logarithms_of_the_curve():
    run = published.RUNS["l4_fp16_linear"]
    assert [row[0] for row in run.losses] == [epoch for epoch, _ in run.curve]
    losses = [row[2] for row in run.losses]
    assert losses == pytest.approx([math.log(ppl) for _, ppl in run.curve], abs=0.006)  # both are rounded


def test_milestones_are_published_results():
    best = {run.best_ppl for run in published.RUNS.values()}
    assert {ppl for ppl, _ in published.MILESTONES} <= best


IDENTITIES = {
    "quickstart": "078e12793be26079122dec967e9dcb2d0d35d6da035126a9a2f98d2787e4e238",
    "auto": "e4e59831d27693af1f12410a9ab3a5f19cda8385cf1302992785e40b356f98a4",
    "cpu_baseline": "3b554f9e6f4f9c2b1feb5f91962e53d6e5868a9302ec14dde9392efdddc0a92c",
    "t4_fp16": "df065704237c7961e914d820483b9ec787c29afc8abf9dd69d645bda58486af8",
    "l4_fp16_unscaled": "b09c4cfb457da2beb516408e04c2368b460afed4e464b629979f90448d2c29e3",
    "l4_fp16_linear": "31538faffc1d927a2414ff93b27d1629a3506c71e4ea35fa629bd0181f67202c",
    "l4_fp16": "6d176d01b1cac9000d21ef38509ad8518b21fba53cdf9667a98b8ede455cc6f6",
    "l4_fp16_extended": "6d176d01b1cac9000d21ef38509ad8518b21fba53cdf9667a98b8ede455cc6f6",
    "l4_5_layers": "6ee1779f4473013b5d86ed637d47294177f4267d73f5a2b14de59e82217a9537",
    "l4_advanced": "0400e309f245f02ea60ba383422b5f482852207a44ed4619081118d917c68935",
    "a100_fp16": "3f4e71fd12c5c13e17742ed8ccf51e72e62d7d43406387d44047eba0afe7668e",
}
"""Of each preset with a text whose fingerprint is 64 zeros, as commit 1f3c5f5 gave them: users' folders carry them."""


def test_no_preset_has_another_identity_than_it_had():
    assert {name: presets.get(name).identity("0" * 64) for name in presets.PRESETS} == IDENTITIES
