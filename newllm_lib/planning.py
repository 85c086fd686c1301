"""Every decision of a run, made before any time is spent, and what it will cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from newllm_lib import presets, published, schedule
from newllm_lib.config import FlatField, ModelConfig, RunConfig, TrainConfig, flat_fields
from newllm_lib.errors import ConfigError
from newllm_lib.hardware import Machine, Precision, choose_precision, default_batch_size, detect
from newllm_lib.recurrence.selfcheck import choose_engine
from newllm_lib.report import duration
from newllm_lib.text.prepare import Prepared, Split, prepare
from newllm_lib.trainer import Setup


def make_setup(config: RunConfig, decided: dict[str, Any] | None = None, prepared: Prepared | None = None) -> Setup:
    """Read the data (if they are not `prepared` yet, for a run of the same text) and decide what is left open.

    `decided` holds what an earlier part of the same run recorded (batch_size, micro_batch_size, precision, engine); it
    is kept, so that a run goes on as it began. A batch that a policy is yet to find starts as the recipe's, or the
    machine's. ConfigError when the configuration does not fit the data or the machine.
    """
    decided = decided or {}
    requested, train = config, config.train
    machine = detect(train.device, train.threads)
    precision = _precision(train, decided.get("precision"), machine)
    wanted = decided.get("engine", "auto") if train.engine == "auto" else train.engine
    engine = choose_engine(wanted, precision, machine.device)
    prepared = prepared.under(config) if prepared else prepare(config)
    identity = config.identity(prepared.fingerprint)  # of what was asked for: what is left open stays open in it
    config = prepared.config
    found = "batch_size" in decided and train.batch_policy != "recipe"
    if train.batch_size is None or train.batch_policy != "recipe":
        most = largest_batch(prepared.split("train", lanes=1), config)
        start = min(most, train.batch_size or default_batch_size(machine))
        config = config.replace(batch_size=decided.get("batch_size", start))
    if train.micro_batch_size is None:
        config = config.replace(micro_batch_size=decided.get("micro_batch_size"))
    train_split = prepared.split("train", config.train.batch_size)
    check_batch(config, train_split)
    return Setup(
        config=config,
        requested=requested,
        prepared=prepared,
        identity=identity,
        machine=machine,
        precision=precision,
        engine=engine,
        train_split=train_split,
        validation_split=prepared.split("validation"),
        rate=schedule.peak_rate(config.train, config.model.num_parameters),
        batch_reason=f"{train.batch_policy}: as this run began" if found else "",
    )


def with_batch(setup: Setup, batch_size: int, micro_batch_size: int | None = None, reason: str = "") -> Setup:
    """The same run with another batch: its rate by the rule, its stream in as many lanes."""
    config = setup.config.replace(batch_size=batch_size, micro_batch_size=micro_batch_size)
    split = setup.train_split
    if split.carries_context and split.ids.shape[1] != batch_size:
        split = setup.prepared.split("train", batch_size)
    rate = schedule.peak_rate(config.train, config.model.num_parameters)
    return dataclasses.replace(setup, config=config, train_split=split, rate=rate, batch_reason=reason)


def _precision(train: TrainConfig, decided: str | None, machine: Machine) -> Precision:
    """What an earlier part of the run used, or what was asked for, or the best of the machine."""
    requested, emulate = train.precision, train.emulate_precision
    chosen = choose_precision(decided or requested, machine, emulate)
    if decided is None or chosen.substituted:
        return chosen
    wanted = choose_precision(requested, machine, emulate)
    if wanted.substituted and wanted.name == decided:
        return wanted
    if requested in ("auto", decided):
        return Precision(decided, "as this run began")
    return Precision(decided, f"as this run began, not {requested}", substituted=True)


def largest_batch(split: Split, config: RunConfig) -> int:
    """Sequences of the training split, or lanes that each have a full sequence of the stream."""
    if config.data.layout == "windows":
        return len(split.ids)
    return max(1, split.num_tokens // (config.data.sequence_length - 1))


def check_batch(config: RunConfig, split: Split) -> None:
    """ConfigError when a batch holds more than the data has."""
    batch, most = config.train.batch_size, largest_batch(split, config)
    if batch > most:
        unit = "training sequences" if config.data.layout == "windows" else "full sequences for a lane each"
        raise ConfigError(f"TrainConfig.batch_size = {batch}: must be at most {most}, the number of {unit}")


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


class Speed(NamedTuple):
    """How fast a run trains here, and how that is known."""

    tokens_per_second: float
    """Real targets, validation left out."""
    basis: str
    """In words: what was measured, and what was scaled to it."""

    def training_seconds(self, setup: Setup) -> float:
        """Of the whole run, validations left out."""
        return setup.total_steps * setup.train_split.num_tokens / setup.steps_per_epoch / self.tokens_per_second


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters that multiply each token: the token half of the first layer is looked up, not multiplied."""
    h, c = config.hidden_dim, config.context_dim
    return h * c + (config.num_layers - 1) * h * h + 3 * c * h + config.vocab_size * h


def memory_estimate_bytes(setup: Setup) -> int:
    """Training memory beside torch itself: weights, gradients, optimizer, and what the backward pass keeps."""
    train, model = setup.config.train, setup.config.model
    states = 1 if train.optimizer == "muon" else 2
    fixed = model.num_parameters * 4 * (2 + states)
    rows = min(train.micro_batch_size or train.batch_size, train.batch_size)
    slots = rows * (setup.config.data.sequence_length - 1)
    width = 4 if setup.precision.name == "fp32" else 2
    of_slots = _reference_bytes if setup.engine.name == "reference" else _packed_bytes
    return fixed + of_slots(model, width, slots)


