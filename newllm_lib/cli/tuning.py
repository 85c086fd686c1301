"""newllm probe, newllm lr-find, newllm bench: instruments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from newllm_lib.cli.options import Sectioned, field_options, overrides_of
from newllm_lib.cli.output import echo, echo_json, echo_written
from newllm_lib.cli.training import config_of
from newllm_lib.escaping import shell_command
from newllm_lib.reporting.formatting import named_lines


@click.command(cls=Sectioned)
@click.argument("preset", required=False)
@click.option(
    "--policy",
    type=click.Choice(("fast", "fill", "recipe")),
    help="What to look for: fast (default) = the smallest batch within 5 % of the best speed, fill = the largest that "
    "fits the memory, recipe = the largest pieces in which the recipe's own batch fits.",
)
@click.option(
    "--memory-share",
    type=click.FloatRange(0, 1, min_open=True),
    help="Largest share of the usable memory that a batch may take (default 0.9).",
)
@click.option("--seconds", type=click.FloatRange(0), help="Longest time for the search (default 60).")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@field_options
def probe(
    preset: str | None,
    policy: str | None,
    memory_share: float | None,
    seconds: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Show this machine, or find the batch with which PRESET should train on it.

    Without PRESET: memory, the precision and engine that `auto` takes and why, and the product rates. With PRESET: real
    steps of a throw-away copy at growing batches, each reported on standard error; what was found is remembered for
    `--batch-policy`. Options as for `newllm train`.
    """
    from newllm_lib import tuning

    overrides = overrides_of(options)
    config = config_of(preset or "auto", overrides)
    searching = {"policy": policy, "memory_share": memory_share, "seconds": seconds}
    searching = {name: value for name, value in searching.items() if value is not None}
    if preset is None:
        if searching or overrides.keys() - {"device", "threads"}:
            raise click.UsageError("name a PRESET to find a batch for; this machine alone needs --device and --threads")
        found = tuning.probe(config.train.device, config.train.threads)
        lines = named_lines(tuning.probe_lines(found))
    else:
        searching.setdefault("policy", overrides.get("batch_policy", "fast"))
        choice = tuning.find_batch(config, report=lambda text: echo(text, err=True), **searching)
        typed = f"newllm train {preset}{_options(choice, searching.keys() == {'policy'})} (with your other options)"
        found, lines = dataclasses.asdict(choice), [*choice.lines(), f"  to use it: {typed}"]
    if as_json:
        echo_json(found)
    else:
        echo("\n".join(lines))


def _options(choice: Any, as_training_searches: bool) -> str:
    """What to type for a batch that was found; training finds it again only by a search like its own."""
    if choice.policy == "recipe":
        return f" --micro-batch-size {choice.micro_batch_size}" if choice.micro_batch_size else ""
    return f" --batch-policy {choice.policy}" if as_training_searches else f" --batch-size {choice.batch_size}"


@click.command("lr-find", cls=Sectioned)
@click.argument("preset", default="auto")
@click.option("--from", "run", default=None, help="Start from the weights of this run instead of new ones.")
@click.option("--low", default=1e-5, show_default=True, help="First rate.")
@click.option("--high", default=1.0, show_default=True, help="Last rate.")
@click.option("--steps", default=100, show_default=True, help="Steps from the first rate to the last.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/lr_find"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print rates, losses and the suggestion as JSON.")
@field_options
def lr_find(
    preset: str, run: str | None, low: float, high: float, steps: int, out: Path, as_json: bool, **options: Any
) -> None:
    """Learning-rate range test of PRESET: the loss while the rate rises, and the rate it suggests.

    Trains a throw-away copy; no run is touched. Options as for `newllm train`.
    """
    from newllm_lib import runs
    from newllm_lib.system.files import make_folder
    from newllm_lib.tuning.lr_finder import lr_find as test

    config = config_of(preset, overrides_of(options))
    model, tokenizer = runs.load_model(run)[:2] if run else (None, None)

    def report(step: int, rate: float, loss: float) -> None:
        if step % 10 == 0 or step == 1:
            echo(f"step {step} of {steps}: rate {rate:.2e}, loss {loss:.3f}", err=True)

    make_folder(out)  # before a minute of training
    found = test(config, model=model, tokenizer=tokenizer, low=low, high=high, steps=steps, report=report)
    found.write(out)
    if as_json:
        fields = ("rates", "muon_rates", "losses", "smoothed", "suggestion", "suggested", "reason")
        echo_json({name: getattr(found, name) for name in fields})
    else:
        echo("\n".join(_range_test_lines(found, preset)))
    echo_written(out, "lr_find.png, lr_find.csv")


def _range_test_lines(found: Any, preset: str) -> list[str]:
    """What was tested, what it suggests, and the command that trains with the very rates that were tested."""
    lines = [f"tested: {_range(found.rates)}"]
    if found.muon_rates:
        lines[0] += f", and with each of them Muon's rate on the hidden matrices: {_range(found.muon_rates)}"
    if not found.suggestion:
        return [*lines, "no suggestion", f"  {found.reason}"]
    rates = {name: f"{rate:.3g}" for name, rate in found.suggested.items()}
    muon = f", Muon {rates['muon_lr']}" if "muon_lr" in rates else ""
    command = shell_command(["newllm", "train", preset])
    options = " ".join(f"--{name.replace('_', '-')} {rate}" for name, rate in rates.items())
    return [
        *lines,
        f"suggested rate: {rates['lr']}{muon}",
        f"  {found.reason}",
        f"  to use it: {command} {options} (with your other options)",
    ]


def _range(rates: list[float]) -> str:
    return f"{min(rates):.3g} to {max(rates):.3g}" if rates else "nothing"
