"""A run's folder, read when asked, and the model in it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from newllm_lib.config import DataConfig, RunConfig
from newllm_lib.config.places import user_path
from newllm_lib.config.portable import received_config
from newllm_lib.data.tokenizer import Tokenizer
from newllm_lib.errors import ConfigError, FileMissingError, NoModelError, RunError
from newllm_lib.escaping import impersonal, one_line
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.pretrained import (
    load_exported,
    load_protocol,
    protocol_text,
    tokenizer_text,
)
from newllm_lib.reporting import report
from newllm_lib.reporting.formatting import ppl_text
from newllm_lib.reporting.model_card import card_of
from newllm_lib.reporting.record import (
    HISTORY,
    MODEL,
    PROTOCOL,
    RECORD,
    TOKENIZER,
    WEIGHTS,
    RunRecord,
    damaged_record,
    history_rows,
    holds_run,
    read_history,
    read_record,
)
from newllm_lib.system.console import warn_on_stderr
from newllm_lib.system.files import file_errors
from newllm_lib.training.checkpoint import Checkpoints, load_trained


class Run:
    """A run's folder, read when asked: `.history`, `.best`, `.model`, `.tokenizer`, `.config`, `.record`."""

    def __init__(self, folder: str | Path):
        self.folder = user_path(folder)
        self.record: RunRecord = read_record(self.folder)

    def __repr__(self) -> str:
        best = f", PPL {ppl_text(self.best['val_ppl'])}" if self.best and self.best["val_ppl"] else ""
        return f"Run({impersonal(str(self.folder))!r}, {one_line(self.record.status)}{best})"

    @property
    def config(self) -> RunConfig:
        """The configuration, every decision made; RunError where run.json has one that this version does not know."""
        return self._config_of(self.record.config)

    @property
    def requested(self) -> RunConfig:
        """The configuration that was asked for: `train(run.requested)` continues the run, in a folder of any name."""
        asked = self._config_of(self.record.requested or self.record.config)
        return asked.replace(name=self.folder.name, results_dir=str(self.folder.parent))

    def _config_of(self, values: dict[str, Any]) -> RunConfig:
        try:
            return RunConfig.from_dict(values)
        except ConfigError as error:
            raise RunError(f"{self.folder / RECORD}: {error}") from error

    @property
    def report(self) -> str:
        """The report without the curves, which are a file of their own (Markdown).

        It is written from the record and the history: the file of a run from elsewhere may hold anything.
        """
        with damaged_record(self.folder):
            text = report.report_text(self.record, history_rows(self.folder))
        return text.replace(report.PICTURE + "\n\n", "")

    @property
    def result(self) -> str:
        """The part of the report on what came out: the best validation, warnings, published figures (Markdown)."""
        with damaged_record(self.folder):
            return report.result_page(self.record, history_rows(self.folder))

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the history with the lowest validation loss."""
        return self.record.best

    @property
    def history(self):
        """A row a validation, as a pandas DataFrame."""
        return read_history(self.folder)

    @cached_property
    def _loaded(self) -> Loaded:
        return load_model(self.folder)

    @property
    def model(self) -> NewLLM:
        """The best weights, on the CPU, in evaluation mode."""
        return self._loaded.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the run was trained with."""
        return self._loaded.tokenizer


class Loaded(NamedTuple):
    """A trained model with what belongs to it."""

    model: NewLLM
    tokenizer: Tokenizer
    config: RunConfig | None
    """None for a bare model folder."""
    fingerprint: str | None
    """sha256 of the text that it was trained on, where that is known."""
    protocol: DataConfig | None = None
    """How its text was read, where that is known; in a bare model folder without the place of the text."""


@file_errors()
def load_model(place: str | Path) -> Loaded:
    """The best model of a run's folder, or that of a model/ folder or of a checkpoint file, in evaluation mode.

    Its `save_pretrained` and `push_to_hub` take the tokenizer and a card written from the run's report along.
    FileMissingError where there is nothing, CheckpointError where it cannot be read.
    """
    loaded = _load_model(place)
    loaded.model.companions = {TOKENIZER: tokenizer_text(loaded.tokenizer)}
    if loaded.protocol:
        loaded.model.companions[PROTOCOL] = protocol_text(loaded.protocol)
    loaded.model.card = card_of(user_path(place), loaded.model.config)
    return loaded


def _load_model(place: str | Path) -> Loaded:
    path = user_path(place)
    if path.is_file():
        return _from_checkpoint(path)
    if (path / WEIGHTS).exists():
        model, tokenizer = load_exported(path)
        return Loaded(model.eval(), tokenizer, None, None, load_protocol(path))
    if not path.is_dir():
        raise FileMissingError(f"{place}: no such run, model folder or checkpoint")
    run = Run(path)
    if not (path / MODEL / WEIGHTS).exists():
        best = Checkpoints.of(path, run.record.run).best
        if not best.exists():
            check_validated(run)
        return _from_checkpoint(best)
    model, tokenizer = load_exported(path / MODEL)
    fingerprint = (run.record.data or {}).get("fingerprint")
    return Loaded(model.eval(), tokenizer, run.config, fingerprint, run.config.data)


def check_validated(run: Run) -> None:
    """NoModelError for a run that no validation has given a best model yet."""
    if run.best is not None:
        return
    if (run.folder / HISTORY).is_file() and len(run.history):
        raise NoModelError(run.folder, "no validation gave a finite loss")
    raise NoModelError(run.folder)


def _from_checkpoint(path: Path) -> Loaded:
    model, tokenizer, config, fingerprint = load_trained(path, warn_on_stderr)
    if not holds_run(path.resolve().parent.parent):  # then who knows where the file comes from
        config = RunConfig.from_dict(received_config(config.to_dict()))
    return Loaded(model.eval(), tokenizer, config, fingerprint, config.data)
