"""A panel of settings for a notebook: core widgets only, and a plan of the run that follows them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from newllm_lib.config import FlatField, RunConfig, flat_fields, presets
from newllm_lib.config.parsing import command
from newllm_lib.errors import ConfigError, NewLLMError
from newllm_lib.escaping import html_text, say, terminal_text
from newllm_lib.notebook.field_widgets import Setting
from newllm_lib.notebook.panel_plan import Plan, Planner, lines_of, plan_html, refused_html
from newllm_lib.system.console import in_kernel

MOST_USED = ("data", "epochs", "max_steps", "batch_size", "lr", "dropout", "seed")
"""Always in view, below the preset; every other field is in a group that opens."""

GROUPS = ("Model", "Data", "Optimizer and rate", "Schedule and length", "Machine and folders")
_SCHEDULE = {
    "epochs", "max_steps", "lr_schedule", "warmup_steps", "decay_steps", "lr_final_fraction", "clip_by_epoch",
    "patience", "min_delta", "validate_every_steps",
}  # fmt: skip

_KEPT = {"data", "text_unit", "validation_fraction", "test_fraction", "device", "engine", "threads"}
"""Which text and which machine: not the preset's to say (nor are the folders)."""

NOTE = (
    "Training takes these settings as they stand when its cell starts. What is running keeps its own, and this panel "
    "stands still meanwhile. Running this cell again brings its defaults back."
)


STYLE = """<style>
.newllm-panel [class*="Collapse-header"] {
    padding: 3px 10px !important; background: rgba(128, 128, 128, .18) !important; color: inherit !important;
}
.newllm-panel [class*="Collapse-contents"] {
    padding: 4px !important; background: transparent !important; color: inherit !important;
}
</style>"""
"""Colab's dark page leaves the inside of an accordion white, and its text light."""


def group_of(item: FlatField) -> str:
    """The group that a field stands in; a new field finds its place without a list of names."""
    if item.section in ("model", "data"):
        return item.section.capitalize()
    if item.name in _SCHEDULE:
        return "Schedule and length"
    recipe = item.section == "train" and item.metadata["identity"] and item.name != "precision"
    return "Optimizer and rate" if recipe else "Machine and folders"


