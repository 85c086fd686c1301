"""newllm_lib: train, study and share New-LLM, a language model with a fixed-size context instead of attention.

    import newllm_lib as nl
    run = nl.train("quickstart", data="builtin")
    print(run.history)

Names load what they need when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ModelConfig": "config",
    "DataConfig": "config",
    "TrainConfig": "config",
    "RunConfig": "config",
    "NewLLM": "model",
    "Metrics": "metrics",
    "Writer": "writing",
    "generate_text": "writing",
    "generate_texts": "writing",
    "stream_text": "writing",
    "Run": "runs",
    "train": "runs",
    "plan": "runs",
    "Panel": "notebook.panel",
    "load": "runs",
    "evaluate": "runs",
    "load_model": "runs",
    "find_batch": "probe",
    "lr_find": "study.lr_range",
    "compare_precisions": "study.precisions",
    "lr_scaling": "study.lr_scaling",
    "compare": "comparison",
    "import_checkpoint": "importing",
    "import_run": "importing",
    "export": "sharing",
    "bundle": "sharing",
    "archive": "sharing",
    "open_bundle": "sharing",
    "fetch": "fetching",
    "adopt": "adopting",
    "storage": "notebook.colab",
    "offer_download": "notebook.colab",
    "flush_drive": "notebook.colab",
    "gather": "gathering",
    "extended": "continuing",
    "find_run": "continuing",
    "side_by_side": "gathering",
}
_ERRORS = (
    "NewLLMError", "ConfigError", "DataError", "RunError", "TrainingError", "PartialUpdateError",
    "MissingPackageError", "CheckpointError", "NewerCheckpointError", "NoModelError", "BundleError", "ChangedError",
    "FileError", "FileMissingError", "FileTakenError", "FilePermissionError", "NotAFileError", "NotAFolderError",
    "NetworkError", "DownloadError",
)  # fmt: skip
_HOMES |= dict.fromkeys(_ERRORS, "errors")
_MODULES = ("presets", "published", "schedule", "config", "report", "checkpoint", "hardware", "probe")

__all__ = list(_HOMES) + list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"newllm_lib.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"newllm_lib.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'newllm_lib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
