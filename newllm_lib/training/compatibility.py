"""Why a checkpoint and a configuration do not belong to the same run."""

from __future__ import annotations

from typing import Any

from newllm_lib.config import flat_fields
from newllm_lib.training.setup import Setup


def needs_new_end(decay_steps: int, total_steps: int) -> str:
    """Why a run whose rate decays to an end cannot go on beyond it."""
    return (
        f"the rate of this run decays to its end at step {decay_steps:,}, so going on to step {total_steps:,} needs a "
        f"new end: decay_steps = {total_steps}. Or start another run: another name, or fresh=True (--fresh)"
    )


def difference(payload: dict[str, Any], setup: Setup) -> str:
    """In which settings, or in what data, a checkpoint and a run differ."""
    if payload["data_fingerprint"] != setup.prepared.fingerprint:
        return (
            f"the data have changed since this checkpoint: sha256 was {payload['data_fingerprint'][:16]}…, is now "
            f"{setup.prepared.fingerprint[:16]}…{setup.prepared.why_changed}. Restore the old text, or start anew: "
            "another name, or fresh=True (in the shell --fresh)"
        )
    old, new = payload["config"], setup.config.to_dict()
    changed = [
        f"{key} {old[section].get(key)!r} there, {value!r} here"
        for section in ("model", "data", "train")
        for key, value in new[section].items()
        if flat_fields()[key].metadata["identity"] and key != "data" and old[section].get(key) != value
    ]
    what = "; ".join(changed) or "the vocab_size or batch_size that was asked for, or the library's identity version"
    return f"of a run with other settings: {what}. Give another name, or fresh=True (in the shell --fresh)"
