"""A panel of settings for a notebook: core widgets only, and a plan of the run that follows them."""

from __future__ import annotations

import re
from typing import Any

from newllm_lib.config import FlatField, RunConfig, flat_fields, presets
from newllm_lib.config.parsing import command
from newllm_lib.errors import ConfigError, NewLLMError
from newllm_lib.escaping import say, terminal_text
from newllm_lib.notebook.field_widgets import Setting
from newllm_lib.notebook.kept import Kept, is_automatic
from newllm_lib.notebook.overruled import overruled
from newllm_lib.notebook.panel_plan import Plan, Planner, busy_html, lines_of, plan_html, refused_html
from newllm_lib.notebook.panel_view import PanelView, SavedPlan, choices_here
from newllm_lib.notebook.quiet import CanBeQuiet
from newllm_lib.notebook.train_button import TrainButton
from newllm_lib.reporting.formatting import named_lines
from newllm_lib.system.console import in_kernel

_KEPT = {"data", "text_unit", "validation_fraction", "test_fraction", "device", "engine", "threads"}
"""Which text and which machine: not the preset's to say (nor are the folders)."""

KEPT_NOTE = "Your changes are kept when you run this cell again; Reset puts the preset back."


class Panel(CanBeQuiet):
    """Every setting of a run in widgets, and the plan of that run below them.

    config: a preset's name or a RunConfig; overrides: any field by name. They are where the widgets start; from then
    on the widgets have the word: `panel.config` is what they say, `nl.train(panel.config)` trains it. Values that do
    not go together are shown all the same, with the reason, which `panel.config` and training refuse them with.
    What a user moves is kept in `results_dir/.panel.json` and taken up again when a panel of the same notebook and
    preset is shown, unless the arguments have changed since. Raises ConfigError for an unknown preset or field.
    """

    _last_shown: Panel | None = None

    def __init__(self, config: str | RunConfig = "auto", **overrides):
        given = presets.get(config) if isinstance(config, str) else config
        _refuse_unknown(overrides)
        self._bases = {name: make() for name, make in presets.PRESETS.items()}
        preset = overrides.pop("preset", given.preset)
        self._bases.setdefault(preset, given.replace(preset=preset))
        self._planner = Planner()
        self._live = self._shown_before = False
        self._config: RunConfig | None = None
        self._plan: Plan | None = None
        self._problem = self._last_plan = ""
        self._wrong: set[str] = set()
        fields = [item for item in flat_fields().values() if item.name != "preset"]
        self._given = {"preset": preset} | {item.name: overrides.get(item.name, _value(given, item)) for item in fields}
        self.preset = Setting(flat_fields()["preset"], self._preset_chosen, tuple(self._bases))
        self.settings = {item.name: Setting(item, self._moved, choices_here(item.name)) for item in fields}
        """By field; `.value`, `.slider` and `.box` are what a slider of one's own would be linked to."""
        self._put_back()
        self._saved_plan = SavedPlan()
        self.train = TrainButton(lambda: self.config, self.refresh)
        """Its `run` is the last one that the button trained."""
        self.view = PanelView(self.preset, self.settings, self.train, self._saved_plan)
        self.view.measure.on_click(lambda button: self.refresh(measure=True, anew=True))
        self.view.reset.on_click(lambda button: self.reset())
        self.view.again.on_click(lambda button: self.read_again())
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

    @property
    def widget(self) -> Any:
        """All of it, as ipywidgets shows it."""
        return self.view.widget

    def _differences(self, base: RunConfig) -> dict[str, Any]:
        return {name: value for name, value in self._values().items() if value != _value(base, flat_fields()[name])}

    def _values(self) -> dict[str, Any]:
        return {name: setting.value for name, setting in self.settings.items()}

    def set(self, **values) -> None:
        """Change fields by name, as their widgets would; a `preset` first. ConfigError for an unknown field."""
        _refuse_unknown(values)
        if "preset" in values and values["preset"] not in self._bases:
            values["preset"] = presets.get(values["preset"]).preset
        with self._quietly():
            self._take(values)
        self._changed()

    def __repr__(self) -> str:
        self.refresh()
        if self._problem:
            return f"{self.command}\nrefused: {self._problem}"
        refused = f"\nrefused: {self._plan.refusal}" if self._plan.refusal else ""
        return "\n".join(named_lines(lines_of(self._plan))) + refused

    def _ipython_display_(self) -> None:
        if not in_kernel():
            say(repr(self))
            return
        from IPython.display import display

        first, self._shown_before = not self._shown_before, True
        if first and not is_automatic():
            self._take_up_kept()
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        display({"text/plain": terminal_text(self.command), "application/vnd.jupyter.widget-view+json": view}, raw=True)
        self._saved_plan.show()
        self._follow_cells()
        self.refresh(measure=True)  # seconds, and only where nothing is known of such a model here

    # --- what is changed in it ----------------------------------------------------------------------------------

    def _base(self) -> RunConfig:
        return self._bases[self.preset.value]

    def _described(self) -> RunConfig:
        """What the widgets say; ConfigError where the configuration refuses it, with every field that is wrong."""
        try:
            return self._base().replace(**self._values())
        except ConfigError:
            alone = self._base().refusals(**self._values())
            if alone:
                raise ConfigError("\n".join(alone.values())) from None
            raise

    def _changed(self) -> None:
        if not self._quiet:
            self.refresh() if self._live else self._mark()

    def _moved(self) -> None:
        """A user changed a field."""
        self._keep()
        self._changed()

    def _preset_chosen(self) -> None:
        self._take_preset()
        self._moved()

    def _take_preset(self) -> None:
        """Every field as the preset has it, but for the text, the machine and the folders, which stay."""
        base = self._base()
        for setting in self.settings.values():
            if not _stays(setting.item):
                setting.set(_value(base, setting.item))

    def _take(self, values: dict[str, Any]) -> None:
        """Fields by name, a preset with all that it brings first."""
        if "preset" in values:
            self.preset.set(values["preset"])
            self._take_preset()
        for name, value in values.items():
            if name != "preset":
                self.settings[name].set(value)

    def _put_back(self) -> None:
        """Everything as the panel was made, or as the preset has it."""
        with self._quietly():
            self._take(self._given)

    def reset(self) -> None:
        """Everything as the panel was made; what was kept is forgotten."""
        self._put_back()
        self._moved()

    def _start_of(self, item: FlatField) -> Any:
        """What a field was before anybody moved it: as the panel was made, or as the preset chosen since has it."""
        own = self.preset.value == self._given["preset"] or _stays(item)
        return self._given[item.name] if own else _value(self._base(), item)

    # --- what is kept of it -------------------------------------------------------------------------------------

    def _store(self) -> Kept:
        return Kept(str(self._given["results_dir"]), self._given["preset"])

    def _keep(self) -> None:
        if not self._shown_before or is_automatic():
            return
        moved = {
            name: setting.value
            for name, setting in self.settings.items()
            if setting.value != self._start_of(setting.item)
        }
        if self.preset.value != self._given["preset"]:
            moved = {"preset": self.preset.value} | moved
        self._store().write(self._given, moved)
        self.view.tell(KEPT_NOTE if moved else "")

    def _take_up_kept(self) -> None:
        """What a user moved before; what is no value any more is dropped, and named."""
        moved, dropped = self._store().read(self._given), []
        preset = moved.pop("preset", self._given["preset"])
        if preset not in self._bases:
            dropped, preset = [f"preset = {preset!r}"], self._given["preset"]
        known = {name: _from_json(value) for name, value in moved.items() if name in self.settings}
        wrong = self._bases[preset].refusals(**known)
        dropped += [f"{name} = {value!r}" for name, value in moved.items() if name in wrong or name not in known]
        good = {name: value for name, value in known.items() if name not in wrong}
        with self._quietly():
            self._take(({"preset": preset} if preset != self._given["preset"] else {}) | good)
        self._keep()
        if dropped:
            self.view.tell(f"{KEPT_NOTE} No longer valid and dropped: {', '.join(dropped)}.")

    # --- the plan -----------------------------------------------------------------------------------------------

    def refresh(self, measure: bool = False, anew: bool = False) -> None:
        """Plan the run that the widgets describe, and show it; from the first time on every change does.

        measure, anew: as for `tuning.estimate_speed`.
        """
        self._live, self._plan, self._problem, self._wrong = True, None, "", set()
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
            self._wrong = _named_in(self._problem)
        if self._plan:
            self._last_plan = plan_html(self._plan, self.command)
            self.view.shown.value = self._last_plan
        else:
            self.view.shown.value = refused_html(self._problem, self._last_plan)
        self._saved_plan.update(self.view.shown.value)
        self.view.offer_reading(self._planner.failed)
        self._mark()

    def read_again(self) -> None:
        """Try once more to read a text that could not be read."""
        self._planner.forget_failure()
        self.refresh()

    def _say(self, text: str) -> None:
        self.view.shown.value = busy_html(text, self._last_plan)

    def _mark(self) -> None:
        """What was changed, refused or overruled, beside the fields and on their groups."""
        unused = {}
        if self._config is not None and not self._problem:
            unused = overruled(self._config, self._plan and self._plan.setup)
        for name, setting in self.settings.items():
            setting.mark(self._start_of(setting.item), name in self._wrong, unused.get(name, ""))
        self.view.mark_groups(self._wrong)
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


def _stays(item: FlatField) -> bool:
    """Whether another preset leaves a field as it is."""
    return item.name in _KEPT or (item.section == "run" and item.name != "name")


def _value(config: RunConfig, item: FlatField) -> Any:
    return getattr(config if item.section == "run" else getattr(config, item.section), item.name)


def _from_json(value: Any) -> Any:
    """Lists, as JSON has them, as the tuples that they were."""
    return tuple(map(_from_json, value)) if isinstance(value, list) else value


def _named_in(problem: str) -> set[str]:
    """The fields that a refusal names, as `NAME = VALUE` or in parentheses; one about the text begins with 'data'."""
    named = {*re.findall(r"(?:^|and )(\w+) = ", problem, re.MULTILINE), *re.findall(r"\((\w+)\)", problem)}
    return named & {*flat_fields()} | ({"data"} if problem.startswith("data ") else set())
