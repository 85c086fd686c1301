"""The picture of a grid: heat maps of the best perplexity, and curves."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm_lib.escaping import plot_text
from newllm_lib.reporting.curves import draw_or_warn, own_style
from newllm_lib.reporting.formatting import counted
from newllm_lib.studies.lr_scaling.findings import Place, places
from newllm_lib.system.files import write_atomic

if TYPE_CHECKING:
    from pandas import DataFrame


COLOURS = {"none": "#1f6fb4", "linear": "#d9701e", "sqrt": "#3a9a5b"}
_LINES = ("-", (0, (4, 2)), ":", "-.")
"""Of the initialisations in their order."""
_GREY = "#8c8c8c"


def write_plot(path: Path, record: dict[str, Any], histories: DataFrame) -> None:
    """A heat-map for each initialisation, and the curves of each batch."""
    draw_or_warn(path, lambda: _write_plot(path, record, histories))


@own_style()
def _write_plot(path: Path, record: dict[str, Any], histories: DataFrame) -> None:
    from matplotlib.figure import Figure

    found = places(record)
    names = list(dict.fromkeys(place.initialisation for place in found))
    batches = list(dict.fromkeys(place.batch for place in found))
    columns = math.lcm(len(names), len(batches))
    figure = Figure(figsize=(max(9, 4.8 * len(batches)), 8.6), layout="constrained")
    figure.suptitle(
        f"Learning-rate rules  ({plot_text(record['data'])}, {record['parameters']:,} parameters, "
        f"{counted(record['sequences'], 'sequence')} a cell)",
        fontsize=13,
    )
    grid = figure.add_gridspec(2, columns)
    _heat_maps(figure, grid, columns // len(names), record, found, names, batches)
    width, first = columns // len(batches), None
    for number, batch in enumerate(batches):
        axes = figure.add_subplot(grid[1, number * width : (number + 1) * width], sharey=first)
        first = first or axes
        _curves(axes, record, histories, batch, names, legend=number == 0)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    write_atomic(path, lambda file: file.write(image.getvalue()))


def _heat_maps(figure, grid, width: int, record, found: list[Place], names: list[str], batches: list[int]) -> None:
    """Best perplexity by rule and batch, one scale of colours for all."""
    from matplotlib.colors import LogNorm

    rules = list(dict.fromkeys(place.rule for place in found))
    values = [place.best for place in found if math.isfinite(place.best)] or [1.0, 2.0]
    norm = LogNorm(min(values), max(*values, 1.01 * min(values)))
    shown, panels = None, []
    for number, name in enumerate(names):
        axes = figure.add_subplot(grid[0, number * width : (number + 1) * width])
        panels.append(axes)
        by_place = {(p.rule, p.batch): p for p in found if p.initialisation == name}
        rows = [[by_place[rule, batch].best for batch in batches] for rule in rules]
        shown = axes.imshow(rows, norm=norm, cmap="viridis_r", aspect="auto")
        for y, rule in enumerate(rules):
            for x, batch in enumerate(batches):
                _annotate(axes, x, y, by_place[rule, batch], norm)
        axes.set_xticks(
            range(len(batches)),
            [f"batch {batch}\n{counted(by_place[rules[0], batch].steps, 'step')}" for batch in batches],
        )
        axes.set_yticks(range(len(rules)), [rule.replace(":", "\nfrom ") for rule in rules])
        axes.set_title(f"{name} initialisation: best validation perplexity", fontsize=11)
    bar = figure.colorbar(shown, ax=panels, fraction=0.025, pad=0.01)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_formatter("{x:g}")


def _annotate(axes, x: int, y: int, place: Place, norm) -> None:
    """The figure in its cell, in the colour that can be read on it."""
    words = f"{place.best:.1f}" if math.isfinite(place.best) else "no figure"
    note = {"below": "", "on": "\nunigram plateau", "above": "\nabove the plateau"}[place.plateau]
    dark = math.isfinite(place.best) and norm(place.best) > 0.55
    style = {"xy": (x, y), "textcoords": "offset points", "ha": "center", "color": "white" if dark else "black"}
    axes.annotate(words, xytext=(0, 2), va="bottom", fontsize=12, weight="bold", **style)
    axes.annotate(f"rate {place.lr:.2g}{note}", xytext=(0, -2), va="top", fontsize=9, **style)


def _curves(axes, record, histories: DataFrame, batch: int, names: list[str], legend: bool) -> None:
    """Validation perplexity over epochs: colours tell rules apart, lines initialisations."""
    from matplotlib import ticker
    from matplotlib.lines import Line2D

    drawn, width = set(), 1.7 if len({cell["seed"] for cell in record["cells"]}) == 1 else 1.0
    for cell in record["cells"]:
        if cell["batch"] != batch or cell["run"] in drawn:
            continue
        drawn.add(cell["run"])
        rows = histories[histories["cell"] == cell["run"]]
        color, line = COLOURS[cell["rule"].partition(":")[0]], _LINES[names.index(cell["initialisation"]) % 4]
        axes.plot(
            rows["epoch"],
            rows["val_ppl"],
            color=color,
            linestyle=line,
            linewidth=width,
            marker=".",
            markersize=3 * width,
        )
    axes.axhline(record["unigram_ppl"], color=_GREY, linewidth=1, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    bests = [cell["best_ppl"] for cell in record["cells"] if cell["best_ppl"] is not None] + [record["unigram_ppl"]]
    axes.set_ylim(0.9 * min(bests), max(3 * record["unigram_ppl"], 1.2 * max(bests)))  # a beginning would flatten all
    one = len({f"{cell['lr']:.6g}" for cell in record["cells"] if cell["batch"] == batch}) == 1
    axes.set_title(f"batch {batch}: validation perplexity" + (" (all rules, one rate)" if one else ""), fontsize=11)
    axes.set_xlabel("epochs")
    axes.grid(alpha=0.25)
    if legend:
        rules = dict.fromkeys(cell["rule"] for cell in record["cells"])
        handles = [Line2D([], [], color=COLOURS[rule.partition(":")[0]], label=rule) for rule in rules]
        handles += [Line2D([], [], color="black", linestyle=_LINES[n % 4], label=name) for n, name in enumerate(names)]
        handles.append(Line2D([], [], color=_GREY, linestyle=":", label="word frequencies alone"))
        axes.legend(handles=handles, framealpha=0.8, edgecolor="none", fontsize=9)
