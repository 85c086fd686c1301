"""The configuration with which a run continues beyond its planned end."""

from __future__ import annotations

from newllm_lib.config import RunConfig, flat_fields
from newllm_lib.errors import ConfigError
from newllm_lib.reporting.formatting import counted
from newllm_lib.runs.run import Run
from newllm_lib.training.setup import make_setup


def extended(run: Run, *, epochs: int | None = None, max_steps: int | None = None, **changes) -> RunConfig:
    """The configuration with which `train` carries a run on, to a new total of epochs or of steps (None = its own end).

    A rate that decays to an end gets the new end of the run as its own. changes: fields that define no result
    (patience, mirror_dir, ...), and `data` where the same text now lies in another place. ConfigError where the run is
    longer already, or a change would make another run of it.
    """
    if epochs is not None and max_steps is not None:
        raise ConfigError(f"epochs = {epochs}, max_steps = {max_steps}: give the new total as one of them")
    _check_same_run(run, changes)
    asked = run.requested
    if epochs is None and max_steps is None:
        return asked.replace(**changes)
    config = asked.replace(**changes, epochs=epochs, max_steps=max_steps)
    if asked.train.lr_schedule != "constant" and "decay_steps" not in changes:
        config = config.replace(decay_steps=None)
    setup = make_setup(config, run.record.decided)  # its batch may be what a policy or another machine gave
    done = run.record.step or 0
    if setup.total_steps < done:
        asked_for = f"epochs = {epochs}" if epochs else f"max_steps = {max_steps}"
        raise ConfigError(
            f"{asked_for}: {run.folder.name} has already trained {counted(done, 'step')} "
            f"({done / setup.steps_per_epoch:.2f} epochs): must be as much or more"
        )
    if config.train.lr_schedule != "constant" and config.train.decay_steps is None:
        config = config.replace(decay_steps=setup.total_steps)
    return config


def _check_same_run(run: Run, changes: dict) -> None:
    fields = flat_fields()
    for name, value in changes.items():
        if name not in fields:
            continue  # `replace` names it
        item = fields[name]
        section = run.requested if item.section == "run" else getattr(run.requested, item.section)
        now = getattr(section, name)
        if name != "data" and item.metadata["identity"] and value != now:
            raise ConfigError(f"{name} = {value!r}: is {now!r} in {run.folder.name}; another value makes another run")
