"""The folder of a trained model: weights (safetensors), configuration and tokenizer, written and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from newllm_lib.config import DataConfig, ModelConfig
from newllm_lib.config.fields import build
from newllm_lib.data.tokenizer import Tokenizer, tokenizer_from_dict
from newllm_lib.errors import CheckpointError, ConfigError, RunError
from newllm_lib.model.newllm import NewLLM
from newllm_lib.reporting.record import MODEL_CONFIG, PROTOCOL, TOKENIZER, WEIGHTS
from newllm_lib.system.files import make_folder, read_json, write_atomic, write_text_atomic


def load_weights(model: NewLLM, payload: dict[str, Any], path: Path) -> None:
    """Put a payload's weights into a model; CheckpointError lists both shapes and leaves the model untouched."""
    wanted, found = model.state_dict(), payload["model"]
    if not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise CheckpointError(f"{path}: its weights are damaged: not all of them are tensors")
    differing = [
        f"{name}: file {_shape(found.get(name))}, model {_shape(wanted.get(name))}"
        for name in sorted(wanted.keys() | found.keys())
        if _shape(found.get(name)) != _shape(wanted.get(name))
    ]
    if differing:
        raise CheckpointError(f"{path}: of another model: " + "; ".join(differing[:4]))
    if broken := not_finite(found):
        raise CheckpointError(f"{path}: not a model that can be used: {', '.join(broken[:4])} not finite")
    model.load_state_dict(found)


def not_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The names of those that hold NaN or an infinity."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def _shape(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def export_model(
    folder: Path,
    model: NewLLM,
    tokenizer: Tokenizer,
    dtype: torch.dtype | None = None,
    protocol: DataConfig | None = None,
) -> None:
    """Write model.safetensors, config.json and tokenizer.json, each whole: what `NewLLM.from_pretrained` reads.

    dtype: the type of the stored weights (None = their own); readers bring them back to FP32. protocol: how the text
    of the model was read, for data.json, so that whoever scores it reads alike; None = not known.
    """
    make_folder(folder)
    tensors = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(folder / WEIGHTS, lambda file: file.write(safetensors.torch.save(tensors)))
    write_text_atomic(folder / MODEL_CONFIG, json.dumps(model.config.to_dict(), indent=2) + "\n")
    write_text_atomic(folder / TOKENIZER, tokenizer_text(tokenizer))
    if protocol is None:
        (folder / PROTOCOL).unlink(missing_ok=True)  # of the model that was here before
    else:
        write_text_atomic(folder / PROTOCOL, protocol_text(protocol))


def protocol_text(protocol: DataConfig) -> str:
    """What data.json holds; where the text lies is left out."""
    values = {name: value for name, value in protocol.to_dict().items() if name != "data"}
    return json.dumps(values, indent=2) + "\n"


def load_protocol(folder: Path) -> DataConfig | None:
    """How the text of a model folder was read; None where it does not say, CheckpointError for a damaged data.json."""
    path = folder / PROTOCOL
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        if isinstance(values, dict):
            values.pop("data", None)  # no place that a stranger's file names is read
        return build(DataConfig, values)
    except (ConfigError, RunError) as error:
        raise CheckpointError(f"{path}: not a data protocol that can be read ({error})") from error


def tokenizer_text(tokenizer: Tokenizer) -> str:
    """What tokenizer.json holds."""
    return json.dumps(tokenizer.to_dict(), ensure_ascii=False) + "\n"


def load_exported(folder: Path) -> tuple[NewLLM, Tokenizer]:
    """Model and tokenizer of a folder that `export_model` wrote; CheckpointError names what is wrong with it."""
    try:
        config = build(ModelConfig, read_json(folder / MODEL_CONFIG))
        tokenizer = tokenizer_from_dict(read_json(folder / TOKENIZER))
        tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a model folder that can be read ({error})") from error
    check_vocabulary(config, tokenizer, folder)
    model = NewLLM(config)
    load_weights(model, {"model": tensors}, folder / WEIGHTS)
    return model, tokenizer


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, place: Path) -> None:
    """CheckpointError when a tokenizer and a model do not have the same number of ids."""
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{place}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: they do not "
            "belong together"
        )
