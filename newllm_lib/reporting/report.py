"""The written report of a run: report.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from newllm_lib.config import published
from newllm_lib.config.portable import portable
from newllm_lib.escaping import markdown_block, markdown_code, markdown_text
from newllm_lib.reporting.curves import no_curves
from newllm_lib.reporting.diagnostics import best_row, every_spell
from newllm_lib.reporting.formatting import counted, markdown_table
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


# --- the written report -----------------------------------------------------------------------------------------


def write_report(folder: Path, record: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """report.md: `report_text` in a run's folder."""
    write_text_atomic(folder / REPORT, report_text(record, history))


def report_text(record: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """What was run, what came out, against what was published, every validation, samples: Markdown.

    Every text of the record is escaped, and no path of this machine is in it.
    """
    record = portable(record)
    parts = [
        f"# {markdown_text(record['run'])}",
        summary_text(record),
        PICTURE if best_row(history) else f"No curves: {no_curves(history)}.",
        "## Set-up",
        markdown_table(("", ""), [tuple(map(markdown_text, line)) for line in record["plan"] if line[0] != "run"]),
        _provenance(record),
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
    ppl = _cell(best, "val_ppl", ".2f") or "infinite"
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
            _cell(best, "val_ppl", ".3f") or "infinite",
            "exp(loss)" if imported else "exp(sum of nll / number of targets)",
        ),
        ("loss", f"{best['val_loss']:.4f}", weighting),
        ("accuracy", _cell(best, "val_accuracy", ".2%"), "likeliest token is the target"),
        *(_lossless_rows(best) if _is_lossless(best) else _known_rows(best, record["validation"]["unknown_share"])),
        ("tokens a second", _cell(best, "tokens_per_second", ",.0f"), "real targets, since the validation before"),
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
        ("known-word perplexity", _cell(best, "val_ppl_known", ".2f"), "the same over targets that are not `<UNK>`"),
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
        return "unknown", f"epoch {markdown_text(row['epoch'])} (PPL {row['val_ppl']:.2f})"
    return f"{row['train_seconds']:,.1f} s", f"{row['step']:,} (PPL {row['val_ppl']:.2f})"


def _history_table(record: dict[str, Any], history: list[dict[str, Any]]) -> str:
    best = record["best"] or {"step": None, "epoch": None}
    lossless = any(_is_lossless(row) for row in history)
    rows = [
        (
            f"{row['epoch']:.2f}",
            _cell(row, "step", ","),
            _cell(row, "train_loss", ".4f"),
            _cell(row, "val_loss", ".4f"),
            f"**{row['val_ppl']:.2f}**"
            if (row["step"], row["epoch"]) == (best["step"], best["epoch"])
            else _cell(row, "val_ppl", ".2f"),
            _cell(row, "val_accuracy", ".2%"),
            _cell(row, "val_bits_per_byte", ".4f") if lossless else _cell(row, "val_ppl_known", ".2f"),
            _cell(row, "lr", ".2e"),
            _cell(row, "train_seconds", ",.1f"),
        )
        for row in history
    ]
    last = "bits a byte" if lossless else "known PPL"
    titles = ("epoch", "step", "train loss", "val loss", "val PPL", "accuracy", last, "rate", "seconds")
    return markdown_table(titles, rows)
