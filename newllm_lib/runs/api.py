"""What users call: train, plan, load, evaluate, side_by_side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from newllm_lib.config import DataConfig, RunConfig
from newllm_lib.config.presets import resolve
from newllm_lib.data.corpus import ALL, SPLITS
from newllm_lib.data.dataset import prepare
from newllm_lib.data.tokenizer import Tokenizer
from newllm_lib.errors import ConfigError, DataError
from newllm_lib.escaping import say, text_table
from newllm_lib.evaluation import Metrics, copied_to, evaluate_split
from newllm_lib.generation import generate_texts
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence.self_check import choose_numerics
from newllm_lib.reporting.progress import Progress
from newllm_lib.runs.folder import plan_of, resolve_run
from newllm_lib.runs.launch import default_progress, launch
from newllm_lib.runs.run import Loaded, Run, load_model
from newllm_lib.system.buffer_pool import BUFFERS
from newllm_lib.system.console import warn_on_stderr
from newllm_lib.system.files import file_errors
from newllm_lib.system.hardware import default_eval_batch_size, detect
from newllm_lib.training.setup import Setup
from newllm_lib.training.trainer import Trainer
from newllm_lib.tuning import estimate_speed


@file_errors()
def plan(
    config: str | RunConfig = "auto", *, report: Callable[[str], None] | None = None, **overrides
) -> tuple[Setup, list[tuple[str, str]]]:
    """Every decision that `train` would make, and its lines for the reader; no run is trained or written.

    A batch that a policy has yet to find is sought; `report` is told of each try (None = standard error).
    """
    run = resolve_run(resolve(config, **overrides), log=report or (lambda text: say(text, err=True)))
    return run.setup, plan_of(run.setup, run.place.folder, run.earlier, estimate_speed(run.setup))


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
    the trainer before it starts or continues, for example to append an `Observer` to its `observers` or to set its
    `on_step`; a run that has ended does not call it. Raises ConfigError, DataError or FileError for bad settings or
    data, CheckpointError when the folder holds another run, TrainingError when training breaks down; in each case what
    was on disk stays valid.
    """
    progress = progress or default_progress()
    try:
        return launch(resolve(config, **overrides), fresh, progress, watch)
    finally:
        progress.close()  # also where nothing begins


def load(folder: str | Path) -> Run:
    """The run in a folder; FileMissingError where there is none."""
    return Run(folder)


@file_errors()
def evaluate(
    what: Run | NewLLM | str | Path,
    data: str | tuple[str, ...] | None = None,
    *,
    split: str = "validation",
    tokenizer: Tokenizer | None = None,
    config: RunConfig | None = None,
    precision: str = "fp32",
    device: str = "auto",
) -> Metrics:
    """Scores on a split of some data (None = what the run was trained on), read by the run's own protocol.

    split: train, validation, test, or all, which is every split that is there, and a file as it is, not cut.
    what: a Run; the place of a run, a model folder or a checkpoint; or a model, then with its tokenizer. config: the
    protocol, where `what` has none of its own. FP32 unless told otherwise. device: as of a run, for a copy of the
    weights that is freed afterwards; a model that is passed is scored where it lies. ConfigError when the tokenizer and
    the model do not belong together, the run's text has changed, or the data has no such split.
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
    if split not in (*SPLITS, ALL):
        raise ConfigError(f"split = {split!r}: must be one of {', '.join((*SPLITS, ALL))}")
    config = config or _default_protocol(loaded.protocol)
    prepared = prepare(config.replace(data=data) if data else config, loaded.tokenizer, split if data else None)
    if data is None and loaded.fingerprint not in (None, prepared.fingerprint):
        raise DataError(
            f"data {config.data.data}: the text has changed since the run was trained{prepared.why_changed}; to score "
            "it all the same, name it with data= (in the shell --data)"
        )
    for note in prepared.notes if data else ():  # of the run's own text its plan has told
        warn_on_stderr(note)
    place = str(loaded.model.device) if isinstance(what, NewLLM) else detect(device).device
    chosen, engine = choose_numerics(place, precision)
    if chosen.substituted:
        warn_on_stderr(f"scored in {chosen.name}: {chosen.reason}")
    scored = prepared.split(split)
    with BUFFERS.kept(), copied_to(loaded.model, place) as model:
        batch = config.train.eval_batch_size or default_eval_batch_size(model.device.type)
        return evaluate_split(model, scored, precision=chosen, batch_size=batch, engine=engine.run)


def _default_protocol(protocol: DataConfig | None) -> RunConfig:
    """A configuration that reads text as a model's own did, or, where the model does not say, as by default."""
    if protocol:
        return RunConfig(data=protocol)
    default = DataConfig()
    warn_on_stderr(
        "this model does not say how its text was read (it has no data.json): it is scored by the default protocol, "
        f"{default.layout} of {default.sequence_length} tokens every {default.stride}"
    )
    return RunConfig(data=default)


def side_by_side(runs: Sequence[Run], prompts: Sequence[str], *, seed: int = 0, **options):
    """How each run's best model continues the same prompts: a pandas DataFrame, a row a prompt, a column a run.

    A notebook shows it as text, through its `.style` too: the words of a model from elsewhere may be anything.
    Options as for `generate_texts`; every model draws from the same seed. ConfigError where there is no run or prompt.
    """
    import pandas

    if not runs or isinstance(prompts, str) or not prompts:
        raise ConfigError("side_by_side(runs, prompts) needs at least one run and a list of at least one prompt")
    names = [run.folder.name for run in runs]
    columns = {
        name if names.count(name) == 1 else str(run.folder): [
            text.prompt + text.text for text in generate_texts(run.model, run.tokenizer, prompts, seed, **options)
        ]
        for name, run in zip(names, runs, strict=True)
    }
    return text_table(columns, index=pandas.Index(prompts, name="prompt"))
