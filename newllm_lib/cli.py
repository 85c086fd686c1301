"""The command `newllm`: train, presets, evaluate, generate, bench.

Results go to standard output, progress and messages to standard error. Exit status: 0 done, 1 failed or interrupted,
2 wrong usage. NEWLLM_DEBUG=1 shows the traceback behind a message.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from newllm_lib import presets
from newllm_lib.config import SPECIAL_TOKENS, UNK, FlatField, allowed_types, describe_allowed, flat_fields

SECTIONS = {"run": "Run", "data": "Data", "model": "Model", "train": "Recipe and machine"}


class FieldValue(click.ParamType):
    """A configuration field's value as typed in a shell; its range is checked by the configuration itself."""

    def __init__(self, item: FlatField):
        self.item = item
        self.name = _metavar(item)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to the field's type; 'none' where the field allows it."""
        kinds = allowed_types(self.item.type)
        if not isinstance(value, str):
            return value
        if value.lower() == "none" and type(None) in kinds:
            return _NONE
        try:
            if self.item.name == "clip_by_epoch":
                return tuple((int(epoch), float(norm)) for epoch, norm in (p.split(":") for p in value.split(",")))
            if int in kinds:
                return int(value)
            return float(value) if float in kinds else value
        except ValueError:
            self.fail(f"{value!r}: must be {describe_allowed(self.item.type, self.item.metadata)}", param, ctx)


_NONE = object()
"""What 'none' becomes, until it is told apart from an option that was not given."""


def _metavar(item: FlatField) -> str:
    if item.metadata["choices"]:
        return "|".join(item.metadata["choices"])
    kinds = allowed_types(item.type)
    return "INT" if int in kinds else "NUMBER" if float in kinds else "TEXT"


class Sectioned(click.Command):
    """A command whose options stand under the part of the configuration that they change."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options first, then a section for each part."""
        fields = flat_fields()
        groups: dict[str, list[tuple[str, str]]] = {"Options": []} | {title: [] for title in SECTIONS.values()}
        for parameter in self.get_params(ctx):
            line = parameter.get_help_record(ctx)
            if line and isinstance(parameter, click.Option):
                item = fields.get(parameter.name or "")
                groups[SECTIONS[item.section] if item else "Options"].append(line)
        for title, lines in groups.items():
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)


def field_options(function: Callable) -> Callable:
    """An option for every configuration field, none of which has a default: the preset has it."""
    for item in reversed(flat_fields().values()):
        if item.name == "preset":
            continue
        flag = "--" + item.name.replace("_", "-")
        if item.type is bool:
            option = click.option(f"{flag}/--no-{flag[2:]}", item.name, default=None, help=item.doc)
        else:
            repeated = item.name == "data"
            kind = FieldValue(item)
            option = click.option(
                flag, item.name, type=kind, multiple=repeated, metavar=kind.name, default=None, help=_help(item)
            )
        function = option(function)
    return function


def _help(item: FlatField) -> str:
    repeated = " Repeat the option for several files." if item.name == "data" else ""
    text = describe_allowed(item.type, item.metadata)
    plain = item.metadata["choices"] or text in ("text", "text, or none") or item.name in ("data", "clip_by_epoch")
    return item.doc + repeated + ("" if plain else f" [{text}]")


def overrides_of(options: dict[str, Any]) -> dict[str, Any]:
    """The fields that were given, by name."""
    given = {key: value for key, value in options.items() if value is not None and value != ()}
    if "data" in given and len(given["data"]) == 1:
        given["data"] = given["data"][0]
    return {key: None if value is _NONE else value for key, value in given.items()}


