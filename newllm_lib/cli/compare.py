"""newllm compare: runs beside each other, or two models on the words that both know."""

from __future__ import annotations

import json
from pathlib import Path

import click

from newllm_lib.cli.output import echo, echo_exact, echo_json, echo_written
from newllm_lib.escaping import csv_text


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN ...]")
@click.option("--published/--no-published", default=True, show_default=True, help="Show the series' published runs.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for comparison.md, .csv, .json and .png.")
@click.option("--json", "as_json", is_flag=True, help="Print every column as JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="Print every column as CSV; the notes go to standard error.")
@click.option("--shared-words", is_flag=True, help="Score two models on the words that both of their tokenizers know.")
@click.option("--data", multiple=True, help="Text for --shared-words (as for train); default: what RUN was trained on.")
@click.option("--split", default="validation", show_default=True, help="For --shared-words: train, validation or test.")
def compare(
    runs: tuple[str, ...],
    published: bool,
    out: Path | None,
    as_json: bool,
    as_csv: bool,
    shared_words: bool,
    data: tuple[str, ...],
    split: str,
) -> None:
    """Show runs beside each other, best first, and why some of them do not compare.

    RUN is a run's folder (for --shared-words also a model/ folder or a checkpoint).
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv: choose one")
    if shared_words:
        if len(runs) != 2 or as_csv or out:
            raise click.UsageError("--shared-words takes two runs, and neither --csv nor --out")
        _shared_words(runs, data[0] if len(data) == 1 else data or None, split, as_json)
        return
    if data or split != "validation":
        raise click.UsageError("--data and --split belong to --shared-words: other comparisons train and score nothing")
    from newllm_lib.reporting import comparison
    from newllm_lib.reporting.comparison_report import frame, table_text, write

    found = comparison.collect(runs, published=published)
    if out is not None:
        write(found, out)
        echo_written(out, "comparison.md, comparison.csv, comparison.json, comparison.png")
    if as_csv:
        echo_exact(csv_text(frame(found)), nl=False)
        echo("\n".join(found.notes), err=True)
    elif as_json:
        echo_json(json.loads(found.to_json()))
    else:
        echo(table_text(found), nl=False)


def _shared_words(runs: tuple[str, ...], data: str | tuple[str, ...] | None, split: str, as_json: bool) -> None:
    from newllm_lib.studies import shared_words

    result = shared_words.compare_models(*runs, data, split=split)
    if as_json:
        echo_json(result.to_dict())
    else:
        echo(result.text(runs))
