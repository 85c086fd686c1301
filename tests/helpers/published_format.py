"""Files as the experiment series wrote them, and its formulas under its own parameter names, in NumPy alone."""

import contextlib
import dataclasses
import sys
import types

import numpy as np
import torch

SHAPE = {"vocab_size": 34, "embed_dim": 5, "hidden_dim": 7, "num_layers": 3, "context_dim": 4}
"""34: the words of `tiny.write_text` and the special ids."""
SETTINGS = {
    "batch_size": 2048, "learning_rate": 8e-4, "num_epochs": 50, "dropout": 0.2, "max_seq_length": 12, "patience": 30,
    "vocab_size": 34, "context_vector_dim": 4, "gradient_clip": 1.0, "device": "cuda", "use_amp": True,
}  # fmt: skip
HISTORY = {
    "train_losses": [3.6, 3.3, 3.2],
    "val_losses": [3.5, 3.25, 3.4],
    "train_ppls": [36.6, 27.1, 24.5],
    "val_ppls": [33.1, 25.8, 30.0],
    "current_epoch": 2,
}
"""Three epochs, the second the best; current_epoch counted from 0."""


def old_weights(seed=0, **changes):
    """Every tensor of the series' model, float32, large enough for each to matter."""
    shape = SHAPE | changes
    v, e, h, c = (shape[f"{name}"] for name in ("vocab_size", "embed_dim", "hidden_dim", "context_dim"))
    sizes = {"token_embedding.weight": (v, e)}
    for layer in range(shape["num_layers"]):
        sizes[f"fnn_layers.{3 * layer}.weight"] = (h, h if layer else e + c)
        sizes[f"fnn_layers.{3 * layer}.bias"] = (h,)
    for name, rows in (("token_output", v), ("context_update", c), ("forget_gate", c), ("input_gate", c)):
        sizes |= {f"{name}.weight": (rows, h), f"{name}.bias": (rows,)}
    sizes |= {"context_norm.weight": (c,), "context_norm.bias": (c,)}
    generator = np.random.default_rng(seed)
    return {name: generator.normal(0, 0.6, size).astype(np.float32) for name, size in sizes.items()}


def old_logits(weights, tokens):
    """Logits (T, V) and the last context (C,) in float64, one token after the other from the empty context."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    layers = sum(name.startswith("fnn_layers") for name in w) // 2
    context = np.zeros(len(w["context_norm.weight"]))
    logits = []
    for token in tokens:
        h = np.concatenate([w["token_embedding.weight"][token], context])
        for layer in range(layers):
            h = np.maximum(0, w[f"fnn_layers.{3 * layer}.weight"] @ h + w[f"fnn_layers.{3 * layer}.bias"])
        logits.append(w["token_output.weight"] @ h + w["token_output.bias"])
        d, f, i = (
            w[f"{name}.weight"] @ h + w[f"{name}.bias"] for name in ("context_update", "forget_gate", "input_gate")
        )
        context = context / (1 + np.exp(-f)) + d / (1 + np.exp(-i))
        context = (context - context.mean()) / np.sqrt(context.var() + 1e-5)
        context = np.clip(context * w["context_norm.weight"] + w["context_norm.bias"], -10, 10)
    return np.array(logits), context


@contextlib.contextmanager
def installed(full_name, value):
    """A class or function as if the package `src` were installed; it is gone afterwards."""
    module, _, name = full_name.rpartition(".")
    parts = module.split(".")
    names = [".".join(parts[: n + 1]) for n in range(len(parts))]
    before = {name: sys.modules.get(name) for name in names}
    own = value.__module__, value.__qualname__, value.__name__
    value.__module__, value.__qualname__, value.__name__ = module, name, name
    try:
        for part in names:
            sys.modules[part] = types.ModuleType(part)
        setattr(sys.modules[module], name, value)
        yield value
    finally:
        value.__module__, value.__qualname__, value.__name__ = own
        for part, module in before.items():
            sys.modules.pop(part) if module is None else sys.modules.update({part: module})


def plain_class():
    """A class whose settings are attributes of the object."""

    class Config:
        def __init__(self, **settings):
            self.__dict__.update(settings)

    return Config


def data_class(settings, **options):
    """A dataclass with the settings as fields."""
    return dataclasses.make_dataclass(
        "Config", [(key, type(value), dataclasses.field(default=value)) for key, value in settings.items()], **options
    )


def old_payload(weights=None, config=None, **changes):
    """What the series saved, with an optimizer's state as torch gives it."""
    weights = old_weights() if weights is None else weights
    state = torch.nn.Module()
    for name, value in weights.items():
        state.register_buffer(name.replace(".", "/"), torch.as_tensor(value).clone())
    tensors = state.state_dict()  # an ordered dictionary with metadata, as a module gives it
    for name in list(tensors):
        tensors[name.replace("/", ".")] = tensors.pop(name)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter], lr=8e-4)
    parameter.sum().backward()
    optimizer.step()
    payload = {"model_state_dict": tensors, "optimizer_state_dict": optimizer.state_dict(), **HISTORY, "config": config}
    return payload | changes


def write_old(
    path, weights=None, settings=SETTINGS, *, legacy=False, full_name="src.utils.config.NewLLMConfig", **changes
):
    """A file with an object of a plain class as its configuration, whose package is not there any more."""
    with installed(full_name, plain_class()) as config_class:
        torch.save(
            old_payload(weights, config_class(**settings), **changes), path, _use_new_zipfile_serialization=not legacy
        )
    return path
