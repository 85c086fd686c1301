"""The shape of the house: who may import whom, what an import costs, how long things are."""

import ast
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import newllm_lib

PACKAGE = Path(newllm_lib.__file__).parent

ROOMS = [
    "escaping",
    "errors",
    "settings",
    "config",
    "portable",
    "notation",
    "schedule",
    "published",
    "presets",
    "files",
    "buffers",
    "text",
    "hardware",
    "recurrence",
    "model",
    "metrics",
    "generate",
    "writing",
    "checkpoint",
    "mirror",
    "diagnose",
    "curves",
    "report",
    "card",
    "comparison",
    "skips",
    "step",
    "progress",
    "trainer",
    "planning",
    "earlier",
    "probe",
    "recorder",
    "importing",
    "runs",
    "sharing",
    "fetching",
    "adopting",
    "gathering",
    "continuing",
    "study",
    "notebook",
    "cli",
]
"""In import order: a room imports from those above it only (design.md)."""

EXCEPTIONS = {("model", "generate", "NewLLM.generate"), ("runs", "notebook", "_default_progress")}
"""(room, imported room, function): conveniences for users, resolved when they are called."""

HEAVY = {"torch", "numpy", "datasets", "matplotlib", "pandas", "ipywidgets"}


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def modules():
    """Every source file of a room; the package's front door and `python -m` are no rooms."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if room_of(path) not in ("__init__", "__main__")]


def imported_rooms(source, package=("newllm_lib",)):
    """(room, function) of each import from newllm_lib in a source, also inside functions; '' at the top level."""
    found = []

    def visit(node, scope):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")] if node.level else []
            base = [part for part in base if part] or node.module.split(".")
            names = [[*base, alias.name] for alias in node.names]
        else:
            names = []
        found.extend((name[1], ".".join(scope)) for name in names if name[0] == "newllm_lib" and len(name) > 1)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            scope = (*scope, node.name)
        for child in ast.iter_child_nodes(node):
            visit(child, scope)

    visit(ast.parse(source), ())
    return found


def backward_imports(room, source, package=("newllm_lib",)):
    """What a source of a room imports from itself downwards in ROOMS, or from what is no room at all."""
    above = [*ROOMS[: ROOMS.index(room)], room]
    return [
        f"{room} imports {other}" + (f" in {function}" if function else "")
        for other, function in imported_rooms(source, package)
        if other not in above and (room, other, function) not in EXCEPTIONS
    ]


def test_every_room_has_its_place():
    new = sorted({room_of(path) for path in modules()} - set(ROOMS))
    assert not new, f"new rooms {new}: add them to ROOMS in this test and to the table in design.md, where they belong"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    package = ("newllm_lib", *path.relative_to(PACKAGE).parts[:-1])
    assert backward_imports(room_of(path), path.read_text(encoding="utf-8"), package) == []


def test_imports_that_run_backwards_are_found():
    source = """
import torch, newllm_lib.runs
from newllm_lib import presets, trainer
from . import cli
from .metrics import Metrics
class NewLLM:
    def fit(self):
        from newllm_lib.generate import generate
    def generate(self):
        from newllm_lib.generate import generate
