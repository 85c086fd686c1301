"""What a run is made of: keyword-only dataclasses, validated when they are built, without torch.

How a field is declared and checked stands in `fields`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import operator
import re
import typing
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from newllm_lib.config.fields import Checked, build, field_docs, field_types, setting
from newllm_lib.errors import ConfigError

SPECIAL_TOKENS = ("<PAD>", "<UNK>", "<BOS>", "<EOS>")
PAD, UNK, BOS, EOS = range(4)

NAMED_TEXTS = ("builtin", "wikitext-2", "wikitext-103")
"""Data that have the same name on every machine."""

IDENTITY_VERSION = 1
"""Raise it when a default or the meaning of a field changes, so that old and new runs get different names."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """The shape and the initial values of a New-LLM."""

    vocab_size: int = setting(1000, len(SPECIAL_TOKENS) + 1, 1_000_000)
    """Token ids, the 4 special ones included."""
    embed_dim: int = setting(256, 1, 65_536)
    """Width of a token embedding (units)."""
    hidden_dim: int = setting(512, 1, 65_536)
    """Width of a hidden layer (units)."""
    num_layers: int = setting(6, 1, 1_000)
    """Hidden layers from the input to the output of one token (layers)."""
    context_dim: int = setting(256, 1, 65_536)
    """Width of the context vector carried from token to token (units)."""
    dropout: float = setting(0.1, 0, 1, open_high=True)
    """Share of hidden units dropped while training (0 to below 1)."""
    context_clamp: float = setting(10.0, 0, 1e6, open_low=True)
    """Bound of every context value after its LayerNorm (absolute value)."""
    init_std: float | None = setting(0.02, 0, 10, open_low=True)
    """Standard deviation of the initial weights; none = variance-preserving: gain x sqrt(2 / fan-in)."""
    init_gain: float = setting(1.0, 0, 100, open_low=True)
    """Factor on the variance-preserving standard deviation (read when init_std is none)."""
    embedding_std: float = setting(0.02, 0, 10, open_low=True)
    """Standard deviation of the initial token embeddings."""
    output_std: float = setting(0.02, 0, 10)
    """Standard deviation of the initial output head (0 starts from the uniform distribution)."""
    forget_gate_bias: float = setting(0.0, -20, 20)
    """Initial bias of the forget gate, before the sigmoid (1 keeps 73 % of the context a token)."""

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of this model, counted from its shape."""
        v, e, h, c = self.vocab_size, self.embed_dim, self.hidden_dim, self.context_dim
        embedding = v * e
        hidden = h * (e + c) + h + (self.num_layers - 1) * (h * h + h)
        context = 3 * (c * h + c) + 2 * c
        output = v * h + v
        return embedding + hidden + context + output


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """Which text, and how it becomes sequences."""

    data: str | tuple[str, ...] = setting("wikitext-2", path=True)
    """wikitext-2, wikitext-103, builtin, a folder with train and valid files, a text file, or a file pattern."""
    text_unit: str = setting("line", choices=("line", "paragraph", "file"))
    """One text is: a line, a paragraph (lines up to a blank one, joined), or a whole file as it is (for code)."""
    tokenizer: str = setting("words", choices=("words", "sentencepiece"))
    """words = lower-cased words, as published; sentencepiece = pieces of any text, nothing lost."""
    sentencepiece_model: str = setting("bpe", choices=("bpe", "unigram"))
    """How pieces are found (sentencepiece only)."""
    layout: str = setting("windows", choices=("windows", "stream"))
    """windows = each text cut into overlapping windows, as published; stream = one text, the context carried on."""
    sequence_length: int = setting(64, 2, 1_000_000)
    """Ids in one sequence (tokens); the model reads all but the last and predicts all but the first."""
    stride: int = setting(32, 1, 1_000_000)
    """Distance between the starts of two windows of a long text (tokens; windows only)."""
    min_words: int = setting(5, 0, 1_000_000)
    """Texts with fewer are skipped (words, or pieces of SentencePiece; windows only)."""
    validation_fraction: float = setting(0.05, 0, 0.5, open_low=True)
    """Share of a text file that becomes the validation split (texts; text files only)."""
    test_fraction: float = setting(0.05, 0, 0.5, open_low=True)
    """Share of a text file, at its end, that becomes the test split (texts; text files only)."""
    eval_lanes: int = setting(32, 1, 1_000_000)
    """Parallel pieces a stream is evaluated in, each from an empty context (lanes; stream only)."""

    def __post_init__(self):
        super().__post_init__()
        sources = self.data if isinstance(self.data, tuple) else (self.data,)
        if not sources or not all(isinstance(source, str) and source for source in sources):
            raise ConfigError(f"data = {self.data!r}: must be a corpus, a folder, or one or more text files")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """The recipe, and how this machine carries it out."""

    epochs: int | None = setting(50, 1, 1_000_000, identity=False)
    """Passes over the training sequences (epochs); none = as many as max_steps needs."""
    max_steps: int | None = setting(None, 1, 1_000_000_000, identity=False)
    """Optimizer steps after which training ends (steps); none = as many as epochs give."""
    batch_size: int | None = setting(32, 1, 1_000_000)
    """Sequences in one optimizer step (stream layout: parallel lanes); none = by the hardware."""
    batch_policy: str = setting("recipe", choices=("recipe", "fill", "fast"))
    """recipe = batch_size as it is, in pieces where memory is short; fill = the largest batch that fits 90 % of it;
    fast = the smallest batch within 5 % of the best speed. The last two replace batch_size, and lr_rule the rate."""
    micro_batch_size: int | None = setting(None, 1, 1_000_000, identity=False)
    """Sequences in one forward and backward pass, gradients accumulated; none = the whole batch."""
    optimizer: str = setting("adam", choices=("adam", "adamw", "muon"))
    """adam, adamw, or muon = Muon on the hidden matrices with AdamW on the rest."""
    lr: float | None = setting(None, 0, 100, open_low=True)
    """Peak learning rate; none = lr_base scaled by lr_rule."""
    lr_rule: str = setting("none", choices=("none", "linear", "sqrt"))
    """How the rate grows with batch_size / batch_base."""
    lr_base: float = setting(1e-4, 0, 100, open_low=True)
    """Learning rate at batch_base, from which lr_rule starts."""
    batch_base: int = setting(32, 1, 1_000_000)
    """Batch size for which lr_base is right (sequences)."""
    scale_lr_by_model_size: bool = setting(False)
    """Divide the rate by the parameter count over that of the published baseline (2,739,432)."""
    muon_lr: float = setting(0.02, 0, 100, open_low=True)
    """Peak learning rate of the matrices that Muon updates (optimizer muon only)."""
    muon_momentum: float = setting(0.95, 0, 1, open_high=True)
    """Momentum of Muon (optimizer muon only)."""
    beta1: float = setting(0.9, 0, 1, open_high=True)
    """Decay of the running mean of gradients (Adam, AdamW)."""
    beta2: float = setting(0.999, 0, 1, open_high=True)
    """Decay of the running mean of squared gradients (Adam, AdamW)."""
    weight_decay: float = setting(0.0, 0, 10)
    """Weight decay of the optimizer (decoupled in adamw and muon)."""
    lr_schedule: str = setting("constant", choices=("constant", "cosine"))
    """Course of the rate after the warm-up."""
    warmup_steps: int = setting(0, 0, 1_000_000_000)
    """Steps over which the rate rises linearly from near zero (steps)."""
    decay_steps: int | None = setting(None, 1, 1_000_000_000, identity=False)
    """Step at which a decaying rate reaches its end (steps); none = the end of the run as first planned."""
    lr_final_fraction: float = setting(0.0, 0, 1)
    """Rate at the end of the decay, as a share of the peak."""
    clip_by_epoch: tuple[tuple[int, float], ...] = setting(((0, 0.5), (10, 1.0), (30, 2.0)))
    """Largest gradient norm from each epoch (counted from 0) on, as (epoch, norm) pairs; in the shell 0:0.5,10:1."""
    patience: int | None = setting(15, 1, 1_000_000, identity=False)
    """Validations without improvement after which training stops; none = never."""
    min_delta: float = setting(0.001, 0, 100, identity=False)
    """Fall of the validation loss that counts as improvement for patience (nats)."""
    validate_every_steps: int | None = setting(None, 1, 1_000_000_000, identity=False)
    """Steps between validations (steps), besides the one at the end of each epoch and of the run."""
    checkpoint_every_epochs: int = setting(5, 1, 1_000_000, identity=False)
    """Epochs between the checkpoints that are kept (epochs)."""
    checkpoint_every_minutes: float = setting(5.0, 0, 100_000, open_low=True, identity=False)
    """Wall-clock time between the checkpoints that guard against a lost machine; the last two stay (minutes)."""
    max_skipped_steps: int = setting(20, 1, 1_000_000, identity=False)
    """Skipped FP16 steps in a row after which training stops, or more than so many among twice as many (steps)."""
    eval_batch_size: int | None = setting(None, 1, 1_000_000, identity=False)
    """Sequences, or lanes of a stream, in one forward pass of the evaluation; none = by the hardware."""
    seed: int = setting(42, 0, 2**63 - 1)
    """Seed of the initial weights, the order of the batches and the dropout (masks differ from device to device)."""
    precision: str = setting("auto", choices=("auto", "fp32", "bf16", "fp16"))
    """Number format of the matrix products; auto = by the hardware."""
    emulate_precision: bool = setting(False, identity=False)
    """Compute in that format even where the hardware lacks it: the same rounding, slowly; else in the nearest one."""
    device: str = setting("auto", identity=False)
    """auto, cpu, cuda, cuda:1, ..."""
    engine: str = setting("auto", identity=False)
    """Implementation of the recurrence; auto = the best that this machine has."""
    cuda_graph: str = setting("auto", choices=("auto", "on", "off"), identity=False)
    """Replay each training step as one CUDA graph; auto = on a GPU, where its gradients agree with the plain step's."""
    threads: int | None = setting(None, 1, 4096, identity=False)
    """CPU threads of torch while training (threads); none = torch's own choice."""

    def __post_init__(self):
        super().__post_init__()
        if self.epochs is None and self.max_steps is None:
            raise ConfigError("epochs = none and max_steps = none: give at least one of them")
        self._check_clip()

    def _check_clip(self):
        try:
            pairs = tuple((operator.index(epoch), float(norm)) for epoch, norm in self.clip_by_epoch)
        except (TypeError, ValueError):
            pairs = ()
        epochs = [epoch for epoch, _ in pairs]
        if (
            not pairs
            or epochs[0] != 0
            or epochs != sorted(set(epochs))
            or not all(0 < norm < math.inf for _, norm in pairs)
        ):
            raise ConfigError(
                f"clip_by_epoch = {self.clip_by_epoch!r}: must be (epoch, norm) pairs with rising epochs, "
                "the first 0, and norms above 0, for example ((0, 0.5), (10, 1.0))"
            )
        object.__setattr__(self, "clip_by_epoch", pairs)  # whole norms as floats: equal settings, equal identities


