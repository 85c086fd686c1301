"""How long a notebook takes from Run all to the end of its first training step, with and without what is cached.

    python tests/browser/first_step.py notebooks/01_train_wikitext2.ipynb --set DATA=FOLDER

Runs in the Jupyter that its Python has, from an empty folder, three times: with an empty cache of the library (texts
are tokenized, nothing is known of the machine), then twice with a filled one. The import of torch is a figure of its
own. Not a test: times belong to a machine.
"""

import argparse
import os
import re
import shutil
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

BEFORE = """
import time
started = time.perf_counter()
import torch
imported = time.perf_counter()
"""
AFTER_SET_UP = """
from newllm_lib.training import trainer

class FirstStepError(Exception):
    pass

def first_step(self, step=trainer.Trainer._step):
    step(self)
    ended = time.perf_counter()
    print(f"TIMES {imported - started} {ended - imported}")
    raise FirstStepError

trainer.Trainer._step = first_step
"""


def timed(path: Path, settings: dict[str, str], folder: Path) -> tuple[float, float]:
    """Seconds of the import of torch, and from there to the end of the first training step."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for name, value in settings.items():
            cell.source = re.sub(rf"^{name} = .*$", f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
    (set_up,) = [at for at, cell in enumerate(notebook.cells) if cell.source.startswith("# @title Set-up")]
    notebook.cells.insert(set_up + 1, nbformat.v4.new_code_cell(AFTER_SET_UP))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(BEFORE))
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}})
    try:
        client.execute()
    except CellExecutionError as error:
        if "FirstStepError" not in str(error):
            raise
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    found = re.search(r"TIMES (\S+) (\S+)", said)
    return float(found[1]), float(found[2])


def main() -> None:
    """Three runs, a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=TEXT", help="a text of the settings' cell")
    options = parser.parse_args()
    settings = dict(pair.split("=", 1) for pair in options.set)
    here = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), here]))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NEWLLM_CACHE"] = cache
        for kind in ("nothing cached", "cached", "cached"):
            folder = Path(tempfile.mkdtemp())
            try:
                torch, rest = timed(options.notebook, settings, folder)
            finally:
                shutil.rmtree(folder)
            print(f"{options.notebook.stem}, {kind}: {rest:.1f} s to the first step, and {torch:.1f} s for torch")


if __name__ == "__main__":
    main()
