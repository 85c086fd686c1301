"""Notebooks that carry the library: how they are built, and one that runs where nothing else of the project is."""

import base64
import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import nbformat
import pytest
from environments import bare_python
from requirement_lists import frozen_versions, setup_argument

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
FIXTURES = Path(__file__).parent / "fixtures"

STACKS = {"own": "NEWLLM_JUPYTER", "classic": "NEWLLM_JUPYTER_COLAB"}

RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300).execute()
nbformat.write(notebook, "executed.ipynb")
"""
BENCH = """
import subprocess
command = [sys.executable, "-m", "newllm_lib", "bench", "--part", "fp32", "--rounds", "1", "--no-memory"]
done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.mkdtemp())
print("BENCH", done.returncode, done.stderr[-500:] if done.returncode else done.stdout)
"""


@pytest.fixture(scope="module")
def tidy():
    """The module notebooks/tidy.py."""
    spec = importlib.util.spec_from_file_location("tidy", NOTEBOOKS / "tidy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tidy, tmp_path_factory):
    """A folder with all standalone notebooks."""
    out = tmp_path_factory.mktemp("standalone")
    tidy.write_standalone(out)
    return out


def setup_of(path):
    """The set-up cell of a notebook."""
    (cell,) = [cell for cell in nbformat.read(path, as_version=4).cells if cell.source.startswith("# @title Set-up")]
    return cell


def packed_in(source):
    """The archive in a set-up cell, decoded by hand, and the sha256 that it states."""
    text = re.search(r'^ARCHIVE = """\n(.*?)\n"""$', source, re.MULTILINE | re.DOTALL)[1]
    return base64.b85decode(text.replace("\n", "")), re.search(r'^SHA256 = "(\w{64})"$', source, re.MULTILINE)[1]


def outcome(source, folder, before=""):
    """What a cell prints as IPython shows it, in a process of its own; `before` is run first in the same session."""
    script = (
        "import sys\nfrom IPython.core.interactiveshell import InteractiveShell\n"
        f"shell = InteractiveShell.instance()\n{before}\n"
        f"done = shell.run_cell({source!r})\nprint('succeeded:', done.success)\n"
        "shell.run_cell('print(run.history)')\nshell.run_cell('nl.train')\nshell.run_cell('1 / 0')\n"
    )
    environment = os.environ | {"IPYTHONDIR": str(folder)}
    environment.pop("PYTHONPATH", None)
    file = folder / "cell.py"  # too long for a command
    file.write_text(script, "utf-8")
    return subprocess.run(
        [sys.executable, file], cwd=folder, env=environment, capture_output=True, text=True, check=False
    ).stdout


def with_version(name, version):
    """Lines after which a package says that it has this version."""
    return (
        "import importlib.metadata as metadata\n"
        f"metadata.version = lambda name, real=metadata.version: {version!r} if name == {name!r} else real(name)\n"
    )


def test_a_set_up_cell_is_folded_everywhere():
    for path in NOTEBOOKS.glob("*.ipynb"):
        metadata = setup_of(path).metadata
        assert metadata["cellView"] == "form"
        assert metadata["jupyter"] == {"source_hidden": True}


def test_the_set_up_cell_knows_what_setup_py_asks_for(repository):
    needs = re.search(r"^NEEDS = (\[.*?\])", (NOTEBOOKS / "setup_cell.py").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    asked = setup_argument((repository / "setup.py").read_text("utf-8"), "install_requires")
    assert re.findall(r'"(.+?)"', needs[1]) == asked


def test_the_archive_is_the_library_and_nothing_of_this_machine(built, repository):
    for path in sorted(built.glob("*.ipynb")):
        packed, stated = packed_in(setup_of(path).source)
        assert hashlib.sha256(packed).hexdigest() == stated
        assert path.stat().st_size < 500_000
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        entries = archive.getmembers()
        files = {entry.name: archive.extractfile(entry).read() for entry in entries}
    assert files == {
        path.relative_to(repository).as_posix(): path.read_bytes() for path in (repository / "newllm_lib").rglob("*.py")
    }
    assert {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.mode) for entry in entries} == {
        (0, 0, 0, "", "", 0o644)
    }


def test_the_same_sources_give_the_same_bytes(built, tmp_path):
    """Also in another process, whose hashes of strings are others."""
    command = [sys.executable, NOTEBOOKS / "tidy.py", "--standalone", tmp_path / "again"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    names = sorted(path.name for path in built.iterdir())
    assert len(names) == 7
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (built / name).read_bytes()


def test_a_library_that_has_grown_too_large_is_refused(tidy, monkeypatch):
    monkeypatch.setattr(tidy, "MAX_BYTES", 100_000)
    with pytest.raises(ValueError, match="must be at most 100,000"):
        tidy.standalone_cell(NOTEBOOKS.parent)


def test_a_character_that_is_none_of_base85_is_damage_too(built, tmp_path):
    source = setup_of(built / "00_quickstart.ipynb").source
    at = source.index('ARCHIVE = """') + 500
    said = outcome(f'{source[:at]}"{source[at + 1 :]}', tmp_path)
    assert "The library in this notebook is damaged: its sha256 is wrong. Download the notebook again." in said


