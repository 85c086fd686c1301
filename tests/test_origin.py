"""Where a notebook came from: what Colab's own server says of it, the stamp of a release, and the badges."""

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CELL = (NOTEBOOKS / "setup_cell.py").read_text("utf-8")
ADDRESS = "git+https://github.com/someone/new-llm@v0.2"
KERNEL = "1d9f-kernel"


def opened_from():
    """The set-up cell's function of that name, with PROJECT and the imports, alone."""
    wanted = [
        node
        for node in ast.parse(CELL).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.FunctionDef) and node.name == "opened_from")
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROJECT")
    ]
    names = {}
    exec(compile(ast.Module(wanted, []), "setup_cell.py", "exec"), names)
    return names["opened_from"]


@contextlib.contextmanager
def server(monkeypatch, answer):
    """A stand-in for the kernel's own server; `answer` is bytes, or a function of the request's handler."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if callable(answer):
                answer(self)
                return
            self.send_response(200 if self.path == "/api/sessions" else 404)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.daemon_threads = True
    threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("COLAB_JUPYTER_IP", "127.0.0.1")
    monkeypatch.setenv("KMP_TARGET_PORT", str(served.server_port))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which the kernel's own server is not behind
    monkeypatch.setattr("ipykernel.get_connection_file", lambda: f"/tmp/runtime/kernel-{KERNEL}.json")
    try:
        yield
    finally:
        served.shutdown()
        served.server_close()


def sessions(path, kernel=KERNEL):
    """What the server answers where another kernel runs too."""
    other = {
        "path": "fileId=" + quote("https://github.com/x/y/blob/z/notebooks/00_quickstart.ipynb", ""),
        "kernel": {"id": "0"},
    }
    return json.dumps([other, {"path": path, "kernel": {"id": kernel}}]).encode()


def from_github(address):
    return sessions("fileId=" + quote(address, safe=""))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://github.com/o/r/blob/main/notebooks/01_train_wikitext2.ipynb", "git+https://github.com/o/r@main"),
        ("https://github.com/a-b/new.llm_2/blob/v1.0/notebooks/06_compare_runs.ipynb", "git+https://github.com/a-b/new.llm_2@v1.0"),
        ("https://github.com/o/r/blob/fix/the-bug/notebooks/00_quickstart.ipynb", "git+https://github.com/o/r@fix/the-bug"),
        ("https://github.com/o/r/blob/a/notebooks/b/notebooks/00_quickstart.ipynb", "git+https://github.com/o/r@a/notebooks/b"),
    ],
)  # fmt: skip
def test_a_notebook_opened_from_github_is_installed_from_there(address, expected, monkeypatch):
    with server(monkeypatch, from_github(address)):
        assert opened_from()() == expected


@pytest.mark.parametrize(
    "address",
    [
        "http://github.com/o/r/blob/main/notebooks/00_quickstart.ipynb",
        "https://github.com.evil.example/o/r/blob/main/notebooks/00_quickstart.ipynb",
        "https://user@github.com/o/r/blob/main/notebooks/00_quickstart.ipynb",
        "https://gist.github.com/o/r/blob/main/notebooks/00_quickstart.ipynb",
        "https://github.com/o/r/blob/main/notebooks/99_other.ipynb",
        "https://github.com/o/r/blob/main/elsewhere/00_quickstart.ipynb",
        "https://github.com/o/r/blob/main/notebooks/00_quickstart.ipynb#x",
        "https://github.com/o/r/blob/main/notebooks/00_quickstart.ipynb\n",
        "https://github.com/o/r/tree/main/notebooks/00_quickstart.ipynb",
        "https://github.com/o/r/blob/--upload-pack=x/notebooks/00_quickstart.ipynb",
        "https://github.com/o/r/blob/a b/notebooks/00_quickstart.ipynb",
        "https://github.com/o/r/blob/a@b/notebooks/00_quickstart.ipynb",
        "https://github.com/o/r/blob/a/../b/notebooks/00_quickstart.ipynb",
        "https://github.com/o/../blob/main/notebooks/00_quickstart.ipynb",
        "https://github.com/-o/r/blob/main/notebooks/00_quickstart.ipynb",
        "https://github.com/ö/r/blob/main/notebooks/00_quickstart.ipynb",
        "https://github.com/o/r/blob//notebooks/00_quickstart.ipynb",
        "1AbCdEfGhIjKlMnOp",  # a Drive copy
        "",
    ],
)
def test_any_other_place_is_not_an_origin(address, monkeypatch):
    with server(monkeypatch, from_github(address)):
        assert opened_from()() == ""


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"not JSON",
        b"\xff\xfe",
        b"{}",
        b"null",
        b"[1, 2]",
        b'[{"path": null, "kernel": {"id": "1d9f-kernel"}}]',
        b'[{"path": ["a"], "kernel": {"id": "1d9f-kernel"}}]',
        b'[{"kernel": {"id": "1d9f-kernel"}}]',
        b'[{"path": "fileId=x"}]',
        sessions("fileId=https%3A%2F%2Fgithub.com%2Fo%2Fr%2Fblob%2Fm%2Fnotebooks%2F00_quickstart.ipynb", kernel="2"),
        b"[" * (1 << 21),
    ],
)
def test_a_malformed_answer_is_no_origin(answer, monkeypatch):
    with server(monkeypatch, answer):
        assert opened_from()() == ""


@pytest.mark.parametrize("reference", ["a//b", "a/./b", "a/.b", "a/../b", "x" * 200_000])
def test_an_odd_reference_is_refused_in_one_sentence(reference, monkeypatch, capsys):
    place = f"https://github.com/o/r/blob/{reference}/notebooks/00_quickstart.ipynb"
    with server(monkeypatch, from_github(place)):
        assert opened_from()() == ""
    assert capsys.readouterr().out == (
        f"The library is not installed from {place[:100]!r}, because that is no usable address of the project.\n"
    )


def test_a_redirect_is_not_followed(monkeypatch):
    asked = []

    def answer(handler):
        asked.append(handler.path)
        if handler.path != "/api/sessions":
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(from_github("https://github.com/o/r/blob/main/notebooks/00_quickstart.ipynb"))
            return
        handler.send_response(302)
        handler.send_header("Location", "/elsewhere")
        handler.end_headers()

    with server(monkeypatch, answer):
        assert opened_from()() == ""
    assert asked == ["/api/sessions"]


def test_refusals_and_no_server_are_no_origin(monkeypatch):
    with server(monkeypatch, lambda handler: handler.send_error(403)):
        assert opened_from()() == ""
    assert opened_from()() == ""  # the server is gone
    monkeypatch.delenv("COLAB_JUPYTER_IP")
    assert opened_from()() == ""


def test_an_answer_that_never_ends_is_not_waited_for(monkeypatch):
    """A byte now and then keeps every time limit of a single read satisfied."""
    done = threading.Event()

    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not done.wait(0.05):
                handler.wfile.write(b" ")

    with server(monkeypatch, drip):
        asking = threading.Thread(target=opened_from(), args=(0.5,), daemon=True)
        asking.start()
        asking.join(60)
        assert not asking.is_alive()
        done.set()


def test_the_cell_says_where_it_installs_from_before_pip_is_asked(tmp_path, monkeypatch):
    """The whole cell where there is nothing else, pip replaced by a printed line."""
    script = (
        "import importlib.util, os, subprocess, types\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'newllm_lib' else find(name, package)\n"
        "import ipykernel\n"
        f"ipykernel.get_connection_file = lambda: 'kernel-{KERNEL}.json'\n"
        "def run(command, **more):\n"
        "    print('PIP', command[-1], more['env']['GIT_TERMINAL_PROMPT'])\n"
        "    return types.SimpleNamespace(stdout='no network', returncode=1)\n"
        "subprocess.run = run\n"
        f"from pathlib import Path\nexec(Path({str(NOTEBOOKS / 'setup_cell.py')!r}).read_text('utf-8'))\n"
    )
    (tmp_path / "cell.py").write_text(script)
    with server(monkeypatch, from_github("https://github.com/o/r/blob/main/notebooks/01_train_wikitext2.ipynb")):
        done = subprocess.run(
            [sys.executable, "cell.py"], cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False
        )
    assert done.stdout.splitlines() == [
        "installing from git+https://github.com/o/r@main, where this notebook was opened",
        "PIP git+https://github.com/o/r@main 0",
    ]
    assert "ModuleNotFoundError: pip could not install git+https://github.com/o/r@main:\n  no network" in done.stderr


@pytest.mark.parametrize("outcome", ["mounted", "refused"])
def test_drive_is_mounted_before_a_wheel_is_looked_for_there(outcome, tmp_path):
    """The cell with another folder for Colab's, and a stand-in for its module."""
    drive = tmp_path / "drive"
    cell = CELL.replace("/content/drive", str(drive)).replace("LOOK_IN_DRIVE = False", "LOOK_IN_DRIVE = True")
    script = (
        "import importlib.util, os, subprocess, sys, types\n"
        "from pathlib import Path\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'newllm_lib' else find(name, package)\n"
        "def mount(place):\n"
        f"    if {outcome!r} == 'refused': raise ValueError('mount failed')\n"
        "    wheels = Path(place) / 'MyDrive' / 'newllm'\n"
        "    wheels.mkdir(parents=True)\n"
        "    (wheels / 'newllm_lib-0.1.0-py3-none-any.whl').touch()\n"
        "sys.modules['google'] = google = types.ModuleType('google')\n"
        "sys.modules['google.colab'] = google.colab = types.ModuleType('google.colab')\n"
        "google.colab.drive = types.SimpleNamespace(mount=mount)\n"
        "def run(command, **more):\n"
        "    print('PIP', command[-1])\n"
        "    return types.SimpleNamespace(stdout='', returncode=1)\n"
        "subprocess.run = run\n"
        f"exec({cell!r})\n"
    )
    (tmp_path / "cell.py").write_text(script)
    done = subprocess.run([sys.executable, "cell.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    if outcome == "mounted":
        assert done.stdout == f"PIP {drive}/MyDrive/newllm/newllm_lib-0.1.0-py3-none-any.whl\n"
    else:
        assert done.stdout == "Google Drive is not used, because it could not be mounted: ValueError: mount failed\n"
        assert "newllm_lib is not here. Do one of these" in done.stderr


@pytest.fixture
def project(tmp_path):
    """A copy of the notebooks and the README, and the function that runs its tidy.py."""
    for path in [*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("*.py"), NOTEBOOKS.parent / "README.md"]:
        place = tmp_path / path.relative_to(NOTEBOOKS.parent)
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(path.read_bytes())

    def tidy(*arguments):
        command = [sys.executable, tmp_path / "notebooks" / "tidy.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return tmp_path, tidy


def test_a_release_is_stamped_and_stays_so(project):
    folder, tidy = project
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert tidy("--source", ADDRESS).returncode == 0
    place = "github.com/someone/new-llm/blob/v0.2/notebooks"
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        (cell,) = [cell for cell in notebook.cells if cell.source.startswith("# @title Set-up")]
        assert f'\nSTAMP = "{ADDRESS}"\n' in cell.source
        first = notebook.cells[0].source.splitlines()[0]
        assert re.findall(r"\]\((https://[^\s)]+\.ipynb)\)", first) == [
            f"https://colab.research.google.com/github/someone/new-llm/blob/v0.2/notebooks/{path.name}",
            f"https://kaggle.com/kernels/welcome?src=https://{place}/{path.name}",
        ]
    assert f"{place}/01_train_wikitext2.ipynb" in (folder / "README.md").read_text("utf-8")
    assert (tidy("--check").stdout, tidy("--source", ADDRESS).stdout) == ("", "")  # nothing left to do
    assert tidy("--source", "").returncode == 0
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


@pytest.mark.parametrize(
    "address", ["https://github.com/o/r", "git+https://example.com/o/r@main", "git+https://github.com/o/r"]
)
def test_only_an_address_of_a_release_is_stamped(address, project):
    _, tidy = project
    done = tidy("--source", address)
    assert done.returncode == 2
    assert f"--source {address}: must be git+https://github.com/OWNER/REPOSITORY@TAG, or empty" in done.stderr


def test_the_projects_own_notebooks_have_no_link_that_leads_nowhere():
    for path in [*NOTEBOOKS.glob("*.ipynb"), NOTEBOOKS.parent / "README.md"]:
        text = path.read_text("utf-8")
        assert ("Open in Colab](" in text) == ('STAMP = \\"git' in text)


def test_every_notebook_is_an_origin_that_is_accepted():
    listed = re.search(r'r"\((00_.*?)\)\\\.ipynb"', CELL, re.DOTALL)[1]
    assert re.findall(r"\d\d_\w+", listed) == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
