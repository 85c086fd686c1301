"""What `lr_scaling` tells: its findings in sentences, lr_scaling.md and lr_scaling.png."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from newllm_lib.escaping import markdown_list, markdown_text, plot_text
from newllm_lib.files import write_atomic

if TYPE_CHECKING:
    from pandas import DataFrame

COLOURS = {"none": "#1f6fb4", "linear": "#d9701e", "sqrt": "#3a9a5b"}
_LINES = ("-", (0, (4, 2)), ":", "-.")
"""Of the initialisations in their order."""
_GREY = "#8c8c8c"

_WORDS = {"none": "no scaling", "linear": "the linear rule", "sqrt": "the square-root rule"}


class Place(NamedTuple):
    """A rule at a batch with an initialisation, over its seeds."""

    initialisation: str
    batch: int
    rule: str
    lr: float
    steps: int
    best: float
    """Mean over the seeds; infinity where none has a figure."""
    low: float
    high: float
    plateau: str

    @property
    def text(self) -> str:
        """Rule, rate and result."""
        rule, _, base = self.rule.partition(":")
        return f"{_WORDS[rule]}{f' from {base}' if base else ''} ({self.lr:.2g}) {self.result}"

    @property
    def result(self) -> str:
        """Perplexity, its range over seeds, and where it stands to the plateau."""
        figure = f"PPL {self.best:.1f}" if math.isfinite(self.best) else "no figure"
        spread = f" ({self.low:.1f} to {self.high:.1f})" if self.high > self.low else ""
        return figure + spread + ("" if self.plateau == "below" else f", {PLATEAU_WORDS[self.plateau]}")


PLATEAU_WORDS = {"on": "on the unigram plateau", "above": "not even down to the unigram plateau"}


def places(record: dict[str, Any]) -> list[Place]:
    """The cells of a record, seeds taken together, in the order of the record."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for cell in record["cells"]:
        groups.setdefault((cell["initialisation"], cell["batch"], cell["rule"]), []).append(cell)
    found = []
    for (initialisation, batch, rule), cells in groups.items():
        values = [math.inf if cell["best_ppl"] is None else cell["best_ppl"] for cell in cells]
        states = {cell["plateau"] for cell in cells}
        worst = next(state for state in ("above", "on", "below") if state in states)
        first = cells[0]
        found.append(
            Place(
                initialisation, batch, rule, first["lr"], first["steps"], mean(values), min(values), max(values), worst
            )
        )
    return found


# --- in words ---------------------------------------------------------------------------------------------------


def findings(record: dict[str, Any]) -> list[str]:
    """What a study's record says, as far as it says it."""
    found = places(record)
    seeds = sorted({cell["seed"] for cell in record["cells"]})
    sentences = [_budget(record)]
    for (initialisation, batch), group in _grouped(found):
        sentences.append(_at_one_batch(initialisation, batch, group))
    sentences += filter(None, [_largest_rate(found), _initialisations(found), _plateaus(record)])
    sentences += [
        f"{cell['run']} broke down and counts with the best figure it had."
        for cell in record["cells"]
        if cell["status"] == "broke down"
    ]
    if len(seeds) == 1:
        sentences.append(
            f"One seed ({seeds[0]}) for each cell: what another seed would change is not known from this grid, so "
            "small differences are no ranking."
        )
    else:
        sentences.append(f"{len(seeds)} seeds for each cell; the figures are means, with the range in brackets.")
    return sentences


def _grouped(found: list[Place]) -> Iterator[tuple[tuple[str, int], list[Place]]]:
    groups: dict[tuple[str, int], list[Place]] = {}
    for place in found:
        groups.setdefault((place.initialisation, place.batch), []).append(place)
    return iter(groups.items())


def _budget(record: dict[str, Any]) -> str:
    return (
        f"Every cell read {record['sequences']:,} sequences of {record['data']} ({record['epochs']:.1f} epochs) with "
        f"{record['parameters']:,} parameters in {record['precision']}; a larger batch made fewer steps of it."
    )


def _at_one_batch(initialisation: str, batch: int, group: list[Place]) -> str:
    """The rules at one batch, the best first; equal rates are one run."""
    rates: dict[str, Place] = {}
    for place in group:
        rates.setdefault(f"{place.lr:.6g}", place)
    start = f"{initialisation} initialisation, batch {batch} ({group[0].steps} steps): "
    if len(rates) == 1:
        return f"{start}all rules give the rate {group[0].lr:.2g}, {group[0].result}."
    ranked = sorted(rates.values(), key=lambda place: place.best)
    text = start + "; ".join(place.text for place in ranked) + "."
    if all(place.low == place.high for place in group):  # one seed
        return text
    apart = ranked[0].high < ranked[1].low
    return (
        f"{text} The first is {'below the others with every seed' if apart else 'not below the next with every seed'}."
    )


