"""What a notebook shows of a run that trains: the page, the curves. Pure functions.

Plain HTML and a picture, without widgets, scripts and style sheets: Jupyter, Colab, Kaggle and VS Code show it alike,
in light and in dark, and a saved notebook keeps it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from newllm_lib.config import published
from newllm_lib.escaping import html_text, one_line
from newllm_lib.reporting.curves import plain_log_axis, set_epoch_axis
from newllm_lib.reporting.diagnostics import Row, Spell, best_row, number
from newllm_lib.reporting.formatting import COLUMNS, duration, named_lines, ppl_text
from newllm_lib.reporting.step_losses import StepLosses
from newllm_lib.reporting.sync_status import SyncStatus

# --- the page ---------------------------------------------------------------------------------------------------


LAST_ROWS, LAST_MESSAGES = 15, 40
"""How much of the table and of the messages is shown."""

BLUE, ORANGE, GREEN, GREY = "#3b8fd6", "#e07b22", "#2e9e5b", "#888888"
"""Legible on white and on black; text and other lines take the colour of the page."""

LINE = "1px solid rgba(128,128,128,.35)"
MONOSPACE = "font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:12px"


@dataclass
class View:
    """Everything that is on the page."""

    record: dict[str, Any] | None = None
    status: str = ""
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    loss: float = math.nan
    tokens_per_second: float = math.nan
    seconds: float | None = None
    """Left, validation and saving included; once the run has ended, since it was started or continued."""
    validated_share: float = 0.0
    """Of the validation that is running."""
    rows: list[Row] = field(default_factory=list)
    spells: dict[str, Spell] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    safety: SyncStatus | None = None
    """None where there is nothing to fear."""
    plan: list[tuple[str, str]] = field(default_factory=list)
    """(what, how much and why) of each decision; empty where the run began before."""
    losses: StepLosses = field(default_factory=StepLosses)
    """Of the steps since the run was started or continued."""
    curves: list[str] = field(default_factory=list)
    """PNGs in base64, as `curves_pngs` gives them."""

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come."""
        return self.status not in ("", "training", "validating")


def page(view: View) -> str:
    """HTML in the colours of the page around it; every text in it escaped."""
    parts = (_title(view.record), _state(view), _work(view.safety), _plan(view), _notes(view))
    parts += (_pictures(view.curves), _table(view.rows))
    return f'<div style="max-width:960px;font-size:13px;line-height:1.45">{"".join(parts)}</div>'


def summary(view: View) -> str:
    """The page in one line, for where no HTML is shown."""
    if not view.total_steps and view.messages:
        return one_line(view.messages[-1])
    best = best_row(view.rows)
    parts = [
        view.record["run"] if view.record else "training",
        f"{view.status or 'not started'} at step {view.step:,} of {view.total_steps:,}",
        f"best validation perplexity {ppl_text(best['val_ppl'])} at step {best['step']:,}"
        if best
        else "no validation yet",
    ]
    return one_line("; ".join(parts))


