"""What users call: train, load, evaluate, plan."""

from __future__ import annotations

import shlex
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from newllm_lib import presets, published, report
from newllm_lib.checkpoint import CheckpointError, Checkpoints, export_model, load_checkpoint, load_exported
from newllm_lib.config import BOS, ModelConfig, RunConfig, build
from newllm_lib.generate import generate
from newllm_lib.hardware import choose_precision, detect, environment
from newllm_lib.metrics import Metrics, evaluate_split
from newllm_lib.model import NewLLM
from newllm_lib.planning import is_published_protocol, make_setup, plan_lines, unfaithful_reason
from newllm_lib.progress import Progress, TerminalProgress
from newllm_lib.recurrence import get_engine
from newllm_lib.step import TrainingError
from newllm_lib.text.prepare import prepare
from newllm_lib.text.tokenizer import WordTokenizer, tokenizer_from_dict
from newllm_lib.trainer import Setup, Trainer

SAMPLES, SAMPLE_PROMPT_TOKENS, SAMPLE_TOKENS = 3, 8, 60
"""A report's samples: how many, after how many tokens of a validation text, of how many tokens."""


class Run:
    """A run's folder, read when asked: `.history`, `.best`, `.model`, `.tokenizer`, `.config`, `.record`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.record: dict[str, Any] = report.read_record(self.folder)

    def __repr__(self) -> str:
        best = f", PPL {self.best['val_ppl']:.2f}" if self.best else ""
        return f"Run({str(self.folder)!r}, {self.record['status']}{best})"

    @property
    def config(self) -> RunConfig:
        """The configuration, every decision made."""
        return RunConfig.from_dict(self.record["config"])

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the history with the lowest validation loss."""
        return self.record["best"]

    @property
    def history(self):
        """A row a validation, as a pandas DataFrame."""
        return report.read_history(self.folder)

    @cached_property
    def _loaded(self) -> tuple[NewLLM, WordTokenizer]:
        exported = self.folder / "model"
        if (exported / "model.safetensors").exists():
            return load_exported(exported)
        payload = load_checkpoint(Checkpoints(self.folder / "checkpoints", self.record["run"]).best, _to_stderr)
        model = NewLLM(build(ModelConfig, payload["config"]["model"]))
        model.load_state_dict(payload["model"])
        return model, tokenizer_from_dict(payload["tokenizer"])

    @property
    def model(self) -> NewLLM:
        """The best weights, on the CPU, in evaluation mode."""
        return self._loaded[0].eval()

    @property
    def tokenizer(self) -> WordTokenizer:
        """The tokenizer that the run was trained with."""
        return self._loaded[1]


def resolve(config: str | RunConfig = "auto", **overrides) -> RunConfig:
    """A preset's name or a configuration, with fields changed by name; ValueError for what is unknown or invalid."""
    config = presets.get(config) if isinstance(config, str) else config
    return config.replace(**overrides)


def plan(config: str | RunConfig = "auto", **overrides) -> tuple[Setup, list[tuple[str, str]]]:
    """Every decision that `train` would make, and its lines for the reader; nothing is trained or written."""
    setup = make_setup(resolve(config, **overrides))
    return setup, plan_lines(setup, str(run_folder(setup)))


def train(
    config: str | RunConfig = "auto", *, fresh: bool = False, progress: Progress | None = None, **overrides
) -> Run:
    """Train a run, or continue it from its newest valid checkpoint; the folder tells which.

    config: a preset's name or a RunConfig; overrides: any field by name. `fresh` starts over and keeps the old folder
    under a new name. Raises ValueError for bad settings or data, CheckpointError when the folder holds another run,
    TrainingError when training breaks down; in each case what was on disk stays valid.
    """
    progress = progress or TerminalProgress()
    setup, folder, earlier = _setup_and_folder(resolve(config, **overrides), fresh, progress)
    model = NewLLM(setup.config.model)
    model.initialise(torch.Generator().manual_seed(setup.config.train.seed))
    model.to(setup.machine.device)
    trainer = Trainer(setup, model, Checkpoints(folder / "checkpoints", folder.name), progress)
    continued = _continue(trainer, progress)
    if trainer.ended() and earlier.get("status") == trainer.ended():
        progress.message(
            f"this run has already {trainer.ended()}: {folder} (more: --epochs or --max-steps; anew: --fresh)"
        )
        return Run(folder)
    writer = _Writer(trainer, folder, earlier.get("commands", []))
    if not continued:
        for name, text in plan_lines(setup, str(folder)):
            progress.message(f"{name:>10}  {text}")
    if reason := writer.record["faithful_reason"]:
        progress.message(f"warning: not faithful to the published run: {reason}")
    return _fit(trainer, writer, progress)


