"""Gives every notebook beside it the one set-up cell of setup_cell.py, tags the cell with the settings, which is the
first one after it, and strips outputs and widget state.

`python notebooks/tidy.py` writes what has to change and names it; with `--check` it changes nothing, and its exit
status is the number of notebooks that are not tidy.
"""

import sys
from pathlib import Path

import nbformat
from nbstripout import strip_output

FOLDER = Path(__file__).resolve().parent
MARK = "# @title Set-up"
PARAMETERS = "parameters"
"""The tag of the cell with the settings, which papermill replaces."""


def tidy(text: str, setup_cell: str) -> str:
    """A notebook's JSON as it should lie in the project; ValueError where it has no or several set-up cells."""
    notebook = nbformat.reads(text, as_version=4)
    setups = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(MARK)]
    if len(setups) != 1:
        raise ValueError(f"has {len(setups)} cells that begin with {MARK!r}: must be one")
    setups[0].source = setup_cell.rstrip("\n")
    settings = [cell for cell in notebook.cells if cell.cell_type == "code" and cell is not setups[0]][:1]
    for cell in notebook.cells:
        tags = [tag for tag in cell.metadata.pop("tags", []) if tag != PARAMETERS]
        tags += [PARAMETERS] if cell in settings else []
        cell.metadata.update({"tags": tags} if tags else {})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"  # the same in every checkout, whoever saved it
    stripped = strip_output(
        notebook, keep_output=False, keep_count=False, keep_id=True, extra_keys=["metadata.widgets"]
    )
    return nbformat.writes(stripped) + "\n"


def main() -> int:
    """Tidy every notebook; the number of those that were not tidy, with --check, else 0."""
    check, untidy = "--check" in sys.argv[1:], 0
    setup_cell = (FOLDER / "setup_cell.py").read_text(encoding="utf-8")
    for path in sorted(FOLDER.glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        wanted = tidy(text, setup_cell)
        if text == wanted:
            continue
        untidy += 1
        print(f"{path.name}: {'is not tidy' if check else 'tidied'}")
        if not check:
            path.write_text(wanted, encoding="utf-8")
    return untidy if check else 0


if __name__ == "__main__":
    sys.exit(main())
