"""What users call: train, load, evaluate, plan."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from newllm_lib import presets, report
from newllm_lib.buffers import BUFFERS
from newllm_lib.card import card_of
from newllm_lib.checkpoint import (
    TOKENIZER_FILE,
    Checkpoints,
    load_exported,
    load_trained,
    tokenizer_text,
)
from newllm_lib.config import RunConfig
from newllm_lib.earlier import (
    checkpoints_gone,
    decided_by_checkpoint,
    decisions,
    earlier_record,
    run_folder,
    set_aside,
)
from newllm_lib.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FileMissingError,
    NoModelError,
    RunError,
    TrainingError,
)
from newllm_lib.escaping import one_line, say
from newllm_lib.files import file_errors
from newllm_lib.hardware import choose_precision, detect
from newllm_lib.metrics import Metrics, evaluate_split
from newllm_lib.mirror import Mirror
from newllm_lib.model import NewLLM
from newllm_lib.planning import make_setup, plan_lines
from newllm_lib.portable import received_config
from newllm_lib.probe import estimate_speed, settle_batch
from newllm_lib.progress import Progress, TerminalProgress, in_kernel, warn_on_stderr
from newllm_lib.recorder import Recorder, command
from newllm_lib.recurrence.selfcheck import choose_engine
from newllm_lib.text.prepare import prepare
from newllm_lib.text.tokenizer import Tokenizer
from newllm_lib.trainer import Setup, Trainer


class Run:
    """A run's folder, read when asked: `.history`, `.best`, `.model`, `.tokenizer`, `.config`, `.record`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.record: dict[str, Any] = report.read_record(self.folder)

    def __repr__(self) -> str:
        best = f", PPL {self.best['val_ppl']:.2f}" if self.best and self.best["val_ppl"] else ""
        return f"Run({str(self.folder)!r}, {one_line(self.record['status'])}{best})"

    @property
    def config(self) -> RunConfig:
        """The configuration, every decision made; RunError where run.json has one that this version does not know."""
        return self._config_of(self.record["config"])

    @property
    def requested(self) -> RunConfig:
        """The configuration that was asked for: `train(run.requested)` continues the run, in a folder of any name."""
        asked = self._config_of(self.record.get("requested") or self.record["config"])
        return asked.replace(name=self.folder.name, results_dir=str(self.folder.parent))

    def _config_of(self, values: dict[str, Any]) -> RunConfig:
        try:
            return RunConfig.from_dict(values)
        except ConfigError as error:
            raise RunError(f"{self.folder / 'run.json'}: {error}") from error

    @property
    def report(self) -> str:
        """The report without the curves, which are a file of their own (Markdown).

        It is written from the record and the history: the file of a run from elsewhere may hold anything.
        """
        with report.damaged_record(self.folder):
            text = report.report_text(self.record, report.history_rows(self.folder))
        return text.replace("![curves](curves.png)\n\n", "")

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the history with the lowest validation loss."""
        return self.record["best"]

    @property
    def history(self):
        """A row a validation, as a pandas DataFrame."""
        return report.read_history(self.folder)

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


def resolve(config: str | RunConfig = "auto", **overrides) -> RunConfig:
    """A preset's name or a configuration, with fields changed by name; ConfigError for what is unknown or invalid."""
    config = presets.get(config) if isinstance(config, str) else config
    return config.replace(**overrides)


@file_errors()
def plan(
    config: str | RunConfig = "auto", *, report: Callable[[str], None] | None = None, **overrides
) -> tuple[Setup, list[tuple[str, str]]]:
    """Every decision that `train` would make, and its lines for the reader; no run is trained or written.

    A batch that a policy has yet to find is sought; `report` is told of each try (None = standard error).
    """
    setup = make_setup(resolve(config, **overrides))
    folder = run_folder(setup)
    decided = decisions(earlier_record(folder, setup.identity), setup.identity)
    setup = make_setup(setup.requested, decided, setup.prepared) if decided else setup
    setup = settle_batch(setup, decided, report or (lambda text: say(text, sys.stderr)))
    return setup, plan_lines(setup, str(folder), speed=estimate_speed(setup))


@file_errors()
def train(
    config: str | RunConfig = "auto",
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    watch: Callable[[Trainer], None] = lambda trainer: None,
    **overrides,
) -> Run:
    """Train a run, or continue it from its newest valid checkpoint; the folder tells which.

    config: a preset's name or a RunConfig; overrides: any field by name. progress: what shows the course of it; None =
    live in a notebook, lines in a terminal. `fresh` starts over and keeps the old folder under a new name. `watch` gets
    the trainer before it goes on, for example to set its `on_step`; a run that has ended does not call it. Raises
    ConfigError, DataError or FileError for bad settings or data, CheckpointError when the folder holds another run,
    TrainingError when training breaks down; in each case what was on disk stays valid.
    """
    progress = progress or _default_progress()
    try:
        return _train(resolve(config, **overrides), fresh, progress, watch)
    finally:
        progress.close()  # however it ends, and also where nothing begins


