"""curves.png: loss, perplexity and accuracy of a run over its epochs; and axes that all pictures of runs share."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from newllm_lib.config import published
from newllm_lib.errors import FileError
from newllm_lib.escaping import plot_text
from newllm_lib.reporting.diagnostics import Row, best_row, number
from newllm_lib.reporting.formatting import ppl_text
from newllm_lib.reporting.record import CURVES
from newllm_lib.system.console import warn_on_stderr
from newllm_lib.system.files import write_atomic

_DRAWN = ("epoch", "train_loss", "val_loss", "val_ppl", "val_accuracy")
_BLUE, _ORANGE, _GREY = "#1f6fb4", "#d9701e", "#777777"


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Pictures inside look alike everywhere: a user's matplotlibrc may ask for LaTeX or fonts that are not there."""
    from matplotlib import style

    with style.context("default", after_reset=True):
        yield


def draw_or_warn(path: Path, draw: Callable[[], None]) -> None:
    """Call what writes a picture to `path`; where it cannot be drawn, a warning, and no picture of an earlier state.

    FileError where it cannot be written.
    """
    try:
        draw()
    except FileError:
        raise
    except Exception as error:  # whatever a user's matplotlib has
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        warn_on_stderr(f"{path}: no picture: it could not be drawn ({type(error).__name__}: {error})")


def without_missing_picture(text: str, folder: Path) -> str:
    """Markdown without the links to pictures that could not be drawn and so are not in the folder."""

    def link(match: re.Match[str]) -> str:
        return match[0] if (folder / match[1]).is_file() else ""

    return re.sub(r"!\[[^\]]*\]\(([\w.]+\.png)\)\n*", link, text)


def write_curves(folder: Path, record: dict[str, Any], history: list[Row]) -> None:
    """curves.png: `curves_png` in a run's folder."""
    image = curves_png(record, history)
    write_atomic(folder / CURVES, lambda file: file.write(image))


def is_current(folder: Path, history: list[Row]) -> bool:
    """Whether a run's picture is there and was drawn from this history."""
    try:
        return _digest(history).encode() in (folder / CURVES).read_bytes()
    except OSError:
        return False


def _digest(history: list[Row]) -> str:
    """What a picture keeps of the history that it shows, as history.csv would give it back."""
    rows = [[None if row.get(name) is None else f"{row[name]:.6g}" for name in _DRAWN] for row in history]
    return "history " + hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def curves_png(record: dict[str, Any], history: list[Row]) -> bytes:
    """Loss, perplexity and accuracy over epochs, the published curve dashed where there is one: a PNG.

    Without a validation, or with none of a finite loss, the panels say so: whoever shows the file finds it.
    """
    with own_style():
        return _curves_png(record, history)


def _curves_png(record: dict[str, Any], history: list[Row]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    title = f"{record['run']}  ({record['data']['name']}, {record['parameters']:,} parameters)"
    figure.suptitle(plot_text(title), fontsize=12)
    panels = figure.subplots(1, 3)
    if best_row(history):
        _draw(panels, record, history)
    else:
        for axes in panels:
            axes.set(xticks=[], yticks=[])
            axes.annotate(no_curves(history), (0.5, 0.5), xycoords="axes fraction", color=_GREY, ha="center")
    titles = ("Loss (nats a token)", "Perplexity (lower is better)", "Next-token accuracy (%)")
    for title, axes in zip(titles, panels, strict=True):
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("epochs")
        axes.grid(alpha=0.25)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None, "Description": _digest(history)})
    return image.getvalue()


def no_curves(history: list[Row]) -> str:
    """Why a history without a best row has none."""
    return "no validation gave a finite loss" if history else "no validation yet"


