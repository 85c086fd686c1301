"""JupyterLab and classic Notebook as a user drives them, with one set of verbs: menus, cells and what they show."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
from playwright.sync_api import Locator, expect

SECONDS = 240
"""How long anything may take, on a machine that does other things too."""

expect.set_options(timeout=1000 * SECONDS)


class Interface:
    """One notebook, open in one page. What differs between the two stands in their classes."""

    name: str
    folds: bool
    """Whether a cell whose source is to be hidden is shown as one line, without an editor."""
    cells: str
    """CSS of the code cells that are not folded; below, of what belongs to them."""
    editor: str
    outputs: str
    number: str
    complaints: str
    """Tracebacks, and what went to standard error."""
    questions: str
    """Whatever waits for an answer."""
    dead_widgets: str
    """How the text begins that stands in the place of widgets whose kernel is gone."""

    def __init__(self, page, server, shots):
        self.page, self.server, self._shots = page, server, shots
        self.path: Path | None = None
        """The open notebook on disk."""

    def open(self, path: str) -> None:
        """Open a notebook, `path` from the server's folder, until its kernel and its widgets are ready."""
        raise NotImplementedError

    def _await_cells(self, path: str) -> None:
        """Until every code cell is on the page: those out of view are laid out late, and push others away."""
        self.path = self.server.folder / path
        cells = nbformat.read(self.path, as_version=4).cells
        hidden = [self.folds and cell.metadata.get("jupyter", {}).get("source_hidden", False) for cell in cells]
        count = sum(cell.cell_type == "code" and not folded for cell, folded in zip(cells, hidden, strict=True))
        expect(self.page.locator(f"{self.cells} {self.editor}")).to_have_count(count)

    def start_all(self) -> None:
        """Run all cells, by the menu, until the first one runs."""
        raise NotImplementedError

    def interrupt(self) -> None:
        """Interrupt the kernel, by the menu."""
        raise NotImplementedError

    def save(self, holds: str) -> None:
        """Save the notebook, by the keyboard, until the file on disk holds a text."""

        def saved() -> bool:
            self.page.keyboard.press("Control+s")
            self.page.wait_for_timeout(500)
            return holds in self.path.read_text(encoding="utf-8")

        self.until(saved, f"the saved notebook holds {holds}")

    def darken(self) -> None:
        """Make the page dark."""
        raise NotImplementedError

    def start(self, cell: Locator) -> None:
        """Run one cell, by the keyboard, until it runs."""
        cell.locator(self.editor).click()
        self._begin(lambda: self.page.keyboard.press("Control+Enter"))

    def _begin(self, action: Callable[[], None]) -> None:
        """Do what makes cells run, until their numbers show it."""
        before = self._numbers()
        action()
        self.until(lambda: self._numbers() != before, "a cell begins to run")

    def cell(self, source: str) -> Locator:
        """The code cell whose source holds a text."""
        found = self.page.locator(self.cells).filter(has=self.page.locator(self.editor, has_text=source))
        expect(found).to_have_count(1)
        return found

    def output(self, source: str) -> Locator:
        """All that the cell whose source holds a text shows."""
        return self.cell(source).locator(self.outputs)

    def panel(self) -> Locator:
        """The panel of settings that is shown."""
        return self.page.locator(".newllm-panel")

    def hide_files(self) -> None:
        """Give the notebook the whole width."""

    def setting(self, name: str) -> Locator:
        """The row of the panel whose label is, or begins with, a field's name."""
        label = self.page.locator(".widget-label", has_text=re.compile(rf"^{name}\b"))
        return self.page.locator(".widget-hbox").filter(has=label)

    def drag(self, row: Locator, pixels: int) -> None:
        """Pull a row's slider with the mouse, again where it was missed: a page that is laid out late moves it away."""
        handle = row.locator(".noUi-handle, .ui-slider-handle")
        start = self._place_in(row, handle)

        def pulled() -> bool:
            handle.hover()  # once it keeps still, in view and under nothing else
            box = handle.bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            self.page.mouse.down()
            self.page.mouse.move(x + pixels, y, steps=10)
            self.page.mouse.up()
            return self._place_in(row, handle) != start

        self.until(pulled, "the slider follows the mouse")

    @staticmethod
    def _place_in(row: Locator, part: Locator) -> float:
        """How far to the right in its row something is, in pixels: the same wherever the page has scrolled to."""
        return round(part.bounding_box()["x"] - row.bounding_box()["x"])

    def until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait; nothing may ask anything meanwhile."""
        end = time.monotonic() + SECONDS
        while not happened():
            assert time.monotonic() < end, f"waited {SECONDS} s in vain: {what}"
            self._not_asked()
            self.page.wait_for_timeout(100)
        self._not_asked()

    def wait(self) -> None:
        """Until no cell runs or waits for its turn."""
        self.until(lambda: not any("*" in number for number in self._numbers()), "all cells have run")

    def _not_asked(self) -> None:
        """AssertionError where a dialog or a prompt waits for an answer."""
        asked = [found.inner_text() for found in self.page.locator(self.questions).all() if found.is_visible()]
        assert not asked, f"the notebook asks: {asked}"

    def complained(self) -> list[str]:
        """Tracebacks and warnings that cells show; how the sources of those begin that never ran."""
        never = [cell for cell in self.page.locator(self.cells).all() if not re.search(r"\d", self._number_of(cell))]
        return self.page.locator(self.complaints).all_text_contents() + [
            "never ran: " + cell.locator(self.editor).text_content()[:60] for cell in never
        ]

    def _number_of(self, cell: Locator) -> str:
        return cell.locator(self.number).text_content()

    def _numbers(self) -> list[str]:
        """The number of each code cell, `*` where it runs or waits."""
        return self.page.locator(f"{self.cells} {self.number}").all_text_contents()  # also of those out of view

    def shot(self, name: str, of: Locator | None = None) -> None:
        """A picture of the page, or of a part of it, for people to look at."""
        if of is not None:
            of.scroll_into_view_if_needed()
        if self._shots:
            (of or self.page).screenshot(path=self._shots / f"{self.name}_{name}.png")

    def keep(self, name: str, text: str) -> None:
        """A text beside the pictures, for people to read."""
        if self._shots:
            (self._shots / f"{self.name}_{name}.txt").write_text(text, encoding="utf-8")


class Lab(Interface):
    """JupyterLab 4."""

    name = "lab"
    folds = True
    cells = ".jp-NotebookPanel .jp-CodeCell:not(:has(.jp-InputPlaceholder))"
    editor = ".jp-InputArea-editor .cm-content"
    outputs = ".jp-OutputArea-output"
    number = ".jp-InputPrompt"
    complaints = '.jp-NotebookPanel [data-mime-type="application/vnd.jupyter.stderr"]'  # tracebacks too
    questions = ".jp-Dialog-content, .jp-Stdin"
    dead_widgets = "model not found"

    def open(self, path: str) -> None:
        """See Interface."""
        self.page.goto(f"{self.server.address}/lab/tree/{path}?token={self.server.token}&reset")
        self._await_cells(path)
        status = self.page.locator(".jp-StatusBar-TextItem", has_text=re.compile(r"\| Idle$"))
        expect(status).to_be_visible()

    def _menu(self, menu: str, entry: str) -> None:
        self.page.locator(".lm-MenuBar").get_by_text(menu, exact=True).click()
        self.page.locator(".lm-Menu").get_by_text(entry, exact=True).click()

    def start_all(self) -> None:
        """See Interface."""
        self._begin(lambda: self._menu("Run", "Run All Cells"))

    def interrupt(self) -> None:
        """See Interface."""
        self._menu("Kernel", "Interrupt Kernel")

    def hide_files(self) -> None:
        """See Interface."""
        self.page.locator(".jp-SideBar [data-id=filebrowser]").click()
        expect(self.page.locator("#jp-left-stack")).to_be_hidden()

    def darken(self) -> None:
        """See Interface."""
        self.page.locator(".lm-MenuBar").get_by_text("Settings", exact=True).click()
        self.page.locator(".lm-Menu").get_by_text("Theme", exact=True).hover()
        self.page.locator(".lm-Menu").get_by_text("JupyterLab Dark", exact=True).click()
        expect(self.page.locator("body[data-jp-theme-light=false]")).to_have_count(1)


class Classic(Interface):
    """Notebook 6, the interface that Colab's versions belong to."""

    name = "classic"
    folds = False
    cells = "#notebook .code_cell"
    editor = ".input_area .CodeMirror-code"
    outputs = ".output_area"
    number = ".input_prompt"
    complaints = ".output_error, .output_stderr"
    questions = ".modal-dialog, .raw_input_container"
    dead_widgets = "A Jupyter widget could not be displayed"

    def open(self, path: str) -> None:
        """See Interface."""
        self.page.goto(f"{self.server.address}/notebooks/{path}?token={self.server.token}")
        self.page.wait_for_function(
            """() => { const kernel = window.Jupyter?.notebook?.kernel;
                       return kernel?.is_connected() && kernel.widget_manager; }""",
            timeout=1000 * SECONDS,
        )
        self._await_cells(path)

    def _menu(self, menu: str, entry: str) -> None:
        self.page.locator("#menubar").get_by_text(menu, exact=True).click()
        self.page.locator("#menubar .open").get_by_text(entry, exact=True).click()

    def start_all(self) -> None:
        """See Interface."""
        self._begin(lambda: self._menu("Cell", "Run All"))

    def interrupt(self) -> None:
        """See Interface."""
        self._menu("Kernel", "Interrupt")

    def darken(self) -> None:
        """It has no dark theme; users bring style sheets such as this one."""
        dark = "background: #111 !important; color: #ddd !important"
        self.page.add_style_tag(
            content=f"body, #site, #notebook-container, .output_area, .rendered_html, .widget-label {{ {dark} }}"
        )


INTERFACES = {"lab": Lab, "classic": Classic}
