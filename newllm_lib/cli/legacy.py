"""newllm import: the experiment series' own files."""

from __future__ import annotations

import click

from newllm_lib.cli.output import echo, echo_json


@click.command("import")
@click.argument("file")
@click.option(
    "--data",
    multiple=True,
    default=("wikitext-2",),
    show_default=True,
    help="Text that the run was trained on (as for train): the file holds no vocabulary, so it is made again.",
)
@click.option("--name", default=None, help="Folder of the run (default: the name of FILE without .pt).")
@click.option("--results-dir", default="results", show_default=True, help="Where runs lie.")
@click.option("--preset", default=None, help="The published run that FILE is of, to be shown beside it.")
@click.option("--evaluate", is_flag=True, help="Score the weights on the validation split too.")
@click.option("--json", "as_json", is_flag=True, help="Print the run's record as JSON.")
def import_(
    file: str,
    data: tuple[str, ...],
    name: str | None,
    results_dir: str,
    preset: str | None,
    evaluate: bool,
    as_json: bool,
) -> None:
    """Make a run's folder from FILE, a .pt file of the experiment series. Nothing in the file is run."""
    from newllm_lib.reporting.record import contents, read_record
    from newllm_lib.sharing import legacy

    source = data[0] if len(data) == 1 else data
    folder = legacy.import_run(file, data=source, name=name, results_dir=results_dir, preset=preset, evaluate=evaluate)
    record = read_record(folder)
    if as_json:
        echo_json(record | {"folder": str(folder)})
        return
    echo("\n".join(f"{title:>14}  {text}" for title, text in record["plan"]))
    echo(f"written to {folder}/: {contents(folder)}")
