"""What a panel says below its settings: what a run would be, what it costs, and why it cannot be. No widgets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from newllm_lib.config import RunConfig, presets
from newllm_lib.data.dataset import Prepared, Split, prepare, text_settings
from newllm_lib.escaping import html_text
from newllm_lib.notebook.field_widgets import ORANGE, PILL, RED
from newllm_lib.reporting.formatting import duration
from newllm_lib.reporting.notebook_page import LINE, MONOSPACE
from newllm_lib.reporting.record import RunRecord
from newllm_lib.runs.folder import ResolvedRun, checkpoints_gone, has_saved, plan_of, resolve_run
from newllm_lib.runs.mirror import check_mirror_dir
from newllm_lib.runs.mirror_copy import of_another_run
from newllm_lib.system.files import file_errors
from newllm_lib.training.checkpoint import Checkpoints
from newllm_lib.training.compatibility import difference, needs_new_end
from newllm_lib.training.estimates import Speed, memory_estimate_bytes
from newllm_lib.training.plan import unfaithful_reason
from newllm_lib.training.setup import Setup
from newllm_lib.tuning import estimate_speed


@dataclass(frozen=True)
class Kept(Prepared):
    """A text whose splits are laid out once, for as long as nothing that shapes them changes."""

    splits: dict[tuple[str, bool], tuple[tuple, Split]] = field(default_factory=dict)
    """The newest of each name and whether in one lane, and what shaped it."""

    def split(self, name: str, lanes: int | None = None) -> Split:
        """As `Prepared.split`."""
        data = self.config.data
        shape = (data.layout, data.sequence_length, data.stride, data.min_words)
        if data.layout == "stream":
            shape = (data.layout, data.sequence_length, lanes or data.eval_lanes)
        slot = name, lanes == 1  # a stream in one lane tells the largest batch
        if self.splits.get(slot, ((), None))[0] != shape:
            self.splits[slot] = shape, super().split(name, lanes)
        return self.splits[slot][1]


@dataclass(frozen=True)
class Plan:
    """What training with some settings would be."""

    setup: Setup
    folder: Path
    record: RunRecord
    """Of the run that the folder holds; empty where there is none."""
    refusal: str
    """Why training would not go on with that run; '' where nothing stands against it."""
    speed: Speed | None
    """None where nothing comparable was ever measured here."""


class Planner:
    """Plans one configuration after another; the text is read again only where its settings changed."""

    def __init__(self):
        self._text: Kept | None = None
        self._failed: tuple[tuple, Exception] | None = None

    def must_read(self, config: RunConfig) -> bool:
        """Whether a plan has to wait for a text to be read."""
        wanted = text_settings(config)
        return wanted not in (self._text and self._text.made_by, self._failed and self._failed[0])

    @property
    def failed(self) -> bool:
        """Whether the text could not be read."""
        return self._failed is not None

    def forget_failure(self) -> None:
        """Try again to read a text that could not be read."""
        self._failed = None

    def release(self) -> None:
        """Let go of the laid-out splits, which training lays out for itself."""
        if self._text:
            self._text.splits.clear()

    @file_errors()
    def plan(self, config: RunConfig, measure: bool = False, anew: bool = False) -> Plan:
        """Every decision of a run; NewLLMError where training would raise it, in the same words."""
        run = resolve_run(config, self._read(config), preview=True, remeasure=anew)
        if config.mirror_dir:
            check_mirror_dir(run.place.folder, config.mirror_dir)
        speed = estimate_speed(run.setup, measure=measure, anew=anew)
        return Plan(run.setup, run.place.folder, run.earlier, run.refusal or refusal_of(run), speed)

    def _read(self, config: RunConfig) -> Kept:
        if self.must_read(config):
            self._text = self._failed = None  # two texts may not fit into memory
            try:
                found = prepare(config)
            except Exception as error:
                self._failed = text_settings(config), error
                raise
            self._text = Kept(**{item.name: getattr(found, item.name) for item in dataclasses.fields(found)})
        if self._failed:
            raise self._failed[1]
        return self._text


def refusal_of(run: ResolvedRun) -> str:
    """Why a run cannot continue from what its folder or its copy holds, in the words of `train`; '' if it can."""
    setup, record, checkpoints = run.setup, run.earlier, run.place.checkpoints
    if not record:
        return ""
    identity = record.identity or "unknown"
    lies_in = run.place.copy if run.in_copy else run.place.folder
    if run.in_copy and identity != setup.identity:
        return of_another_run(lies_in, identity, setup.identity)
    files = Checkpoints.of(lies_in, run.place.folder.name).files()
    newest = checkpoints.folder / files[0].name if files else None
    if newest is None:
        return checkpoints_gone(checkpoints.folder, record.step or 0) if has_saved(lies_in) else ""
    if identity != setup.identity:
        return f"{newest}: {difference(record | {'data_fingerprint': record.data['fingerprint']}, setup)}"
    train, end = setup.config.train, record.decay_steps
    decays = train.lr_schedule != "constant" and train.decay_steps is None
    return f"{newest}: {needs_new_end(end, setup.total_steps)}" if decays and end and setup.total_steps > end else ""


def tokens_per_step(setup: Setup) -> float:
    """Real targets of a step, averaged over an epoch."""
    return setup.train_split.num_tokens / setup.steps_per_epoch


def state_of(plan: Plan) -> str:
    """What training would do with the folder."""
    step, total, status = plan.record.step, plan.setup.total_steps, plan.record.status
    if not step:
        return "a new run"
    if step >= total:
        return (
            f"already finished: {step:,} of {total:,} steps" if status == "finished" else f"at its end, step {step:,}"
        )
    if status == "stopped early":
        return f"stopped early at step {step:,} of {total:,}; to train longer, raise patience"
    return f"continues at step {step:,} of {total:,}"


def warnings_of(plan: Plan) -> list[str]:
    """What does not stop a training, but should be known before."""
    setup, found = plan.setup, []
    needed, there = memory_estimate_bytes(setup), setup.machine.memory_bytes
    if needed > there:
        found.append(f"about {needed / 2**30:.1f} GiB are needed, and this machine has {there / 2**30:.1f} GiB")
    if setup.config.train.batch_policy != "recipe" and "batch_size" not in (plan.record.decided or {}):
        policy = setup.config.train.batch_policy
        found.append(f"batch_policy {policy} finds the batch when training starts; this plan is that of the recipe's")
        if steps := setup.config.train.max_steps:
            found.append(f"max_steps = {steps} counts steps: with a larger batch the same steps read more text")
    if setup.config.preset in presets.FAITHFUL and (reason := unfaithful_reason(setup)):
        found.append(f"not faithful to the published run: {reason}")
    return found


def lines_of(plan: Plan) -> list[tuple[str, str]]:
    """(what, how much and why), with what is in the folder and the minutes that are left."""
    lines = dict(plan_of(plan.setup, plan.folder, plan.record))
    lines["run"] = f"{plan.folder}: {state_of(plan)}"
    if plan.speed:
        lines["time"] = plan.speed.total_text(plan.setup, plan.record.step or 0)
    return list(lines.items())


def time_of(plan: Plan) -> str:
    """How long the steps that are left will take, if that is known."""
    if not plan.speed:
        return "not measured"
    return f"about {duration(plan.speed.total_seconds(plan.setup, plan.record.step or 0))}"


# --- HTML, legible on light and dark pages ----------------------------------------------------------------------


def plan_html(plan: Plan, command: str) -> str:
    """The plan: the figures that the sliders move, then each decision with its reason."""
    setup = plan.setup
    memory, there = memory_estimate_bytes(setup) / 2**30, setup.machine.memory_bytes / 2**30
    figures = (
        ("parameters", f"{setup.config.model.num_parameters:,}"),
        ("memory", f"{memory:.1f} of {there:.1f} GiB"),
        ("steps", f"{setup.total_steps:,}"),
        ("epochs", f"{setup.total_steps / setup.steps_per_epoch:.2f}"),
        ("tokens a step", f"{tokens_per_step(setup):,.0f}"),
        ("learning rate", f"{setup.rate.value:.3g}"),
        ("time here", time_of(plan)),
    )
    cells = "".join(
        '<div style="flex:1 1 auto;min-width:80px;white-space:nowrap"><div style="opacity:.75;font-size:11px">'
        f'{name}</div><div style="font-size:15px;font-variant-numeric:tabular-nums">{html_text(value)}</div></div>'
        for name, value in figures
    )
    rows = "".join(map(_row, [*lines_of(plan), ("shell", command)]))
    refused = refused_html(plan.refusal) if plan.refusal else ""
    return (
        f'<div style="line-height:1.4;padding:2px 0">{refused}'
        '<div style="display:flex;flex-wrap:wrap;gap:2px 14px;'
        f'padding:4px 0 6px">{cells}</div>{"".join(map(_warning, warnings_of(plan)))}'
        f'<div style="border-top:{LINE};padding-top:4px;{MONOSPACE}">{rows}</div></div>'
    )


def refused_html(reason: str, last_plan: str = "") -> str:
    """Why training refuses; the last plan stays dimly below, so that what the hand is on does not jump away."""
    last = f'<div style="font-size:11px">The last plan that could be:</div>{last_plan}' if last_plan else ""
    return (
        f'<div role="alert" style="{PILL};background:{RED};padding:6px 10px;margin:4px 0;font-size:13px;'
        f'line-height:1.4;white-space:pre-wrap;overflow-wrap:anywhere">{html_text(reason)}</div>'
        f'<div style="opacity:.4">{last}</div>'
    )


def busy_html(text: str, last_plan: str = "") -> str:
    """What is being done; the last plan stays dimly below, so that nothing jumps."""
    return f'<div style="padding:4px 0;opacity:.75">{html_text(text)}</div><div style="opacity:.4">{last_plan}</div>'


def _warning(text: str) -> str:
    return (
        f'<div style="border-left:3px solid {ORANGE};padding-left:8px;margin:3px 0 6px;font-size:12px;'
        f'overflow-wrap:anywhere">{html_text(text)}</div>'
    )


def _row(line: tuple[str, str]) -> str:
    name, text = line
    return (
        f'<div style="display:flex"><div style="flex:0 0 104px;opacity:.75">{html_text(name)}</div>'
        f'<div style="flex:1 1 0;min-width:0;overflow-wrap:anywhere">{html_text(text)}</div></div>'
    )
