"""The written report of a run: report.md."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

from newllm_lib.config import published
from newllm_lib.config.portable import portable
from newllm_lib.escaping import markdown_block, markdown_code, markdown_text, one_line
from newllm_lib.reporting import curves
from newllm_lib.reporting.diagnostics import best_row, every_spell
from newllm_lib.reporting.formatting import COLUMNS, counted, markdown_table, ppl_text
from newllm_lib.reporting.record import (  # noqa: F401, nl.report has them
    CURVES,
    REPORT,
    finite,
    read_history,
    read_record,
    write_history,
    write_record,
)
from newllm_lib.system.files import write_text_atomic

PICTURE = f"![curves]({CURVES})"


def _cell(row: dict[str, Any], name: str, form: str) -> str:
    """A number of a row in a table; empty where a row of an imported run does not have it."""
    return "" if row[name] is None else f"{row[name]:{form}}"


def _ppl(row: dict[str, Any]) -> str:
    """The perplexity of a best row, which is infinite where JSON has no number for it."""
    return _cell_ppl(row, "val_ppl") if row["val_ppl"] is not None else "infinite"


def _cell_ppl(row: dict[str, Any], name: str) -> str:
    """A perplexity of a row; empty where a row of an imported run does not have it."""
    value = row.get(name)
    return "" if value is None else "infinite" if math.isinf(value) else ppl_text(value)


# --- the written report -----------------------------------------------------------------------------------------


def write_pages(folder: Path, record: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """curves.png and report.md, each whole; returns why there is no picture, '' where there is one.

    Drawing never fails a run: matplotlib may be set up for a backend or fonts that are not there.
    """
    no_picture = ""
    try:
        curves.write_curves(folder, record, history)
    except Exception as error:
        no_picture = one_line(f"they could not be drawn ({type(error).__name__}: {error})")
        with contextlib.suppress(OSError):
            (folder / CURVES).unlink(missing_ok=True)  # what is there shows less than was trained
    write_report(folder, record, history, no_picture)
    return no_picture


def pages_are_current(folder: Path, record: dict[str, Any], history: list[dict[str, Any]]) -> bool:
    """Whether report and picture are there and tell of this status and these validations."""
    if best_row(history) and not curves.is_current(folder, history):
        return False
    try:
        text = (folder / REPORT).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    told = [summary_text(portable(record)), *_history_table(record, history).splitlines()[2:]]
    return all(line in text for line in told) and (PICTURE in text) == bool(best_row(history))


def write_report(folder: Path, record: dict[str, Any], history: list[dict[str, Any]], no_picture: str = "") -> None:
    """report.md: `report_text` in a run's folder."""
    write_text_atomic(folder / REPORT, report_text(record, history, no_picture))


def report_text(record: dict[str, Any], history: list[dict[str, Any]], no_picture: str = "") -> str:
    """What was run, what came out, against what was published, every validation, samples: Markdown.

    no_picture: why there is none, in words that follow "No curves:". Every text of the record is escaped, and no path
    of this machine is in it.
    """
    no_picture = no_picture or ("" if best_row(history) else curves.no_curves(history))
    record = portable(record)
    parts = [
        f"# {markdown_text(record['run'])}",
        summary_text(record),
        f"No curves: {markdown_text(no_picture)}." if no_picture else PICTURE,
        "## Set-up",
        markdown_table(("", ""), [tuple(map(markdown_text, line)) for line in record["plan"] if line[0] != "run"]),
        _provenance(record),
        *_parts(record),
        "## Result",
        result_text(record),
        *_warnings(record, history),
        "## Time to the published perplexities",
        milestones_text(record, history),
        "## Every validation",
        _history_table(record, history),
        "## Samples",
        "After the first words (bold, or up to the triangle) of long validation texts; temperature 0.8, no `<UNK>`.",
        "\n\n".join(quoted(sample) for sample in record["samples"]) or "None: the run has no trained weights yet.",
        "",
    ]
    return "\n\n".join(parts)


