"""A comparison of runs as a DataFrame, a Markdown table and a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from newllm_lib.config.places import user_path
from newllm_lib.escaping import csv_text, markdown_list, markdown_text, plot_text, text_table
from newllm_lib.reporting.comparison import (
    COLUMNS,
    PROTOCOL_SETTINGS,
    SCORE_COLUMNS,
    SET_UP_COLUMNS,
    Comparison,
    Entry,
    collect,
)
from newllm_lib.reporting.curves import draw_or_warn, own_style, set_perplexity_axis
from newllm_lib.reporting.formatting import counted, duration, ppl_text
from newllm_lib.system.files import make_folder, write_atomic, write_text_atomic

_PANELS = {"step": "optimizer steps", "tokens": "tokens seen", "train_seconds": "training time"}
_TIMES = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 18000, 36000, 72000, 180000, 360000)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of Okabe and Ito (2008), which the colour-blind tell apart; the markers tell the runs apart once more."""
_MARKERS, _LINES = "os^Dv", ("-", (0, (6, 1, 1, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
_GREYS = (("#555555", (0, (6, 2))), ("#777777", (0, (3, 1.5))), ("#999999", (0, (1.5, 1))))


def compare(runs, *, published: bool = True, out: str | Path | None = None):
    """The runs beside each other and, where scores compare, beside the published ones, as a pandas DataFrame.

    runs: folders, or objects with a `.folder`; at least one. Perplexities are ranked (`rank`, 1 = best) only within a
    `group`; `.attrs["notes"]` says why groups do not compare, `.attrs["text"]` is what one reads. `out`: a folder for
    comparison.md, .csv, .json and .png.
    FileMissingError or RunError names a folder that holds no run or a damaged one.
    """
    comparison = collect(runs, published=published)
    if out is not None:
        write(comparison, user_path(out))
    return frame(comparison)


def frame(comparison: Comparison):
    """The rows as a pandas DataFrame, numbered from 1; `.attrs`: notes, groups, and all as Markdown text."""
    table = text_table(comparison.rows()).set_index("number").astype({name: COLUMNS[name][0] for name in COLUMNS})
    groups = {name: str(scored) for name, scored in comparison.groups.items()}
    table.attrs = {"notes": comparison.notes, "groups": groups, "text": table_text(comparison)}
    return table


def write(comparison: Comparison, folder: Path) -> None:
    """comparison.md, .csv, .json and .png, each whole, and of a run's folder no more than its name."""
    comparison = replace(comparison, entries=[entry.without_place() for entry in comparison.entries])
    make_folder(folder)
    path = folder / "comparison.png"
    draw_or_warn(path, lambda: _write_picture(path, comparison))
    write_text_atomic(folder / "comparison.json", comparison.to_json())
    write_text_atomic(folder / "comparison.csv", csv_text(frame(comparison)))
    title = f"# Comparison of {counted(len(comparison.entries), 'run')}\n\n"
    title += "![validation perplexity](comparison.png)\n\n" if path.is_file() else ""
    write_text_atomic(folder / "comparison.md", title + table_text(comparison))


@own_style()
def _write_picture(path: Path, comparison: Comparison) -> None:
    image, options = picture(comparison), {"format": "png", "dpi": 110, "metadata": {"Software": None}}
    write_atomic(path, lambda file: image.savefig(file, **options))


def table_text(comparison: Comparison) -> str:
    """Markdown: a table of scores for each group, the set-up of all where it differs, and the notes."""
    rows, parts = comparison.rows(), []
    for letter, scored in comparison.groups.items():
        group = [row for row in rows if row["group"] == letter]
        parts += [f"## {letter}: {markdown_text(scored)}", _table(group, SCORE_COLUMNS, results=True)]
        if ranked := [row for row in group if row["rank"] and not row["published"]]:
            best, name = ranked[0], markdown_text(ranked[0]["run"])
            parts.append(f"Best of these runs: #{best['number']} {name}, PPL {ppl_text(best['val_ppl'])}.")
    parts += ["## Set-up", _table(rows, SET_UP_COLUMNS)]
    differing = []
    for name in (name for name in rows[0] if name.startswith("setting.") and name[8:] not in PROTOCOL_SETTINGS):
        values: dict[str, list[str]] = {}
        for row in (row for row in rows if comparison.entries[row["number"] - 1].settings):
            values.setdefault(json.dumps(row[name]), []).append(f"#{row['number']}")
        differing.append(f"{name[8:]}: " + "; ".join(f"{value} ({', '.join(by)})" for value, by in values.items()))
    parts += ["Other settings that differ:", markdown_list(differing)] if differing else []
    notes = [*comparison.notes, *(f"{row['run']}: {row['note']}" for row in rows if row["note"])]
    parts += ["## Notes", markdown_list(notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def _table(rows: list[dict[str, Any]], names: list[str], results: bool = False) -> str:
    """The columns in which rows differ, padded so that they line up in a terminal too, and in words what all share.

    results: what the columns hold was measured, so that equal values are no common ground; every column stays.
    """
    names = [name for name in names if COLUMNS[name][2]]
    cells = {name: [_cell(name, row[name]) for row in rows] for name in names}
    found = {name: set(cells[name]) - {""} for name in names}
    shared = [name for name in names if len(found[name]) == 1 < len(rows) and not results]
    columns = [["#", *(str(row["number"]) for row in rows)], ["run", *(_cell("run", row["run"]) for row in rows)]]
    for name in (name for name in names if found[name] and name not in shared):
        best = [name == "val_ppl" and row["rank"] == 1 for row in rows]
        columns.append([COLUMNS[name][2], *(f"**{c}**" if b else c for c, b in zip(cells[name], best, strict=True))])
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    lines = ["| " + " | ".join(row) + " |" for row in zip(*padded, strict=True)]
    lines.insert(1, "|" + "|".join("-" * (len(column[0]) + 2) for column in padded) + "|")
    told = ", ".join(f"{COLUMNS[name][2]} {min(found[name])}" for name in shared)
    return "\n".join(lines) + (f"\n\nThe same for all, where known: {told}." if told else "")


def _cell(name: str, value: Any) -> str:
    """A value in a table of Markdown, empty where it is missing."""
    return "" if value is None else markdown_text(COLUMNS[name][1](value))


def picture(comparison: Comparison):
    """Validation perplexity over steps, tokens and training time, 13 x 4.4 inches; published curves grey and dashed."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    figure.suptitle("Validation perplexity (lower is better)", fontsize=12)
    panels, letter, handles, counts = figure.subplots(1, 3, sharey=True), "", [], {True: count(), False: count()}
    drawn = [(number, entry) for number, entry in enumerate(comparison.entries, start=1) if entry.curve]
    for number, entry in drawn:
        if len(comparison.groups) > 1 and entry.values["group"] != letter:
            letter = entry.values["group"]
            handles.append(Line2D([], [], linestyle="none", label=f"group {letter}: compare within it only"))
        line = _LINES[list(comparison.groups).index(entry.values["group"]) % 4]
        style, name = _style(entry, next(counts[entry.values["published"]]), line), entry.values["run"]
        shown = name if len(name) <= 30 else f"{name[:14]}…{name[-15:]}"
        handles.append(Line2D([], [], label=plot_text(f"{number}  {shown}"), **style))
        for axes, what in zip(panels, _PANELS, strict=True):
            axes.plot([row[what] for row in entry.curve], [row["val_ppl"] for row in entry.curve], **style)
    for axes, (what, title) in zip(panels, _PANELS.items(), strict=True):
        axes.set_xlabel(title)
        axes.grid(alpha=0.25)
        if values := [row[what] for _, entry in drawn for row in entry.curve if row[what] > 0]:
            _scale_cost(axes, what, min(values), max(values))
        else:
            axes.text(0.5, 0.5, "nothing recorded", ha="center", transform=axes.transAxes)
    if drawn:
        ppls = [row["val_ppl"] for _, entry in drawn for row in entry.curve]
        set_perplexity_axis(panels[0], min(ppls), max(ppls))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8 if len(handles) <= 24 else 6)
    return figure


def _style(entry: Entry, number: int, line: Any) -> dict[str, Any]:
    """Colour and marker tell runs apart, the line their groups; published ones are grey and dashed."""
    if entry.values["published"]:
        color, line = _GREYS[number % 3]
        return {"color": color, "linestyle": line, "linewidth": 1.4, "zorder": 1}
    marks = {"marker": _MARKERS[number % 5], "markersize": 4, "markevery": max(1, len(entry.curve) // 10)}
    return {"color": _COLOURS[number % 7], "linestyle": line, "linewidth": 1.6, **marks}


def _scale_cost(axes, what: str, low: float, high: float) -> None:
    from matplotlib import ticker

    if high > 20 * low:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    if what == "train_seconds":
        every = ticker.MultipleLocator(next((time for time in _TIMES if high <= 6 * time), high))
        axes.xaxis.set_major_locator(ticker.FixedLocator(_TIMES[::3]) if high > 20 * low else every)
        axes.xaxis.set_major_formatter(lambda seconds, _: duration(seconds))
