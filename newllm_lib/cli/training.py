"""newllm train, newllm continue, newllm presets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

import click

from newllm_lib.cli.options import Sectioned, field_options, options_of, overrides_of
from newllm_lib.cli.output import echo, echo_exact, echo_json
from newllm_lib.config import RunConfig, flat_fields, presets
from newllm_lib.errors import ConfigError
from newllm_lib.reporting.formatting import counted, named_lines, ppl_text


@click.command(cls=Sectioned)
@click.argument("preset", default="")
@click.option(
    "--config", "file", type=click.File(encoding="utf-8"), help="TOML (`newllm config`) or a run.json; - = input."
)
@click.option("--plan", "plan_only", is_flag=True, help="Show every decision and the cost, and train nothing.")
@click.option("--fresh", is_flag=True, help="Start over; the old folder is kept under another name.")
@click.option("--json", "as_json", is_flag=True, help="Print the result (or the plan) as JSON.")
@field_options
def train(preset: str, file: TextIO | None, plan_only: bool, fresh: bool, as_json: bool, **options: Any) -> None:
    """Train PRESET (see `newllm presets`; auto when left out), or continue it where it stopped.

    Every option changes one field of the preset, or of the file. The same settings and data continue the same run.
    """
    _train_or_plan(config_of(preset, overrides_of(options), file), fresh, plan_only, as_json)


@click.command("config", cls=Sectioned)
@click.argument("preset", default="auto")
@field_options
def write_config(preset: str, **options: Any) -> None:
    """Print the settings of PRESET as a file for `newllm train --config`, each with what it means.

    Every option changes one of them.
    """
    from newllm_lib.config.config_file import config_text

    echo_exact(config_text(config_of(preset, overrides_of(options))), nl=False)


def _train_or_plan(config: RunConfig, fresh: bool, plan_only: bool, as_json: bool) -> None:
    from newllm_lib import runs

    if plan_only:
        _, lines = runs.plan(config)
        if as_json:
            echo_json(dict(lines))
        else:
            echo("\n".join(named_lines(lines)))
        return
    run = runs.train(config, fresh=fresh)
    _print_run(run, as_json)
    if run.record.status == "interrupted":
        sys.exit(1)


def _continuing_options(function: Callable) -> Callable:
    """The length, and the fields that may differ between two parts of a run."""
    items = [item for name, item in flat_fields().items() if name not in ("preset", "name")]
    return options_of([item for item in items if item.name == "data" or not item.metadata["identity"]], function)


@click.command("continue", cls=Sectioned)
@click.argument("place", default="")
@click.option("--sha256", help="What the content of a file must be (64 hex digits).")
@click.option("--plan", "plan_only", is_flag=True, help="Show every decision and the cost, and train nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result (or the plan) as JSON.")
@_continuing_options
def continue_(place: str, sha256: str | None, plan_only: bool, as_json: bool, **options: Any) -> None:
    """Continue a run to its planned end, or to a later one set with --epochs or --max-steps.

    PLACE is the run's folder or name, a bundle with a checkpoint, a checkpoint file, or the id of such a file on Google
    Drive; left out, it is the newest run of --results-dir and of the copies in --mirror-dir. A rate that decays to an
    end gets a new end. --data says where the run's text is, if it has moved or the run came from another machine:
    a path in a bundle or a checkpoint is never followed.
    """
    from newllm_lib.runs.extend import extended
    from newllm_lib.sharing import find_runs

    given = overrides_of(options)
    results_dir = given.pop("results_dir", RunConfig().results_dir)
    found = find_runs.find_run(
        place,
        results_dir=results_dir,
        mirror_dir=given.get("mirror_dir"),
        sha256=sha256,
        tell=lambda text: echo(text, err=True),
    )
    if found is None:
        raise click.ClickException(f"{results_dir}: holds no run that could be continued; name a place")
    _train_or_plan(extended(found, **given), False, plan_only, as_json)


def config_of(preset: str, overrides: dict[str, Any], file: TextIO | None = None) -> RunConfig:
    """The configuration of a preset or a file with overrides; a mistake in any is wrong usage (exit status 2)."""
    from newllm_lib.config.config_file import read_config

    if preset and file:
        raise click.UsageError(f"PRESET is {preset!r} and --config {file.name!r}: must be one of the two")
    try:
        config = read_config(_content(file), file.name) if file else presets.get(preset or "auto")
        return config.replace(**overrides)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error


def _content(file: TextIO) -> str:
    """The text of a file of settings; ConfigError where it is no text."""
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file.name}: is no text in UTF-8") from error


def _print_run(run, as_json: bool) -> None:
    from newllm_lib.reporting import report
    from newllm_lib.reporting.progress import HEADER, table_line
    from newllm_lib.reporting.record import contents

    if as_json:
        echo_json(run.record)
        return
    rows = run.history.to_dict("records")
    echo(f"\n{run.folder.name}: {run.record.status}")
    echo(HEADER)
    for row in rows:
        echo(table_line(row, run.best is not None and row["step"] == run.best["step"]))
    if run.best is None:
        return
    best = next((row for row in rows if row["step"] == run.best["step"]), run.best)
    echo(f"\nbest validation perplexity {ppl_text(best['val_ppl'])} at step {best['step']:,}")
    if run.record.published_protocol:
        for level, title, row in report.milestones(rows):
            reached = "not reached" if row is None else f"{row['train_seconds']:.0f} s of training"
            echo(f"  PPL {level:5.2f}  {reached:22}  (published: {title})")
    for sample in (run.record.samples or [])[:1]:
        echo(f"\nsample: {sample}")
    echo(f"\nwritten to {run.folder}/: {contents(run.folder)}")


@click.command("presets")
@click.option("--json", "as_json", is_flag=True, help="Print every preset's whole configuration as JSON.")
def list_presets(as_json: bool) -> None:
    """List the presets, what they stand for and where their rate comes from."""
    from newllm_lib.training.schedule import peak_rate

    if as_json:
        echo_json({name: preset().to_dict() for name, preset in presets.PRESETS.items()})
        return
    for name, preset in presets.PRESETS.items():
        config = preset()
        batch = config.train.batch_size or "by the hardware"
        epochs, steps = config.train.epochs, config.train.max_steps
        length = counted(steps, "step") if epochs is None else counted(epochs, "epoch")
        echo(f"{name:18}{(preset.__doc__ or '').strip()}")
        echo(f"{'':18}{config.model.num_parameters:,} parameters, batch {batch}, {length}, {config.train.precision}")
        if config.train.batch_size:
            rate = peak_rate(config.train, config.model.num_parameters)
            echo(f"{'':18}rate {rate.value:.3g}: {rate.reason}")