def test_a_full_disk_is_named_with_the_remedy(built, tmp_path):
    before = (
        "import tarfile\n"
        "def full(self, *arguments, **more): raise OSError(28, 'No space left on device')\n"
        "tarfile.TarFile.extractall = full\n"
    )
    said = outcome(setup_of(built / "00_quickstart.ipynb").source, tmp_path, before)
    assert re.search(
        r"The library cannot be unpacked into /\S+: \[Errno 28\] No space left on device. Free some space",
        said,
    )
    assert "succeeded: False" in said
    assert "Traceback" not in said.partition("succeeded: False")[0]


def test_without_packaging_the_set_up_cell_takes_pips_copy_or_says_so(built, tmp_path):
    source = setup_of(built / "00_quickstart.ipynb").source
    absent = "sys.modules['packaging'] = sys.modules['packaging.requirements'] = None\n"
    assert "succeeded: True" in outcome(source, tmp_path, absent)
    said = outcome(source, tmp_path, absent + "sys.modules['pip'] = None\n")
    assert "The package 'packaging' is not here: run %pip install packaging, then run all cells again." in said
    assert "succeeded: False" in said


def test_a_library_imported_before_is_named_once_it_wins(built, tmp_path, repository):
    source = setup_of(built / "00_quickstart.ipynb").source
    said = outcome(source, tmp_path, f"sys.path.insert(0, {str(repository)!r})\nimport newllm_lib")
    sentence = "The library in this notebook is not used, because newllm_lib was imported already, from "
    assert f"{sentence}{repository / 'newllm_lib'}: restart the kernel" in said
    again = outcome(source, tmp_path, f"shell.run_cell({source!r})")
    assert "succeeded: True" in again
    assert sentence not in again  # the cell run twice uses its own