def result_page(record: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """What came out, without the table of validations, the curves and the samples: Markdown."""
    record = portable(record)
    milestones = milestones_text(record, history)
    parts = [summary_text(record), result_text(record), *_warnings(record, history)]
    return "\n\n".join([*parts, "## Time to the published perplexities", milestones, ""])


def quoted(sample: str) -> str:
    """A sample as a quotation; one of several lines as a block, in which a triangle stands for the end of the bold."""
    start, bold, rest = sample.removeprefix("**").partition("**")
    if "\n" in sample:
        return markdown_block(f"{start}\N{BLACK RIGHT-POINTING TRIANGLE}{rest}")
    start, rest = markdown_text(start), markdown_text(rest)
    return f"> **{start}**{rest}" if bold else f"> {start}"


def summary_text(record: dict[str, Any]) -> str:
    """The outcome in two sentences."""
    best = record["best"]
    if best is None:
        return f"Status: {markdown_text(record['status'])}. No validation yet."
    place = (
        f"after epoch {markdown_text(best['epoch'])}"
        if best["step"] is None
        else f"(accuracy {best['val_accuracy']:.1%}) at step {best['step']:,}, after {best['train_seconds']:,.0f} s of "
        "training (validation excluded)"
    )
    ppl = _ppl(best)
    text = f"Best validation perplexity **{ppl}** {place}. Status: {markdown_text(record['status'])}."
    if record.get("model_step") is not None:
        text += (
            f" **The model here is not that best one**, but the one of step {record['model_step']:,}: the file that "
            "this run was taken from had no other."
        )
    if record["faithful"] is not None:
        reason = markdown_text(record["faithful_reason"])
        text += " Faithful." if record["faithful"] else f" **Not faithful** to the published run ({reason})."
    return text


def _warnings(record: dict[str, Any], history: list[dict[str, Any]]) -> list[str]:
    """What the history warns of, or has for a while; nothing where there was nothing."""
    spells = every_spell(history, record["validation"]["unknown_share"])
    found = [f"- {markdown_text(spell)}." for spell in spells]
    return ["## Warnings", "\n".join(found)] if found else []


def _provenance(record: dict[str, Any]) -> str:
    environment = record["environment"]
    commands = "Command: " + ", then ".join(map(markdown_code, record["commands"]))
    versions = markdown_text(", ".join(f"{name} {version}" for name, version in environment["versions"].items()))
    commit = markdown_text(environment["git_commit"] or "unknown (not run from a checkout)")
    unknown = "seed" in record.get("imported", {}).get("unknown", ())
    seed = "unknown" if unknown else markdown_text(record["config"]["train"]["seed"])
    sha256 = markdown_text(record["data"]["fingerprint"][:16])
    return f"{commands}\n\nCommit: {commit}. {versions}. Seed {seed}. Data sha256 {sha256}…"


def _parts(record: dict[str, Any]) -> list[str]:
    """Where each part of a run was trained, if not all of it was trained in the same way; '' for what is not known."""
    parts = record.get("parts") or []
    if len(parts) < 2:
        return []
    rows = []
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        known = part.get("environment") or {}
        versions, threads = known.get("versions") or {}, known.get("threads")
        device = known.get("device_name") or ""
        if device and known.get("device") == "cpu" and threads:
            device += f", {counted(threads, 'thread')}"
        last = following["from_step"] if following else record["step"]
        cells = (
            f"{part['from_step']:,} to {last:,}",
            device,
            part.get("precision") or "",
            ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "newllm_lib") if name in versions),
            (known.get("git_commit") or "")[:12],
        )
        rows.append(tuple(map(markdown_text, cells)))
    return ["## Parts", markdown_table(("steps", "device", "precision", "versions", "commit"), rows)]


def result_text(record: dict[str, Any]) -> str:
    """The best validation as a table."""
    best = record["best"]
    if best is None:
        return "None yet."
    imported, peak = "imported" in record, best["peak_memory_bytes"]
    weighting = "as the file has it: means of batches, weighted by rows" if imported else "nats a target"
    rows = [
        (
            "perplexity",
            _cell(best, "val_ppl", ".3f") if (best["val_ppl"] or math.inf) < 1e7 else _ppl(best),
            "exp(loss)" if imported else "exp(sum of nll / number of targets)",
        ),
        ("loss", f"{best['val_loss']:.4f}", weighting),
        ("accuracy", _cell(best, "val_accuracy", ".2%"), "likeliest token is the target"),
        *(_lossless_rows(best) if _is_lossless(best) else _known_rows(best, record["validation"]["unknown_share"])),
        ("tokens a second", _cell(best, "tokens_per_second", ",.0f"), _speed_meaning(record)),
        (
            "peak memory",
            "" if peak is None else f"{peak / 2**30:.2f} GiB",
            markdown_text(record["peak_memory_meaning"]),
        ),
    ]
    rows = [row for row in rows if row[1]]
    known = published.RUNS.get(record["preset"])
    if known and known.best_ppl and record["published_protocol"]:
        rows.append(
            (
                "published",
                f"{known.best_ppl:.2f}",
                f"{known.title}, {counted(known.epochs, 'epoch')}. {known.note}".strip(),
            )
        )
    return markdown_table(("", "best validation", "meaning"), rows)