def _train(requested: RunConfig, fresh: bool, progress: Progress, watch: Callable[[Trainer], None]) -> Run:
    setup, folder, earlier, mirror = _setup_and_folder(requested, fresh, progress)
    progress.watch(mirror.safety if mirror else None)
    model = NewLLM(setup.config.model)
    model.initialise(torch.Generator().manual_seed(setup.config.train.seed))
    model.to(setup.machine.device)
    trainer = Trainer(setup, model, Checkpoints(folder / "checkpoints", folder.name), progress)
    _continue(trainer, earlier, progress)
    if trainer.ended() and (earlier.get("status"), earlier.get("step")) == (trainer.ended(), trainer.state.step):
        progress.message(f"this run has already {trainer.ended()}: {folder} ({_how_to_extend(trainer)})")
        if mirror:
            mirror.close(progress.message)
        return Run(folder)
    recorder = Recorder(trainer, folder, earlier)
    if not trainer.state.step:
        for name, text in recorder.record["plan"]:
            progress.message(f"{name:>10}  {text}")
    elif setup.precision.substituted:
        progress.message(f"warning: precision {setup.precision.name}: {setup.precision.reason}")
    if reason := recorder.record["faithful_reason"]:
        progress.message(f"warning: not faithful to the published run: {reason}")
    progress.begin(recorder.record, trainer.state.history)
    watch(trainer)
    return _fit(trainer, recorder, progress, mirror)


def _default_progress() -> Progress:
    """Live in the cell of a notebook, lines elsewhere."""
    if not in_kernel():
        return TerminalProgress()
    from newllm_lib.notebook import NotebookProgress  # a room below, for users' convenience

    return NotebookProgress()


def _setup_and_folder(
    requested: RunConfig, fresh: bool, progress: Progress
) -> tuple[Setup, Path, dict[str, Any], Mirror | None]:
    """The setup in which the decisions of a run that is there stand, its folder, its record so far, its copy."""
    setup = make_setup(requested)
    folder = run_folder(setup)
    mirror = Mirror(folder, setup.config.mirror_dir, setup.identity) if setup.config.mirror_dir else None
    for place in (folder, *([mirror.place] if mirror else [])):
        if fresh and place.exists():
            progress.message(f"starting over; the old run is kept as {set_aside(place)}")
    if mirror and earlier_record(folder, setup.identity).get("identity", setup.identity) == setup.identity:
        mirror.restore(progress.message)
    earlier = earlier_record(folder, setup.identity)
    checkpoints = Checkpoints(folder / "checkpoints", folder.name)
    checkpoints.take_over(earlier.get("run", folder.name))
    decided = decisions(earlier, setup.identity) if earlier else decided_by_checkpoint(checkpoints, setup.identity)
    setup = make_setup(requested, decided, setup.prepared) if decided else setup
    return settle_batch(setup, decided, progress.message), folder, earlier, mirror


def _continue(trainer: Trainer, earlier: dict[str, Any], progress: Progress) -> None:
    """Restore the newest valid checkpoint, if there is one, and say where the run goes on.

    CheckpointError where the folder held a validated run whose checkpoints are gone: starting over would replace it.
    """
    found = trainer.checkpoints.newest_valid(lambda text: progress.message(f"warning: {text}"))
    if found is None:
        if earlier.get("best"):  # one that ended before its first validation may never have saved anything
            raise CheckpointError(checkpoints_gone(trainer.checkpoints.folder, earlier.get("step") or 0))
        return
    path, payload = found
    trainer.restore(payload, path)
    state, setup = trainer.state, trainer.setup
    total, epoch, best = setup.total_steps, setup.steps_per_epoch, report.best_row(state.history)
    text = f"step {state.step:,} of {total:,} (epoch {state.step / epoch:.2f} of {total / epoch:.2f})"
    if state.step > total:
        text = f"step {state.step:,}, which is more than the {total:,} asked for"
    if best:
        text += f", best PPL so far {best['val_ppl']:.2f}"
    speed = estimate_speed(setup, measure=False)
    if speed and state.step < total:
        seconds = speed.training_seconds(setup) * (total - state.step) / total
        text += f", about {report.duration(seconds)} of training left"
    progress.message(f"continuing {trainer.checkpoints.run} from {path.name}: {text}")


def _how_to_extend(trainer: Trainer) -> str:
    if trainer.ended() == "stopped early":
        return "more: a larger patience; anew: fresh"
    decays = trainer.setup.config.train.lr_schedule != "constant"
    return "more: epochs or max_steps" + (" with decay_steps" if decays else "") + "; anew: fresh"


def _fit(trainer: Trainer, recorder: Recorder, progress: Progress, mirror: Mirror | None) -> Run:
    """Train to the end and write what the run leaves behind, however it ends."""
    trainer.on_validation = recorder.validated
    if mirror:
        trainer.on_save = mirror.request
    recorder.write("running")
    status = "failed"
    try:
        status = trainer.fit()
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except TrainingError as error:
        newest = next(iter(trainer.checkpoints.files()), None)
        where = f"the newest checkpoint is {newest.name}" if newest else "there is no checkpoint yet"
        raise TrainingError(f"{error}. Stopped at step {trainer.state.step:,}; {where}") from error
    finally:
        progress.close()
        try:
            recorder.write(status)
            if status == "interrupted":
                _tell_how_to_continue(trainer, progress)
        finally:  # a full disk here is one more reason to have the copy there
            if mirror:
                mirror.close(progress.message)
    return Run(recorder.folder)


