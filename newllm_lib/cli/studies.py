"""newllm precisions, newllm lr-scaling: studies made of several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from newllm_lib.cli.options import Sectioned, field_options, overrides_of
from newllm_lib.cli.output import echo, echo_json, echo_written
from newllm_lib.cli.training import config_of
from newllm_lib.errors import ConfigError


class Listed(click.ParamType):
    """A list with commas between; `kind` makes each item."""

    name = "A,B,..."

    def __init__(self, kind: type = str):
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to a tuple."""
        from newllm_lib.studies.study_runs import listed

        try:
            return listed(value, self._kind)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


@click.command(cls=Sectioned)
@click.argument("preset", default="quickstart")
@click.option(
    "--formats",
    type=Listed(),
    default="fp32,fp16",
    show_default=True,
    help="Number formats, of fp32, bf16 and fp16; each is compared with the first.",
)
@click.option(
    "--control-seed/--no-control-seed",
    default=True,
    show_default=True,
    help="Train the first once more with the next seed, as a yardstick.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything but the curves as JSON.")
@field_options
def precisions(preset: str, formats: tuple[str, ...], control_seed: bool, as_json: bool, **options: Any) -> None:
    """Train PRESET in several number formats, everything else equal, and tell where they part and by how much.

    Same seed, same batches, same initial weights, same dropout. A format that the hardware lacks gives way to the
    nearest 16-bit one, or with --emulate-precision is emulated (FP16 on a CPU: some 30 times as slow). Options as for
    `newllm train`; --name is the folder of the study, its runs lie in it. The same command goes on where it stopped.
    """
    from newllm_lib.studies.precision.study import compare_precisions

    if options.get("precision"):
        raise click.UsageError("--precision: this command trains in several formats; name them with --formats")
    config = config_of(preset, overrides_of(options))
    study = compare_precisions(config, formats, control_seed=control_seed, report=lambda text: echo(text, err=True))
    _show(study, as_json, "precisions.md, precisions.png, study.json, steps.csv, validations.csv, and the runs")


@click.command("lr-scaling", cls=Sectioned)
@click.argument("preset", default="small")
@click.option("--batch-sizes", type=Listed(int), help="Batches (sequences; default: the grid's, else 32,128,512).")
@click.option("--rules", type=Listed(), help="Of none, linear, sqrt; linear:512 starts from batch 512.")
@click.option(
    "--initialisations",
    type=Listed(),
    default="published,fan-in",
    show_default=True,
    help="Of published (N(0, 0.02^2), biases 0) and fan-in (scaled weights, embedding std 1, forget bias 1).",
)
@click.option(
    "--seeds", type=Listed(int), help="Seeds; several show what a seed changes (default: the configuration's)."
)
@click.option("--json", "as_json", is_flag=True, help="Print everything but the curves as JSON.")
@field_options
def lr_scaling(
    preset: str,
    batch_sizes: tuple[int, ...] | None,
    rules: tuple[str, ...] | None,
    initialisations: tuple[str, ...],
    seeds: tuple[int, ...] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a grid of learning-rate rule x batch x initialisation, each cell with the same number of sequences.

    PRESET is small (minutes on a CPU), full (the published batches and rates, hours on a GPU), or a preset: its
    --batch-size and --lr-base are where the rules start, its --epochs or --max-steps what each cell reads. Options as
    for `newllm train`. The same command goes on where it stopped.
    """
    from newllm_lib.studies.lr_scaling import study as scaling

    overrides = overrides_of(options)
    if preset in scaling.GRIDS:
        try:
            scaling.GRIDS[preset]().config.replace(**overrides)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error
        study = scaling.lr_scaling(preset, batch_sizes, rules, initialisations, seeds=seeds, **overrides)
    else:
        study = scaling.lr_scaling(config_of(preset, overrides), batch_sizes, rules, initialisations, seeds=seeds)
    _show(study, as_json, "lr_scaling.md, lr_scaling.png, lr_scaling.csv, histories.csv, study.json, and the runs")


def _show(study: Any, as_json: bool, files: str) -> None:
    """Findings and table, or the whole record."""
    if as_json:
        echo_json(study.record)
    else:
        echo("\n".join(f"- {sentence}" for sentence in study.findings))
        echo("\n" + study.table.to_string(index=False, na_rep="", float_format="{:.4g}".format))
    echo_written(study.folder, files)


@click.command()
@click.option("--data", default="builtin", show_default=True, help="Text whose real batches are used (as for train).")
@click.option(
    "--part",
    "parts",
    multiple=True,
    help="batch, fp32, length, hidden_dim, num_layers, gpu, execution, inference; repeat (default: all, gpu on a GPU).",
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
    from newllm_lib.studies.bench.report import GROWTH, table_text
    from newllm_lib.studies.bench.training_speed import default_parts, run_bench

    chosen = list(parts or default_parts())
    result = run_bench(data, out, chosen, rounds, memory, lambda text: echo(text, err=True))
    if as_json:
        echo_json(result)
    else:
        echo(table_text(result))
    names = ["bench.json", "bench.md", *(["bench.png"] if set(chosen) & set(GROWTH) else [])]
    echo(f"written to {out}/: {', '.join(names)}", err=True)
