"""newllm train, newllm presets."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from newllm_lib import presets
from newllm_lib.cli.fields import Sectioned, field_options, overrides_of


@click.command(cls=Sectioned)
@click.argument("preset", default="auto")
@click.option("--plan", "plan_only", is_flag=True, help="Show every decision and the cost, and train nothing.")
@click.option("--fresh", is_flag=True, help="Start over; the old folder is kept under another name.")
@click.option("--json", "as_json", is_flag=True, help="Print the result (or the plan) as JSON.")
@field_options
def train(preset: str, plan_only: bool, fresh: bool, as_json: bool, **options: Any) -> None:
    """Train PRESET (see `newllm presets`; auto when left out), or continue it where it stopped.

    Every option changes one field of the preset. The same settings and data continue the same run.
    """
    from newllm_lib import runs

    config = config_of(preset, overrides_of(options))
    if plan_only:
        _, lines = runs.plan(config)
        if as_json:
            click.echo(json.dumps(dict(lines), indent=2))
        else:
            click.echo("\n".join(f"{name:>10}  {text}" for name, text in lines))
        return
    run = runs.train(config, fresh=fresh)
    _print_run(run, as_json)
    if run.record["status"] == "interrupted":
        sys.exit(1)


def config_of(preset: str, overrides: dict[str, Any]):
    """The configuration of a preset with overrides; a mistake in either is wrong usage (exit status 2)."""
    try:
        return presets.get(preset).replace(**overrides)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _print_run(run, as_json: bool) -> None:
    from newllm_lib import report
    from newllm_lib.progress import HEADER, table_line

    if as_json:
        click.echo(json.dumps(run.record, indent=2))
        return
    rows = run.history.to_dict("records")
    click.echo(f"\n{run.folder.name}: {run.record['status']}")
    click.echo(HEADER)
    for row in rows:
        click.echo(table_line(row, run.best is not None and row["step"] == run.best["step"]))
    if run.best is None:
        return
    best = next(row for row in rows if row["step"] == run.best["step"])
    click.echo(f"\nbest validation perplexity {best['val_ppl']:.2f} at step {best['step']:,}")
    if run.record["published_protocol"]:
        for level, title, row in report.milestones(rows):
            reached = "not reached" if row is None else f"{row['train_seconds']:.0f} s of training"
            click.echo(f"  PPL {level:5.2f}  {reached:22}  (published: {title})")
    for sample in run.record["samples"][:1]:
        click.echo(f"\nsample: {sample}")
    click.echo(f"\nleft in {run.folder}/: report.md, curves.png, history.csv, run.json, model/, checkpoints/")


@click.command("presets")
@click.option("--json", "as_json", is_flag=True, help="Print every preset's whole configuration as JSON.")
def list_presets(as_json: bool) -> None:
    """List the presets, what they stand for and where their rate comes from."""
    from newllm_lib.schedule import peak_rate

    if as_json:
        click.echo(json.dumps({name: preset().to_dict() for name, preset in presets.PRESETS.items()}, indent=2))
        return
    for name, preset in presets.PRESETS.items():
        config = preset()
        batch = config.train.batch_size or "by the hardware"
        length = f"{config.train.max_steps} steps" if config.train.epochs is None else f"{config.train.epochs} epochs"
        click.echo(f"{name:18}{(preset.__doc__ or '').strip()}")
        click.echo(
            f"{'':18}{config.model.num_parameters:,} parameters, batch {batch}, {length}, {config.train.precision}"
        )
        if config.train.batch_size:
            rate = peak_rate(config.train, config.model.num_parameters)
            click.echo(f"{'':18}rate {rate.value:.3g}: {rate.reason}")
