"""newllm export, newllm bundle, newllm open: what leaves the machine, and comes back."""

from __future__ import annotations

import math
from pathlib import Path

import click

from newllm_lib.cli.output import echo
from newllm_lib.reporting.formatting import ppl_text


@click.command()
@click.argument("run")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--half", is_flag=True, help="Store the weights in FP16: half the size.")
def export(run: str, folder: Path, half: bool) -> None:
    """Write the model of RUN (a run's folder, a model folder, a checkpoint) to FOLDER: weights, tokenizer, card."""
    from newllm_lib.sharing import export as exporting

    exporting.export(run, folder, half=half)
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    size = sum(path.stat().st_size for path in folder.iterdir())
    echo(f"{folder}/: {names} ({size / 2**20:.1f} MiB)")


@click.command()
@click.argument("run")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="The file (default: RUN's folder + .zip).")
@click.option("--checkpoint", is_flag=True, help="Include the newest checkpoint, so that the run can be continued.")
def bundle(run: str, out: Path | None, checkpoint: bool) -> None:
    """Write RUN (a run's folder) as one file to hand on: weights, tokenizer, history, plots, report, hashes."""
    from newllm_lib.sharing import bundle as bundles

    path = bundles.bundle(run, out, checkpoint=checkpoint)
    echo(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")


@click.command("open")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--name", default=None, help="Folder of the run (default: the name it had).")
@click.option("--results-dir", default="results", show_default=True, help="Where runs lie.")
@click.option("--max-gib", default=8.0, show_default=True, help="Most that may be unpacked (GiB).")
def open_(bundle: Path, name: str | None, results_dir: str, max_gib: float) -> None:
    """Verify BUNDLE (every hash, name and size) and unpack it as a run."""
    from newllm_lib.sharing import bundle as bundles

    if not math.isfinite(max_gib):
        raise click.UsageError(f"--max-gib {max_gib}: must be a number of GiB")
    run = bundles.open_bundle(bundle, results_dir, name, max_bytes=int(max_gib * 2**30))
    best = f", best PPL {ppl_text(run.best['val_ppl'])}" if run.best else ""
    echo(f"{run.folder}: verified; {run.record['status']}{best}")
