"""Fields that have no effect as the others stand, each with the reason: the panel dims them."""

from __future__ import annotations

from newllm_lib.config import NAMED_TEXTS, RunConfig
from newllm_lib.training.schedule import warmup_of
from newllm_lib.training.setup import Setup


def overruled(config: RunConfig, setup: Setup | None = None) -> dict[str, str]:
    """Field -> a sentence that says why its value has no effect.

    setup: of the same configuration, where it is known; only then it is known whether epochs or max_steps comes first.
    """
    found = _by_model_and_data(config) | _by_recipe(config) | (_by_length(config, setup) if setup else {})
    found = {name: f"Not used: {why}" for name, why in found.items()}
    return found | (_warmup_of(config, setup) if setup else {})


def _by_model_and_data(config: RunConfig) -> dict[str, str]:
    model, data = config.model, config.data
    found = {}
    if model.init_std is not None:
        found["init_gain"] = f"init_std = {model.init_std:g} sets the initial weights"
    if data.layout == "stream":
        found |= dict.fromkeys(("stride", "min_words"), "layout = stream does not cut windows")
    else:
        found["eval_lanes"] = "layout = windows has no lanes"
    if data.tokenizer == "words":
        found["sentencepiece_model"] = "tokenizer = words"
    if data.data in NAMED_TEXTS and data.data != "builtin":
        found |= dict.fromkeys(("validation_fraction", "test_fraction"), f"{data.data} has its own splits")
    return found


def _by_recipe(config: RunConfig) -> dict[str, str]:
    train = config.train
    found = {}
    if train.lr is not None:
        found |= dict.fromkeys(("lr_rule", "lr_base", "batch_base"), f"lr = {train.lr:g} sets the learning rate")
    elif train.lr_rule == "none":
        found["batch_base"] = "lr_rule = none does not scale the learning rate with the batch"
    if train.optimizer != "muon":
        found |= dict.fromkeys(("muon_lr", "muon_momentum"), f"optimizer = {train.optimizer}")
    if train.lr_schedule == "constant":
        found |= dict.fromkeys(("lr_final_fraction", "decay_steps"), "lr_schedule = constant does not decay")
    if train.batch_policy != "recipe":
        found["batch_size"] = f"batch_policy = {train.batch_policy} finds the batch"
    if train.patience is None:
        found["min_delta"] = "patience = none never stops early"
    if train.precision == "auto":
        found["emulate_precision"] = "precision = auto takes a format that the hardware has"
    return found


def _by_length(config: RunConfig, setup: Setup) -> dict[str, str]:
    train, found = config.train, {}
    if train.epochs and train.max_steps:
        by_epochs = train.epochs * setup.steps_per_epoch
        if train.max_steps < by_epochs:
            found["epochs"] = f"max_steps = {train.max_steps:,} ends the run first (epochs would at {by_epochs:,})"
        elif by_epochs < train.max_steps:
            found["max_steps"] = f"epochs = {train.epochs:,} ends the run first, at step {by_epochs:,}"
    return found


def _warmup_of(config: RunConfig, setup: Setup) -> dict[str, str]:
    train, total = config.train, setup.total_steps
    warmup = warmup_of(train, train.decay_steps or total)
    if warmup < train.warmup_steps:
        return {"warmup_steps": f"The run is short: its warm-up takes {warmup:,} steps, a tenth of the decay"}
    if warmup >= total:
        return {"warmup_steps": f"Longer than the run ({total:,} steps): the learning rate does not reach its peak"}
    return {}
