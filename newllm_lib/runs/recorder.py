"""Keeps a run's folder up to date while it trains: the weights to take away, the record, the tables, the report."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from newllm_lib.config import BOS, presets
from newllm_lib.config.portable import FROM_PYTHON
from newllm_lib.data.dataset import Prepared, Split
from newllm_lib.errors import CheckpointError
from newllm_lib.escaping import impersonal, shell_command
from newllm_lib.model.decoding import generate
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.pretrained import export_model, load_exported
from newllm_lib.reporting import report
from newllm_lib.reporting.diagnostics import best_row
from newllm_lib.reporting.record import CURVES, MODEL, WEIGHTS, RunRecord, write_history, write_record
from newllm_lib.system.files import make_folder
from newllm_lib.system.hardware import environment
from newllm_lib.training.checkpoint import load_checkpoint
from newllm_lib.training.observers import Observer
from newllm_lib.training.plan import is_published_protocol, plan_lines, unfaithful_reason
from newllm_lib.training.trainer import Trainer
from newllm_lib.tuning import estimate_speed
from newllm_lib.tuning.cache import Store
from newllm_lib.tuning.products import usual_rate

SAMPLES, SAMPLE_PROMPT_TOKENS, SAMPLE_TOKENS = 3, 8, 60
"""A report's samples: how many, after how many tokens of a validation text, of how many tokens."""
_WHILE_TRAINING = "they are drawn when training ends"
LEAST_SECONDS = 10
"""Of training, before a run's speed stands for this machine in later plans."""


class Recorder(Observer):
    """Writes what a run leaves behind; `earlier` is the record of the part of the run before this one."""

    def __init__(self, trainer: Trainer, folder: Path, earlier: RunRecord):
        self.trainer, self.folder = trainer, folder
        make_folder(folder)
        self._rows_before = len(trainer.state.history)  # which may be another machine's
        self.record = self._first_record(earlier)

    def _first_record(self, earlier: RunRecord) -> RunRecord:
        """What does not change while it trains, and what continues an earlier part of the run."""
        setup, state = self.trainer.setup, self.trainer.state
        faithful, reason = self._faithful(earlier)
        speed = estimate_speed(setup, measure=False)
        self.trainer.time_left.expected_validation = speed and speed.validation_seconds
        began_on = earlier.began_on if state.step else ""
        lines = plan_lines(setup, str(self.folder), state.decay_steps, speed, state.warmup_steps, began_on)
        plan = [(name, impersonal(text)) for name, text in lines]
        on_gpu = setup.machine.kind == "cuda"
        here = {"from_step": state.step, "precision": setup.precision.name, "environment": environment(setup.machine)}
        return RunRecord(
            run=self.folder.name,
            preset=setup.config.preset,
            status="running",
            identity=setup.identity,
            parameters=setup.config.model.num_parameters,
            published_protocol=is_published_protocol(setup),
            faithful=faithful,
            faithful_reason=reason,
            decided=setup.decided,
            plan=plan,
            decay_steps=state.decay_steps,
            warmup_steps=state.warmup_steps,
            model_step=earlier.model_step,
            data=data_facts(setup.prepared, setup.train_split),
            validation=validation_facts(setup.validation_split),
            peak_memory_meaning="of tensors on the GPU" if on_gpu else "resident memory of the process",
            product_rate=usual_rate(setup.machine, setup.precision.name),
            environment=here["environment"],
            parts=[*parts_before(earlier, here), here],
            config=setup.config.to_dict(),
            requested=setup.requested.to_dict(),
            commands=list(dict.fromkeys([*(earlier.commands or []), command()])),
            samples=[],
        )

    def _faithful(self, earlier: RunRecord) -> tuple[bool | None, str | None]:
        """Whether this is the published run; once a part of it was not, the whole is not."""
        if self.trainer.setup.config.preset not in presets.FAITHFUL:
            return None, None
        reason = unfaithful_reason(self.trainer.setup) or earlier.faithful_reason
        return reason is None, reason

    def on_validation(self, trainer: Trainer, row: dict[str, Any], improved: bool) -> None:
        """The weights if they are the best, then the tables."""
        if improved:
            self._export(trainer.model)
            self.record.model_step = None
        write_history(self.folder, trainer.state.history)
        self._update_record("running")
        write_record(self.folder, self.record)
        report.write_report(self.folder, self.record, trainer.state.history, _WHILE_TRAINING)

    def write(self, status: str) -> None:
        """Everything, the record with the run's status last: a run whose end was cut short is ended again."""
        history = self.trainer.state.history
        if best_row(history):
            self._export_best()
        self.record.samples = self._samples() if status != "running" else []
        if len(history) > self._rows_before and history[-1]["train_seconds"] >= LEAST_SECONDS:
            self._keep_speed(history[-1]["tokens_per_second"])
        self._update_record(status)
        if status == "running":
            write_record(self.folder, self.record)
        write_history(self.folder, history)
        if status == "running":
            report.write_report(self.folder, self.record, history, _WHILE_TRAINING)
        else:
            write_pages(self.folder, self.record, history, self.trainer.progress.message)
            write_record(self.folder, self.record)

    def _keep_speed(self, tokens_per_second: float) -> None:
        """For later plans on this machine."""
        setup, times = self.trainer.setup, self.trainer.validation_times
        scoring = statistics.median(time.scoring for time in times)
        saving = statistics.median(time.saving for time in times)
        validation = (setup.validation_split.num_tokens / scoring, saving)
        Store(setup.machine).keep_speed(setup, tokens_per_second, validation)

    def _export_best(self) -> None:
        """model/ from the best checkpoint: a run may have ended between the two."""
        try:
            payload = load_checkpoint(self.trainer.checkpoints.best, self.trainer.progress.message)
        except CheckpointError as error:
            self.trainer.progress.message(f"warning: {error}; model/ stays as it is")
            return
        if payload["state"]["step"] != self.trainer.state.best_step:
            return  # a best one of before: the run came from a file that did not have a later one
        model = NewLLM(self.trainer.setup.config.model)
        model.load_state_dict(payload["model"])
        self._export(model)

    def _export(self, model: NewLLM) -> None:
        setup = self.trainer.setup
        export_model(self.folder / MODEL, model, setup.prepared.tokenizer, protocol=setup.config.data)

    def _update_record(self, status: str) -> None:
        state, setup, record = self.trainer.state, self.trainer.setup, self.record
        record.status, record.step, record.total_steps = status, state.step, setup.total_steps
        record.best = best_row(state.history)
        if record.best:
            peak = max(row["peak_memory_bytes"] for row in state.history)
            record.peak_memory_bytes = peak
            record.peak_memory_share = round(peak / setup.machine.memory_bytes, 4)

    def _samples(self) -> list[str]:
        """Texts that the best weights write after the first words of validation texts."""
        if not (self.folder / MODEL / WEIGHTS).exists():
            return []
        model, tokenizer = load_exported(self.folder / MODEL)
        samples = []
        for seed, ids in enumerate(sample_prompts(self.trainer.setup.prepared)):
            prompt = torch.tensor([[BOS, *ids.tolist()]])
            generator = torch.Generator().manual_seed(seed)
            new = generate(model.eval(), prompt, SAMPLE_TOKENS, generator=generator).tokens
            start, whole = tokenizer.decode(prompt[0]), tokenizer.decode([*prompt[0], *new[0]])
            samples.append(f"**{start}**{whole[len(start) :]}")
        return samples