class Messages(click.Group):
    """Expected failures become one message and exit status 1; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        from newllm_lib.step import TrainingError

        try:
            return super().invoke(ctx)
        except (ValueError, OSError, TrainingError) as error:
            if os.environ.get("NEWLLM_DEBUG"):
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=Messages, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 118})
@click.version_option(package_name="newllm_lib", prog_name="newllm")
def main() -> None:
    """Train, study and share New-LLM, a language model with a fixed-size context instead of attention."""


@main.command(cls=Sectioned)
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

    config = runs_config(preset, overrides_of(options))
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


def runs_config(preset: str, overrides: dict[str, Any]):
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
    click.echo(f"\nbest validation perplexity {best['val_ppl']:.2f} at step {best['step']}")
    if run.record["published_protocol"]:
        for level, title, row in report.milestones(rows):
            reached = "not reached" if row is None else f"{row['train_seconds']:.0f} s of training"
            click.echo(f"  PPL {level:5.2f}  {reached:22}  (published: {title})")
    for sample in run.record["samples"][:1]:
        click.echo(f"\nsample: {sample}")
    click.echo(f"\nleft in {run.folder}/: report.md, curves.png, history.csv, run.json, model/, checkpoints/")


@main.command("presets")
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


@main.command()
@click.argument("run")
@click.option("--data", multiple=True, help="Other text than the run's own (as for train).")
@click.option("--split", default="validation", show_default=True, help="train, validation or test.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    help="Number format of the products.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def evaluate(run: str, data: tuple[str, ...], split: str, precision: str, as_json: bool) -> None:
    """Score RUN (a run's folder, its model/ folder, or a checkpoint) on a split, by the run's own data protocol."""
    from newllm_lib import runs

    source = data[0] if len(data) == 1 else data or None
    metrics = runs.evaluate(run, source, split=split, precision=precision)
    if as_json:
        click.echo(json.dumps(metrics.to_dict(), indent=2))
        return
    click.echo(f"{run}, {split} split: {metrics.tokens:,} targets, {metrics.unknown_share:.1%} of them <UNK>")
    click.echo(f"  perplexity   {metrics.perplexity:10.3f}   over known words {metrics.perplexity_known:10.3f}")
    click.echo(f"  loss         {metrics.loss:10.4f}   over known words {metrics.loss_known:10.4f}  (nats a token)")
    click.echo(f"  accuracy     {metrics.accuracy:10.2%}   over known words {metrics.accuracy_known:10.2%}")


@main.command()
@click.argument("run")
@click.option("--prompt", default="", help="Text to go on from (empty: the start of a text).")
@click.option("--tokens", "max_new_tokens", default=60, show_default=True, help="Most new tokens.")
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", default=0, show_default=True, help="Draw from this many of the likeliest tokens (0 = all).")
@click.option("--top-p", default=1.0, show_default=True, help="Draw from the likeliest that reach this probability.")
@click.option("--allow-unknown", is_flag=True, help=f"Let {SPECIAL_TOKENS[1]} be drawn too.")
@click.option("--seed", type=int, default=None, help="Seed of the draw; without it, another text each time.")
@click.option(
    "--samples", type=click.IntRange(1), default=1, show_default=True, help="How many texts, with consecutive seeds."
)
@click.option("--json", "as_json", is_flag=True, help="Print the texts as a JSON list.")
def generate(run: str, prompt: str, samples: int, seed: int | None, as_json: bool, **options: Any) -> None:
    """Write text with RUN: a run's folder, its model/ folder, or a checkpoint file."""
    from newllm_lib import runs
    from newllm_lib.writing import generate_text

    model, tokenizer, *_ = runs.load_model(run)
    if UNK in tokenizer.encode(prompt):
        click.echo(
            f"warning: words of the prompt are not in the vocabulary and are read as {SPECIAL_TOKENS[UNK]}", err=True
        )
    seeds = [None if seed is None else seed + number for number in range(samples)]
    texts = [generate_text(model, tokenizer, prompt, chosen, **options) for chosen in seeds]
    click.echo(json.dumps(texts, ensure_ascii=False, indent=2) if as_json else "\n\n".join(texts))


@main.command()
@click.option("--data", default="builtin", show_default=True, help="Text whose real batches are used (as for train).")
@click.option(
    "--part",
    "parts",
    multiple=True,
    help="batch, fp32, length, hidden_dim, num_layers, inference; repeat (default: all).",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Measured steps a case (median).")
@click.option(
    "--memory/--no-memory", default=True, show_default=True, help="Measure peak memory in processes of its own."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("results/bench"), show_default=True, help="Folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print what bench.json holds instead of the table.")
def bench(data: str, parts: tuple[str, ...], rounds: int, memory: bool, out: Path, as_json: bool) -> None:
    """Time training steps of the engines beside the published loop, an LSTM and the machine's own product rate."""
    from newllm_lib.study.bench import INFERENCE, PARTS, run_bench
    from newllm_lib.study.bench_report import table_text

    chosen = list(parts or (*PARTS, INFERENCE))
    result = run_bench(data, out, chosen, rounds, memory, lambda text: click.echo(text, err=True))
    click.echo(json.dumps(result, indent=2) if as_json else table_text(result))
    click.echo(f"left in {out}/: bench.json, bench.md, bench.png", err=True)


if __name__ == "__main__":
    main()
