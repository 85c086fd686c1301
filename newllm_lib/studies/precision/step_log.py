"""What every step of a run did, in a file beside the run, so that runs can be laid over each other step by step."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch

from newllm_lib.model.newllm import NewLLM
from newllm_lib.system.files import file_errors, make_folder, write_atomic, write_text_atomic
from newllm_lib.training.observers import Observer
from newllm_lib.training.step import StepResult
from newllm_lib.training.trainer import Trainer

if TYPE_CHECKING:
    from pandas import DataFrame


COLUMNS = ("batch", "step", "loss", "grad_norm", "loss_scale", "skipped", "digest", "moved", "distance")
"""batch: batches read so far, from 1; step: updates made so far; loss: of the batch before the update (nats a token);
grad_norm: before clipping; loss_scale: after the step, FP16 only; skipped: 1 where the update was left out; digest: of
the batch's ids; moved and distance: of the weights after some of the steps (see `Weights`)."""


def read_steps(path: Path) -> DataFrame:
    """A row for each batch that a run has read, in order; none without the file. A torn last line is left out."""
    import pandas

    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1] or ",".join(COLUMNS) + "\n"
    found = pandas.read_csv(io.StringIO(whole), dtype={"digest": str})
    return found.drop_duplicates("batch", keep="last").sort_values("batch", ignore_index=True)


class StepLog(Observer):
    """Keeps `steps.csv` while a run trains: `with log.open(): train(..., watch=log.watch)`.

    Every line is handed to the system at once, so that a killed process loses none that its newest checkpoint counts.
    A run that goes on from a checkpoint, or goes back to one because memory ran out in the middle of an update, drops
    the lines after it. measure(model, batch) gives "moved" and "distance" after the steps that `marks` names.
    """

    def __init__(self, path: Path, measure: Callable[[NewLLM, int], tuple[float, float]]):
        self._path, self._measure = path, measure
        self._trainer: Trainer | None = None
        self._last = 0  # the batch of the last line

    @contextmanager
    def open(self) -> Iterator[StepLog]:
        """Close the file at the end, however that comes."""
        with contextlib.ExitStack() as self._files:
            try:
                yield self
            finally:
                if self._trainer and self._batches() < self._last:  # gone back, and never came so far again
                    self._keep(self._batches())

    def watch(self, trainer: Trainer) -> None:
        """Follow a trainer from where it stands."""
        self._trainer = trainer
        self._keep(self._batches())
        trainer.observers.append(self)

    def _keep(self, batches: int) -> None:
        """Leave the lines up to so many batches in the file, and write after them."""
        self._files.close()
        kept = read_steps(self._path)
        kept = kept[kept["batch"] <= batches]
        write_text_atomic(self._path, kept.to_csv(index=False, lineterminator="\n"))
        file = self._files.enter_context(self._path.open("a", buffering=1, encoding="utf-8"))
        self._writer = csv.writer(file, lineterminator="\n")
        self._last = batches

    def _batches(self) -> int:
        state = self._trainer.state
        return state.epoch * self._trainer.setup.steps_per_epoch + state.batch

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Write the line of a batch."""
        batch = self._batches()
        if batch <= self._last:
            self._keep(batch - 1)
        self._last = batch
        moved = distance = None
        if batch in marks(trainer.setup.total_steps):
            moved, distance = self._measure(trainer.model, batch)
        row = (
            batch,
            trainer.state.step,
            result.nll / result.tokens,
            result.grad_norm,
            trainer.scaler.get_scale() if trainer.scaler.is_enabled() else None,
            int(result.skipped),
            digest_of(result.ids),
            moved,
            distance,
        )
        with file_errors(self._path, f"cannot write {self._path}"):
            self._writer.writerow(row)


def digest_of(ids: torch.Tensor) -> str:
    """16 hex digits that tell a batch of ids (B, S) from another, by content and order."""
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]


def marks(last: int) -> list[int]:
    """The steps after which weights are measured: 1, 2, 5, 10, 20, 50, ... and the last one."""
    powers = (10**exponent for exponent in range(len(str(last))))
    return sorted({mark for power in powers for mark in (power, 2 * power, 5 * power) if mark < last} | {last})


class Weights:
    """Weights of a first run after some of its steps, kept in a folder, and how far those of others are from them.

    Distances are relative: ||w - w_first|| / ||w_first|| over all parameters together.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def measure(self, beginning: NewLLM, model: NewLLM, batch: int, first: bool) -> tuple[float, float]:
        """How far a model has moved from its own beginning, and how far it is from the first run after that batch.

        The first run is kept, and 0 away from itself; the distance is NaN where nothing was kept of it.
        """
        weights = _cpu_weights(model)
        moved = relative_distance(weights, _cpu_weights(beginning))
        path = self.folder / f"{batch}.safetensors"
        if first:
            make_folder(self.folder)
            data = safetensors.torch.save(weights)
            write_atomic(path, lambda file: file.write(data))
            return moved, 0.0
        if not path.is_file():
            return moved, math.nan
        return moved, relative_distance(weights, safetensors.torch.load_file(path))

    def remove(self) -> None:
        """Delete what was kept: megabytes for each mark."""
        for path in self.folder.glob("*.safetensors"):
            path.unlink()
        with contextlib.suppress(OSError):  # there is none, or somebody put something else into it
            self.folder.rmdir()


def relative_distance(weights: dict[str, torch.Tensor], measure: dict[str, torch.Tensor]) -> float:
    """||w - m|| / ||m|| over all tensors of two models together."""
    apart = sum(float((weights[name].double() - tensor.double()).square().sum()) for name, tensor in measure.items())
    size = sum(float(tensor.double().square().sum()) for tensor in measure.values())
    return math.sqrt(apart / size)


def _cpu_weights(model: NewLLM) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