LONGEST_NAME = 220
"""Bytes in a run's name: the names of its checkpoints add 35, and 255 are what file systems take."""


def _is_folder_name(name: str) -> bool:
    """Whether every system takes a name for a folder, and every file and picture can show it."""
    if re.search(r'[\x00-\x1f\x7f/\\:*?"<>|\ud800-\udfff]', name) or len(name.encode()) > LONGEST_NAME:
        return False
    return bool(name) and not name.startswith(".")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """A whole run: which model, on which data, by which recipe, kept where."""

    preset: str = setting("custom", identity=False)
    """Name of the preset that this run started from."""
    name: str | None = setting(None, identity=False)
    """Folder of the run under results_dir; none = <preset>-<6 hex digits of the run's identity>."""
    results_dir: str = setting("results", identity=False, path=True)
    """Folder that holds the runs."""
    mirror_dir: str | None = setting(None, identity=False, path=True)
    """Folder that keeps a second, verified copy of each run, for example on a mounted drive; none = nowhere."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape and initial values of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text and sequences."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Recipe and machine."""

    def __post_init__(self):
        super().__post_init__()
        if self.name is not None and not _is_folder_name(self.name):
            raise ConfigError(
                f"name = {self.name!r}: must be a plain folder name of at most {LONGEST_NAME} bytes, without "
                '/ \\ : * ? " < > | or control characters, and not starting with a dot'
            )

    def replace(self, **flat) -> RunConfig:
        """A copy with fields changed by their own name, wherever they live: `replace(lr=1e-3, dropout=0.0)`."""
        owners = flat_fields()
        changes: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            if key not in owners:
                close = difflib.get_close_matches(key, owners, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"unknown setting {key!r}.{hint} Known: {', '.join(sorted(owners))}")
            changes.setdefault(owners[key].section, {})[key] = value
        own = changes.pop("run", {})
        parts = {name: dataclasses.replace(getattr(self, name), **values) for name, values in changes.items()}
        return dataclasses.replace(self, **own, **parts)

    def refusals(self, **flat) -> dict[str, str]:
        """Why single fields cannot have these values, whatever the others are: field -> the words of ConfigError."""
        alone, found = self.replace(epochs=1, max_steps=1), {}  # so that neither is refused for lack of the other
        for name, value in flat.items():
            try:
                alone.replace(**{name: value})
            except ConfigError as error:
                found[name] = str(error)
        return found

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; an unknown key is an error that names it."""
        parts = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
        own = {key: value for key, value in values.items() if key not in parts}
        return build(cls, {**own, **{key: build(part, values.get(key, {})) for key, part in parts.items()}})

    def identity(self, data_fingerprint: str) -> str:
        """Hash of what defines the result: model, recipe, seed and the content of the data (not its path).

        Only values that differ from their defaults count, so that a field added later changes no existing name.
        """
        chosen = {}
        for section in ("model", "data", "train"):
            part = getattr(self, section)
            for item in dataclasses.fields(part):
                value = getattr(part, item.name)
                if item.metadata["identity"] and item.name != "data" and value != item.default:
                    chosen[f"{section}.{item.name}"] = value
        chosen["data"] = data_fingerprint
        chosen["version"] = IDENTITY_VERSION
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class FlatField:
    """One configuration field as the shell and the notebook show it."""

    name: str
    section: str
    type: Any
    doc: str
    default: Any
    metadata: typing.Mapping[str, Any]


@cache
def flat_fields() -> dict[str, FlatField]:
    """Every setting of a run by its own name, which is unique across the sections."""
    found: dict[str, FlatField] = {}
    for section, cls in (("model", ModelConfig), ("data", DataConfig), ("train", TrainConfig), ("run", RunConfig)):
        hints, docs = field_types(cls), field_docs(cls)
        for item in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[item.name]):
                continue
            assert item.name not in found, item.name
            found[item.name] = FlatField(
                item.name, section, hints[item.name], docs[item.name], item.default, item.metadata
            )
    return found