def _tell_how_to_continue(trainer: Trainer, progress: Progress) -> None:
    newest = next(iter(trainer.checkpoints.files()), None)
    if newest is None:
        text = f"interrupted at step {trainer.state.step:,}, before the first checkpoint; to start again"
    else:
        text = f"interrupted; {newest.name} is saved; to go on"
    progress.message(f"{text}: {_again()}")


def _again() -> str:
    """What the user does to make this call once more."""
    if in_kernel():
        return "run this cell again"
    text = command(without=("--fresh",))
    return text if text.startswith("newllm ") else "the same call again"


def load(folder: str | Path) -> Run:
    """The run in a folder; FileMissingError where there is none."""
    return Run(folder)


@file_errors()
def load_model(place: str | Path) -> Loaded:
    """The best model of a run's folder, or that of a model/ folder or of a checkpoint file, in evaluation mode.

    Its `save_pretrained` and `push_to_hub` take the tokenizer and a card written from the run's report along.
    FileMissingError where there is nothing, CheckpointError where it cannot be read.
    """
    loaded = _load_model(place)
    loaded.model.companions = {TOKENIZER_FILE: tokenizer_text(loaded.tokenizer)}
    loaded.model.card = card_of(Path(place), loaded.model.config)
    return loaded


def _load_model(place: str | Path) -> Loaded:
    path = Path(place)
    if path.is_file():
        return _from_checkpoint(path)
    if (path / "model.safetensors").exists():
        model, tokenizer = load_exported(path)
        return Loaded(model.eval(), tokenizer, None, None)
    if not path.is_dir():
        raise FileMissingError(f"{place}: no such run, model folder or checkpoint")
    run = Run(path)
    if not (path / "model" / "model.safetensors").exists():
        best = Checkpoints(path / "checkpoints", run.record["run"]).best
        if not best.exists():
            check_validated(run)
        return _from_checkpoint(best)
    model, tokenizer = load_exported(path / "model")
    return Loaded(model.eval(), tokenizer, run.config, (run.record.get("data") or {}).get("fingerprint"))


def check_validated(run: Run) -> None:
    """NoModelError for a run that no validation has given a best model yet."""
    if run.best is not None:
        return
    if (run.folder / "history.csv").is_file() and len(run.history):
        raise NoModelError(run.folder, "no validation gave a finite loss")
    raise NoModelError(run.folder)


def _from_checkpoint(path: Path) -> Loaded:
    model, tokenizer, config, fingerprint = load_trained(path, warn_on_stderr)
    if not (path.resolve().parent.parent / "run.json").is_file():  # then who knows where the file comes from
        config = RunConfig.from_dict(received_config(config.to_dict()))
    return Loaded(model.eval(), tokenizer, config, fingerprint)


@file_errors()
def evaluate(
    what: Run | NewLLM | str | Path,
    data: str | tuple[str, ...] | None = None,
    *,
    split: str = "validation",
    tokenizer: Tokenizer | None = None,
    config: RunConfig | None = None,
    precision: str = "fp32",
) -> Metrics:
    """Scores on a split of some data (None = what the run was trained on), read by the run's own protocol.

    what: a Run; the place of a run, a model folder or a checkpoint; or a model, then with its tokenizer. config: the
    protocol, where `what` has none of its own. FP32 unless told otherwise. ConfigError when the tokenizer and the model
    do not belong together, the run's text has changed, or the data has no such split.
    """
    if isinstance(what, NewLLM):
        if tokenizer is None:
            raise ConfigError("evaluate(model, ...) needs the model's tokenizer: pass tokenizer=..., or the run itself")
        loaded = Loaded(what, tokenizer, config, None)
    else:
        loaded = what._loaded if isinstance(what, Run) else load_model(what)
    if loaded.tokenizer.vocab_size != loaded.model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {loaded.tokenizer.vocab_size} ids, the model {loaded.model.config.vocab_size}"
        )
    config = config or loaded.config
    if data is None and config is None:
        raise ConfigError(f"{what}: a model alone does not know its text: say which with data= (in the shell --data)")
    config = config or RunConfig()
    prepared = prepare(config.replace(data=data) if data else config, loaded.tokenizer)
    if data is None and loaded.fingerprint not in (None, prepared.fingerprint):
        raise DataError(
            f"data {config.data.data}: the text has changed since the run was trained; to score it all the same, "
            "name it with data= (in the shell --data)"
        )
    machine = detect(str(loaded.model.output.weight.device))
    chosen = choose_precision(precision, machine)
    engine = choose_engine("auto", chosen, machine.device).run
    if chosen.substituted:
        warn_on_stderr(f"scored in {chosen.name}: {chosen.reason}")
    batch = config.train.eval_batch_size
    with BUFFERS.kept():
        return evaluate_split(loaded.model, prepared.split(split), precision=chosen, batch_size=batch, engine=engine)