def _largest_rate(found: list[Place]) -> str:
    """In how many places the best rule is simply the one with the largest rate."""
    contests = [group for _, group in _grouped(found) if len({f"{place.lr:.6g}" for place in group}) > 1]
    if not contests:
        return ""
    won = sum(min(group, key=lambda p: p.best).lr == max(place.lr for place in group) for group in contests)
    return (
        f"The best rule is the one with the largest rate in {won} of {len(contests)} places where the rules differ."
        + (" That speaks for a larger rate here, not for the form of a rule." if won == len(contests) else "")
    )


def _initialisations(found: list[Place]) -> str:
    """How two initialisations compare at equal batch and rule."""
    names = list(dict.fromkeys(place.initialisation for place in found))
    if len(names) != 2:
        return ""
    by_name = {name: {(p.batch, f"{p.lr:.6g}"): p for p in found if p.initialisation == name} for name in names}
    ratios = [first.best / by_name[names[1]][key].best for key, first in by_name[names[0]].items()]
    ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
    better = sum(ratio > 1 for ratio in ratios)
    text = f"At equal batch and rate {names[1]} is below {names[0]} in {better} of {len(ratios)} runs"
    return text + (
        f"; PPL of {names[0]} over that of {names[1]}: {min(ratios):.2f} to {max(ratios):.2f}." if ratios else "."
    )


def _plateaus(record: dict[str, Any]) -> str:
    """Which runs never saw more than the word frequencies."""
    own = {cell["run"]: cell for cell in record["cells"]}.values()
    text = f"Knowing the word frequencies alone gives PPL {record['unigram_ppl']:.1f} (the unigram plateau)"
    for name in dict.fromkeys(cell["initialisation"] for cell in own):
        cells = [cell for cell in own if cell["initialisation"] == name]
        left = sum(cell["plateau"] == "below" for cell in cells)
        text += f"; {name} got below it in {left} of {len(cells)} runs"
    return text + "."


def text(record: dict[str, Any]) -> str:
    """lr_scaling.md: findings, every cell, what was changed."""
    titles = ("initialisation", "batch", "rule", "lr", "seed", "steps", "best PPL", "final PPL", "accuracy", "plateau")
    lines = ["| " + " | ".join(titles) + " | run |", "|" + "---|" * (len(titles) + 1)]
    for cell in record["cells"]:
        accuracy = "" if cell["accuracy"] is None else f"{cell['accuracy']:.1%}"
        values = (cell["initialisation"], cell["batch"], cell["rule"], f"{cell['lr']:.3g}", cell["seed"], cell["steps"])
        figures = ("" if cell[name] is None else f"{cell[name]:.2f}" for name in ("best_ppl", "final_ppl"))
        row = [*map(markdown_text, values), *figures, accuracy, *map(markdown_text, (cell["plateau"], cell["run"]))]
        lines.append("| " + " | ".join(row) + " |")
    train, environment = record["config"]["train"], record["environment"]
    settings = [
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in fields.items())
        for name, fields in record["initialisations"].items()
    ]
    return "\n".join(
        [
            "# Learning-rate rules, batches, initialisations",
            "",
            markdown_list(record["findings"]),
            "",
            "![grid and curves](lr_scaling.png)",
            "",
            "## Cells",
            "",
            "Cells of equal rate share a run. Plateau: best perplexity above, on (within 10 %) or below that of the "
            "word frequencies.",
            "",
            *lines,
            "",
            "## What differs, and what does not",
            "",
            markdown_list(settings),
            "",
            f"All else is equal: {train['optimizer']}, betas {train['beta1']} and {train['beta2']}, weight decay "
            f"{train['weight_decay']:g}, {train['lr_schedule']} rate, clipping {train['clip_by_epoch']}, dropout "
            f"{record['config']['model']['dropout']:g}. Rules start from {train['lr_base']:g} at batch "
            f"{train['batch_size']} unless they name another batch.",
            "",
            markdown_text(
                f"{record['precision']}: {record['precision_reason']}. {environment['device_name']}, torch "
                f"{environment['versions']['torch']}, commit {environment['git_commit'] or 'unknown'}."
            ),
            "",
        ]
    )


# --- as a picture -----------------------------------------------------------------------------------------------


def write_plot(path: Path, record: dict[str, Any], histories: DataFrame) -> None:
    """A heat-map for each initialisation, and the curves of each batch."""
    from matplotlib.figure import Figure

    found = places(record)
    names = list(dict.fromkeys(place.initialisation for place in found))
    batches = list(dict.fromkeys(place.batch for place in found))
    columns = math.lcm(len(names), len(batches))
    figure = Figure(figsize=(max(9, 4.8 * len(batches)), 8.6), layout="constrained")
    figure.suptitle(
        f"Learning-rate rules  ({plot_text(record['data'])}, {record['parameters']:,} parameters, "
        f"{record['sequences']:,} sequences a cell)",
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
            range(len(batches)), [f"batch {batch}\n{by_place[rules[0], batch].steps:,} steps" for batch in batches]
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
