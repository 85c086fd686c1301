"""What an old file says, checked: the weights by their shapes, the histories, the recipe as far as it is known."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newllm_lib.config import ModelConfig, RunConfig
from newllm_lib.config.places import user_path
from newllm_lib.errors import CheckpointError, ConfigError
from newllm_lib.evaluation import perplexity
from newllm_lib.model.newllm import NewLLM
from newllm_lib.reporting.record import HISTORY_COLUMNS
from newllm_lib.sharing.legacy.safe_unpickle import Record, read

HISTORIES = ("train_losses", "val_losses", "train_ppls", "val_ppls")
"""Keys of the lists with a number an epoch."""

ATTRIBUTES = {
    "batch_size": ("batch_size",),
    "lr": ("learning_rate", "lr"),
    "epochs": ("num_epochs", "epochs", "max_epochs"),
    "dropout": ("dropout", "dropout_rate"),
    "sequence_length": ("max_seq_length", "max_seq_len", "max_length", "sequence_length"),
    "stride": ("stride",),
    "weight_decay": ("weight_decay",),
    "patience": ("patience", "early_stopping_patience"),
    "min_delta": ("min_delta", "early_stopping_min_delta"),
    "seed": ("seed", "random_seed"),
}
"""Settings of a run, and the attributes of an old configuration that stand for each, the likeliest first."""
SHAPE_ATTRIBUTES = {
    "vocab_size": ("vocab_size",),
    "embed_dim": ("embed_dim", "embedding_dim"),
    "hidden_dim": ("hidden_dim",),
    "num_layers": ("num_layers",),
    "context_dim": ("context_dim", "context_vector_dim"),
}
"""The same for the shape, which the tensors decide."""

_HEADS = ("context_update", "forget_gate", "input_gate")


class Recipe(NamedTuple):
    """What an old configuration says, sorted."""

    recognised: dict[str, Any]
    """Setting of a run to its value."""
    rejected: list[str]
    """Values that were not taken, each with the reason."""
    others: dict[str, str]
    """Attributes that are no setting here, their values as text."""


@dataclass(frozen=True)
class OldFile:
    """A file of the series, read and checked: the names and shapes are right, and every weight is finite."""

    path: Path
    sha256: str
    payload: dict[str, Any]
    config_class: str | None
    """Full name of the class of its configuration; None where that is a dictionary or missing."""
    shape: dict[str, int]
    """Fields of ModelConfig, from the tensors."""
    weights: dict[str, Tensor]
    """float32, under the names of `NewLLM`."""

    def recipe(self) -> Recipe:
        """What its configuration says that can be used."""
        return sort_attributes(attributes(self.payload.get("config")), self.shape)

    def model(self) -> NewLLM:
        """The model in evaluation mode."""
        dropout = {key: value for key, value in self.recipe().recognised.items() if key == "dropout"}
        model = NewLLM(ModelConfig(**self.shape, **dropout))
        model.load_state_dict(self.weights)
        return model.eval()


def import_checkpoint(path: str | Path) -> NewLLM:
    """The model of an old `.pt` file: float32, on the CPU, in evaluation mode. Nothing in the file runs.

    FileMissingError where there is no file; CheckpointError for one that is damaged, holds more than tensors, plain
    values and one configuration, or whose tensors are not those of a New-LLM: it says which, and what would be right.
    """
    return read_old(user_path(path)).model()


def read_old(path: Path) -> OldFile:
    """Read and check an old file; errors as for `import_checkpoint`."""
    content = read(path)
    if not isinstance(content.payload, dict):
        raise CheckpointError(f"{path}: not a file of the experiment series (it holds no dictionary)")
    payload = _plain(content.payload)
    if "format_version" in payload:
        raise CheckpointError(f"{path}: a checkpoint of newllm_lib itself, which needs no import")
    _check_keys(payload, ("model_state_dict",), path)
    found = payload["model_state_dict"]
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in dict.values(found)):
        raise CheckpointError(f"{path}: model_state_dict is not a dictionary of tensors")
    found = _plain(found)
    shape = _check_tensors(found, path)
    weights = _library_weights(_float32(found, path), shape["num_layers"], shape["embed_dim"])
    return OldFile(path, content.sha256, payload, content.config_class, shape, weights)


def _plain(found: dict) -> dict:
    """A dictionary without the attributes that an ordered one from a file may have, such as its own `items`."""
    return dict(dict.items(found))


def _check_keys(payload: dict[str, Any], wanted: tuple[str, ...], path: Path) -> None:
    missing = [key for key in wanted if key not in payload]
    if missing:
        raise CheckpointError(
            f"{path}: not a whole file of the experiment series: {', '.join(missing)} missing; it holds "
            f"{', '.join(map(repr, sorted(map(str, payload))[:8])) or 'nothing'}"
        )


# --- the weights ------------------------------------------------------------------------------------------------


def _check_tensors(found: dict[str, Tensor], path: Path) -> dict[str, int]:
    """The shape of the model; CheckpointError names the first tensors that are missing, unexpected or do not fit."""
    layers = max(1, sum(bool(re.fullmatch(r"fnn_layers\.\d+\.weight", str(name))) for name in found))
    wanted = _shapes(1, 1, 1, 1, layers)
    for problem, names in (("lacks", wanted.keys() - found.keys()), ("holds the unexpected", found.keys() - wanted)):
        if names:
            listed = ", ".join(sorted(map(repr, names))[:4]) + (" and more" if len(names) > 4 else "")
            raise CheckpointError(
                f"{path}: model_state_dict {problem} {listed}; the hidden layers of New-LLM are fnn_layers.0, .3, .6 "
                "and so on, each with weight and bias"
            )
    for name, shape in wanted.items():
        if found[name].ndim != len(shape) or not found[name].is_floating_point() or not found[name].numel():
            raise CheckpointError(
                f"{path}: {name} is {found[name].dtype} of shape {tuple(found[name].shape)}: must hold floating-point "
                f"numbers in {len(shape)} dimension{'s' * (len(shape) > 1)}"
            )
    (vocab, embed), (context,) = found["token_embedding.weight"].shape, found["context_norm.weight"].shape
    hidden = len(found["fnn_layers.0.weight"])
    for name, shape in _shapes(vocab, embed, hidden, context, layers).items():
        if tuple(found[name].shape) != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(found[name].shape)}: must be {shape} beside the others (vocabulary "
                f"{vocab}, embedding {embed}, hidden width {hidden}, context {context})"
            )
    shape = dict(vocab_size=vocab, embed_dim=embed, hidden_dim=hidden, num_layers=layers, context_dim=context)
    try:
        ModelConfig(**shape)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return shape


def _shapes(vocab: int, embed: int, hidden: int, context: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published model with its shape."""
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (vocab, embed)}
    sizes = {f"fnn_layers.{3 * n}": (hidden, hidden if n else embed + context) for n in range(layers)}
    sizes |= dict.fromkeys(_HEADS, (context, hidden)) | {"token_output": (vocab, hidden)}
    for name, size in sizes.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    return shapes | {"context_norm.weight": (context,), "context_norm.bias": (context,)}


