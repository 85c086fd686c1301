"""What a run's record and configuration say once they leave a machine, and what is believed of them on another.

Paths belong to one machine. They tell who its user is, and on another machine they are a stranger's wish: where to
read, and where to write. So none leaves, and none that arrives is obeyed; only the last part of a text's path is kept,
as its name.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from newllm_lib.config.configs import NAMED_TEXTS, flat_fields
from newllm_lib.errors import RunError
from newllm_lib.escaping import impersonal, shell_command

ELSEWHERE = "elsewhere:"
"""Before the name of a text that lies on the machine that a run came from: `data.corpus` asks where it lies here."""

FROM_PYTHON = "newllm_lib.train(...) from Python"
"""In place of the command of a run that was started from Python or a notebook; no shell would take it, so no quotes."""


def last_part(path: str) -> str:
    """The name at the end of a path of any system; "text" where it has none."""
    name = re.split(r"[/\\]", path.removeprefix(ELSEWHERE).rstrip("/\\"))[-1]
    return "text" if name in ("", ".", "..", "~") else name


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration (as `RunConfig.to_dict` gives it) without paths: the data by name, the folders as by default."""
    return _with_data(config, last_part)


def received_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration from elsewhere: no path of it is kept, and its text, if it is no named one, is to be found."""
    return _with_data(config, lambda source: name if (name := last_part(source)) in NAMED_TEXTS else ELSEWHERE + name)


def portable(record: dict[str, Any]) -> dict[str, Any]:
    """A run's record (run.json) as it may leave this machine; what was made portable once stays as it is."""
    return _with_configs(record, portable_config)


def received(record: dict[str, Any]) -> dict[str, Any]:
    """A run's record from elsewhere as it is kept here; RunError where it is none that this library has written."""
    try:
        return _with_configs(record, received_config)
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError(f"run.json is damaged: not what a run writes ({error!r})") from error


def portable_command(command: str) -> str:
    """A recorded command, each path in it shortened to its last part."""
    try:
        words = shlex.split(impersonal(command))
        return FROM_PYTHON if words == FROM_PYTHON.split() else shell_command(map(_short, words))
    except ValueError:  # no command of a shell, such as a note that somebody wrote
        return " ".join(map(_short, command.split(" ")))


def _short(word: str) -> str:
    option, value = re.fullmatch(r"(?s)(--?[\w-]+=)?(.*)", word).groups(default="")
    return option + (last_part(value) if re.search(r"[/\\]", value) else value)


def _with_data(config: dict[str, Any], name_of) -> dict[str, Any]:
    changed = dict(config)
    for name, item in flat_fields().items():
        if not item.metadata["path"]:
            continue
        if item.section == "run":
            changed[name] = item.default
        elif name in changed.get(item.section, {}):
            value = changed[item.section][name]
            named = [name_of(part) for part in value] if isinstance(value, (list, tuple)) else name_of(value)
            changed[item.section] = changed[item.section] | {name: named}
    return changed


def _with_configs(record: dict[str, Any], changed_config) -> dict[str, Any]:
    changed = dict(record)
    for part in ("config", "requested"):
        if record.get(part):
            changed[part] = changed_config(record[part])
    if "plan" in record:
        plan = [(name, text) for name, text in record["plan"] if name != "copy"]
        changed["plan"] = [[name, last_part(text) if name == "run" else text] for name, text in plan]
    if "commands" in record:
        changed["commands"] = list(map(portable_command, record["commands"]))
    return changed