def test_a_forked_process_that_ends_leaves_the_library_to_the_others(built, tmp_path):
    (tmp_path / "cell.py").write_text(setup_of(built / "00_quickstart.ipynb").source)
    script = (
        "import os, sys\nexec(open('cell.py').read())\n"
        "child = os.fork()\nif not child:\n    sys.exit(0)\nos.waitpid(child, 0)\n"
        "print('left:', Path(carried).is_dir())\n"
        "shutil.rmtree(carried)\nexec(open('cell.py').read())\nimport newllm_lib.runs.launch\nprint('unpacked again')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "left: True\n" in done.stdout
    assert done.stdout.endswith("unpacked again\n")


def test_a_damaged_file_says_so_and_the_cells_below_stay_calm(built, tmp_path):
    source = setup_of(built / "00_quickstart.ipynb").source
    said = outcome(re.sub(r'SHA256 = "\w', 'SHA256 = "x', source), tmp_path)
    assert "The library in this notebook is damaged: its sha256 is wrong. Download the notebook again." in said
    assert "succeeded: False" in said
    later, _, bug = said.partition("succeeded: False\n")[2].partition("\x1b[31m---")
    assert (
        later == 2 * "\x1b[31mnewllm_lib is not here: run the set-up cell at the top of this notebook first.\x1b[0m\n"
    )
    assert "ZeroDivisionError" in bug  # any other error is shown whole


@pytest.mark.parametrize("kind", ["2026_01", "tpu"])
@pytest.mark.parametrize("which", ["own", "standalone"])
def test_an_older_runtime_of_colab_is_named_before_anything_is_installed(kind, which, built, tmp_path):
    old = frozen_versions((FIXTURES / f"colab_{kind}_versions.txt").read_text("utf-8"))
    source = setup_of((NOTEBOOKS if which == "own" else built) / "00_quickstart.ipynb").source
    before = "sys.modules['google'] = sys.modules['google.colab'] = type(sys)('colab')\n"
    before += "import subprocess\nsubprocess.run = None\n"
    before += "".join(with_version(name.replace("-", "_"), str(version)) for name, version in old.items())
    said = outcome(source, tmp_path, before)
    assert "newllm_lib cannot run in this runtime, because it needs torch>=2.10 (2.9" in said
    assert "choose the latest runtime version in Runtime > Change runtime type" in said
    assert ("huggingface_hub>=1.0 (0.36.0 is here)" in said) == (kind == "2026_01")
    assert "succeeded: False" in said and "NameError" not in said


def test_what_is_absent_stops_only_a_notebook_that_installs_nothing(built, tmp_path):
    before = (
        "import importlib.metadata as metadata\n"
        "def version(name, real=metadata.version):\n"
        "    if name == 'gdown': raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.version = version\n"
    )
    said = outcome(setup_of(built / "00_quickstart.ipynb").source, tmp_path, before)
    assert "because it needs gdown>=5.2 (it is not here): install 'gdown>=5.2' with pip, then restart." in said
    said = outcome(
        setup_of(NOTEBOOKS / "00_quickstart.ipynb").source,
        tmp_path,
        f"import os; os.chdir({str(NOTEBOOKS)!r})\n{before}",
    )
    assert "succeeded: True" in said
    assert "NameError" in said  # of `run`: with the library there, a missing name is a bug like any other


@pytest.mark.skipif("NEWLLM_JUPYTER" not in os.environ, reason="a minute: make test-notebooks")
@pytest.mark.parametrize(
    ("name", "stack"), [("00_quickstart", "own"), ("00_quickstart", "classic"), ("01_train_wikitext2", "classic")]
)
def test_a_folder_with_only_this_file_trains(name, stack, built, tmp_path):
    """With Colab's versions too (torch and Python are this machine's), without the library and without a network."""
    path = tmp_path / f"{name}.ipynb"
    notebook = nbformat.read(built / path.name, as_version=4)
    if (name, stack) == ("00_quickstart", "classic"):
        notebook.cells.append(nbformat.v4.new_code_cell(BENCH))
    nbformat.write(notebook, path)
    python = bare_python(tmp_path, Path(os.environ[STACKS[stack]]).with_name("python"))
    without = [python, "-c", "import importlib.util as u; print(u.find_spec('newllm_lib'))"]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"NEWLLM_SMOKE": "1", "HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    environment |= {"HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    asked = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    assert subprocess.run(without, check=True, **asked).stdout == "None\n"
    done = subprocess.run([python, "-c", RUN, path.name], check=False, **asked)
    assert done.returncode == 0, done.stderr
    executed = nbformat.read(tmp_path / "executed.ipynb", as_version=4)
    said = "".join(output.get("text", "") for cell in executed.cells for output in cell.get("outputs", []))
    assert re.search(r"^newllm_lib 0\.1\.0 from /.*/newllm_lib-\w+/newllm_lib$", said, re.MULTILINE)
    carried = Path(re.search(r"^newllm_lib 0\.1\.0 from (/.*)/newllm_lib$", said, re.MULTILINE)[1])
    assert not carried.exists()  # gone with the kernel
    record = next((tmp_path / "results").glob("*/run.json")).read_text("utf-8")
    assert '"status": "finished"' in record
    assert '"newllm_lib": "0.1.0"' in record
    if (name, stack) == ("00_quickstart", "classic"):
        assert "BENCH 0" in said