class Panel:
    """Every setting of a run in widgets, and the plan of that run below them.

    config: a preset's name or a RunConfig; overrides: any field by name. They are the defaults; from then on the
    widgets have the word: `panel.config` is what they say, `nl.train(panel.config)` trains it. Values that do not go
    together are shown all the same, with the reason, which `panel.config` and training refuse them with.
    Raises ConfigError for an unknown preset or field.
    """

    _last_shown: Panel | None = None

    def __init__(self, config: str | RunConfig = "auto", **overrides):
        given = presets.get(config) if isinstance(config, str) else config
        _refuse_unknown(overrides)
        self._bases = {name: make() for name, make in presets.PRESETS.items()}
        preset = overrides.pop("preset", given.preset)
        self._bases.setdefault(preset, given.replace(preset=preset))
        self._planner = Planner()
        self._live = self._quiet = False
        self._config: RunConfig | None = None
        self._plan: Plan | None = None
        self._problem = self._last_plan = ""
        fields = [item for item in flat_fields().values() if item.name != "preset"]
        self.preset = Setting(flat_fields()["preset"], self._preset_chosen, tuple(self._bases))
        self.preset.set(preset)
        self.settings = {item.name: Setting(item, self._changed) for item in fields}
        """By field; `.value`, `.slider` and `.box` are what a slider of one's own would be linked to."""
        for name, setting in self.settings.items():
            setting.set(overrides.get(name, _value(given, setting.item)))
        self._make_widgets()
        self._mark()

    # --- what it says -------------------------------------------------------------------------------------------

    @property
    def config(self) -> RunConfig:
        """The run that the widgets describe now; ConfigError, in the words shown in red, where it cannot be."""
        self._planner.forget_failure()
        self.refresh()
        self._plan = None
        self._planner.release()
        if self._problem:
            raise ConfigError(self._problem)
        return self._config

    @property
    def overrides(self) -> dict[str, Any]:
        """The fields that differ from the preset."""
        return self._differences(self._base())

    @property
    def command(self) -> str:
        """The `newllm train` command of the same run; from `auto` where it started from no preset."""
        preset = self.preset.value if self.preset.value in presets.PRESETS else "auto"
        return command(preset, self._differences(self._bases[preset]))

    def _differences(self, base: RunConfig) -> dict[str, Any]:
        values = {name: setting.value for name, setting in self.settings.items()}
        return {name: value for name, value in values.items() if value != _value(base, self.settings[name].item)}

    def set(self, **values) -> None:
        """Change fields by name, as their widgets would; a `preset` first. ConfigError for an unknown field."""
        _refuse_unknown(values)
        self._quiet = True
        try:
            if "preset" in values:
                name = values.pop("preset")
                self.preset.set(name if name in self._bases else presets.get(name).preset)
                self._take_preset()
            for name, value in values.items():
                self.settings[name].set(value)
        finally:
            self._quiet = False
        self._changed()

    def __repr__(self) -> str:
        self.refresh()
        if self._problem:
            return f"{self.command}\nrefused: {self._problem}"
        refused = f"\nrefused: {self._plan.refusal}" if self._plan.refusal else ""
        return "\n".join(f"{name:>10}  {text}" for name, text in lines_of(self._plan)) + refused

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if not in_kernel():
            say(repr(self))
            return
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        display({"text/plain": terminal_text(self.command), "application/vnd.jupyter.widget-view+json": view}, raw=True)
        self._follow_cells()
        self.refresh(measure=True)  # seconds, and only where nothing is known of such a model here

    # --- the widgets --------------------------------------------------------------------------------------------

    def _make_widgets(self) -> None:
        import ipywidgets

        def button(text: str, action: Callable[[], None]):
            made = ipywidgets.Button(description=text, layout={"width": "170px"})
            made.on_click(lambda button: action())
            return made

        buttons = [
            button("Back to the preset", self._preset_chosen),
            button("Measure this machine", lambda: self.refresh(measure=True, anew=True)),
            button("Read the text again", self._read_again),
        ]
        self._again = buttons[-1]
        self._groups = {
            title: [s for s in self.settings.values() if s.item.name not in MOST_USED and group_of(s.item) == title]
            for title in GROUPS
        }
        self._accordion = ipywidgets.Accordion(
            [ipywidgets.VBox([setting.row for setting in group]) for group in self._groups.values()],
            selected_index=None,
        )
        self._shown = ipywidgets.HTML()
        note = f'{STYLE}<div style="font-size:11px;line-height:15px;opacity:.75">{NOTE}</div>'
        rows = [setting.row for setting in (self.preset, *(self.settings[name] for name in MOST_USED))]
        parts = [*rows, self._shown, ipywidgets.HBox(buttons), self._accordion, ipywidgets.HTML(note)]
        self.widget = ipywidgets.VBox(parts, layout={"width": "100%", "max_width": "960px"})
        self.widget.add_class("newllm-panel")

    def _base(self) -> RunConfig:
        return self._bases[self.preset.value]

    def _described(self) -> RunConfig:
        """What the widgets say; ConfigError where the configuration refuses it."""
        return self._base().replace(**{name: setting.value for name, setting in self.settings.items()})

    def _changed(self) -> None:
        if not self._quiet:
            self.refresh() if self._live else self._mark()

    def _preset_chosen(self) -> None:
        self._take_preset()
        self._changed()

    def _take_preset(self) -> None:
        """Every field as the preset has it, but for the text, the machine and the folders, which stay."""
        base = self._base()
        for name, setting in self.settings.items():
            folder = setting.item.section == "run" and name != "name"
            if name not in _KEPT and not folder:
                setting.set(_value(base, setting.item))

    def _read_again(self) -> None:
        self._planner.forget_failure()
        self.refresh()

    # --- the plan -----------------------------------------------------------------------------------------------

    def refresh(self, measure: bool = False, anew: bool = False) -> None:
        """Plan the run that the widgets describe, and show it; from the first time on every change does.

        measure, anew: as for `tuning.estimate_speed`.
        """
        self._live, self._plan, self._problem = True, None, ""
        try:
            self._config = self._described()
            if self._planner.must_read(self._config):
                what = " and measuring this machine" if measure else ""
                self._say(f"reading the text of {self.settings['data'].value}{what} …")
            elif measure:
                self._say("measuring this machine …")
            self._plan = self._planner.plan(self._config, measure, anew)
        except Exception as error:  # whatever it is, Run all goes on
            known = isinstance(error, NewLLMError) and str(error)
            self._problem = str(error) if known else f"{type(error).__name__}: {error}"
        if self._plan:
            self._shown.value = self._last_plan = plan_html(self._plan, self.command)
        else:
            self._shown.value = refused_html(self._problem, self._last_plan)
        self._again.layout.display = None if self._planner.failed else "none"
        self._mark()

    def _say(self, text: str) -> None:
        self._shown.value = f'<div style="padding:8px 0;opacity:.75">{html_text(text)}</div>'

    def _mark(self) -> None:
        """What differs from the preset, and what training is refused for, beside the fields and on their groups."""
        base, wrong = self._base(), _named_in(self._problem)
        for name, setting in self.settings.items():
            setting.mark(_value(base, setting.item), "refused" if name in wrong else "")
        for index, (title, group) in enumerate(self._groups.items()):
            changed = sum(setting.value != _value(base, setting.item) for setting in group)
            refused = any(setting.item.name in wrong for setting in group)
            notes = ["refused"] * refused + [f"{changed} changed"] * bool(changed)
            self._accordion.set_title(index, f"{title} ({', '.join(notes)})" if notes else title)
        make = presets.PRESETS.get(self.preset.value)
        self.preset.explain((make and make.__doc__) or "The settings that this panel was given.")

    def _follow_cells(self) -> None:
        """Once a cell has run, tell what it left in the run's folder; the panel shown last does."""
        from IPython import get_ipython

        events, before = get_ipython().events, Panel._last_shown
        if before is not None:
            events.unregister("post_run_cell", before._cell_ended)
        events.register("post_run_cell", self._cell_ended)
        Panel._last_shown = self

    def _cell_ended(self, result: Any = None) -> None:
        self.refresh()


def _refuse_unknown(values: dict[str, Any]) -> None:
    """ConfigError for names that are no fields, with the nearest one; the values are not looked at."""
    unknown = {name: None for name in values if name not in flat_fields()}
    if unknown:
        RunConfig().replace(**unknown)


def _value(config: RunConfig, item: FlatField) -> Any:
    return getattr(config if item.section == "run" else getattr(config, item.section), item.name)


def _named_in(problem: str) -> set[str]:
    """The fields that a refusal names; one about the text begins with 'data'."""
    return set(re.findall(r"Config\.(\w+)", problem)) | ({"data"} if problem.startswith("data ") else set())
