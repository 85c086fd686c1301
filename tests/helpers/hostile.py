"""A bundle as somebody would make it who wants its reader's browser, terminal, spreadsheet and disk to obey."""

import hashlib
import json
import zipfile
from pathlib import Path

from tiny import tiny_config

import newllm_lib as nl
from newllm_lib.reporting.progress import Progress

SCRIPT = "<script>window.__pwned='script'</script>"
IMAGE = "<img src=x onerror=window.__pwned='image' data-foreign>"
LINK = "[link](javascript:window.__pwned='link') [again](javascript&colon;window.__pwned='link')"
PICTURE = "![picture](https://foreign.example/picture.png) https://foreign.example/bare"
FORMULA = r"$\href{javascript:window.__pwned='formula'}{x}$ $$\unicode{x41}$$ \(y\) \begin{matrix}z\end{matrix}"
FENCE = "```\n</code></pre>" + IMAGE + "\n````"
TERMINAL = "\x1b]0;title\x07\x1b[2J\x9b31m\u202etxt"
SHEET = '=HYPERLINK("https://foreign.example/","x")'
EVERYTHING = " ".join((SCRIPT, IMAGE, LINK, PICTURE, FORMULA, "**|**", "{x}", TERMINAL))

WORDS = (
    SCRIPT.replace(" ", "/"), IMAGE.replace(" ", "/"), "[x](javascript:window.__pwned='word')", "```",
    r"$\href{javascript:window.__pwned='math'}{x}$", "=1+1", "\x1b[31m", "\x9b2j", "\u202e", "**|**", "$", "{", "<b>",
)  # fmt: skip
"""Without white space, so that each is one word of the vocabulary."""
DATA_NAME = "<img src=x onerror=window.__pwned='data' data-foreign> $x$ $(touch pwned)"
RUN_NAME = "r [a](javascript&colon;window.__pwned='name') `b` $c$ $(touch pwned) ; 'd' _e_"
"""What a run's folder may be called: no slash, no < and no double quote."""


def write_text(folder: Path) -> Path:
    """train.txt and valid.txt of hostile words."""
    folder.mkdir(parents=True)
    for name, count in (("train", 60), ("valid", 14)):
        lines = [
            " ".join(WORDS[(start + k * (1 + start % 3)) % len(WORDS)] for k in range(14)) for start in range(count)
        ]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def hostile_bundle(folder: Path, target: Path, **changes) -> Path:
    """A run of one epoch, its record, report and card replaced, as a bundle with right hashes.

    folder: for the text (in DATA_NAME) and the run. changes: of the record, after that.
    """
    config = tiny_config(write_text(folder / DATA_NAME), results_dir=str(folder / "sender"), name=RUN_NAME, epochs=1)
    run = nl.train(config.replace(preset=EVERYTHING), progress=Progress())
    with zipfile.ZipFile(nl.bundle(run, folder / "honest.zip", checkpoint=True)) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name != "MANIFEST.json"}
    record = hostile_record(json.loads(files["run.json"]), folder) | changes
    raw = f"{EVERYTHING}\n\n{FENCE}\n\n{SCRIPT}\n".encode()
    files |= {"run.json": json.dumps(record).encode(), "report.md": raw, "model/README.md": raw}
    return write_zip(files, RUN_NAME, target)


def hostile_record(record: dict, folder: Path) -> dict:
    """A record in which every text that its reader sees is hostile, and every path leads to the receiver's folders."""
    places = {"results_dir": str(folder / "obeyed"), "mirror_dir": str(folder / "obeyed")}
    for part in ("config", "requested"):
        record[part] = record[part] | places | {"preset": EVERYTHING}
        record[part]["data"] = record[part]["data"] | {"data": "/etc/passwd"}
    record["environment"] |= {"device_name": EVERYTHING, "git_commit": EVERYTHING, "versions": {"torch": EVERYTHING}}
    record["data"] |= {"name": EVERYTHING}
    return record | {
        "preset": EVERYTHING,
        "status": EVERYTHING,
        "faithful": False,
        "faithful_reason": EVERYTHING,
        "peak_memory_meaning": EVERYTHING,
        "plan": [["run", "/home/jane/secret"], ["copy", "/home/jane/drive"], [EVERYTHING, EVERYTHING]],
        "commands": [EVERYTHING, f"newllm train --data '{folder}/x; touch pwned'"],
        "samples": [f"**{EVERYTHING}** {EVERYTHING}", f"**a** {FENCE}\nb", EVERYTHING],
    }


def write_zip(files: dict[str, bytes], run: str, target: Path) -> Path:
    """A bundle of these files, with its manifest."""
    entries = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    manifest = {"format_version": 1, "run": run, "files": entries}
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("MANIFEST.json", json.dumps(manifest))
    return target