def _reference_bytes(model: ModelConfig, width: int, slots: int) -> int:
    """What the reference engine keeps for each slot: a layer's output (and mask), the gates in FP32, the ends."""
    layers = model.num_layers * model.hidden_dim * (2 * width + 1 if model.dropout else width)
    gates = model.context_dim * (3 * width + 11 * 4)
    ends = (model.embed_dim + 2 * model.hidden_dim) * (4 + width) + model.vocab_size * width
    # 1.25: what allocators keep; fits within 10 % the growth measured at batch 128 and 512 (results/LOG.md)
    return int(1.25 * slots * (layers + gates + ends)) + (64 << 20)


def _packed_bytes(model: ModelConfig, width: int, slots: int) -> int:
    """What the fused engine keeps: every output once, and a block of the backward loop's gradients twice.

    Against the growth measured at batch 32 to 2048: within 15 % in bf16, up to 25 % too high in FP32.
    """
    layers = model.num_layers * model.hidden_dim + 3 * model.context_dim
    ends = 4 * model.hidden_dim + model.context_dim + model.vocab_size
    kept = slots * (width * (layers + ends) + 4 * model.context_dim)
    return int(1.1 * kept) + min(slots, 1 << 14) * 2 * width * layers + (128 << 20)


def plan_lines(
    setup: Setup, folder: str, decay_steps: int | None = None, speed: Speed | None = None
) -> list[tuple[str, str]]:
    """(what, how much and why) for each decision, ready to print.

    decay_steps: where a run has settled its own; speed: where it is known, for a line on the time.
    """
    config, train_split, validation = setup.config, setup.train_split, setup.validation_split
    model, train = config.model, config.train
    micro = train.micro_batch_size
    texts = {name: len(encoded) for name, encoded in setup.prepared.texts.items()}
    tokens_per_step = train_split.num_tokens / setup.steps_per_epoch
    lines = [
        ("run", folder),
        ("model", f"{model.num_parameters:,} parameters ({model.num_layers} layers of {model.hidden_dim}, "
                  f"embedding {model.embed_dim}, context {model.context_dim}, vocabulary {model.vocab_size})"),
        ("data", f"{setup.prepared.corpus_name}: {texts['train']:,} training and {texts['validation']:,} "
                 "validation texts"),
        ("sequences", _sequences_line(setup)),
        ("tokens", f"{train_split.num_tokens:,} an epoch, {validation.num_tokens:,} in validation"),
        ("device", f"{setup.machine.name} ({setup.machine.device}, {setup.machine.threads} threads)"),
        ("precision", f"{setup.precision.name}: {setup.precision.reason}"),
        ("engine", f"{setup.engine.name}: {setup.engine.reason}"),
        ("batch", f"{train.batch_size} sequences, about {tokens_per_step:,.0f} tokens a step"
                  + (f", {micro} at a time" if micro else "")
                  + (f"; {setup.batch_reason}" if setup.batch_reason else "")),
        ("steps", f"{setup.total_steps:,} ({setup.steps_per_epoch:,} an epoch, "
                  f"{setup.total_steps / setup.steps_per_epoch:.2f} epochs)"),
        ("rate", _rate_line(setup, decay_steps)),
        ("memory", f"about {memory_estimate_bytes(setup) / 2**30:.1f} GiB for training, of "
                   f"{setup.machine.memory_bytes / 2**30:.1f} GiB (an estimate from the shapes)"),
    ]  # fmt: skip
    if config.mirror_dir:
        kept = "the best, the final and the last two other checkpoints, verified"
        lines.insert(1, ("copy", f"{Path(config.mirror_dir, Path(folder).name)}: {kept}"))
    if speed:
        lines.append(("time", f"about {duration(speed.training_seconds(setup))} of training, validation not counted "
                              f"({speed.tokens_per_second:,.0f} tokens/s, {speed.basis})"))  # fmt: skip
    return lines


def _sequences_line(setup: Setup) -> str:
    data, split, held = setup.config.data, setup.train_split, setup.validation_split
    if split.carries_context:
        return (
            f"{len(split.ids):,} chunks of {data.sequence_length} ids in {split.ids.shape[1]} lanes, the context "
            f"carried; validation in {held.ids.shape[1]} lanes"
        )
    return (
        f"{len(split.ids):,} training and {len(held.ids):,} validation, {data.sequence_length} ids each "
        f"({1 - split.num_tokens / split.num_slots:.1%} padding)"
    )


def _rate_line(setup: Setup, decay_steps: int | None) -> str:
    train = setup.config.train
    text = f"{setup.rate.value:.3g}: {setup.rate.reason}"
    if train.batch_policy != "recipe" and train.lr is not None:
        text += "; it does not follow the batch that was found, unless lr is none"
    if train.optimizer == "muon":
        text += f"; Muon {train.muon_lr:g} on the hidden matrices"
    course = f"; {train.lr_schedule}"
    if train.lr_schedule == "cosine":
        end = decay_steps or train.decay_steps or setup.total_steps
        course += f" to {train.lr_final_fraction:g} at step {end:,}"
    return text + course + (f", warm-up {train.warmup_steps} steps" if train.warmup_steps else "")
