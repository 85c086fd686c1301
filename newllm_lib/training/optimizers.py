"""The optimizers of a run, and their learning rates."""

from __future__ import annotations

import torch

from newllm_lib.config import TrainConfig
from newllm_lib.model.newllm import NewLLM
from newllm_lib.training.muon import MUON_DTYPES, Muon


def make_optimizers(
    model: NewLLM, train: TrainConfig, peak_lr: float, precision: str = "fp32"
) -> list[torch.optim.Optimizer]:
    """Adam, AdamW, or Muon with AdamW; each group keeps its peak learning rate under `peak_lr`.

    Muon (Jordan et al. 2024) orthogonalises the update of a matrix, so it takes the hidden matrices: both halves of the
    first layer, the other layers and the context heads. Embedding, output head, biases and LayerNorm stay with AdamW.
    precision: the run's format (fp32, bf16 or fp16), which decides that of Muon's products.
    """
    adam = {"lr": peak_lr, "betas": (train.beta1, train.beta2), "weight_decay": train.weight_decay}
    if train.optimizer == "adam":
        optimizers = [torch.optim.Adam(model.parameters(), **adam)]
    elif train.optimizer == "adamw":
        optimizers = [torch.optim.AdamW(model.parameters(), **adam)]
    else:
        hidden = (model.from_token, model.from_context, *model.layers, model.context_heads)
        matrices = [layer.weight for layer in hidden]
        taken = {id(matrix) for matrix in matrices}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
        muon = {"lr": train.muon_lr, "momentum": train.muon_momentum, "weight_decay": train.weight_decay}
        optimizers = [Muon(matrices, dtype=MUON_DTYPES[precision], **muon), torch.optim.AdamW(rest, **adam)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def scale_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set the learning rate of every group to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
