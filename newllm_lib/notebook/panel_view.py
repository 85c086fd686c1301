"""The widgets of a panel, where they stand, and the plan that a saved notebook keeps without them."""

from __future__ import annotations

import secrets
from typing import Any

from newllm_lib.config import FlatField
from newllm_lib.escaping import html_text
from newllm_lib.model.recurrence import ENGINES
from newllm_lib.notebook.field_widgets import Setting
from newllm_lib.notebook.train_button import TrainButton

MOST_USED = ("data", "epochs", "max_steps", "batch_policy", "batch_size", "lr", "dropout", "precision", "seed")
"""Always in view, below the preset; every other field is in a group that opens."""

GROUPS = ("Model", "Data", "Optimizer and rate", "Schedule and length", "Machine and folders")
_SCHEDULE = {
    "epochs", "max_steps", "lr_schedule", "warmup_steps", "decay_steps", "lr_final_fraction", "clip_by_epoch",
    "patience", "min_delta", "validate_every_steps",
}  # fmt: skip

NOTE = (
    "Training uses these settings as they are when it starts. A change that you make while a run trains is for the "
    "next run, and some notebooks show it only then."
)

STYLE = """<style>
.newllm-panel [class*="Collapse-header"] {
    padding: 3px 10px !important; background: rgba(128, 128, 128, .18) !important; color: inherit !important;
}
.newllm-panel [class*="Collapse-contents"] {
    padding: 4px !important; background: transparent !important; color: inherit !important;
}
.newllm-panel .newllm-overruled > :not(:last-child) { opacity: .4; }
.newllm-panel .newllm-chip {
    background: #1f6fb4 !important; color: #fff !important; font-size: 11px; line-height: 20px; padding: 0 8px;
    white-space: nowrap;
}
</style>"""
"""Colab's dark page leaves the inside of an accordion white, and its text light; a theme's blue is often too light."""


def group_of(item: FlatField) -> str:
    """The group that a field stands in; a new field finds its place without a list of names."""
    if item.section in ("model", "data"):
        return item.section.capitalize()
    if item.name in _SCHEDULE:
        return "Schedule and length"
    recipe = item.section == "train" and item.metadata["identity"] and item.name != "precision"
    return "Optimizer and rate" if recipe else "Machine and folders"


def choices_here(name: str) -> tuple[str, ...]:
    """What this machine has, for the fields that ask which of it to use; () for others."""
    import torch

    if name == "device":
        return ("auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count())))
    return ("auto", *ENGINES) if name == "engine" else ()


class PanelView:
    """The widgets around the rows of a panel's settings."""

    def __init__(self, preset: Setting, settings: dict[str, Setting], train: TrainButton, saved_plan: SavedPlan):
        import ipywidgets

        self.shown = ipywidgets.HTML()
        """Where the plan is."""
        self.measure = ipywidgets.Button(description="Measure this machine", layout={"width": "auto"})
        self.reset = ipywidgets.Button(description="Reset", layout={"width": "auto"})
        self.again = ipywidgets.Button(description="Read the text again", layout={"width": "auto"})
        self._groups = {
            title: [s for s in settings.values() if s.item.name not in MOST_USED and group_of(s.item) == title]
            for title in GROUPS
        }
        self.accordion = ipywidgets.Accordion(
            [ipywidgets.VBox([setting.row for setting in group]) for group in self._groups.values()],
            selected_index=None,
        )
        self._kept = ipywidgets.HTML()
        note = f"{STYLE}{saved_plan.hidden_by_live_widgets}{_small(NOTE)}"
        rows = [setting.row for setting in (preset, *(settings[name] for name in MOST_USED))]
        buttons = [train.button, self.measure, self.reset, self.again]
        bar = ipywidgets.HBox(buttons, layout={"flex_flow": "row wrap"})
        parts = [*rows, self._kept, self.shown, bar, train.page, self.accordion, ipywidgets.HTML(note)]
        self.widget = ipywidgets.VBox(parts, layout={"width": "100%", "max_width": "960px", "overflow": "hidden"})
        self.widget.add_class("newllm-panel")

    def tell(self, text: str) -> None:
        """A line in small print below the first rows."""
        self._kept.value = _small(text) if text else ""

    def offer_reading(self, offered: bool) -> None:
        """Whether there is a button that reads the text again."""
        self.again.layout.display = None if offered else "none"

    def mark_groups(self, wrong: set[str]) -> None:
        """How many fields of each group were changed, and whether one is refused, in its title."""
        for index, (title, group) in enumerate(self._groups.items()):
            changed = sum(setting.is_changed for setting in group)
            refused = any(setting.item.name in wrong for setting in group)
            notes = ["refused"] * refused + [f"{changed} changed"] * bool(changed)
            self.accordion.set_title(index, f"{title} ({', '.join(notes)})" if notes else title)


def _small(text: str) -> str:
    return f'<div style="font-size:11px;line-height:15px;opacity:.75">{html_text(text)}</div>'


_DEAD_WIDGETS = """<style>
.jp-OutputArea-child:has(> .lm-Panel):not(:has(> .lm-Panel > *)):has(+ * .{name}),
.output_area:has(> .jupyter-widgets-view):not(:has(> .jupyter-widgets-view > *)):has(+ * .{name}) {{ display: none; }}
</style>"""
"""JupyterLab and classic Notebook: the output before a plan, where it holds words in place of widgets."""


class SavedPlan:
    """The plan as plain HTML, an output of its own: what is left of a panel in a notebook that was saved and reopened.

    As long as the widgets live, their style sheet hides it. Without them, its own hides what Jupyter writes in their
    place ("model not found").
    """

    def __init__(self):
        self._name = f"newllm-saved-plan-{secrets.token_hex(4)}"
        self._handle: Any = None
        self._html = ""

    @property
    def hidden_by_live_widgets(self) -> str:
        """A style sheet for the widgets."""
        return f"<style>.{self._name} {{ display: none; }}</style>"

    def show(self) -> None:
        """Display it below the widgets of the same cell."""
        from IPython.display import display

        self._handle = display(self._data(), raw=True, display_id=True)

    def update(self, plan: str) -> None:
        """Replace what is shown."""
        if plan == self._html:
            return
        self._html = plan
        if self._handle is not None:
            self._handle.update(self._data(), raw=True)

    def _data(self) -> dict[str, str]:
        page = f'{_DEAD_WIDGETS.format(name=self._name)}<div class="{self._name}">{self._html}</div>'
        return {"text/html": page, "text/plain": ""}
