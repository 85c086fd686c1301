"""A run so small that it takes a second, and ways to look at it."""

import copy
import dataclasses
import sys
from pathlib import Path

import torch

from newllm_lib.config import RunConfig
from newllm_lib.model.newllm import NewLLM
from newllm_lib.reporting.progress import Progress
from newllm_lib.system.hardware import Precision
from newllm_lib.training.checkpoint import Checkpoints
from newllm_lib.training.setup import Setup, make_setup
from newllm_lib.training.trainer import Trainer

SHAPE = {"vocab_size": 40, "embed_dim": 8, "hidden_dim": 12, "num_layers": 2, "context_dim": 6}
RECIPE = {
    "batch_size": 8, "epochs": 2, "lr": 3e-3, "precision": "fp32", "device": "cpu", "sequence_length": 12, "stride": 6,
    "dropout": 0.2, "init_std": None, "embedding_std": 1.0, "validate_every_steps": 3, "eval_batch_size": 16,
}  # fmt: skip
TIMINGS = ("train_seconds", "tokens_per_second", "peak_memory_bytes")


def write_text(folder: Path, texts: int = 40) -> Path:
    """train.txt and valid.txt of made-up sentences with some structure."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", texts), ("valid", 12)):
        lines = []
        for _ in range(count):
            start, length, stride = (int(torch.randint(1, high, (), generator=generator)) for high in (30, 20, 4))
            lines.append(" ".join(f"w{(start + stride * k) % 30}" for k in range(length + 5)))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def tiny_config(data: Path, **changes) -> RunConfig:
    return RunConfig(preset="tiny").replace(**(SHAPE | RECIPE | {"data": str(data)} | changes))


def tiny_command(config: RunConfig, *more: str, steps: int = 100_000) -> list[str]:
    """`newllm train` of `tiny_config` with name and folder of a configuration, in a process of its own."""
    fields = SHAPE | RECIPE | {"data": config.data.data, "results_dir": config.results_dir, "name": config.name}
    fields |= {"epochs": None, "max_steps": steps, "threads": 1, "lr_schedule": "constant", "optimizer": "adam"}
    words = [sys.executable, "-m", "newllm_lib", "train", "auto"]
    for name, value in fields.items():
        words += [f"--{name.replace('_', '-')}", "none" if value is None else str(value)]
    return [*words, *more]


def tiny_setup(data: Path, precision: str = "fp32", **changes) -> Setup:
    setup = make_setup(tiny_config(data, **changes))
    return dataclasses.replace(setup, precision=Precision(precision, "for the test"))


def tiny_trainer(setup: Setup, folder: Path, progress: Progress | None = None) -> Trainer:
    model = NewLLM.fresh(setup.config.model, setup.config.train.seed)
    return Trainer(setup, model, Checkpoints(folder, "tiny"), progress)


class Quiet(Progress):
    """Collects what a run says."""

    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


class StopAt(Progress):
    """Asks a trainer to stop after an update number."""

    def __init__(self, step: int):
        self.at, self.trainer = step, None

    def step(self, step, *_rest):
        if step == self.at:
            self.trainer.request_stop()


def stopped_trainer(setup: Setup, folder: Path, step: int) -> Trainer:
    """Trained up to `step`, saved and stopped."""
    progress = StopAt(step)
    trainer = progress.trainer = tiny_trainer(setup, folder, progress)
    assert trainer.fit() == "interrupted"
    return trainer


def continued_trainer(setup: Setup, folder: Path) -> Trainer:
    """A new trainer that took up the newest checkpoint of the folder."""
    trainer = tiny_trainer(setup, folder)
    path, payload = trainer.checkpoints.newest_valid(fail_on_warning)
    trainer.restore(payload, path)
    return trainer


def fail_on_warning(text: str):
    raise AssertionError(text)


def result_of(trainer: Trainer) -> dict:
    """All that two equal runs share: weights, optimizers, scaler, history without timings, best, patience."""
    payload = copy.deepcopy(trainer.payload())  # the live tensors would follow the training
    state = payload["state"]
    for row in state["history"]:
        for name in TIMINGS:
            del row[name]
    del state["train_seconds"], state["seconds_since_row"]
    return {key: payload[key] for key in ("model", "optimizers", "scaler", "context", "state", "recent_skips")}


def same(first, second) -> bool:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second
