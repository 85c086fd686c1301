"""Which run a configuration is: its folder, what that holds already, and every decision, made once."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newllm_lib.config import RunConfig
from newllm_lib.data.dataset import Prepared
from newllm_lib.errors import CheckpointError, NewLLMError
from newllm_lib.reporting.record import CHECKPOINTS, MODEL, RECORD, WEIGHTS, RunRecord, read_record
from newllm_lib.runs.mirror import Mirror
from newllm_lib.training.checkpoint import Checkpoints, check_payload
from newllm_lib.training.estimates import Speed, memory_estimate_bytes
from newllm_lib.training.plan import plan_lines
from newllm_lib.training.setup import Setup, make_setup
from newllm_lib.tuning import SharedExecution, free_memory_bytes, settle_batch, settle_execution

_OF_A_DEVICE = ("precision", "engine", "threads", "layout")
"""Decisions that a run keeps only for as long as it stays on one kind of device."""


@dataclass(frozen=True, kw_only=True)
class RunPlace:
    """Where a run lives."""

    identity: str
    folder: Path
    copy: Path | None
    """Where a second copy of it is kept, if one is asked for."""

    @property
    def checkpoints(self) -> Checkpoints:
        """Those in the run's own folder."""
        return Checkpoints.of(self.folder)


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run with every decision made."""

    setup: Setup
    place: RunPlace
    mirror: Mirror | None
    """What keeps the copy, as `claim` returned it."""
    earlier: RunRecord
    """Of what the folder holds, or the copy that training would bring back; empty for a new run."""
    in_copy: bool
    """Whether `earlier` is in the copy alone."""
    refusal: str
    """In a preview: why what the folder holds cannot be read or continued; '' where it can."""


def resolve_run(
    requested: RunConfig,
    prepared: Prepared | None = None,
    *,
    claim: Callable[[RunPlace], Mirror | None] = lambda place: None,
    preview: bool = False,
    remeasure: bool = False,
    shared: SharedExecution | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> ResolvedRun:
    """Every decision of a run: by its settings, by what its folder holds, and by what this machine is asked.

    prepared: its text, where that was read before. claim: makes the folder that of the training, before it is read but
    after the settings were checked, and returns what keeps the copy; without it nothing is written. A preview leaves
    out what takes long (searching a batch, reading a checkpoint) and returns what is wrong with the folder as
    `refusal`. remeasure: time again how steps are computed fastest, where that is open; shared: what a study decided
    for all of its runs. log: gets a line for each try of a search. Raises ConfigError, DataError or FileError for bad
    settings or data; RunError or CheckpointError where the folder's record is damaged or that of an imported run.
    """
    setup = make_setup(requested, prepared=prepared)
    place = _place_of(setup)
    mirror = claim(place)
    earlier, in_copy, decided, refusal, moved = RunRecord(), False, {}, "", ""
    try:
        earlier, in_copy = _earlier_part(place, brought_back=mirror is not None)
        decided = _decided_before(place, earlier, preview)
        if moved := moved_between_devices(decided, setup):
            log(moved)
            decided = {name: value for name, value in decided.items() if name not in _OF_A_DEVICE}
        setup = make_setup(requested, decided, setup.prepared) if decided else setup
    except NewLLMError as error:
        if not preview:
            raise
        refusal = str(error)
    setup = settle_execution(setup, {} if moved else decided, remeasure, shared)
    if not preview or _may_need_pieces(setup):
        setup = settle_batch(setup, decided, log)
    return ResolvedRun(setup=setup, place=place, mirror=mirror, earlier=earlier, in_copy=in_copy, refusal=refusal)


def _place_of(setup: Setup) -> RunPlace:
    folder, mirror_dir = run_folder(setup), setup.requested.mirror_dir
    copy = Path(mirror_dir) / folder.name if mirror_dir else None
    return RunPlace(identity=setup.identity, folder=folder, copy=copy)


def _earlier_part(place: RunPlace, brought_back: bool) -> tuple[RunRecord, bool]:
    """The record of the run's folder, or of a copy that was not brought back yet; and whether it is the copy's."""
    earlier = earlier_record(place.folder, place.identity)
    if earlier or brought_back or not place.copy:
        return earlier, False
    with contextlib.suppress(NewLLMError):  # training passes over such a record too
        earlier = earlier_record(place.copy, place.identity)
    return earlier, bool(earlier)


def _decided_before(place: RunPlace, earlier: RunRecord, preview: bool) -> dict[str, Any]:
    """What the run keeps; nothing where the record is of another run, which training refuses."""
    if earlier:
        return earlier.decided if earlier.identity == place.identity else {}
    if preview:
        return {}
    found = place.checkpoints.newest_valid(lambda text: None)  # what is damaged is told when the run continues
    if found is None or check_payload(found[1], found[0])["identity"] != place.identity:
        return {}
    return decided_in(found[1])


def _may_need_pieces(setup: Setup) -> bool:
    """Whether a plan should cut the batch: not before a policy has found it, and only near the limit of the memory."""
    free = free_memory_bytes(setup.machine) or setup.machine.memory_bytes
    return setup.config.train.batch_policy == "recipe" and memory_estimate_bytes(setup) >= free / 2


def plan_of(setup: Setup, folder: Path, earlier: RunRecord, speed: Speed | None = None) -> list[tuple[str, str]]:
    """The lines of a plan, with what an earlier part of the run has settled."""
    warmup = earlier.warmup_steps
    if earlier and warmup is None:  # an earlier version began it
        warmup = setup.config.train.warmup_steps
    return plan_lines(setup, str(folder), earlier.decay_steps, speed, warmup, earlier.began_on)


def run_folder(setup: Setup) -> Path:
    """Where a run lives: its own name, or its preset's and six digits of its identity."""
    config = setup.config
    preset = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]|^\.', "-", config.preset)  # any text may be one
    return Path(config.results_dir) / (config.name or f"{preset}-{setup.identity[:6]}")


