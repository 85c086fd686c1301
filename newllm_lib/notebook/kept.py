"""What was moved in a panel, kept in a file of the results folder, so that Run all does not lose it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from newllm_lib.config.places import user_path
from newllm_lib.system.files import read_json, write_text_atomic

NAME = ".panel.json"
"""In the results folder; no run's folder, so in no bundle."""


class Kept:
    """The values that were moved in the panel of one notebook and one preset.

    With them the file holds what the notebook's settings said then: a field that they changed since is theirs again.
    """

    def __init__(self, results_dir: str, preset: str):
        self.path: Path = user_path(results_dir) / NAME
        self._key = (notebook_name(), preset)

    def read(self, given: dict[str, Any]) -> dict[str, Any]:
        """Field -> value that was moved, as JSON holds it; without what the settings, `given`, changed since."""
        entry = self._entries().get(self._key[0], {}).get(self._key[1], {})
        moved, then = (entry.get("moved"), entry.get("given")) if isinstance(entry, dict) else (None, None)
        if not isinstance(moved, dict) or not isinstance(then, dict):
            return {}
        now = _as_json(given)
        return {name: value for name, value in moved.items() if name == "preset" or now.get(name) == then.get(name)}

    def write(self, given: dict[str, Any], moved: dict[str, Any]) -> None:
        """Keep what was moved; nothing moved leaves no entry. Best effort: a full disk costs the next Run all."""
        entries = self._entries()
        own = entries.setdefault(self._key[0], {})
        before = own.pop(self._key[1], None)
        if moved:
            own[self._key[1]] = _as_json({"given": given, "moved": moved})
        if own.get(self._key[1]) == before:
            return
        if not own:
            del entries[self._key[0]]
        with contextlib.suppress(OSError):
            if entries:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text_atomic(self.path, json.dumps(entries, indent=1) + "\n")
            else:
                self.path.unlink(missing_ok=True)

    def _entries(self) -> dict[str, Any]:
        """Notebook -> preset -> entry; empty where the file is missing or damaged."""
        try:
            found = read_json(self.path)
        except (OSError, ValueError):
            return {}
        good = isinstance(found, dict) and all(isinstance(own, dict) for own in found.values())
        return found if good else {}


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def notebook_name() -> str:
    """The file name of the notebook whose kernel this is, as far as its server or VS Code tells; else ""."""
    from IPython import get_ipython

    shell = get_ipython()
    told = (shell.user_ns.get("__vsc_ipynb_file__") if shell else None) or os.environ.get("JPY_SESSION_NAME", "")
    return Path(told).name


def is_automatic() -> bool:
    """Whether no person runs this notebook: the tests' short runs, and papermill, whose values are not to be replaced.

    Papermill puts its values into a cell that begins with a comment of its own.
    """
    from IPython import get_ipython

    if os.environ.get("NEWLLM_SMOKE") or any(name.startswith("PAPERMILL_") for name in os.environ):
        return True
    shell = get_ipython()
    cells = shell.user_ns.get("In", ()) if shell else ()
    return any(cell.startswith("# Parameters\n") for cell in cells)
