"""A setting as a row of the panel: widgets made from the field's type, choices and docstring."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from newllm_lib.config import FlatField
from newllm_lib.config.fields import allowed_types
from newllm_lib.config.parsing import parse, shown
from newllm_lib.errors import ConfigError
from newllm_lib.escaping import html_text
from newllm_lib.notebook.quiet import CanBeQuiet

UNITS = (
    "units", "layers", "tokens", "words", "texts", "lanes", "sequences", "epochs", "steps", "nats", "minutes",
    "validations", "threads", "ids",
)  # fmt: skip
"""Words of a docstring that name what a field counts."""


class Range(NamedTuple):
    """A slider's values, fewer than its field allows: from low in steps to high, or a base to the power of these."""

    low: float
    high: float
    step: float
    base: float | None = None

    @property
    def last(self) -> int:
        """The last position; the first is 0."""
        return round((self.high - self.low) / self.step)

    def value(self, position: int) -> float:
        """What a position stands for, in numbers that people would choose."""
        at = self.low + position * self.step
        return float(f"{self.base**at:.2g}") if self.base == 10 else self.base**at if self.base else round(at, 6)

    def position(self, value: Any) -> int:
        """The nearest position to a value; the first where there is no number to show."""
        if not isinstance(value, (int, float)) or math.isnan(value) or (self.base and value <= 0):
            return 0
        at = math.log(value, self.base) if self.base else value
        return round((min(max(at, self.low), self.high) - self.low) / self.step)


_RATES = Range(-5, -1, 0.05, base=10)
_BATCHES = Range(3, 12, 1, base=2)

SLIDERS = {
    "vocab_size": Range(500, 16_000, 500),
    "embed_dim": Range(32, 1024, 32),
    "hidden_dim": Range(32, 2048, 32),
    "num_layers": Range(1, 24, 1),
    "context_dim": Range(32, 1024, 32),
    "dropout": Range(0, 0.6, 0.01),
    "init_std": Range(-3, 0, 0.05, base=10),
    "embedding_std": Range(-3, 0.5, 0.05, base=10),
    "output_std": Range(0, 0.2, 0.005),
    "forget_gate_bias": Range(-4, 4, 0.1),
    "sequence_length": Range(16, 256, 8),
    "stride": Range(8, 256, 8),
    "min_words": Range(0, 20, 1),
    "validation_fraction": Range(0.01, 0.5, 0.01),
    "test_fraction": Range(0.01, 0.5, 0.01),
    "epochs": Range(1, 150, 1),
    "max_steps": Range(10, 4000, 10),
    "batch_size": _BATCHES,
    "micro_batch_size": _BATCHES,
    "batch_base": _BATCHES,
    "lr": _RATES,
    "lr_base": _RATES,
    "muon_lr": _RATES,
    "muon_momentum": Range(0.5, 0.99, 0.01),
    "beta1": Range(0.5, 0.99, 0.01),
    "beta2": Range(0.9, 0.999, 0.001),
    "weight_decay": Range(0, 0.3, 0.005),
    "warmup_steps": Range(0, 500, 5),
    "lr_final_fraction": Range(0, 1, 0.01),
    "patience": Range(1, 50, 1),
    "validate_every_steps": Range(10, 1000, 10),
}
"""Fields with a slider; the box beside it takes every value, and shows it truly where the slider cannot."""

_LABEL, _SLIDER, _BOX, _END = 190, 172, 132, 46
"""Widths (CSS pixels); a slider and its box each begin with an end of the slider, and fit side by side on a phone."""
PILL = "border-radius:3px;padding:0 4px;color:#fff"
"""White on a colour of its own: as legible on a light page as on a dark one."""
RED, ORANGE = "#b3261e", "#e07b22"


def unit_of(item: FlatField) -> str:
    """What a number counts, by its docstring: the first such word in parentheses, or among the two it begins with."""
    if not {int, float} & set(allowed_types(item.type)):
        return ""
    words = [*re.findall(r"\((\w+)", item.doc), *re.findall(r"\w+", item.doc.lower())[:2]]
    return next((word for word in words if word in UNITS), "")


