"""newllm bench: instruments."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
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
