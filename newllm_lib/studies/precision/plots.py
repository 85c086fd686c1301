"""The picture of a precision study: curves, their differences, errors of one step."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm_lib.escaping import plot_text
from newllm_lib.reporting.curves import draw_or_warn, own_style, plain_log_axis
from newllm_lib.reporting.formatting import counted
from newllm_lib.studies.precision.findings import run_of
from newllm_lib.system.files import write_atomic

if TYPE_CHECKING:
    from pandas import DataFrame


COLOURS = ("#1f6fb4", "#d9701e", "#3a9a5b", "#8a5bb5")
"""Of the runs in their order; the one with another seed is grey."""
_GREY = "#8c8c8c"


def write_plot(path: Path, record: dict[str, Any], steps: DataFrame, validations: DataFrame) -> None:
    """Training loss, its difference, validation; gradient norms, distance of the weights, errors of one step."""
    draw_or_warn(path, lambda: _write_plot(path, record, steps, validations))


@own_style()
def _write_plot(path: Path, record: dict[str, Any], steps: DataFrame, validations: DataFrame) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.4), layout="constrained")
    formats = " and ".join(dict.fromkeys(run["precision"].upper() for run in record["runs"]))
    title = f"The same run in {formats}  ({record['data']}, preset {record['preset']})"
    figure.suptitle(plot_text(title), fontsize=13)
    panels = figure.subplots(2, 3)
    _training_panel(panels[0, 0], record, steps)
    _difference_panel(panels[0, 1], record, steps)
    _validation_panel(panels[0, 2], record, validations)
    _norm_panel(panels[1, 0], record, steps)
    _distance_panel(panels[1, 1], record, steps)
    _rounding_panel(panels[1, 2], record)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    write_atomic(path, lambda file: file.write(image.getvalue()))


def _styles(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour, width and order of each run's line, by its label; later formats are drawn dashed over the first."""
    seed = record["runs"][0]["seed"]
    styles = {}
    for number, run in enumerate(record["runs"]):
        if run["seed"] != seed:
            styles[run["label"]] = {"color": _GREY, "linewidth": 1.6, "zorder": 1, "label": "another seed"}
        else:
            dashed = {"linestyle": (0, (4, 2))} if number else {}
            name = plot_text(run["precision"].upper())
            styles[run["label"]] = {
                "color": COLOURS[number % 4],
                "linewidth": 1.8,
                "zorder": 3 + number,
                "label": name,
                **dashed,
            }
    return styles


def _finish(axes, title: str, xlabel: str = "batches read") -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.25)
    axes.legend(framealpha=0.8, edgecolor="none", fontsize=9)


def _training_panel(axes, record: dict[str, Any], steps: DataFrame) -> None:
    window = record["window"]
    for label, style in _styles(record).items():
        rows = steps[steps["label"] == label]
        axes.plot(rows["batch"], rows["loss"].rolling(window, min_periods=1).mean(), **style)
    _finish(axes, f"Training loss (nats a token, mean of {counted(window, 'step')})")


def _difference_panel(axes, record: dict[str, Any], steps: DataFrame) -> None:
    """How far each run is from the first, and the line below which nobody could tell two curves apart."""
    window, (first, *others) = record["window"], record["runs"]
    styles, measure = _styles(record), steps[steps["label"] == first["label"]].set_index("batch")["loss"]
    for run in others:
        rows = steps[steps["label"] == run["label"]].set_index("batch")["loss"]
        gaps, style = (rows - measure).dropna(), styles[run["label"]] | {"linestyle": "-"}
        axes.plot(gaps.index, gaps.abs(), **style | {"linewidth": 0.6, "alpha": 0.5, "label": None})
        axes.plot(gaps.index, gaps.abs().rolling(window).mean(), **style)
    for item in record["comparisons"]:
        run = run_of(record, item)
        if item["parted_at"] is not None and run["seed"] == first["seed"]:
            axes.axvline(item["parted_at"], color=styles[run["label"]]["color"], linewidth=1, linestyle=":")
            note = f" part at {item['parted_at']}"
            axes.annotate(note, (item["parted_at"], 0.95), xycoords=("data", "axes fraction"), fontsize=9)
    if record["comparisons"]:
        name = "what another draw of batches can do"
        axes.axhline(record["comparisons"][0]["band"], color="black", linewidth=1, linestyle=":", label=name)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-6)
    _finish(axes, f"Training loss: distance from {first['label'].upper()} (nats, mean of {window})")


