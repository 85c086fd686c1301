"""A model folder with its card, exported from a run, a checkpoint or another model folder."""

from __future__ import annotations

from pathlib import Path

import torch

from newllm_lib.config.places import user_path
from newllm_lib.errors import RunError
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.pretrained import export_model
from newllm_lib.reporting.model_card import model_card
from newllm_lib.reporting.record import CARD, MODEL, WEIGHTS
from newllm_lib.runs.run import Run, load_model
from newllm_lib.system.files import file_errors, write_text_atomic


@file_errors()
def export(what: Run | str | Path, folder: str | Path, *, half: bool = False) -> Path:
    """Write a model folder: weights (safetensors; FP16 with `half`), configuration, tokenizer and model card.

    what: a run, or the place of one, of a model folder, or of a checkpoint. `NewLLM.from_pretrained(folder)` and
    every command read the result. RunError when the folder holds something else, or a weight does not fit FP16.
    """
    folder = user_path(folder)
    if folder.exists() and not (folder / WEIGHTS).exists() and any(folder.iterdir()):
        raise RunError(f"{folder}: holds other files; name a new or an empty folder, or a model folder to replace")
    place = what.folder if isinstance(what, Run) else user_path(what)
    if folder.resolve() in (place.resolve(), (place / MODEL).resolve()):
        raise RunError(f"{folder}: is where the model comes from; name another folder")
    loaded = load_model(place)
    if half:
        _check_half(loaded.model)
    export_model(folder, loaded.model, loaded.tokenizer, torch.float16 if half else None, loaded.protocol)
    write_text_atomic(folder / CARD, loaded.model.card or model_card(None, loaded.model.config))
    return folder


def _check_half(model: NewLLM) -> None:
    most = torch.finfo(torch.float16).max
    for name, tensor in model.state_dict().items():
        largest = float(tensor.abs().max())
        if not largest <= most:
            raise RunError(
                f"{name} holds {largest:g}: FP16 ends at {most:g}; export without half (in the shell --half)"
            )
