"""How safe a run's work is: whether a copy of it exists elsewhere, in one line for the user."""

from __future__ import annotations

from typing import NamedTuple

from newllm_lib.system.console import KAGGLE_OUTPUT, in_colab, in_kaggle


class SyncStatus(NamedTuple):
    """How safe a run's work is."""

    kind: str
    """"local", "copying", "synced", or a name of what keeps it from being copied."""
    text: str
    """One line for the user."""
    safe: bool = True
    """False where something is wrong."""


def unsaved() -> SyncStatus | None:
    """How safe a run without a copy is, where the machine itself goes away; None elsewhere."""
    if in_colab():
        return SyncStatus("local", "only on this machine, which Colab deletes when the runtime ends")
    if in_kaggle():
        return SyncStatus("local", f"only on this machine; Kaggle keeps {KAGGLE_OUTPUT} when you choose Save Version")
    return None
