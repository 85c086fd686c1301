"""The plan of a run: every decision and its cost, line by line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from newllm_lib.config import FlatField, RunConfig, flat_fields, presets, published
from newllm_lib.reporting.formatting import counted
from newllm_lib.system.console import notebook_gpu
from newllm_lib.system.hardware import Machine
from newllm_lib.training.estimates import Speed, memory_estimate_bytes
from newllm_lib.training.schedule import warmup_of
from newllm_lib.training.setup import Setup


def unfaithful_reason(setup: Setup) -> str | None:
    """Why a re-creation of a published run is not the published one; None where nothing stands against it."""
    config, preset = setup.config, presets.get(setup.config.preset)
    changed = [
        f"{name} is {mine!r}, not {theirs!r}"
        for name, item in flat_fields().items()
        if (item.metadata["identity"] or name in ("patience", "min_delta")) and name not in ("data", "seed")
        for mine, theirs in [(_value(config, item), _value(preset, item))]
        if mine != theirs
    ]
    if setup.precision.substituted:
        changed.append(setup.precision.reason)
    if not is_published_protocol(setup):
        changed.append("the validation data are not those of the published protocol")
    return "; ".join(changed) or None


def _value(config: RunConfig, item: FlatField) -> Any:
    return getattr(getattr(config, item.section), item.name)


def is_published_protocol(setup: Setup) -> bool:
    """Whether the very ids that the series scored are scored: only then do its figures stand beside ours."""
    return setup.validation_split.digest == published.VALIDATION_DIGEST


def plan_lines(
    setup: Setup,
    folder: str,
    decay_steps: int | None = None,
    speed: Speed | None = None,
    warmup_steps: int | None = None,
    began_on: str = "",
) -> list[tuple[str, str]]:
    """(what, how much and why) for each decision, ready to print.

    decay_steps, warmup_steps: where a run has settled its own; speed: where it is known, for a line on the time;
    began_on: the name of the device of the run's first step, "" before it.
    """
    config, train_split, validation = setup.config, setup.train_split, setup.validation_split
    model, train = config.model, config.train
    micro = train.micro_batch_size
    texts = {name: len(encoded) for name, encoded in setup.prepared.texts.items()}
    tokens_per_step = train_split.num_tokens / setup.steps_per_epoch
    lines = [
        ("run", folder),
        ("model", f"{model.num_parameters:,} parameters ({counted(model.num_layers, 'layer')} of {model.hidden_dim}, "
                  f"embedding {model.embed_dim}, context {model.context_dim}, vocabulary {model.vocab_size})"),
        ("data", f"{setup.prepared.corpus_name}: {texts['train']:,} training and "
                 f"{counted(texts['validation'], 'validation text')}"),
        ("sequences", _sequences_line(setup)),
        ("tokens", f"{train_split.num_tokens:,} an epoch, {validation.num_tokens:,} in validation"),
        ("device", _device_line(setup.machine, began_on)),
        ("precision", f"{setup.precision.name}: {setup.precision.reason}"),
        ("engine", f"{setup.engine.name}: {setup.engine.reason}"),
        ("batch", f"{counted(train.batch_size, 'sequence')}, about {tokens_per_step:,.0f} tokens a step"
                  + (f", {micro} at a time" if micro else "")
                  + (f"; {setup.batch_reason}" if setup.batch_reason else "")),
        ("steps", f"{setup.total_steps:,} ({setup.steps_per_epoch:,} an epoch, "
                  f"{setup.total_steps / setup.steps_per_epoch:.2f} epochs)"),
        ("learning rate", _rate_line(setup, decay_steps, warmup_steps)),
        ("memory", f"about {memory_estimate_bytes(setup) / 2**30:.1f} GiB for training, of "
                   f"{setup.machine.memory_bytes / 2**30:.1f} GiB (an estimate from the shapes)"),
    ]  # fmt: skip
    if config.mirror_dir:
        kept = "the best, the final and the last two other checkpoints, verified"
        lines.insert(1, ("copy", f"{Path(config.mirror_dir, Path(folder).name)}: {kept}"))
    if warnings := setup.prepared.warnings:
        lines.append(("warning", "; ".join(warnings)))
    if speed:
        lines.append(("time", speed.total_text(setup)))
    return lines


_COLAB_GPUS = {"G4": "RTX PRO 6000"}
"""What torch calls a GPU whose name in Colab's menu is not part of its own."""


def _device_line(machine: Machine, began_on: str) -> str:
    """The device, and whether it is another than the notebook asks for, or than the run began on."""
    text = f"{machine.name} ({machine.device}, {counted(machine.threads, 'thread')})"
    if machine.passed_over:
        text += f"; the GPU is not used: {machine.passed_over}"
    asked = notebook_gpu()
    if asked and not re.search(rf"\b{re.escape(_COLAB_GPUS.get(asked, asked))}\b", machine.name):
        text += f"; this notebook asks for a GPU of type {asked} (Runtime > Change runtime type)"
    if began_on and began_on != machine.name:
        text += f"; the run began on {began_on}"
    return text


def _sequences_line(setup: Setup) -> str:
    data, split, held = setup.config.data, setup.train_split, setup.validation_split
    if split.carries_context:
        return (
            f"{counted(len(split.ids), 'chunk')} of {data.sequence_length} ids in "
            f"{counted(split.ids.shape[1], 'lane')}, the context carried; validation in "
            f"{counted(held.ids.shape[1], 'lane')}"
        )
    return (
        f"{len(split.ids):,} training and {len(held.ids):,} validation, {data.sequence_length} ids each "
        f"({1 - split.num_tokens / split.num_slots:.1%} padding)"
    )


def _rate_line(setup: Setup, decay_steps: int | None, warmup_steps: int | None) -> str:
    train = setup.config.train
    text = f"{setup.rate.value:.3g}: {setup.rate.reason}"
    if train.batch_policy != "recipe" and train.lr is not None:
        text += "; it does not follow the batch that was found, unless lr is none"
    if train.optimizer == "muon":
        text += f"; Muon {train.muon_lr:g} on the hidden matrices"
    course = f"; {train.lr_schedule}"
    end = train.decay_steps or decay_steps or setup.total_steps
    if train.lr_schedule == "cosine":
        course += f" to {train.lr_final_fraction:g} at step {end:,}"
    usual = warmup_of(train, end)
    warmup = usual if warmup_steps is None else warmup_steps
    if train.warmup_steps:
        course += f", warm-up {counted(warmup, 'step')}"
    if warmup < train.warmup_steps:
        why = "a tenth of the decay, less than" if warmup == usual else "as the run began, not"
        course += f" ({why} the {train.warmup_steps} of warmup_steps)"
    return text + course