def parts_before(earlier: RunRecord, here: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a run before the one that begins now: without it where nothing but the step has changed.

    Of a run that an earlier version trained the last environment is known, and taken for that of all. So it is where
    the record's parts are damaged; a part that does not say at which step it began is left out.
    """
    recorded = earlier.parts if isinstance(earlier.parts, list) else []
    parts = [part for part in recorded if isinstance(part, dict) and type(part.get("from_step")) is int]
    if not parts and earlier.step and earlier.environment:
        known = {"precision": earlier.decided.get("precision"), "environment": earlier.environment}
        parts = [{"from_step": 0, **known}]
    parts = [part for part in parts if part["from_step"] < here["from_step"]]
    if parts and {**parts[-1], "from_step": 0} == {**json.loads(json.dumps(here)), "from_step": 0}:
        here["from_step"] = parts.pop()["from_step"]
    return parts


def write_pages(folder: Path, record: RunRecord, history: list[dict[str, Any]], log: Callable[[str], None]) -> None:
    """Report and picture of a run that has ended; one warning where the picture could not be drawn."""
    if why := report.write_pages(folder, record, history):
        log(f"warning: {folder / CURVES}: no picture: {why}; the report has every figure")


def sample_prompts(prepared: Prepared) -> list[np.ndarray]:
    """What the samples of a report begin with: the first ids of the longest validation texts."""
    texts = prepared.texts["validation"]
    longest = sorted(range(len(texts)), key=lambda index: -len(texts[index]))[:SAMPLES]
    return [texts[index][:SAMPLE_PROMPT_TOKENS] for index in longest]


def data_facts(prepared: Prepared, train_split: Split) -> dict[str, Any]:
    """What a record says of the text."""
    return {
        "name": prepared.corpus_name,
        "fingerprint": prepared.fingerprint,
        "training_sequences": len(train_split.ids),
        "training_tokens": train_split.num_tokens,
    }


def validation_facts(split: Split) -> dict[str, Any]:
    """What a record says of the ids that are scored."""
    return {"tokens": split.num_tokens, "unknown_share": split.unknown_share, "digest": split.digest}


def command(without: tuple[str, ...] = ()) -> str:
    """How this process was called, for the record; Python and notebooks say so. `without`: words to leave out."""
    program = Path(sys.argv[0]).name
    if program in ("newllm", "__main__.py"):
        return impersonal(shell_command(["newllm", *(word for word in sys.argv[1:] if word not in without)]))
    return FROM_PYTHON
