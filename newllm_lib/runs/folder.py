"""What a run's folder holds before the run begins: nothing, an earlier part of it, or another run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from newllm_lib.errors import CheckpointError
from newllm_lib.reporting.record import read_record
from newllm_lib.training.checkpoint import Checkpoints, check_payload
from newllm_lib.training.setup import Setup


def run_folder(setup: Setup) -> Path:
    """Where a run lives: its own name, or its preset's and six digits of its identity."""
    config = setup.config
    preset = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]|^\.', "-", config.preset)  # any text may be one
    return Path(config.results_dir) / (config.name or f"{preset}-{setup.identity[:6]}")


def earlier_record(folder: Path, identity: str) -> dict[str, Any]:
    """The record of the run that one of this identity would continue, or must not replace; empty where there is none.

    Another run that has saved nothing is none. RunError when the record is damaged, CheckpointError when it
    is that of an imported run.
    """
    if not (folder / "run.json").exists():
        return {}
    earlier = read_record(folder)
    if earlier["status"] == "imported":
        raise CheckpointError(
            f"{folder}: an imported run: it has weights, but no training state to go on from. Give this run another "
            "name, or fresh=True (in the shell --fresh), which keeps the imported one under another name"
        )
    matters = earlier.get("identity") == identity or earlier["best"] or any((folder / "checkpoints").glob("*.pt"))
    return earlier if matters else {}


def decisions(earlier: dict[str, Any], identity: str) -> dict[str, Any]:
    """What a run goes on with as it began; nothing where the record is of another run, which training refuses."""
    return earlier["decided"] if earlier.get("identity") == identity else {}


def decided_by_checkpoint(checkpoints: Checkpoints, identity: str) -> dict[str, Any]:
    """The decisions that a run's newest checkpoint shows, for where its record is missing; empty without one."""
    found = checkpoints.newest_valid(lambda text: None)  # told when it goes on
    if found is None or check_payload(found[1], found[0])["identity"] != identity:
        return {}
    decided = {"batch_size": found[1]["config"]["train"]["batch_size"]}
    return decided | ({"precision": "fp16"} if found[1]["scaler"] else {})


def checkpoints_gone(folder: Path, step: int) -> str:
    """Why a run that has a record cannot go on."""
    return (
        f"{folder}: the checkpoints of this run are gone (it was at step {step:,}); fresh=True (in the shell --fresh) "
        "keeps what is left under another name and starts over"
    )


def set_aside(folder: Path) -> Path:
    """Give a folder a free name, which is returned, so that its own is free."""
    number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.old-{number}"))