def _draw(panels, record: dict[str, Any], history: list[Row]) -> None:
    """The curves of a history that has a best row, each panel with its legend."""
    loss, ppl, accuracy = panels
    epochs = [row["epoch"] for row in history]
    known = published.RUNS.get(record["preset"]) if record["published_protocol"] else None
    style = {"marker": "o", "markersize": 3.5, "linewidth": 1.8}
    loss.plot(epochs, _values(history, "train_loss"), color=_ORANGE, label="training", **style)
    loss.plot(epochs, _values(history, "val_loss"), color=_BLUE, label="validation", **style)
    ppl.plot(epochs, _values(history, "val_ppl"), color=_BLUE, label="validation", **style)
    shares = [100 * share for share in _values(history, "val_accuracy")]
    accuracy.plot(epochs, shares, color=_BLUE, label="validation", **style)
    if all(map(math.isnan, shares)):  # as in the series' own files
        accuracy.set_xlim(ppl.get_xlim())
        accuracy.annotate("not recorded", (0.5, 0.6), xycoords="axes fraction", color=_GREY, ha="center")
    if known:
        _plot_published(known, loss, ppl, accuracy)
    best = best_row(history)
    star = {"color": _BLUE, "markersize": 13, "linestyle": "none", "label": f"best: {ppl_text(best['val_ppl'])}"}
    ppl.plot([best["epoch"]], [best["val_ppl"]], marker="*", **star)
    reached = [row["val_ppl"] for row in history if row["val_ppl"] is not None and math.isfinite(row["val_ppl"])]
    if record["published_protocol"] and reached:
        _mark_levels(ppl, reached)
    if share := (record["validation"] or {}).get("unknown_share"):
        accuracy.axhline(100 * share, color=_GREY, linewidth=0.8, linestyle=":", label="always <UNK>")
    shown = reached + ([value for _, value in known.curve] if known else [])
    if shown and max(shown) > 50 * min(shown):  # what diverged would flatten all else
        set_perplexity_axis(ppl, min(shown), max(shown))
    elif shown and max(shown) > 4 * min(shown):
        plain_log_axis(ppl)
    for axes in panels:
        set_epoch_axis(axes)
        axes.legend(frameon=False, fontsize=9)


def _values(history: list[Row], name: str) -> list[float]:
    """A column to be drawn; NaN, which leaves a gap, where a row of an imported run does not have it."""
    return [number(row, name) for row in history]


def set_epoch_axis(axes) -> None:
    """Epochs from 0 on, also where there is one point alone, with so few labels that long ones do not touch."""
    axes.update_datalim([(0, 0)], updatey=False)
    axes.autoscale_view(scaley=False)
    axes.set_xlim(left=0)
    axes.locator_params("x", nbins=6)


def plain_log_axis(axes) -> None:
    """A logarithmic y axis with plain numbers, so many to a decade that they do not touch."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    labels = {1: (1, 1.5, 2, 2.5, 3, 4, 5, 7), 2: (1, 2, 3, 5, 7), 4: (1, 2, 5)}
    subs = next((few for most, few in labels.items() if decades < most), (1,))
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def set_perplexity_axis(axes, low: float, high: float) -> None:
    """Perplexities from low to high: logarithmic where they are far apart, cut where one diverged."""
    from matplotlib import ticker

    if high > 2.5 * low:
        axes.set_yscale("log")
        few = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 7)
        axes.yaxis.set(major_locator=ticker.LogLocator(subs=few), minor_locator=ticker.NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    if high > 50 * low:
        axes.set(ylim=(0.9 * low, 50 * low), ylabel="cut at 50 x the lowest")  # or one that diverged flattens all


def _plot_published(known: published.PublishedRun, loss, ppl, accuracy) -> None:
    dashed = {"color": _GREY, "linestyle": "--", "linewidth": 1.5}
    label = f"published: {known.title}"
    if known.curve:
        ppl.plot(*zip(*known.curve, strict=True), label=label, **dashed)
    if known.losses:
        epochs, training, validation, share = zip(*known.losses, strict=True)
        loss.plot(epochs, validation, label="published, validation", **dashed)
        loss.plot(epochs, training, color=_GREY, linestyle=":", label="published, training")
        accuracy.plot(epochs, share, label=label, **dashed)


def _mark_levels(ppl, reached: list[float]) -> None:
    """Horizontal lines at the published results near the curve."""
    for level, title in published.MILESTONES:
        if 0.85 * min(reached) <= level <= max(reached):
            ppl.axhline(level, color=_GREY, linewidth=0.8, linestyle=":")
            short = title.split(":")[0]
            low = level < (min(reached) + max(reached)) / 2  # the curve falls to the right: write where it is not
            ppl.annotate(
                f"{level:.2f}  {short}",
                (0.02 if low else 0.98, level),
                (0, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                fontsize=7.5,
                color=_GREY,
                ha="left" if low else "right",
            )