def earlier_record(folder: Path, identity: str) -> RunRecord:
    """The record of the run that one of this identity would continue, or must not replace; empty where there is none.

    Another run that has saved nothing is none. RunError when the record is damaged, CheckpointError when it
    is that of an imported run.
    """
    if not (folder / RECORD).exists():
        return RunRecord()
    earlier = read_record(folder)
    if earlier.status == "imported":
        raise CheckpointError(
            f"{folder}: an imported run: it has weights, but no training state to go on from. Give this run another "
            "name, or fresh=True (in the shell --fresh), which keeps the imported one under another name"
        )
    return earlier if earlier.identity == identity or has_saved(folder) else RunRecord()


def has_saved(folder: Path) -> bool:
    """Whether a run's folder holds anything that its training saved: a checkpoint, or the weights of one that is gone.

    Validations in its record are no proof: the first checkpoint may have met a full disk.
    """
    return any((folder / CHECKPOINTS).glob("*.pt")) or (folder / MODEL / WEIGHTS).exists()


def moved_between_devices(decided: dict[str, Any], setup: Setup) -> str:
    """What is decided again where a run continues on another kind of device than it had; '' on the same kind."""
    before, now = decided.get("device", setup.machine.kind), setup.machine.kind
    return f"this run was trained on {before} and continues on {now}: {', '.join(_OF_A_DEVICE)} are decided again" * (
        before != now
    )


def decided_in(payload: dict[str, Any]) -> dict[str, Any]:
    """The decisions that a checkpoint holds, for where there is no record; one of an earlier version shows few."""
    if isinstance(payload.get("decided"), dict):
        return payload["decided"]
    decided = {"batch_size": payload["config"]["train"]["batch_size"]}
    return decided | ({"precision": "fp16"} if payload["scaler"] else {})


def checkpoints_gone(folder: Path, step: int) -> str:
    """Why a run that has a record cannot be continued."""
    return (
        f"{folder}: the checkpoints of this run are gone (it was at step {step:,}), or did not come with it: a bundle "
        "holds one if it is made with checkpoint=True (--checkpoint). fresh=True (in the shell --fresh) keeps what is "
        "left under another name and starts over"
    )


def set_aside(folder: Path) -> Path:
    """Give a folder a free name, which is returned, so that its own is free."""
    number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.old-{number}"))