"""
    assert backward_imports("model", source) == [
        "model imports runs",
        "model imports trainer",
        "model imports cli",
        "model imports metrics",
        "model imports generate in NewLLM.fit",
    ]
    nested = "from ..config import PAD\nfrom ..runs import train\nfrom . import corpus"
    assert backward_imports("text", nested, ("newllm_lib", "text")) == ["text imports runs"]


def test_exceptions_are_still_needed():
    for room, other, function in EXCEPTIONS:
        assert (other, function) in imported_rooms((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))


# --- what an import costs ---------------------------------------------------------------------------------------


def test_importing_the_package_is_cheap():
    script = "import json, sys, newllm_lib; print(json.dumps(sorted(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert HEAVY & set(json.loads(printed)) == set()


def test_every_public_name_resolves():
    assert len(newllm_lib.__all__) == len(set(newllm_lib.__all__)) > 10
    assert set(newllm_lib.__all__) <= set(dir(newllm_lib))
    for name in newllm_lib.__all__:
        assert getattr(newllm_lib, name) is not None
    with pytest.raises(AttributeError, match="module 'newllm_lib' has no attribute 'nothing'"):
        _ = newllm_lib.nothing


def test_every_module_imports():
    names = [module.name for module in pkgutil.walk_packages(newllm_lib.__path__, "newllm_lib.")]
    assert len(names) >= len(ROOMS)
    for name in names:
        if name != "newllm_lib.__main__":
            importlib.import_module(name)


# --- how long things are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_and_modules_fit_the_eye(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_no_file_holds_a_path_of_one_machine(repository):
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    places = [f"/{folder}/".encode() for folder in ("work", "root")]
    paths = [repository / name for name in listed.stdout.split("\0") if name and (repository / name).is_file()]
    assert len(paths) > len(ROOMS)
    contents = {path: path.read_bytes() for path in paths}
    found = [str(path) for path, raw in contents.items() if b"\0" not in raw and any(place in raw for place in places)]
    assert found == []


# --- the newest Python ------------------------------------------------------------------------------------------

TORCH_FREE = [
    "escaping",
    "errors",
    "settings",
    "config",
    "portable",
    "schedule",
    "published",
    "presets",
    "files",
    "text.corpus",
    "text.tokenizer",
]
NUMPY_ONLY = ["text.sequences", "text.prepare"]


@pytest.fixture(scope="module")
def python_3_13():
    """Python 3.13: $NEWLLM_PYTHON313, this interpreter, or python3.13 where it runs (it may be a version shim)."""
    own = sys.executable if sys.version_info[:2] == (3, 13) else None
    found = os.environ.get("NEWLLM_PYTHON313") or own or shutil.which("python3.13")
    if not found:
        pytest.skip("no python3.13 on PATH; name one in NEWLLM_PYTHON313")
    script = "import sys; print(sys.version_info[:2] == (3, 13))"
    tried = subprocess.run([found, "-c", script], capture_output=True, text=True, check=False)
    if tried.stdout.strip() != "True":
        pytest.skip(f"{found} is no Python 3.13 that runs; name one in NEWLLM_PYTHON313. {tried.stderr.strip()}")
    return found


def run_with(python, script, *arguments):
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, "-W", "error", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sources_compile_under_python_3_13(python_3_13):
    script = "import sys\nfor path in sys.argv[1:]:\n    compile(open(path, 'rb').read(), path, 'exec')"
    run_with(python_3_13, script, *sorted(PACKAGE.rglob("*.py")))


def test_rooms_without_torch_import_under_python_3_13(python_3_13):
    has_numpy = subprocess.run([python_3_13, "-c", "import numpy"], capture_output=True, check=False).returncode == 0
    rooms = TORCH_FREE + (NUMPY_ONLY if has_numpy else [])
    script = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module('newllm_lib.' + name)"
    script += "\nprint('torch' in sys.modules)"
    assert run_with(python_3_13, script, *rooms).strip() == "False"


def test_the_top_level_holds_what_the_design_names_and_nothing_else(repository):
    """A stray download at the top was committed once."""
    if not (repository / ".git").exists():
        pytest.skip("not a checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True).stdout
    assert {name.split("/")[0] for name in tracked.splitlines()} == {
        ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt",
        "newllm_lib", "notebooks", "pyproject.toml", "results", "setup.py", "tests",
    }  # fmt: skip


def dead_links(folder):
    """(page, target) of links and pictures of tracked Markdown pages that lead to no tracked file or folder."""
    tracked = subprocess.run(["git", "ls-files"], cwd=folder, capture_output=True, text=True, check=True).stdout
    there = {part for name in tracked.splitlines() for part in (Path(name), *Path(name).parents)}
    found = []
    for page in sorted(name for name in tracked.splitlines() if name.endswith(".md")):
        for target in re.findall(r"\]\(([^)#\s]+)", (folder / page).read_text(encoding="utf-8")):
            place = Path(os.path.normpath(Path(page).parent / target))
            if "://" not in target and place not in there:
                found.append((page, target))
    return found


def test_every_link_of_the_pages_leads_somewhere(repository):
    if not (repository / ".git").exists():
        pytest.skip("not a checkout")
    assert dead_links(repository) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "page.md").write_text(
        "[a](there.md) ![b](gone.png) [c](https://example.org) [d](sub) [e](page.md#part)"
    )
    (tmp_path / "sub").mkdir()
    for name in ("there.md", "sub/file", "gone.png"):
        (tmp_path / name).write_text("")
    for command in (["init", "-q"], ["add", "page.md", "there.md", "sub"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert dead_links(tmp_path) == [("page.md", "gone.png")]  # on this disk only
