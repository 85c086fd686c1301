"""The notebooks' set-up cell, run in environments that have the requirements, but not the library."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from environments import bare_python

pytestmark = pytest.mark.skipif("NEWLLM_JUPYTER" not in os.environ, reason="half a minute: make test-notebooks")

CELL = Path(__file__).resolve().parent.parent / "notebooks" / "setup_cell.py"

ALREADY = (
    "SOURCE is not used, because newllm_lib is installed already. To install it again: %pip uninstall -y newllm_lib, "
    "restart, run all cells.\n"
)


def run_cell(python, folder, **environment):
    """What the cell printed, as IPython shows it; `environment` is added to this one's."""
    script = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        f"done = InteractiveShell.instance().run_cell(open({str(CELL)!r}).read())\n"
        "raise SystemExit(not done.success)"
    )
    # only what the environment itself has: IPython would add that of VIRTUAL_ENV
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = own | {"IPYTHONDIR": str(Path(python).parent)} | environment
    command = [python, "-s", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory):
    """The library as a wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(repository),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("newllm_lib-*.whl"))


@pytest.fixture
def python(tmp_path):
    """The interpreter of a new environment with all packages of this one but the library."""
    (tmp_path / "empty").mkdir()
    return bare_python(tmp_path, sys.executable)


def versions(python):
    script = "import importlib.metadata as m\nprint(sorted({f'{d.name}=={d.version}' for d in m.distributions()}))"
    listed = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, check=True)
    return set(eval(listed.stdout))


def test_a_checkout_is_used_from_within_and_from_beside(repository, python, tmp_path):
    clone = tmp_path / "newllm_lib"  # as `git clone` leaves it in Colab's /content
    clone.mkdir()
    (clone / "newllm_lib").symlink_to(repository / "newllm_lib")
    for folder in (repository / "notebooks", repository, tmp_path):
        home = clone if folder == tmp_path else repository
        done = run_cell(python, folder, NEWLLM_SOURCE="/nowhere.whl")  # the checkout goes before
        assert done.returncode == 0, done.stdout
        assert done.stdout.splitlines()[0] == f"newllm_lib 0.1.0 from {home / 'newllm_lib'}"
        assert done.stdout.splitlines()[1].startswith("torch 2.")


@pytest.mark.parametrize("way", ["source", "beside"])
def test_a_wheel_is_installed_and_nothing_else_changes(wheel, python, tmp_path, way):
    folder, before = tmp_path / "empty", versions(python)
    if way == "beside":
        (folder / wheel.name).symlink_to(wheel)
        older = folder / "newllm_lib-0.9.0-py3-none-any.whl"
        older.write_bytes(b"not taken: the later version by its name, but the older file")
        os.utime(older, (0, 0))
    done = run_cell(python, folder, **({"NEWLLM_SOURCE": str(wheel)} if way == "source" else {}))
    assert done.returncode == 0, done.stdout + done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("newllm_lib 0.1.0 from ")
    assert "site-packages/newllm_lib" in first
    assert versions(python) - before == {"newllm_lib==0.1.0"}
    if way == "source":  # already there: pip is not even asked, which is said
        again = run_cell(python, folder, NEWLLM_SOURCE="/nowhere.whl")
        assert again.stdout == ALREADY + done.stdout
    else:  # nothing was asked for, so nothing is said; and metadata that are gone do not matter
        (Path(first.partition(" from ")[2]).parent / "newllm_lib-0.1.0.dist-info" / "METADATA").unlink()
        again = run_cell(python, folder)
        assert again.stdout == done.stdout


def test_a_source_that_wants_to_replace_something_is_refused(wheel, python, tmp_path):
    """The same wheel, but asking for a torch that is not the one installed."""
    greedy = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(greedy, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("METADATA"):
                content = content.replace(b"Requires-Dist: tqdm>=4.67", b"Requires-Dist: tqdm<4.60")
            target.writestr(name, content)
    before = versions(python)
    done = run_cell(python, tmp_path / "empty", NEWLLM_SOURCE=str(greedy))
    assert done.returncode == 1
    assert "pip could not install" in done.stdout
    assert "newllm-lib 0.1.0 depends on tqdm<4.60" in done.stdout
    assert versions(python) == before


def test_nothing_to_install_from_gives_one_red_message_with_the_remedies(python, tmp_path):
    done = run_cell(python, tmp_path / "empty", NEWLLM_SOURCE="")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout.startswith("\x1b[31mnewllm_lib is not here. Do one of these, then run all cells again:")
    for remedy in ("standalone", "NEWLLM_SOURCE", "newllm_lib-*.whl", "a clone of the project"):
        assert remedy in done.stdout


def test_an_address_that_does_not_work_is_told_with_pips_own_reason(python, tmp_path):
    done = run_cell(python, tmp_path / "empty", NEWLLM_SOURCE="missing-0.1-py3-none-any.whl")
    assert done.returncode == 1
    assert "pip could not install missing-0.1-py3-none-any.whl" in done.stdout
    assert done.stdout.count("Do one of these") == 1