def _title(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    about = f"{record['data']['name']}, {record['parameters']:,} parameters"
    return (
        f'<div style="margin-bottom:4px"><b>{html_text(record["run"])}</b> '
        f'<span style="opacity:.7">{html_text(about)}</span></div>'
    )


def _state(view: View) -> str:
    """Where the run is, in cells of fixed width, and the bar."""
    if not view.total_steps:
        return ""
    left = "–" if view.seconds is None else duration(view.seconds)
    cells = (
        ("status", f"validating, {view.validated_share:.0%}" if view.status == "validating" else view.status),
        ("epoch", f"{view.epoch:.2f}"),
        ("step", f"{view.step:,} of {view.total_steps:,}"),
        ("loss", _figure(view.loss, ".3f")),
        ("tokens/s", _figure(view.tokens_per_second, ",.0f")),
        ("ran for" if view.ended else "time left", left),
    )
    shown = "".join(
        f'<div style="flex:1 1 0;min-width:84px;white-space:nowrap;overflow:hidden"><div style="opacity:.7;'
        f'font-size:11px">{label}</div><div style="font-variant-numeric:tabular-nums">{html_text(value)}</div></div>'
        for label, value in cells
    )
    done = view.status in ("finished", "stopped early")  # also when skipped steps leave fewer than were planned
    share = 1.0 if view.status == "finished" else min(1.0, view.step / view.total_steps)
    colour = GREEN if done else ORANGE if view.ended else BLUE
    return (
        f'<div style="display:flex;flex-wrap:wrap;gap:2px 12px">{shown}</div>'
        f'<div style="height:8px;margin:4px 0 8px;border:{LINE};border-radius:4px;overflow:hidden">'
        f'<div style="height:100%;width:{share:.2%};background:{colour}"></div></div>'
    )


def _work(safety: SyncStatus | None) -> str:
    """How safe the work is, in one line."""
    if safety is None:
        return ""
    mark = "" if safety.safe else "<b>\N{WARNING SIGN}\N{VARIATION SELECTOR-15}</b> "
    look = "opacity:.7" if safety.safe else f"border-left:3px solid {ORANGE};padding-left:1ch"
    return f'<div style="font-size:12px;{look}">{mark}your work: {html_text(safety.text)}</div>'


def _plan(view: View) -> str:
    """Every decision; folded away once there is something else to look at."""
    if not view.plan:
        return ""
    lines = "".join(_note(line, False, named=True) for line in named_lines(view.plan))
    return (
        f'<details{"" if view.rows else " open"} style="margin:6px 0"><summary style="cursor:pointer">the plan: '
        f"each decision and its reason</summary>{lines}</details>"
    )


def _notes(view: View) -> str:
    """What the history warns of, then the messages, warnings marked."""
    spells = sorted(view.spells.values(), key=lambda spell: not spell.active)
    notes = [_note(str(spell), True, spell.active) for spell in spells]
    if (hidden := len(view.messages) - LAST_MESSAGES) > 0:
        notes.append(_note(f"{hidden:,} earlier messages are not shown", False))
    last = view.messages[-LAST_MESSAGES:]
    notes += [_note(text.removeprefix("warning: "), text.startswith("warning: ")) for text in last]
    return f'<div style="margin:6px 0">{"".join(notes)}</div>' if notes else ""


def _note(text: str, warning: bool, active: bool = True, named: bool = False) -> str:
    # a line of the plan continues under its text, right of the name in fifteen columns
    indent = "padding-left:16ch;text-indent:-15ch" if named else "padding-left:1ch"
    mark = "<b>\N{WARNING SIGN}\N{VARIATION SELECTOR-15} warning</b> " if warning else ""
    edge = f"border-left:3px solid {ORANGE};margin:3px 0" if warning else "border-left:3px solid transparent"
    style = f"{MONOSPACE};white-space:pre-wrap;overflow-wrap:anywhere;{indent};{edge}"
    return f'<div style="{style}{"" if active else ";opacity:.6"}">{mark}{html_text(text)}</div>'


def _pictures(curves: list[str]) -> str:
    """Side by side where there is room for two, else one below the other."""
    if not curves:
        return ""
    width, height = CURVE_SIZE
    pictures = "".join(
        f'<img alt="{title} over epochs" width="{width}" height="{height}" style="flex:1 1 {width - 10}px;'
        f'min-width:min(301px,100%);max-width:min(420px,100%);height:auto" src="data:image/png;base64,{curve}">'
        for title, curve in zip(TITLES, curves, strict=True)
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:4px">{pictures}</div>'


def visible_rows(rows: list[Row]) -> tuple[list[Row], int]:
    """The last rows, before them the best one where it is older, and how many are hidden."""
    best, last = best_row(rows), rows[-LAST_ROWS:]
    shown = last if best is None or any(row is best for row in last) else [best, *last]
    return shown, len(rows) - len(shown)


def _table(rows: list[Row]) -> str:
    """The history, the best row marked."""
    if not rows:
        return ""
    lossless = rows[-1].get("val_bits_per_byte") is not None
    forms = {
        "step": ",d", "epoch": ".2f", "val_ppl": ".2f", "val_accuracy": ".2%", "val_loss": ".4f", "train_loss": ".4f",
        **({"val_bits_per_byte": ".4f"} if lossless else {"val_ppl_known": ".2f"}), "lr": ".2e",
        "train_seconds": ",.1f",
    }  # fmt: skip
    best, (shown, hidden) = best_row(rows), visible_rows(rows)
    lines = [_table_line("".join(_cell(COLUMNS[name], "th") for name in forms))]
    for row in shown:
        if hidden and row is rows[-LAST_ROWS]:  # the gap is just before the last rows
            text = f"{hidden:,} earlier {'row is' if hidden == 1 else 'rows are'} not shown; history.csv has them all"
            lines.append(_table_line(f'<td colspan="9" style="text-align:center;opacity:.7;padding:2px">{text}</td>'))
        cells = [_figure(number(row, name), form) for name, form in forms.items()]
        if row is best:
            cells[0] = f"\N{BLACK STAR} {cells[0]}"
        lines.append(_table_line("".join(map(_cell, cells)), marked=row is best))
    style = f"table-layout:auto;width:max-content;min-width:100%;border-collapse:collapse;margin:6px 0;{MONOSPACE}"
    return f'<div style="overflow-x:auto"><table style="{style}">{"".join(lines)}</table></div>'


def _table_line(cells: str, marked: bool = False) -> str:
    look = ";background:rgba(46,158,91,.22);font-weight:bold" if marked else ";background:transparent"
    return f'<tr style="border-bottom:{LINE}{look}">{cells}</tr>'


def _cell(text: str, tag: str = "td") -> str:
    wrap = "normal" if tag == "th" else "nowrap"
    return f'<{tag} style="text-align:right;padding:2px 6px;white-space:{wrap};overflow:hidden">{text}</{tag}>'


def _figure(value: float, form: str) -> str:
    """A number that keeps to its cell: not finite as it is, huge in three digits."""
    if not math.isfinite(value):
        return "" if math.isnan(value) else "inf"
    return f"{value:.2e}" if abs(value) >= 1e7 and form.endswith("f") else f"{value:{form}}"


# --- the curves -------------------------------------------------------------------------------------------------


CURVE_SIZE = (311, 262)
"""Width and height of one of them on the page (CSS pixels): three fit side by side."""

TITLES = ("loss (nats a token)", "perplexity", "accuracy (%)")

LOOK = {
    "figure.figsize": (CURVE_SIZE[0] / 100, CURVE_SIZE[1] / 100), "figure.dpi": 150, "font.size": 8,
    "axes.titlesize": 9, "legend.fontsize": 7, "legend.frameon": False, "lines.linewidth": 1.5,
    "lines.markersize": 3, "axes.grid": True, "grid.alpha": 0.3, "axes.facecolor": "none", "figure.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), GREY
    ),
}  # fmt: skip


def curves_pngs(record: dict[str, Any] | None, history: list[Row], losses: StepLosses | None = None) -> list[bytes]:
    """Loss, perplexity and accuracy over epochs as transparent PNGs; the published curve dashed where it compares.

    losses: of the steps, drawn faintly, with their moving average.
    """
    name = record["preset"] if record and record["published_protocol"] else None
    known = published.RUNS.get(name)
    epochs = [row["epoch"] for row in history]

    def draw_loss(axes) -> None:
        seen = losses.points if losses else []
        if seen:
            axes.plot(*zip(*seen, strict=True), color=ORANGE, alpha=0.25, linewidth=0.8)
            axes.plot(*zip(*losses.smoothed(), strict=True), color=ORANGE, label="training")
        if history:
            before = [row for row in history if not seen or row["epoch"] < seen[0][0]]  # steps of another process
            means = [row["epoch"] for row in before], _drawn(before, "train_loss")
            axes.plot(*means, "o-", color=ORANGE, label="" if seen else "training")
            axes.plot(epochs, _drawn(history, "val_loss"), "o-", color=BLUE, label="validation")

    def draw_ppl(axes) -> None:
        axes.plot(epochs, _drawn(history, "val_ppl"), "o-", color=BLUE, label="validation" if history else "")
        if best := best_row(history):
            label = f"best {ppl_text(best['val_ppl'])}"
            axes.plot(best["epoch"], best["val_ppl"], "*", color=BLUE, markersize=10, label=label)

    def draw_accuracy(axes) -> None:
        shares = [100 * share for share in _drawn(history, "val_accuracy")]
        axes.plot(epochs, shares, "o-", color=BLUE, label="validation" if history else "")
        if share := record and (record["validation"] or {}).get("unknown_share"):
            axes.axhline(100 * share, color=GREY, linewidth=0.8, linestyle=":", label="always <UNK>")

    panels = zip(TITLES, (draw_loss, draw_ppl, draw_accuracy), strict=True)
    return [_panel_png(title, draw, known) for title, draw in panels]


def _panel_png(title: str, draw: Callable[[Any], None], known: published.PublishedRun | None) -> bytes:
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with style.context(["default", LOOK]):  # the user's own style stays out of it, and comes back
        figure = Figure()
        axes = figure.subplots()
        figure.subplots_adjust(left=0.13, right=0.985, bottom=0.135, top=0.92)
        draw(axes)
        if known:
            _draw_published(known, title, axes)
        reached = [value for line in axes.lines for value in line.get_ydata() if math.isfinite(value)]
        if title == "perplexity" and reached and max(reached) > 4 * min(reached):
            plain_log_axis(axes)
        axes.set_title(title)
        axes.set_xlabel("epochs", labelpad=1)
        set_epoch_axis(axes)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
    data = io.BytesIO()
    # 64 colours: a quarter of the bytes, which every update sends to the browser again
    image.quantize(64, method=Image.Quantize.FASTOCTREE).save(data, "png", optimize=True)
    return data.getvalue()


def _drawn(history: list[Row], name: str) -> list[float]:
    """A column, NaN where a number is missing or not finite: a gap in the curve."""
    return [value if math.isfinite(value) else math.nan for value in (number(row, name) for row in history)]


def _draw_published(known: published.PublishedRun, title: str, axes) -> None:
    dashed = {"color": GREY, "linestyle": "--", "linewidth": 1.2, "label": "published"}
    if title == "perplexity":
        if known.curve:
            axes.plot(*zip(*known.curve, strict=True), **dashed)
    elif known.losses:
        epochs, _, validation, share = zip(*known.losses, strict=True)
        axes.plot(epochs, share if title.startswith("accuracy") else validation, **dashed)
