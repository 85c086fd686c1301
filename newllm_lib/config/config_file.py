"""A configuration as a file: TOML to write and read, and what a run's own run.json holds of it."""

from __future__ import annotations

import json
import textwrap
import tomllib
from typing import Any

from newllm_lib.config.configs import FlatField, RunConfig, flat_fields
from newllm_lib.config.fields import allowed_types
from newllm_lib.config.presets import get
from newllm_lib.errors import ConfigError

_SECTIONS = ("run", "data", "model", "train")
"""In the order of the file; the fields of `run` stand at its top, in no section."""
_WIDTH = 100


def config_text(config: RunConfig) -> str:
    """Every setting as TOML, each below its description; `read_config` gives the same configuration."""
    lines = []
    for section in _SECTIONS:
        lines += [] if section == "run" else [f"[{section}]"]
        for item in flat_fields().values():
            if item.section == section:
                value = getattr(config if section == "run" else getattr(config, section), item.name)
                lines += [
                    *(f"# {line}" for line in textwrap.wrap(item.doc, _WIDTH)),
                    f"{item.name} = {_toml(value)}",
                    "",
                ]
    return "\n".join(lines).rstrip() + "\n"


def read_config(text: str, name: str) -> RunConfig:
    """The configuration in the text of a file; ConfigError that begins with its name where there is none.

    TOML as `config_text` writes it, of which all but what differs may be left out: the rest is that of `preset`, if it
    names one, else the defaults. Or the run.json of a run: what was asked for when it was started.
    """
    try:
        if text.lstrip().startswith("{"):
            record = json.loads(text)
            return RunConfig.from_dict(record.get("requested") or record["config"])
        values = _flat(tomllib.loads(text))
        preset, default = values.get("preset"), RunConfig()
        base = get(preset) if isinstance(preset, str) and preset != default.preset else default
        return base.replace(**{key: _value(flat_fields().get(key), value) for key, value in values.items()})
    except (KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{name}: is no run.json of a run") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: is not TOML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file by their own name, wherever they stand."""
    values: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, dict) and key not in _SECTIONS:
            raise ConfigError(f"unknown section [{key}]: must be one of {', '.join(_SECTIONS[1:])}")
        for name, one in (value if isinstance(value, dict) else {key: value}).items():
            if name in values:
                raise ConfigError(f"{name} is set twice")
            values[name] = one
    return values


def _value(item: FlatField | None, value: Any) -> Any:
    """None for "none" where the setting may have none, as in the shell."""
    return None if item and value == "none" and type(None) in allowed_types(item.type) else value


def _toml(value: Any) -> str:
    """A value as TOML writes it."""
    if value is None:
        return '"none"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