def _setup_and_folder(requested: RunConfig, fresh: bool, progress: Progress) -> tuple[Setup, Path, dict[str, Any]]:
    """The folder, its record where a run is there already, and the setup in which that run's decisions stand."""
    setup = make_setup(requested)
    folder = run_folder(setup)
    if fresh and folder.exists():
        kept = _set_aside(folder)
        progress.message(f"starting over; the old run is kept as {kept}")
    if not (folder / "run.json").exists():
        return setup, folder, {}
    earlier = report.read_record(folder)
    return make_setup(requested, earlier["decided"]), folder, earlier


def run_folder(setup: Setup) -> Path:
    """Where a run lives: its own name, or its preset's and six digits of its identity."""
    config = setup.config
    return Path(config.results_dir) / (config.name or f"{config.preset}-{setup.identity[:6]}")


def _set_aside(folder: Path) -> Path:
    number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.old-{number}"))


def _continue(trainer: Trainer, progress: Progress) -> bool:
    """Restore the newest valid checkpoint, if there is one, and say where the run goes on."""
    found = trainer.checkpoints.newest_valid(lambda text: progress.message(f"warning: {text}"))
    if found is None:
        if trainer.checkpoints.files():
            progress.message("warning: no checkpoint of this run can be read; it starts from the beginning")
        return False
    path, payload = found
    trainer.restore(payload, path)
    state, total = trainer.state, trainer.setup.total_steps
    best = f", best PPL so far {min(row['val_ppl'] for row in state.history):.2f}" if state.history else ""
    progress.message(f"continuing {trainer.checkpoints.run} from {path.name}: step {state.step} of {total}{best}")
    return True


def _fit(trainer: Trainer, writer: _Writer, progress: Progress) -> Run:
    """Train to the end and write what the run leaves behind, however it ends."""
    trainer.on_validation = writer.validated
    writer.write("running")
    status = "failed"
    try:
        status = trainer.fit()
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except TrainingError as error:
        newest = next(iter(trainer.checkpoints.files()), None)
        where = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        raise TrainingError(f"{error}. Stopped at step {trainer.state.step}; {where}. A lower --lr may help") from error
    finally:
        progress.close()
        writer.write(status)
        if status == "interrupted":
            progress.message(f"interrupted at step {trainer.state.step}; the same command continues it: {command()}")
    return Run(writer.folder)


class _Writer:
    """Keeps the run's folder up to date while it trains."""

    def __init__(self, trainer: Trainer, folder: Path, earlier_commands: list[str]):
        self.trainer, self.folder = trainer, folder
        folder.mkdir(parents=True, exist_ok=True)
        commands = [*earlier_commands, command()]
        self.record = self._fixed() | {"commands": list(dict.fromkeys(commands)), "samples": []}

    def _fixed(self) -> dict[str, Any]:
        setup = self.trainer.setup
        reason = unfaithful_reason(setup) if setup.config.preset in published.RUNS else None
        split = setup.validation_split
        is_cuda = setup.machine.kind == "cuda"
        return {
            "run": self.folder.name,
            "preset": setup.config.preset,
            "status": "running",
            "identity": setup.identity,
            "parameters": setup.config.model.num_parameters,
            "published_protocol": is_published_protocol(setup),
            "faithful": None if setup.config.preset not in published.RUNS else reason is None,
            "faithful_reason": reason,
            "decided": {
                "batch_size": setup.config.train.batch_size,
                "precision": setup.precision.name,
                "engine": setup.engine_name,
            },
            "plan": plan_lines(setup, str(self.folder)),
            "data": {
                "name": setup.prepared.corpus_name,
                "fingerprint": setup.prepared.fingerprint,
                "training_sequences": len(setup.train_split.ids),
                "training_tokens": setup.train_split.num_tokens,
            },
            "validation": {"tokens": split.num_tokens, "unknown_share": split.unknown_share},
            "peak_memory_meaning": "of tensors on the GPU" if is_cuda else "resident memory of the process",
            "environment": environment(setup.machine),
            "config": setup.config.to_dict(),
        }

    def validated(self, best: bool) -> None:
        """After each validation: the weights if they are the best, then the tables."""
        if best:
            export_model(self.folder / "model", self.trainer.model, self.trainer.setup.prepared.tokenizer)
        report.write_history(self.folder, self.trainer.state.history)
        self._write_record("running")

    def write(self, status: str) -> None:
        """Everything, with the run's status."""
        history = self.trainer.state.history
        self.record["samples"] = self._samples() if status != "running" else []
        self._write_record(status)
        report.write_history(self.folder, history)
        if history:
            report.write_curves(self.folder, self.record, history)
        report.write_report(self.folder, self.record, history)

    def _write_record(self, status: str) -> None:
        state, setup = self.trainer.state, self.trainer.setup
        best = min(state.history, key=lambda row: row["val_loss"], default=None)
        self.record |= {"status": status, "step": state.step, "total_steps": setup.total_steps, "best": best}
        if best:
            peak = max(row["peak_memory_bytes"] for row in state.history)
            self.record["peak_memory_bytes"] = peak
            self.record["peak_memory_share"] = round(peak / setup.machine.memory_bytes, 4)
        report.write_record(self.folder, self.record)

    def _samples(self) -> list[str]:
        """Texts that the best weights write after the first words of validation texts."""
        if not (self.folder / "model" / "model.safetensors").exists():
            return []
        model, tokenizer = load_exported(self.folder / "model")
        texts = self.trainer.setup.prepared.texts["validation"]
        longest = sorted(range(len(texts)), key=lambda index: -len(texts[index]))[:SAMPLES]
        samples = []
        for seed, index in enumerate(longest):
            prompt = torch.tensor([[BOS, *texts[index][:SAMPLE_PROMPT_TOKENS].tolist()]])
            generator = torch.Generator().manual_seed(seed)
            new = generate(model.eval(), prompt, SAMPLE_TOKENS, generator=generator).tokens
            samples.append(f"**{tokenizer.decode(prompt[0])}** {tokenizer.decode(new[0])}")
        return samples