def _speed_meaning(record: dict[str, Any]) -> str:
    """What a speed means without the machine is nothing: its name, and how fast it multiplies."""
    name, rate = (record.get("environment") or {}).get("device_name"), record.get("product_rate")
    where = f", on {markdown_text(name)}" if name else ""
    products = f" ({rate / 1e9:,.0f} GFLOP/s of {record['decided'].get('precision')} products)" if rate else ""
    return f"real targets, since the validation before{where}{products}"


def _is_lossless(row: dict[str, Any]) -> bool:
    """Whether a row was scored with a tokenizer that loses nothing; older rows do not say."""
    return row.get("val_bits_per_byte") is not None


def _lossless_rows(best: dict[str, Any]) -> list[tuple[str, str, str]]:
    known = best.get("val_bits_per_byte_known")  # rows of before do not say
    without = "the same without the pieces that spell `<unk>`, which stands for rare words in this text"
    return [
        (
            "bits per byte",
            f"{best['val_bits_per_byte']:.4f}",
            "sum of nll / ln 2 / UTF-8 bytes of the scored text; the ends of texts cost bits and hold no byte",
        ),
        (
            "word-level perplexity",
            f"{best['val_word_ppl']:.4g}",
            "exp(sum of nll / words); for text with spaces between its words",
        ),
        *([] if known is None else [("bits per byte, known", f"{known:.4f}", without)]),
    ]


def _known_rows(best: dict[str, Any], unknown: float | None) -> list[tuple[str, str, str]]:
    share = "" if unknown is None else f"{unknown:.1%}"
    return [
        ("known-word perplexity", _cell_ppl(best, "val_ppl_known"), "the same over targets that are not `<UNK>`"),
        ("unknown share", share, "targets that are `<UNK>`: the accuracy of always predicting it"),
    ]


def milestones(history: list[dict[str, Any]]) -> list[tuple[float, str, dict[str, Any] | None]]:
    """Each published perplexity, its run, and the first row of the history that is at or below it."""
    return [
        (level, title, next((row for row in history if _reaches(row, level)), None))
        for level, title in published.MILESTONES
    ]


def _reaches(row: dict[str, Any], level: float) -> bool:
    return row["val_ppl"] is not None and row["val_ppl"] <= level


def milestones_text(record: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """Training seconds to each published perplexity, or why they do not apply."""
    if not record["published_protocol"]:
        return (
            "Not comparable: the published figures hold for the validation ids of WikiText-2 under the published "
            "protocol, and this run scored others."
        )
    rows = [
        (
            f"{level:.2f}",
            title,
            *(("not reached", "") if row is None else _when(row)),
        )
        for level, title, row in milestones(history)
    ]
    note = (
        "Seconds of optimizer steps up to the first validation at or below the figure; validation and saving are not "
        "counted, and the figure may have been passed earlier, between two validations."
    )
    return markdown_table(("PPL", "published by", "training time here", "step"), rows) + "\n\n" + note


def _when(row: dict[str, Any]) -> tuple[str, str]:
    """Training time and step of a row; an imported run knows the epoch alone."""
    if row["step"] is None:
        return "unknown", f"epoch {markdown_text(row['epoch'])} (PPL {ppl_text(row['val_ppl'])})"
    return f"{row['train_seconds']:,.1f} s", f"{row['step']:,} (PPL {ppl_text(row['val_ppl'])})"


def _history_table(record: dict[str, Any], history: list[dict[str, Any]]) -> str:
    best = record["best"] or {"step": None, "epoch": None}
    lossless = any(_is_lossless(row) for row in history)
    last = "val_bits_per_byte" if lossless else "val_ppl_known"
    rows = [
        (
            _cell(row, "step", ","),
            f"{row['epoch']:.2f}",
            f"**{ppl_text(row['val_ppl'])}**"
            if (row["step"], row["epoch"]) == (best["step"], best["epoch"])
            else _cell_ppl(row, "val_ppl"),
            _cell(row, "val_accuracy", ".2%"),
            _cell(row, "val_loss", ".4f"),
            _cell(row, "train_loss", ".4f"),
            _cell(row, last, ".4f") if lossless else _cell_ppl(row, last),
            _cell(row, "lr", ".2e"),
            _cell(row, "train_seconds", ",.1f"),
        )
        for row in history
    ]
    names = ("step", "epoch", "val_ppl", "val_accuracy", "val_loss", "train_loss", last, "lr", "train_seconds")
    return markdown_table(tuple(COLUMNS[name] for name in names), rows)