def _validation_panel(axes, record: dict[str, Any], validations: DataFrame) -> None:
    for label, style in _styles(record).items():
        rows = validations[validations["label"] == label]
        axes.plot(rows["step"], rows["val_ppl"], marker="o", markersize=3.5, **style)
    values = validations["val_ppl"].dropna()
    if len(values) and values.max() > 4 * values.min():
        plain_log_axis(axes)
    _finish(axes, "Validation perplexity (lower is better)", "updates")


def _norm_panel(axes, record: dict[str, Any], steps: DataFrame) -> None:
    styles = _styles(record)
    for label, style in styles.items():
        rows = steps[(steps["label"] == label) & (steps["skipped"] == 0)]
        axes.plot(rows["batch"], rows["grad_norm"].rolling(record["window"], min_periods=1).median(), **style)
        left_out = steps[(steps["label"] == label) & (steps["skipped"] == 1)]
        if len(left_out):
            name = f"{style['label']}: skipped ({len(left_out)})"
            at = [0.97] * len(left_out)
            axes.plot(
                left_out["batch"], at, "v", transform=axes.get_xaxis_transform(), color=style["color"], label=name
            )
    plain_log_axis(axes)
    _finish(axes, f"Gradient norm before clipping (median of {record['window']})")


def _distance_panel(axes, record: dict[str, Any], steps: DataFrame) -> None:
    first, *others = record["runs"]
    styles = _styles(record)
    rows = steps[(steps["label"] == first["label"]) & steps["moved"].notna()]
    moved = styles[first["label"]] | {"label": f"{first['label'].upper()} from its initial weights", "marker": "."}
    axes.plot(rows["batch"], 100 * rows["moved"], **moved)
    for run in others:
        rows = steps[(steps["label"] == run["label"]) & steps["distance"].notna()]
        style = styles[run["label"]]
        name = f"{style['label']} from {first['label'].upper()}"
        axes.plot(rows["batch"], 100 * rows["distance"], marker=".", **style | {"label": name, "linestyle": "-"})
    axes.set_xscale("log")
    plain_log_axis(axes)
    axes.xaxis.set_major_formatter("{x:g}")
    _finish(axes, "Distance of the weights (% of their size)")


def _rounding_panel(axes, record: dict[str, Any]) -> None:
    """Bars for each part of the model: a format's error, and another batch's as the yardstick."""
    rows = record["rounding"]
    if not rows:
        axes.set_axis_off()
        return
    state = rows[-1]["weights"]
    formats = list(dict.fromkeys(row["precision"] for row in rows))
    parts = list(dict.fromkeys(row["part"] for row in rows))
    height = 0.8 / (len(formats) + 1)
    labels = {run["precision"]: number for number, run in reversed(list(enumerate(record["runs"])))}
    for number, (name, column) in enumerate([*((name, "gradient_error") for name in formats), (None, "other_batch")]):
        chosen = [row for row in rows if row["weights"] == state and row["precision"] == (name or formats[0])]
        values = [100 * (row[column] or 0) for row in chosen]
        places = [place + (number - len(formats) / 2) * height for place in range(len(parts))]
        color = _GREY if name is None else COLOURS[labels[name] % 4]
        axes.barh(places, values, height, color=color, label=name.upper() if name else "another batch, FP32")
    axes.set_yticks(range(len(parts)), parts)
    axes.set_ylim(len(parts) - 0.4, -1.6)  # from top to bottom, with room for the legend
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    _finish(axes, f"Error of one step's gradient, {state} weights (%)", "% of the FP32 gradient's size")
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=len(formats) + 1)
