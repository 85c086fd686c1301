"""A hostile bundle through every cell of 02 and 06, in a real browser: nothing in it runs, links or is fetched."""

import json
import shutil

import pytest

pytest.importorskip("playwright", reason="playwright is not installed: make test-browser installs it")
from hostile import DATA_NAME, IMAGE, RUN_NAME, hostile_bundle

FOREIGN = """() => {
    const found = [];
    for (const output of document.querySelectorAll(".jp-OutputArea-output")) {
        // in plain text JupyterLab itself makes links of addresses
        const plain = /stdout$|^text.plain$/.test(output.dataset.mimeType ?? "");
        for (const element of output.querySelectorAll("*")) {
            const wrong = [...element.attributes].filter(({name, value}) =>
                name.startsWith("on") || name === "data-foreign" || /^\\s*javascript:/i.test(value)
                || (["src", "href"].includes(name) && value.includes("foreign.example") && !plain));
            if (wrong.length || ["SCRIPT", "IFRAME", "MJX-CONTAINER"].includes(element.tagName))
                found.push(element.outerHTML.slice(0, 120));
        }
    }
    return found;
}"""
"""Elements in the cells' outputs that act, lead elsewhere, or are formulas: our notebooks show none."""


class Watched:
    """What a page did that only a stranger's text could make it do."""

    def __init__(self, page, address):
        self.page, self.dialogs, self.requests = page, [], []
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self._keep(request.url, address))

    def _keep(self, url, address):
        if not url.startswith((address, address.replace("http", "ws"), "data:", "blob:")):
            self.requests.append(url)

    def seen(self):
        """In one value, so that a failure shows all of it; a second later, for a picture takes time to fail."""
        self.page.wait_for_timeout(1000)
        return {
            "ran": self.page.evaluate("() => window.__pwned ?? null"),
            "elements": self.page.evaluate(FOREIGN),
            "dialogs": self.dialogs,
            "requests": self.requests,
        }


NOTHING = {"ran": None, "elements": [], "dialogs": [], "requests": []}


class TestHostile:
    stack = "lab"

    @pytest.fixture
    def sent(self, folder, tmp_path):
        """The bundle beside the notebook; the folder of its text."""
        hostile_bundle(tmp_path, folder / "hostile.zip", status="finished")  # else it is trained, and written anew
        return tmp_path / DATA_NAME

    def test_the_harness_sees_what_runs(self, ui, compose):
        """A control: the tests below would pass if nothing that runs were seen."""
        ui.open(compose(f"from IPython.display import HTML, display\ndisplay(HTML({IMAGE!r}))"))
        watched = Watched(ui.page, ui.server.address)
        ui.start_all()
        ui.wait()
        seen = watched.seen()
        ui.keep("hostile_control", json.dumps(seen, indent=1))
        assert seen["ran"] == "image"
        assert len(seen["elements"]) == 1

    def test_compared(self, ui, folder, place, sent):
        own = folder / "results" / "own <img src=x onerror=window.__pwned='own' data-foreign>"
        own.parent.mkdir()
        shutil.copytree(sent.parent / "sender" / RUN_NAME, own)
        prompts = {"she is": f"she is ; {IMAGE.replace(chr(39), '')}"}
        ui.open(place("06", prompts))
        watched = Watched(ui.page, ui.server.address)
        ui.start_all()
        ui.wait()
        ui.shot("hostile_table", ui.cell("nl.compare("))
        ui.shot("hostile_compared", ui.cell("texts.style"))
        seen = watched.seen()
        ui.keep("hostile_06", json.dumps(seen, indent=1))
        assert seen == NOTHING
        assert ui.complained() == []
        shown = ui.output("texts.style").text_content()
        assert "<script>window.__pwned='script'</script>".replace(" ", "/") in shown  # as text, whole
        assert RUN_NAME in shown

    def test_continued(self, ui, folder, place, sent):
        """With a new end: the page of the training, and a report that this machine has written."""
        self.continued(ui, place, sent, {"EPOCHS = 2": "EPOCHS = 2"})

    def test_shown_as_it_was_sent(self, ui, folder, place, sent):
        """Without a step more to train: the record is the sender's."""
        self.continued(ui, place, sent, {"EPOCHS = 2": "EPOCHS = 1"})

    def continued(self, ui, place, sent, length):
        obeyed = sent.parent / "obeyed"
        obeyed.mkdir()
        where = {'RUN = ""': 'RUN = "hostile.zip"', 'DATA = ""': f"DATA = {str(sent)!r}"}
        ui.open(place("02", where | length))
        watched = Watched(ui.page, ui.server.address)
        ui.start_all()
        ui.wait()
        ui.shot(f"hostile_{length['EPOCHS = 2'][-1]}", ui.cell("run.result"))
        seen = watched.seen()
        ui.keep(f"hostile_02_{length['EPOCHS = 2'][-1]}", json.dumps(seen | {"said": ui.complained()}, indent=1))
        assert seen == NOTHING
        assert ui.complained() == []
        assert list(obeyed.iterdir()) == []  # where the sender wanted a copy
        assert "Time to the published perplexities" in ui.output("run.result").last.text_content()