def load(folder: str | Path) -> Run:
    """The run in a folder; FileNotFoundError where there is none."""
    return Run(folder)


def load_model(place: str | Path) -> tuple[NewLLM, WordTokenizer]:
    """Model and tokenizer of a run's folder, of its model/ folder, or of a checkpoint file."""
    path = Path(place)
    if path.is_file():
        payload = load_checkpoint(path, _to_stderr)
        model = NewLLM(build(ModelConfig, payload["config"]["model"]))
        model.load_state_dict(payload["model"])
        return model.eval(), tokenizer_from_dict(payload["tokenizer"])
    if (path / "model.safetensors").exists():
        model, tokenizer = load_exported(path)
        return model.eval(), tokenizer
    if not path.is_dir():
        raise FileNotFoundError(f"{place}: no such run, model folder or checkpoint")
    run = Run(path)
    return run.model, run.tokenizer


def evaluate(
    what: Run | NewLLM | str | Path,
    data: str | tuple[str, ...] | None = None,
    *,
    split: str = "validation",
    tokenizer: WordTokenizer | None = None,
    config: RunConfig | None = None,
    precision: str = "fp32",
) -> Metrics:
    """Scores on a split of some data (None = what the run was trained on), read by the run's own protocol.

    what: a Run, its folder, or a model (then with its tokenizer). FP32 unless told otherwise. ValueError when the
    tokenizer and the model do not belong together, or the data has no such split.
    """
    if isinstance(what, (str, Path)) and (Path(what) / "run.json").exists():
        what = Run(what)
    if isinstance(what, Run):
        config, model, tokenizer = config or what.config, what.model, what.tokenizer
    elif isinstance(what, NewLLM):
        model = what
    else:
        model, tokenizer = load_model(what)
    if tokenizer is None:
        raise ValueError("evaluate(model, ...) needs the model's tokenizer: pass tokenizer=..., or the run itself")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}")
    config = config or RunConfig()
    prepared = prepare(config.replace(data=data) if data else config, tokenizer)
    device = str(model.output.weight.device)
    chosen = choose_precision(precision, detect(device))
    batch = config.train.eval_batch_size
    return evaluate_split(
        model, prepared.split(split), precision=chosen, batch_size=batch, engine=get_engine("auto")[1]
    )


def command() -> str:
    """How this process was called, for the record; Python and notebooks say so."""
    program = Path(sys.argv[0]).name
    if program in ("newllm", "__main__.py"):
        return shlex.join(["newllm", *sys.argv[1:]])
    return "newllm_lib.train(...) from Python"


def _to_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


__all__ = ["CheckpointError", "Run", "evaluate", "load", "load_model", "plan", "resolve", "train"]
