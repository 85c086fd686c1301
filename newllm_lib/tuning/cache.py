"""What was measured on this machine, kept in a file of the cache folder: batches that were found, and speeds."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from newllm_lib.data.dataset import cache_folder
from newllm_lib.system.files import read_json, write_text_atomic
from newllm_lib.system.hardware import Machine
from newllm_lib.training.estimates import matrix_parameters
from newllm_lib.training.setup import Setup

VERSION = 5
"""Raise it when what is kept, or what it was measured with, changes its meaning (5: a GPU replays its steps)."""
_SPEED_FIELDS = {"facts", "batch_size", "rows", "tokens_per_second"}
_VALIDATION_FIELDS = ("validation_tokens_per_second", "saving_seconds")
"""What later versions added to a speed, where they know it."""
_MOST = 300
"""Entries of each kind that are kept, the newest ones."""


def machine_facts(machine: Machine) -> dict[str, Any]:
    """What decides how fast this machine is, and how much it holds."""
    return {
        "version": VERSION,
        "device": machine.device,
        "name": machine.name,
        "capability": list(machine.capability or ()),
        "memory_bytes": machine.memory_bytes,
        "threads": machine.threads,
        "torch": str(torch.__version__),  # which as it is compares as a version, not as text
    }


def step_facts(setup: Setup) -> dict[str, Any]:
    """What decides how long a step takes and what it holds, besides the machine and the batch."""
    config, split = setup.config, setup.train_split
    model = config.model
    padded = not split.carries_context  # the lanes of a stream differ with the batch, and have next to no padding
    return {
        "vocab_size": model.vocab_size,
        "embed_dim": model.embed_dim,
        "hidden_dim": model.hidden_dim,
        "num_layers": model.num_layers,
        "context_dim": model.context_dim,
        "has_dropout": model.dropout > 0,
        "sequence_length": config.data.sequence_length,
        "layout": config.data.layout,
        "real_share": round(split.num_tokens / split.num_slots, 1) if padded else 1.0,
        "optimizer": config.train.optimizer,
        "precision": setup.precision.name,
        "engine": setup.engine.name,
        "matrix_parameters": matrix_parameters(model),
    }


def digest(facts: dict[str, Any]) -> str:
    """A short name of some facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """One machine's file. One that is damaged or of another version counts as empty and is replaced."""

    def __init__(self, machine: Machine):
        self._machine = machine_facts(machine)
        self.path: Path = cache_folder() / f"probe-{digest(self._machine)}.json"

    def choice(self, key: str) -> dict[str, Any] | None:
        """The batch that was found under this key, as it was kept."""
        return self._read()["choices"].get(key)

    def keep_choice(self, key: str, choice: dict[str, Any]) -> None:
        """Remember a batch."""
        self._add("choices", {key: choice})

    def speeds(self) -> list[dict[str, Any]]:
        """Every speed that was measured: facts of the step, batch_size, rows (at a time), tokens_per_second.

        Some have validation_tokens_per_second and saving_seconds too.
        """
        found = self._read()["speeds"].values()
        return [
            entry
            for entry in found
            if isinstance(entry, dict) and entry.keys() - {*_VALIDATION_FIELDS} == _SPEED_FIELDS
        ]

    def keep_speed(self, setup: Setup, tokens_per_second: float, validation: tuple[float, float] | None = None) -> None:
        """Remember how fast a setup trained, and where it is known how fast it validated and saved.

        validation: targets scored a second, and seconds of saving what was found to be the best.
        """
        train = setup.config.train
        rows = min(train.micro_batch_size or train.batch_size, train.batch_size)
        step = {"facts": step_facts(setup), "batch_size": train.batch_size, "rows": rows}
        name = digest(step)
        before = self._read()["speeds"].get(name, {})
        costs = {field: before[field] for field in _VALIDATION_FIELDS if field in before}
        if validation:
            costs = dict(zip(_VALIDATION_FIELDS, validation, strict=True))
        self._add("speeds", {name: step | {"tokens_per_second": tokens_per_second} | costs})

    def _read(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"machine": self._machine, "choices": {}, "speeds": {}}
        try:
            found = read_json(self.path)
        except (OSError, ValueError):
            return empty
        good = isinstance(found, dict) and found.get("machine") == self._machine
        good = good and all(isinstance(found.get(kind), dict) for kind in ("choices", "speeds"))
        return found if good else empty

    def _add(self, kind: str, entries: dict[str, Any]) -> None:
        """Best effort: a full or read-only disk costs time at the next start, not this one."""
        kept = self._read()
        for key, entry in entries.items():
            kept[kind].pop(key, None)  # an entry that is renewed becomes the newest
            kept[kind][key] = entry
        kept[kind] = dict(list(kept[kind].items())[-_MOST:])
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(self.path, json.dumps(kept, indent=1) + "\n")
