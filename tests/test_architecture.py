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

WINGS = [
    {"escaping"},
    {"errors"},
    {"config"},
    {"system"},
    {"data", "reporting"},
    {"model"},
    {"evaluation", "generation"},
    {"training"},
    {"tuning"},
    {"runs"},
    {"sharing", "studies", "notebook"},
    {"cli"},
]
"""In import order: a wing imports from itself and from earlier lines; wings of one line do not know each other."""

LOCAL_IMPORTS_IN_CIRCLES: set[tuple[str, str]] = set()
"""(file, imported file) that close a circle of files by an import inside a function; each needs a reason here."""

HEAVY = {"torch", "numpy", "datasets", "matplotlib", "pandas", "ipywidgets"}


def files(folder=PACKAGE):
    """Dotted name -> source file of each module; the package's front door and `python -m` belong to no wing."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name not in ("", "__main__")}


def imports(source, names):
    """The modules of `names` that a source imports, at its top level and inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            whole = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for dotted in whole:
            name = dotted.removeprefix("newllm_lib.")
            if dotted.startswith("newllm_lib.") and name != "__version__":  # which belongs to no wing
                found.add(name if name in names else name.rpartition(".")[0] or name)
    return found


def backward_imports(wing, source, names):
    """What a source of a wing imports from wings that are not before its own."""
    place = next(number for number, line in enumerate(WINGS) if wing in line)
    allowed = {wing}.union(*WINGS[:place])
    return sorted(name for name in imports(source, names) if name.split(".")[0] not in allowed)


def circles(graph):
    """Circles of a graph {name: names}, each once, as the names along it."""
    found, state, path = [], {}, []

    def visit(name):
        state[name] = "open"
        path.append(name)
        for other in sorted(graph.get(name, ())):
            if state.get(other) == "open":
                found.append(path[path.index(other) :])
            elif other not in state:
                visit(other)
        path.pop()
        state[name] = "done"

    for name in sorted(graph):
        if name not in state:
            visit(name)
    return found


def test_every_wing_has_its_place():
    new = {name.split(".")[0] for name in files()} - set().union(*WINGS)
    assert not new, f"new wings {sorted(new)}: add them to WINGS in this test and to CONTRIBUTING.md, where they belong"


@pytest.mark.parametrize("name", files())
def test_imports_run_one_way(name):
    source = files()[name].read_text(encoding="utf-8")
    assert backward_imports(name.split(".")[0], source, files()) == []


def test_imports_that_run_backwards_are_found():
    source = """
import torch, newllm_lib.runs.api
from newllm_lib import cli
from newllm_lib.config import presets
from newllm_lib.evaluation import Metrics
from newllm_lib.reporting.progress import Progress
class NewLLM:
    def fit(self):
        from newllm_lib.training.trainer import Trainer
"""
    assert backward_imports("model", source, files()) == ["cli", "evaluation", "runs.api", "training.trainer"]
    assert backward_imports("cli", source, files()) == []
    assert backward_imports("reporting", "from newllm_lib.data import corpus", files()) == ["data.corpus"]


def test_no_file_imports_itself_through_others():
    names = files()
    graph = {name: imports(path.read_text(encoding="utf-8"), names) - {name} for name, path in names.items()}
    edges = {(name, other) for name in graph for other in graph[name]}
    assert edges >= LOCAL_IMPORTS_IN_CIRCLES
    for name, other in LOCAL_IMPORTS_IN_CIRCLES:
        graph[name].discard(other)
    assert circles(graph) == []