def label_of(item: FlatField) -> str:
    """A field's name, and its unit where it has one that the name does not tell."""
    unit = unit_of(item)
    return f"{item.name} ({unit})" if unit and unit not in item.name.split("_") else item.name


class Setting(CanBeQuiet):
    """A field's value, and the row of widgets in which it is seen and changed.

    `value` is the truth: it is what was set, to the last digit, or what was typed or pulled since; a text that is no
    value of the field stays as it is, for the configuration to refuse. `changed` is called when a user changes it.
    """

    def __init__(self, item: FlatField, changed: Callable[[], None], choices: tuple = ()):
        import ipywidgets

        self.item, self.value, self.slider = item, item.default, None
        self.chip: Any = None
        """The button that undoes a change; made when it is first needed."""
        self._changed, self._before = changed, item.default
        kinds = allowed_types(item.type)
        options = choices or item.metadata["choices"] or ((True, False) if bool in kinds else ())
        self._options = tuple((shown_choice(option), option) for option in options)
        if self._options:
            self.box = ipywidgets.Dropdown(options=self._options, **self._look(_SLIDER + _BOX))
            self.box.observe(self._chosen, "value")
        elif item.name in SLIDERS:
            self.slider = self._make_slider(ipywidgets)
            high = _position_text(item, SLIDERS[item.name].last)
            self.box = ipywidgets.Text(continuous_update=False, **self._look(_BOX, high))
            self.slider.observe(self._pulled, "value")
        else:
            self.box = ipywidgets.Text(continuous_update=False, **self._look(_SLIDER + _BOX))
        if isinstance(self.box, ipywidgets.Text):
            self.box.placeholder = "none" if type(None) in kinds else ""
            self.box.observe(self._typed, "value")
        self.label = ipywidgets.Label(label_of(item), layout={"width": f"{_LABEL}px", "flex": "0 0 auto"})
        self.note = ipywidgets.HTML(layout={"flex": "1 1 200px", "min_width": "0"})
        controls = [self.slider, self.box] if self.slider else [self.box]
        group = ipywidgets.HBox(controls, layout={"flex": "0 0 auto", "max_width": "100%"})
        look = {"align_items": "center", "width": "100%", "flex_flow": "row wrap", "overflow": "hidden"}
        self.row = ipywidgets.HBox([self.label, group, self.note], layout=look)
        self.row.add_class("newllm-row")
        self.set(item.default)

    def _look(self, width: int, end: str = "") -> dict[str, Any]:
        """Of a control: its width, an end of the slider before it, and for those who point at it the field's name."""
        import ipywidgets

        tooltip = "tooltip" if "tooltip" in ipywidgets.DOMWidget.class_traits() else "description_tooltip"
        shown_end = {"description": end, "style": {"description_width": f"{_END}px"}} if end else {}
        return shown_end | {"layout": {"width": f"{width}px", "flex": "0 1 auto"}, tooltip: self.item.name}

    def _make_slider(self, ipywidgets):
        """Of positions, not values: a page puts a slider on the step nearest to its value, and reports it as a change.

        The box shows the number. Where the text is laid out again, the slider is heard when it is let go.
        """
        live = self.item.section != "data" and self.item.name != "vocab_size"
        low = _position_text(self.item, 0)
        look = self._look(_SLIDER, low) | {"readout": False, "continuous_update": live}
        return ipywidgets.IntSlider(value=0, min=0, max=SLIDERS[self.item.name].last, **look)

    # --- from the widgets ---------------------------------------------------------------------------------------

    def _chosen(self, change: dict[str, Any]) -> None:
        if not self._quiet:
            self.value = change["new"]
            self._changed()

    def _typed(self, change: dict[str, Any]) -> None:
        if not self._quiet:
            self.value = read(self.item, change["new"])
            with self._quietly():
                self._move_slider()
            self._changed()

    def _pulled(self, change: dict[str, Any]) -> None:
        if not self._quiet:
            value = SLIDERS[self.item.name].value(change["new"])
            self.value = round(value) if int in allowed_types(self.item.type) else float(value)
            with self._quietly():
                self.box.value = shown(self.item, self.value)
            self._changed()

    # --- to the widgets -----------------------------------------------------------------------------------------

    def set(self, value: Any) -> None:
        """Show a value, valid or not, without a call of `changed`."""
        self.value = value
        with self._quietly():
            if self._options:
                known = any(value is option or value == option for _, option in self._options)
                options = self._options if known else (*self._options, (shown_choice(value), value))
                if self.box.options != options:
                    self.box.options = options
                self.box.value = value
            else:
                several = isinstance(value, tuple) and self.item.name != "clip_by_epoch"
                text = "; ".join(map(str, value)) if several else shown(self.item, value)
                self.box.value = "" if value is None and self.box.placeholder else text
                self._move_slider()

    def _move_slider(self) -> None:
        if self.slider is not None:
            self.slider.value = SLIDERS[self.item.name].position(self.value)

    def mark(self, before: Any, problem: bool = False, overruled: str = "") -> None:
        """Show beside the widgets whether the value is refused, changed (a button undoes it), or overruled by another.

        before: the value that the button puts back; overruled: a sentence that says why the value has no effect, ""
        where it has one.
        """
        self._before = before
        changed = self.is_changed
        if changed and self.chip is None:
            self._make_chip()
        if self.chip is not None:
            self.chip.description = f"changed from {_short(shown(self.item, before))}"
            self.chip.layout.display = None if changed else "none"
        if overruled:
            self.row.add_class("newllm-overruled")
        else:
            self.row.remove_class("newllm-overruled")
        self.explain(self.item.doc, _pill("refused", RED) if problem else "", overruled)

    @property
    def is_changed(self) -> bool:
        """Whether the value is another than the one that the chip would put back."""
        return self.value != self._before

    def _make_chip(self) -> None:
        import ipywidgets

        layout = {"width": "auto", "height": "22px", "flex": "0 0 auto", "margin": "0 6px"}
        self.chip = ipywidgets.Button(tooltip="put it back", layout=layout)
        self.chip.add_class("newllm-chip")
        self.chip.on_click(lambda button: self._undo())
        self.row.children = (*self.row.children[:2], self.chip, self.row.children[2])

    def _undo(self) -> None:
        self.set(self._before)
        self._changed()

    def explain(self, text: str, pill: str = "", first: str = "") -> None:
        """Small print beside the widgets, after a mark and a sentence that matters more."""
        words = f"<b>{html_text(first)}.</b> " if first else ""
        body = f'{pill}{words}<span style="opacity:.75">{html_text(text)}</span>'
        self.note.value = f'<div style="font-size:11px;line-height:14px;padding:1px 6px">{body}</div>'


def _position_text(item: FlatField, position: int) -> str:
    """What a position of a field's slider stands for, as short as it can be."""
    value = SLIDERS[item.name].value(position)
    return f"{value:g}" if float in allowed_types(item.type) else str(round(value))


def _short(text: str, most: int = 24) -> str:
    """A text that keeps a button small: the end of one that is too long."""
    return text if len(text) <= most else f"\N{HORIZONTAL ELLIPSIS}{text[-most:]}"


def read(item: FlatField, text: str) -> Any:
    """The value that was typed: nothing is none where a field may be none, and several data stand between ';'.

    A text that is no value of the field is returned as it is.
    """
    text, kinds = text.strip(), allowed_types(item.type)
    if not text and type(None) in kinds:
        return None
    if item.name == "data" and ";" in text:
        return tuple(part.strip() for part in text.split(";") if part.strip())
    try:
        return parse(item, text)
    except ConfigError:
        return text


def shown_choice(value: Any) -> str:
    """An option of a dropdown."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _pill(text: str, colour: str) -> str:
    return f'<span style="{PILL};background:{colour};margin-right:5px">{html_text(text)}</span>'
