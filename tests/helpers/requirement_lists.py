"""Reads lists of packages: what setup.py asks for, and what a runtime has."""

import ast

from packaging.utils import canonicalize_name
from packaging.version import Version


def setup_argument(source, name):
    """The literal value of an argument of `setup(...)`, read without running the file."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (found,) = [
        keyword.value
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "setup"
        for keyword in call.keywords
        if keyword.arg == name
    ]
    return ast.literal_eval(found)


def frozen_versions(text):
    """Canonical name -> version of `name==version` lines."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}
