"""Gives every notebook beside it the one set-up cell of setup_cell.py, folded, tags the cell with the settings, which is
the first one after it, and strips outputs and widget state.

`python notebooks/tidy.py` writes what has to change and names it. `--source git+https://github.com/OWNER/REPOSITORY@TAG`
stamps the notebooks of a release: they install from there, and begin with "Open in Colab" and "Open in Kaggle"; the stamp
stays until another is given, and `--source ""` takes it away. With `--check` it changes nothing, and its exit
status is the number of notebooks that are not tidy. `--standalone FOLDER` writes copies there whose set-up cell carries
the library and needs no other file: the same sources give the same bytes.
"""

import argparse
import base64
import hashlib
import io
import re
import sys
import tarfile
from pathlib import Path

import nbformat
from nbstripout import strip_output

FOLDER = Path(__file__).resolve().parent
MARK = "# @title Set-up"
PARAMETERS = "parameters"
"""The tag of the cell with the settings, which papermill replaces."""
ADDRESS = re.compile(
    r"git\+https://github\.com/(\w[\w-]*)/(\w[\w.-]*)@(?!\S*(?:\.\.|//|/\.))(\w[\w./-]{0,199})", re.ASCII
)
"""What a release can be stamped with."""
MAIN = "01_train_wikitext2.ipynb"
"""The notebook that the README's badges open."""
GPU_LINE = 'os.environ["NEWLLM_NOTEBOOK_GPU"] ='
"""What the set-up cell hands on of the notebook's metadata, which a kernel cannot read."""
SOURCE_FIELDS = re.compile(r"^(SOURCE|LOOK_IN_DRIVE) = .*# @param.*\n", re.MULTILINE)
"""What a set-up cell that carries the library has no use for."""
MAX_BYTES = 500_000
"""Of a standalone notebook's archive as text: larger ones are slow to open in a browser."""


def badges(source: str, name: str) -> str:
    """A line of links that open the notebook `name` of a stamped address elsewhere, as Markdown; "" without a stamp."""
    if not source:
        return ""
    owner, repository, reference = ADDRESS.fullmatch(source).groups()
    place = f"github.com/{owner}/{repository}/blob/{reference}/notebooks/{name}"
    colab = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    kaggle = "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
    return (
        f"{colab}(https://colab.research.google.com/{place.replace('github.com', 'github', 1)}) "
        f"{kaggle}(https://kaggle.com/kernels/welcome?src=https://{place})\n\n"
    )


def stamp_readme(source: str) -> None:
    """Put the badges of the main notebook into the README, or take them away."""
    readme = FOLDER.parent / "README.md"
    line = f"<!-- badges -->{badges(source, MAIN).strip()}<!-- /badges -->"
    text = readme.read_text("utf-8")
    readme.write_text(re.sub(r"<!-- badges -->.*<!-- /badges -->", lambda _: line, text), "utf-8")


def stamped(source_text: str) -> str:
    """The address stamped into a set-up cell, "" where there is none."""
    found = re.search(r'^STAMP = "(.*)"$', source_text, re.MULTILINE)
    return found[1] if found else ""


def tidy(text: str, setup_cell: str, name: str, source: str | None = None) -> str:
    """A notebook's JSON as it should lie in the project; ValueError where it has no or several set-up cells.

    name: the file's; source: the address to stamp, "" for none, None to keep what is there.
    """
    notebook = nbformat.reads(text, as_version=4)
    setups = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith(MARK)]
    if len(setups) != 1:
        raise ValueError(f"has {len(setups)} cells that begin with {MARK!r}: must be one")
    source = stamped(setups[0].source) if source is None else source
    setups[0].source = setup_cell.rstrip("\n").replace('STAMP = ""', f'STAMP = "{source}"', 1)
    gpu = re.sub(r"\W", "", notebook.metadata.get("colab", {}).get("gpuType", ""))
    setups[0].source = setups[0].source.replace(f'{GPU_LINE} ""', f'{GPU_LINE} "{gpu}"', 1)
    title = notebook.cells[0]
    title.source = badges(source, name) + re.sub(r"\A\[!\[Open in .*\n\n", "", title.source)
    setups[0].metadata.update({"cellView": "form", "jupyter": {"source_hidden": True}})  # Colab; JupyterLab and others
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


def archive(project: Path) -> bytes:
    """The library's Python files as a tar in xz, without times, owners or anything else of this machine."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", format=tarfile.USTAR_FORMAT, preset=9) as tar:
        for path in sorted((project / "newllm_lib").rglob("*.py")):
            content = path.read_bytes()
            entry = tarfile.TarInfo(path.relative_to(project).as_posix())
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def standalone_cell(project: Path) -> str:
    """A set-up cell that carries the library; ValueError where that is more text than a notebook should hold."""
    packed = archive(project)
    encoded = base64.b85encode(packed).decode("ascii")
    if len(encoded) > MAX_BYTES:
        raise ValueError(f"the library takes {len(encoded):,} characters: must be at most {MAX_BYTES:,}")
    lines = "\n".join(encoded[at : at + 120] for at in range(0, len(encoded), 120))
    carried = (project / "notebooks" / "carried_cell.py").read_text("utf-8")
    carried = carried.replace('ARCHIVE = """\n', f'ARCHIVE = """\n{lines}\n', 1)
    carried = carried.replace('SHA256 = ""', f'SHA256 = "{hashlib.sha256(packed).hexdigest()}"', 1)
    text = SOURCE_FIELDS.sub("", (project / "notebooks" / "setup_cell.py").read_text("utf-8"))
    return re.sub(r"# <- where .*?# ->\n", lambda _: carried, text, count=1, flags=re.DOTALL)


def write_standalone(out: Path) -> None:
    """Copies of all notebooks that carry the library."""
    cell = standalone_cell(FOLDER.parent)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(FOLDER.glob("*.ipynb")):
        (out / path.name).write_text(tidy(path.read_text("utf-8"), cell, path.name), "utf-8")
        print(out / path.name)


def tidy_all(check: bool, source: str | None) -> int:
    """Tidy every notebook, or only name those that are not; how many were not. source: as of `tidy`."""
    cell, untidy = (FOLDER / "setup_cell.py").read_text("utf-8"), 0
    for path in sorted(FOLDER.glob("*.ipynb")):
        text = path.read_text("utf-8")
        wanted = tidy(text, cell, path.name, source)
        if text == wanted:
            continue
        untidy += 1
        print(f"{path.name}: {'is not tidy' if check else 'tidied'}")
        if not check:
            path.write_text(wanted, "utf-8")
    return untidy


def main() -> int:
    """What the command line asks for; with --check, the number of notebooks that are not tidy, else 0."""
    parser = argparse.ArgumentParser(description="Keep the notebooks tidy, or build ones that carry the library.")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--check", action="store_true", help="change nothing; exit with the number of untidy notebooks")
    task.add_argument("--standalone", type=Path, metavar="FOLDER", help="write notebooks there that need no other file")
    task.add_argument("--source", metavar="ADDRESS", help="stamp the notebooks: where a release is installed from")
    options = parser.parse_args()
    if options.source and not ADDRESS.fullmatch(options.source):
        parser.error(f"--source {options.source}: must be git+https://github.com/OWNER/REPOSITORY@TAG, or empty")
    if options.standalone:
        write_standalone(options.standalone)
        return 0
    if options.source is not None:
        stamp_readme(options.source)
    untidy = tidy_all(options.check, options.source)
    return untidy if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