def _float32(found: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights, whatever type they were stored in; CheckpointError names one that is not finite."""
    weights = {name: tensor.detach().to(torch.float32) for name, tensor in found.items()}
    for name, tensor in weights.items():
        if bad := int((~tensor.isfinite()).sum()):
            raise CheckpointError(
                f"{path}: {name} holds {bad:,} of {tensor.numel():,} values that are not finite (NaN or infinite)"
            )
    return weights


def _library_weights(old: dict[str, Tensor], layers: int, embed: int) -> dict[str, Tensor]:
    """The same weights under the names of `NewLLM`: the first layer in two halves, the three heads as one."""
    first = old["fnn_layers.0.weight"]  # (H, E + C)
    new = {
        "embedding.weight": old["token_embedding.weight"],
        "from_token.weight": first[:, :embed],
        "from_token.bias": old["fnn_layers.0.bias"],
        "from_context.weight": first[:, embed:],
    }
    for kind in ("weight", "bias"):
        new |= {f"layers.{n - 1}.{kind}": old[f"fnn_layers.{3 * n}.{kind}"] for n in range(1, layers)}
        new[f"context_heads.{kind}"] = torch.cat([old[f"{head}.{kind}"] for head in _HEADS])
        new[f"context_norm.{kind}"] = old[f"context_norm.{kind}"]
        new[f"output.{kind}"] = old[f"token_output.{kind}"]
    return new


# --- the histories ----------------------------------------------------------------------------------------------


class History(NamedTuple):
    """The rows of history.csv, and what is to be said about them."""

    rows: list[dict[str, Any]]
    notes: list[str]


def read_history(old: OldFile) -> History:
    """A row an epoch, from the file's lists; what they do not tell is None. CheckpointError for what is no number.

    Lists of different lengths are taken as they are, the first value of each being epoch 1, and a note says so: a run
    that was stopped between two of them leaves such a file. train_ppls is exp(train_losses) and has no column.
    """
    _check_keys(old.payload, (*HISTORIES, "current_epoch"), old.path)
    lists = {key: _numbers(old, key) for key in HISTORIES}
    epochs = max(map(len, lists.values()))
    rows, notes = [], []
    for epoch in range(epochs):
        train, val, _, ppl = (values[epoch] if epoch < len(values) else None for values in lists.values())
        known = {"epoch": epoch + 1, "train_loss": train, "val_loss": val}
        known["val_ppl"] = perplexity(val, 1) if ppl is None and val is not None else ppl
        rows.append(dict.fromkeys(HISTORY_COLUMNS) | known)
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{key} {len(values)}" for key, values in lists.items())
        notes.append(f"its lists have different lengths ({lengths}): the first value of each is taken as epoch 1")
    if old.payload["current_epoch"] not in (epochs, epochs - 1):  # counted from 1, or from 0
        notes.append(f"its current_epoch is {_shown(old.payload['current_epoch'])}, which does not fit them")
    return History(rows, notes)


def _numbers(old: OldFile, key: str) -> list[float]:
    values = old.payload[key]
    if not isinstance(values, (list, tuple)):
        raise CheckpointError(f"{old.path}: {key} is of type {type(values).__name__}: must be a list of numbers")
    for index, value in enumerate(values):
        if type(value) is not float and not (type(value) is int and abs(value) < 2**63):
            raise CheckpointError(f"{old.path}: {key}[{index}] is of type {type(value).__name__}: must be a number")
    return [float(value) for value in values]


# --- the recipe -------------------------------------------------------------------------------------------------


def attributes(config: Any) -> dict[str, Any]:
    """Names and values of an old configuration, an object or a dictionary; empty where it stored none by name.

    A class whose settings are class attributes stores none of them.
    """
    state = getattr(config, "state", None) if isinstance(config, Record) else config
    parts = state if isinstance(state, tuple) else (state,)  # an object with slots stores (its __dict__, the slots)
    found = {}
    for part in parts:
        if isinstance(part, dict):
            found |= _plain(part)
    return {key: value for key, value in found.items() if isinstance(key, str) and key.isidentifier()}


def sort_attributes(found: dict[str, Any], shape: dict[str, int]) -> Recipe:
    """Which attributes are settings of a run with a valid value, which are not valid, and which are no setting."""
    left, recognised, rejected = dict(found), {}, []
    for setting, names in SHAPE_ATTRIBUTES.items():
        for name in _first(names, left):
            value = left.pop(name)
            if not _equals(value, shape[setting]):
                rejected.append(f"{name} = {_shown(value)}: the tensors say {shape[setting]}")
    for setting, names in ATTRIBUTES.items():
        for name in _first(names, left):
            value = left.pop(name)
            try:
                RunConfig().replace(**{setting: value})
            except (ConfigError, OverflowError) as error:
                rejected.append(f"{name} = {_shown(value)}: {str(error).rpartition(': ')[2]}")
            else:
                recognised[setting] = value
    return Recipe(recognised, rejected, {name: _shown(value) for name, value in left.items()})


def _first(names: tuple[str, ...], found: dict[str, Any]) -> list[str]:
    return [name for name in names if name in found][:1]


def _equals(value: Any, number: int) -> bool:
    return isinstance(value, int) and value == number


def _shown(value: Any) -> str:
    """A value from a file as text that is safe to print: numbers and quoted words, a type's name for all else."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    plain = value is None or isinstance(value, (bool, int, float, str))
    return f"{value!r:.60}" if plain else f"({type(value).__name__})"