def test_a_circle_of_files_is_found(tmp_path):
    sources = {
        "a.py": "from newllm_lib.b import c",
        "b/__init__.py": "",
        "b/c.py": "def f():\n    from newllm_lib import d",
        "d.py": "import newllm_lib.a",
        "e.py": "from newllm_lib.b.c import f",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    names = files(tmp_path)
    graph = {name: imports(path.read_text(), names) for name, path in names.items()}
    assert circles(graph) == [["a", "b.c", "d"]]
    assert circles(graph | {"d": set()}) == []


def test_wings_without_torch():
    """What a run is, its text and what is told of it can be read where torch is not installed."""
    light = [name for name in files() if name.split(".")[0] in ("escaping", "errors", "config", "data", "reporting")]
    names = [*light, "system.files", "system.console"]
    script = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module('newllm_lib.' + name)"
    done = run_with(sys.executable, script + "\nprint('torch' in sys.modules)", *names)
    assert len(light) > 20
    assert done.strip() == "False"


# --- what an import costs ---------------------------------------------------------------------------------------


def test_importing_the_package_is_cheap():
    script = "import json, sys, newllm_lib; print(json.dumps(sorted(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    loaded = set(json.loads(printed))
    assert HEAVY & loaded == set()
    assert {name for name in loaded if name.startswith("newllm_lib")} == {"newllm_lib"}


def test_every_public_name_resolves():
    assert len(newllm_lib.__all__) == len(set(newllm_lib.__all__)) > 10
    assert set(newllm_lib.__all__) <= set(dir(newllm_lib))
    for name in newllm_lib.__all__:
        assert getattr(newllm_lib, name) is not None
    with pytest.raises(AttributeError, match="module 'newllm_lib' has no attribute 'nothing'"):
        _ = newllm_lib.nothing


def test_no_module_hides_a_public_name():
    """Importing newllm_lib.x sets the attribute x of newllm_lib, whatever it was before."""
    here = {name for name in files() if "." not in name}
    assert here & set(newllm_lib._HOMES) == set()
    script = """
import importlib, pkgutil, newllm_lib
for module in pkgutil.walk_packages(newllm_lib.__path__, "newllm_lib."):
    if module.name != "newllm_lib.__main__":
        importlib.import_module(module.name)
for name, home in newllm_lib._HOMES.items():
    assert getattr(newllm_lib, name) is getattr(importlib.import_module(f"newllm_lib.{home}"), name), name
for name, home in newllm_lib._MODULES.items():
    assert getattr(newllm_lib, name) is importlib.import_module(f"newllm_lib.{home}"), name
"""
    run_with(sys.executable, script)


def test_names_that_users_have_imported_stay():
    """Modules move; these spellings are in notebooks and scripts."""
    script = """
import newllm_lib as nl
from newllm_lib.config import DataConfig, ModelConfig, RunConfig, TrainConfig, flat_fields
from newllm_lib.runs import Run, load_model, plan, train
assert nl.presets.get("quickstart") == nl.presets.quickstart()
assert nl.published.RUNS and nl.schedule.peak_rate and nl.config.RunConfig is RunConfig
assert nl.hardware.detect("cpu").device == "cpu"
assert callable(nl.checkpoint.load_checkpoint) and callable(nl.checkpoint.load_exported)
assert callable(nl.report.read_record) and callable(nl.report.write_report)
assert callable(nl.probe.probe) and callable(nl.probe.probe_lines) and nl.probe.find_batch is nl.find_batch
assert nl.runs.train is nl.train
"""
    run_with(sys.executable, script)


def test_modules_that_are_run_exist():
    commands = [
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r'"-m", "(newllm_lib[\w.]*)"', path.read_text(encoding="utf-8"))
    ]
    assert len(commands) >= 2
    for name in commands:  # looked up here: another copy of the library may be installed
        source = files()[name.removeprefix("newllm_lib.")].read_text(encoding="utf-8")
        assert '__name__ == "__main__"' in source


def test_every_module_imports():
    names = [module.name for module in pkgutil.walk_packages(newllm_lib.__path__, "newllm_lib.")]
    assert len(names) >= len(files())
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
    assert len(paths) > len(files())
    contents = {path: path.read_bytes() for path in paths}
    found = [str(path) for path, raw in contents.items() if b"\0" not in raw and any(place in raw for place in places)]
    assert found == []


# --- the newest Python ------------------------------------------------------------------------------------------

TORCH_FREE = [
    "escaping",
    "errors",
    "config",
    "config.parsing",
    "config.presets",
    "system.files",
    "data.corpus",
    "data.tokenizer",
]
NUMPY_ONLY = ["data.sequences", "data.dataset"]


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


def test_modules_without_torch_import_under_python_3_13(python_3_13):
    has_numpy = subprocess.run([python_3_13, "-c", "import numpy"], capture_output=True, check=False).returncode == 0
    names = TORCH_FREE + (NUMPY_ONLY if has_numpy else [])
    script = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module('newllm_lib.' + name)"
    script += "\nprint('torch' in sys.modules)"
    assert run_with(python_3_13, script, *names).strip() == "False"


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
