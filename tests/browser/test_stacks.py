"""The two environments are what they say: Colab's versions, and none but pinned ones."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).parent

COLAB = {
    "datasets": "4.0.0", "gdown": "5.2.2", "huggingface-hub": "1.27.0", "ipykernel": "6.17.1", "ipython": "7.34.0",
    "ipywidgets": "7.7.1", "jupyter-client": "7.4.9", "matplotlib": "3.10.0", "nbclient": "0.10.4",
    "notebook": "6.5.7", "numpy": "2.1.3", "pandas": "2.2.3", "pyzmq": "26.2.1", "safetensors": "0.8.0",
    "sentencepiece": "0.2.2", "tornado": "6.5.7", "tqdm": "4.67.3", "traitlets": "5.7.1",
    "widgetsnbextension": "3.6.10",
}  # fmt: skip
"""Of Colab's GPU runtime, August 2026."""


def pins(path):
    """Canonical name -> version of the `name==version` lines of a file."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, version in pairs}


def installed(jupyter):
    """Canonical name -> version of what an environment holds, local build labels left off."""
    command = [jupyter.with_name("python"), "-m", "pip", "--disable-pip-version-check", "list", "--format", "json"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {canonicalize_name(entry["name"]): entry["version"].partition("+")[0] for entry in listed}


def test_the_pins_are_colabs():
    pinned = pins(FOLDER / "colab.txt")
    assert pinned.items() >= COLAB.items()
    frozen = pins(FOLDER.parent / "fixtures" / "colab_versions.txt")
    assert {name: pinned[name] for name in frozen if name != "torch"} == {
        name: version for name, version in frozen.items() if name != "torch"
    }


@pytest.mark.parametrize("stack", ["classic", "lab"])
def test_a_stack_holds_what_is_pinned_and_nothing_else(stack, jupyter_of, repository):
    found = installed(jupyter_of(stack))
    assert found.pop("newllm-lib") == version("newllm_lib")
    del found["pip"]
    if stack == "classic":
        assert found == pins(FOLDER / "colab.txt")
    else:
        allowed = pins(repository / "constraints.txt") | pins(FOLDER / "jupyterlab.txt")
        assert found.items() <= allowed.items()
        assert (found["jupyterlab"][0], found["ipywidgets"][0]) == ("4", "8")


@pytest.mark.parametrize("stack", ["classic", "lab"])
def test_a_stack_lacks_no_requirement(stack, jupyter_of):
    command = [jupyter_of(stack).with_name("python"), "-m", "pip", "--disable-pip-version-check", "check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.stdout.strip() == "No broken requirements found."
