"""newllm_lib: train, study and share New-LLM, a language model with a fixed-size context instead of attention.

    import newllm_lib as nl
    run = nl.train("quickstart", data="builtin")
    print(run.history)

Names load what they need when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "config",
    "DataConfig": "config",
    "TrainConfig": "config",
    "RunConfig": "config",
    "NewLLM": "model.newllm",
    "Metrics": "evaluation",
    "Writer": "generation",
    "generate_text": "generation",
    "generate_texts": "generation",
    "stream_text": "generation",
    "Run": "runs.run",
    "train": "runs.api",
    "plan": "runs.api",
    "Observer": "training.observers",
    "Panel": "notebook.panel",
    "load": "runs.api",
    "evaluate": "runs.api",
    "load_model": "runs.run",
    "find_batch": "tuning",
    "lr_find": "tuning.lr_finder",
    "compare_precisions": "studies.precision.study",
    "lr_scaling": "studies.lr_scaling.study",
    "compare": "reporting.comparison_report",
    "import_checkpoint": "sharing.legacy",
    "import_run": "sharing.legacy",
    "export": "sharing.export",
    "bundle": "sharing.bundle",
    "archive": "sharing.bundle",
    "open_bundle": "sharing.bundle",
    "fetch": "sharing.google_drive",
    "adopt": "sharing.from_file",
    "storage": "notebook.colab",
    "offer_download": "notebook.colab",
    "flush_drive": "notebook.colab",
    "gather": "sharing.find_runs",
    "extended": "runs.extend",
    "find_run": "sharing.find_runs",
    "side_by_side": "runs.api",
}
_ERRORS = (
    "NewLLMError", "ConfigError", "DataError", "RunError", "RunInUseError", "TrainingError", "PartialUpdateError",
    "MissingPackageError", "CheckpointError", "NewerCheckpointError", "NoModelError", "BundleError", "ChangedError",
    "FileError", "FileMissingError", "FileTakenError", "FilePermissionError", "NotAFileError", "NotAFolderError",
    "NetworkError", "DownloadError",
)  # fmt: skip
_HOMES |= dict.fromkeys(_ERRORS, "errors")
_MODULES = {
    "presets": "config.presets",
    "published": "config.published",
    "schedule": "training.schedule",
    "config": "config",
    "report": "reporting.report",
    "checkpoint": "training.checkpoint",
    "hardware": "system.hardware",
    "probe": "tuning",
}
"""Modules that users reach from here, and where they are: these names stay when a file moves."""

__all__ = list(_HOMES) + list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"newllm_lib.{_MODULES[name]}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"newllm_lib.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'newllm_lib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
