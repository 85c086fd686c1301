"""Two real Jupyter stacks with a real browser: their servers, and a notebook open in each.

`make test-notebooks` and `make test-browser` make the environments and name the `jupyter` of each in a variable.
What is missing skips these tests with a reason, or fails them where NEWLLM_REQUIRE_BROWSER is set. NEWLLM_SHOTS names a
folder for pictures.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import nbformat
import pytest

STACKS = {"own": "NEWLLM_JUPYTER", "classic": "NEWLLM_JUPYTER_COLAB", "lab": "NEWLLM_JUPYTER_LAB"}
"""What names each stack's `jupyter`; the first is the environment of the tests."""

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")

VIEWPORT = {"width": 1280, "height": 1600}


def missing(reason):
    """Skip, or fail where these tests are required."""
    if os.environ.get("NEWLLM_REQUIRE_BROWSER"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def stack_jupyter(stack):
    """The `jupyter` of a stack."""
    path = os.environ.get(STACKS[stack])
    if not path:
        missing(f"{STACKS[stack]} names no jupyter: make test-notebooks and make test-browser do")
    if not Path(path).is_file():
        missing(f"{STACKS[stack]}={path}: no such file")
    return Path(path)


def isolated(folder):
    """Variables under which Jupyter and its kernels see no settings and kernels of this machine's user."""
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "IPYTHONDIR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "NEWLLM_SOURCE"))}
    kept.pop("MPLBACKEND", None)  # the kernel has its own
    return kept | {place: str(folder / place.lower()) for place in places}


@pytest.fixture(scope="session")
def jupyter_of():
    """The function from a stack's name to its `jupyter`; it skips where there is none."""
    return stack_jupyter


@pytest.fixture
def jupyter_environment(tmp_path_factory):
    """For commands of a stack's `jupyter`: nothing of this user, notebooks at their smallest."""
    return isolated(tmp_path_factory.mktemp("jupyter")) | {"NEWLLM_SMOKE": "1"}


class Server:
    """A Jupyter server of a stack, and the folder that it serves."""

    def __init__(self, address, token, folder, log):
        self.address, self.token, self.folder, self.log = address, token, folder, log

    def ask(self, path, method="GET"):
        """The answer of its REST interface: parsed JSON, None where there is none."""
        request = Request(self.address + path, method=method, headers={"Authorization": f"token {self.token}"})
        with urlopen(request, timeout=20) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def wait(self, process):
        """Until it answers."""
        end = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < end:
            try:
                self.ask("/api/status")
                return
            except URLError:
                time.sleep(0.2)
        pytest.fail(f"the server does not answer:\n{self.log.read_text()}", pytrace=False)

    def stop_kernels(self):
        """End every notebook's kernel."""
        for session in self.ask("/api/sessions"):
            self.ask(f"/api/sessions/{session['id']}", "DELETE")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(stack, jupyter, folder):
    """A server of a stack over folder/served."""
    served, log, port, token = folder / "served", folder / "log.txt", free_port(), secrets.token_hex(8)
    served.mkdir()
    environment = isolated(folder) | {"JUPYTER_TOKEN": token, "NEWLLM_SMOKE": "1"}
    kind = "notebook" if stack == "classic" else "lab"
    command = [jupyter, kind, "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--notebook-dir={served}"]
    if stack == "classic":
        command += ["--NotebookApp.show_banner=False"]  # of the move to Notebook 7
    else:
        settings = Path(environment["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')  # else it asks
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=served, stdout=output, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}", token, served, log)
    try:
        server.wait(process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="class")
def server(request, tmp_path_factory):
    """A server of the stack that the class names."""
    stack = request.cls.stack
    with serving(stack, stack_jupyter(stack), tmp_path_factory.mktemp(stack)) as server:
        yield server


@pytest.fixture(scope="class")
def chromium(server):
    """A browser, once there is a server to look at."""
    found = os.environ.get("NEWLLM_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if not found:
        missing("no Chromium on PATH or in NEWLLM_CHROMIUM; on Debian: apt-get install chromium fonts-dejavu-core")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: make test-browser installs it")
    with sync_playwright() as playwright:
        # as root, and where /dev/shm is small, as in containers
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def folder(server, request):
    """An empty folder that the server serves: a notebook in it runs in it."""
    folder = server.folder / re.sub(r"\W+", "_", request.node.name)
    folder.mkdir()
    return folder


@pytest.fixture
def ui(request, server, chromium):
    """The stack's interface in a fresh page."""
    from interfaces import INTERFACES, SECONDS

    shots = os.environ.get("NEWLLM_SHOTS")
    if shots:
        Path(shots).mkdir(parents=True, exist_ok=True)
    page = chromium.new_page(viewport=VIEWPORT)
    page.set_default_timeout(1000 * SECONDS)
    yield INTERFACES[request.cls.stack](page, server, Path(shots) if shots else None)
    page.close()
    server.stop_kernels()


@pytest.fixture
def place(repository, folder):
    """A function that copies a notebook of the project into the test's folder, parts replaced: where to open it."""

    def copy(number, replaced=None):
        path = next((repository / "notebooks").glob(f"{number}_*.ipynb"))
        notebook = nbformat.read(path, as_version=4)
        for old, new in (replaced or {}).items():
            cells = [cell for cell in notebook.cells if old in cell.source]
            assert cells, f"{path.name} does not hold {old}"
            for cell in cells:
                cell.source = cell.source.replace(old, new)
        nbformat.write(notebook, folder / path.name)
        return f"{folder.name}/{path.name}"

    return copy


@pytest.fixture
def compose(folder):
    """A function that writes a notebook of code cells into the test's folder: where to open it."""

    def write(*sources):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, folder / "composed.ipynb")
        return f"{folder.name}/composed.ipynb"

    return write
