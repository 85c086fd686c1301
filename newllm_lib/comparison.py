"""Runs beside each other and beside the published ones: which scores compare, why others do not, a table, a picture.

Perplexities are ranked only among runs that scored the very same predictions: a group. Groups are called A, B, ...
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from newllm_lib import published as series
from newllm_lib import report
from newllm_lib.config import ModelConfig, TrainConfig, flat_fields
from newllm_lib.curves import set_perplexity_axis
from newllm_lib.errors import ConfigError, FileMissingError, RunError
from newllm_lib.escaping import csv_text, markdown_list, markdown_text, plot_text, text_table
from newllm_lib.files import file_errors, make_folder, write_atomic, write_text_atomic

PUBLISHED_SEQUENCES, PUBLISHED_TOKENS = 51_026, 2_748_486
"""Training sequences, and real targets in them, of one epoch of the published protocol."""
PUBLISHED_SHAPES = {"l4_5_layers": {"num_layers": 5}, "l4_advanced": {"context_dim": 512, "num_layers": 12}}
"""Where the model of a published run is not the baseline's."""


_TEXT, _COUNT, _RATIO = ("object", str), ("Int64", "{:,}".format), ("float", "{:.2f}".format)
_MILLIONS, _GIB = ("Int64", lambda n: f"{n / 1e6:.3g} M"), ("Int64", lambda n: f"{n / 2**30:.2f} GiB")
COLUMNS = {  # name: type in pandas, format, and title where it is printed
    "run": (*_TEXT, ""), "published": ("bool", str, ""), "group": (*_TEXT, "group"), "rank": (*_COUNT, ""),
    "preset": (*_TEXT, "preset"), "data": (*_TEXT, "data"), "tokenizer": (*_TEXT, "tokenizer"),
    "parameters": (*_COUNT, "parameters"), "batch_size": (*_COUNT, "batch"), "lr": ("float", "{:.3g}".format, "rate"),
    "optimizer": (*_TEXT, "optimizer"), "precision": (*_TEXT, "precision"), "engine": (*_TEXT, "engine"),
    "device": (*_TEXT, "device"), "peak_memory_bytes": (*_GIB, "memory"), "faithful": (*_TEXT, "faithful"),
    "val_ppl": (*_RATIO, "PPL"), "val_loss": ("float", "{:.4f}".format, ""),
    "val_accuracy": ("float", "{:.1%}".format, "accuracy"), "val_ppl_known": (*_RATIO, "known PPL"),
    "val_bits_per_byte": ("float", "{:.4f}".format, "bits/byte"), "val_word_ppl": (*_RATIO, "word PPL"),
    "epochs": (*_RATIO, "epochs"), "steps": (*_COUNT, "steps"), "tokens_seen": (*_MILLIONS, "tokens"),
    "train_seconds": ("float", report.duration, "time"), "tokens_per_second": ("float", "{:,.0f}".format, "tokens/s"),
    "status": (*_TEXT, "status"), "folder": (*_TEXT, ""), "note": (*_TEXT, ""),
}  # fmt: skip
"""Scores are those of the best validation, costs those up to the last one; seconds are of training alone."""

_SET_UP = list(COLUMNS)[2 : list(COLUMNS).index("val_ppl")]
_SCORES = [name for name in COLUMNS if name not in _SET_UP]
_PROTOCOL = {
    "tokenizer": "", "sentencepiece_model": "sentencepiece", "vocab_size": "", "layout": "", "sequence_length": "",
    "stride": "windows", "min_words": "windows", "eval_lanes": "stream",
}  # fmt: skip
"""Settings that make ids of a text, and the tokenizer or layout that reads them ("" = every one)."""
_COVERED = {*_SET_UP, "lr_rule", "lr_base", "batch_base"}  # settings that columns show

_PANELS = {"step": "optimizer steps", "tokens": "tokens seen", "train_seconds": "training time"}
_TIMES = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 18000, 36000, 72000, 180000, 360000)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of Okabe and Ito (2008), which the colour-blind tell apart; the markers tell the runs apart once more."""
_MARKERS, _LINES = "os^Dv", ("-", (0, (6, 1, 1, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
_GREYS = (("#555555", (0, (6, 2))), ("#777777", (0, (3, 1.5))), ("#999999", (0, (1.5, 1))))


@dataclass(frozen=True)
class Scored:
    """What the scores of a run are scores of."""

    digest: str | None
    """sha256 of the validation ids; None in records of older versions."""
    corpus: str | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    """The text's sha256 and the settings that make ids of it: equal ones make equal ids. Empty where not recorded."""

    def __str__(self) -> str:
        how = ", ".join(f"{name} {value}" for name, value in self.protocol.items())
        return f"{self.corpus or 'unknown text'} ({how or 'settings not recorded'})"

    def reasons(self, other: Scored) -> str:
        """Why scores of `other` do not compare with scores of this."""
        if not self.protocol or not other.protocol:
            return "what was scored is not recorded"
        pairs = [(name, mine, other.protocol.get(name, mine)) for name, mine in self.protocol.items()]
        found = [f"other {name} ({theirs}, not {mine})" for name, mine, theirs in pairs if mine != theirs]
        return "; ".join(found) or "other validation ids, though text and settings are recorded as equal"


@dataclass
class Entry:
    """One run: its values by column (None where missing or not finite), its curve, what it scored, its settings."""

    values: dict[str, Any]
    curve: list[dict[str, float]]
    """step, tokens, train_seconds and val_ppl of each validation with a finite perplexity; NaN where missing."""
    scored: Scored
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.values = dict.fromkeys(COLUMNS) | self.values
        for name, (kind, *_) in COLUMNS.items():
            if kind in ("Int64", "float") and self.values[name] is not None:
                value = float(self.values[name])
                self.values[name] = (round(value) if kind == "Int64" else value) if math.isfinite(value) else None

    def without_place(self) -> Entry:
        """The same without the folder's path."""
        return replace(
            self, values=self.values | {"folder": self.values["folder"] and Path(self.values["folder"]).name}
        )


@dataclass
class Comparison:
    """Entries by group, then perplexity; what each group scored, by letter; and what there is to say about them."""

    entries: list[Entry]
    groups: dict[str, Scored]
    notes: list[str]

    def rows(self) -> list[dict[str, Any]]:
        """Plain values of every column, None where there is none, and behind them the settings that differ."""
        known = [entry.settings for entry in self.entries if entry.settings]
        names = dict.fromkeys(name for settings in known for name in settings if name not in _COVERED)
        names = [name for name in names if len({json.dumps(settings.get(name)) for settings in known}) > 1]
        return [
            {"number": number} | entry.values | {f"setting.{name}": entry.settings.get(name) for name in names}
            for number, entry in enumerate(self.entries, start=1)
        ]

    def frame(self):
        """The rows as a pandas DataFrame, numbered from 1; `.attrs`: notes, groups, and all as Markdown text."""
        frame = text_table(self.rows()).set_index("number").astype({name: COLUMNS[name][0] for name in COLUMNS})
        groups = {name: str(scored) for name, scored in self.groups.items()}
        frame.attrs = {"notes": self.notes, "groups": groups, "text": table_text(self)}
        return frame

    def to_json(self) -> str:
        """Rows, groups and notes."""
        values = {"rows": self.rows(), "groups": {a: asdict(b) for a, b in self.groups.items()}, "notes": self.notes}
        return json.dumps(values, indent=2) + "\n"


def compare(runs, *, published: bool = True, out: str | Path | None = None):
    """The runs beside each other and, where scores compare, beside the published ones, as a pandas DataFrame.

    runs: folders, or objects with a `.folder`; at least one. Perplexities are ranked (`rank`, 1 = best) only within a
    `group`; `.attrs["notes"]` says why groups do not compare, `.attrs["text"]` is what one reads. `out`: a folder for
    comparison.md, .csv, .json and .png.
    FileMissingError or RunError names a folder that holds no run or a damaged one.
    """
    comparison = collect(runs, published=published)
    if out is not None:
        write(comparison, Path(out))
    return comparison.frame()


@file_errors()
def collect(runs, *, published: bool = True) -> Comparison:
    """What `compare` shows; see there."""
    runs = [runs] if isinstance(runs, (str, Path)) or hasattr(runs, "folder") else runs
    folders = {(path := Path(getattr(run, "folder", run))).resolve(): path for run in runs}
    if not folders:
        raise ConfigError("compare() needs at least one run")
    entries = list(map(_read, folders.values(), _labels(list(folders))))
    notes = []
    if published and any(entry.scored.digest == series.VALIDATION_DIGEST for entry in entries):
        entries += [_published(name, known) for name, known in series.RUNS.items() if known.best_ppl]
        notes.append("Published figures weight batch means by rows, ours weight tokens: well under 1 % apart.")
    elif published:
        notes.append("The published runs are left out: none of these scored the ids that their figures hold for.")
    groups = _group(entries)
    entries.sort(key=lambda entry: (list(groups).index(entry.values["group"]), entry.values["rank"] or math.inf))
    return Comparison(entries, groups, [*_group_notes(entries, groups), *notes])


def _labels(folders: list[Path]) -> list[str]:
    """The name of each folder, and of several with one name so much of their paths as tells them apart."""
    alike = [[other.parent for other in folders if other.name == path.name] for path in folders]
    return [os.path.relpath(path, os.path.commonpath(same)) for path, same in zip(folders, alike, strict=True)]


def _read(folder: Path, label: str) -> Entry:
    """The run in a folder; whatever is wrong with its files is told with the folder's name."""
    record = report.read_record(folder)
    try:
        begun = record["best"] or (folder / "history.csv").exists()  # written a moment after run.json
        rows = report.read_history(folder).astype({"step": float, "val_ppl": float}) if begun else None
        rows = [] if rows is None else rows.reindex(columns=report.HISTORY_COLUMNS).astype(float).to_dict("records")
        return _run(folder, label, record, rows)
    except RunError:
        raise
    except (FileMissingError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder}: run.json or history.csv is damaged: not what a run writes ({error!r})") from error


def _run(folder: Path, label: str, record: dict[str, Any], rows: list[dict[str, float]]) -> Entry:
    best, last = record["best"] or {}, rows[-1] if rows else {"step": record.get("step")}
    data, decided, machine, config = (record.get(n) or {} for n in ("data", "decided", "environment", "config"))
    settings = {  # that define a result; one that is younger than the record had its default
        name: config[item.section].get(name, item.default)
        for name, item in flat_fields().items()
        if item.metadata["identity"] and config.get(item.section)
    }
    imported = record.get("imported") or {}
    known = {name: value for name, value in settings.items() if name not in imported.get("unknown", ())}
    note = f"not faithful: {record['faithful_reason']}" if record.get("faithful_reason") else None
    note = "imported; that it scored this text is assumed, unknown settings are left out" if imported else note
    planned = dict(record.get("plan") or ()).get("rate", "nan").split(":")[0]  # the peak, to three digits
    per_epoch, seconds = float(data.get("training_tokens") or math.nan), last.get("train_seconds") or math.nan
    tokens = per_epoch * last.get("epoch", math.nan)
    threads = f", {machine['threads']} threads" if machine.get("device") == "cpu" and "threads" in machine else ""
    values = {
        "run": label, "published": False, "preset": record.get("preset"), "data": data.get("name"),
        "tokenizer": known.get("tokenizer"), "parameters": record.get("parameters"), "status": str(record["status"]),
        "batch_size": decided.get("batch_size") or known.get("batch_size"), "optimizer": known.get("optimizer"),
        "lr": known.get("lr") or float(planned), "precision": decided.get("precision"),
        "engine": decided.get("engine"), "device": name + threads if (name := machine.get("device_name")) else None,
        "epochs": last.get("epoch"), "steps": last["step"], "tokens_seen": tokens, "train_seconds": seconds,
        "tokens_per_second": tokens / seconds, "peak_memory_bytes": record.get("peak_memory_bytes"),
        "faithful": record.get("faithful"), "folder": str(folder), "note": note,
    } | {name: best.get(name) for name in COLUMNS if name.startswith("val_")}  # fmt: skip
    curve = [row | {"tokens": per_epoch * row["epoch"]} for row in rows if math.isfinite(row["val_ppl"])]
    return Entry(values, curve, _scored(record, settings), known)


def _scored(record: dict[str, Any], settings: dict[str, Any]) -> Scored:
    data, digest = record.get("data") or {}, (record.get("validation") or {}).get("digest")
    if not digest and record.get("published_protocol"):  # which has always been decided by the ids themselves
        digest = series.VALIDATION_DIGEST
    readers = {"", settings.get("tokenizer"), settings.get("layout")}
    protocol = {name: settings[name] for name, by in _PROTOCOL.items() if name in settings and by in readers}
    doubted = record.get("imported") and not digest  # by the import itself, which scored the weights
    if doubted or not data.get("fingerprint") or not {"layout", "vocab_size"} <= protocol.keys():
        return Scored(digest, data.get("name"))
    return Scored(digest, data.get("name"), {"text sha256": data["fingerprint"][:16]} | protocol)


def _published(name: str, known: series.PublishedRun) -> Entry:
    """A published run; its epochs become steps and tokens through its batch and the protocol's sequences."""
    steps = math.ceil(PUBLISHED_SEQUENCES / known.batch_size)
    tokens, seconds = known.epochs * PUBLISHED_TOKENS, 60 * known.minutes if known.minutes else math.nan
    values = {
        "run": f"published: {name}", "published": True, "preset": name, "data": "wikitext-2", "tokenizer": "words",
        "parameters": ModelConfig(**PUBLISHED_SHAPES.get(name, {})).num_parameters, "batch_size": known.batch_size,
        "lr": known.lr, "optimizer": TrainConfig().optimizer, "device": known.hardware,
        "precision": "fp32" if known.hardware == "CPU" else "fp16", "epochs": known.epochs,
        "steps": known.epochs * steps, "tokens_seen": tokens, "train_seconds": seconds,
        "tokens_per_second": tokens / seconds, "status": "published", "note": known.note,
        "val_ppl": known.best_ppl, "val_accuracy": known.accuracy / 100 if known.accuracy else None,
    }  # fmt: skip
    an_epoch = {"step": steps, "tokens": PUBLISHED_TOKENS, "train_seconds": seconds / known.epochs}
    curve = [{name: epoch * size for name, size in an_epoch.items()} | {"val_ppl": ppl} for epoch, ppl in known.curve]
    return Entry(values, curve, Scored(series.VALIDATION_DIGEST))


def _group(entries: list[Entry]) -> dict[str, Scored]:
    """Give every entry its group and rank: equal ids, or equal text and settings where ids are not recorded."""
    members: dict[str, list[Entry]] = {}
    for entry in entries:
        scored = entry.scored
        alike = {e.scored.digest for e in entries if scored.protocol and e.scored.protocol == scored.protocol} - {None}
        digest = scored.digest or (min(alike) if len(alike) == 1 else None)
        settings = json.dumps(scored.protocol) if scored.protocol else entry.values["folder"]
        members.setdefault(digest or settings, []).append(entry)
    groups = {}
    for number, group in enumerate(members.values()):
        letter = chr(ord("A") + number) if number < 26 else f"A{number}"
        groups[letter] = group[0].scored
        scores = sorted(ppl for entry in group if (ppl := entry.values["val_ppl"]) is not None)
        for entry in group:
            ppl = entry.values["val_ppl"]
            entry.values |= {"group": letter, "rank": None if ppl is None else 1 + scores.index(ppl)}
    return groups


def _group_notes(entries: list[Entry], groups: dict[str, Scored]) -> list[str]:
    (first, scored), *others = groups.items()
    notes = [
        f"Perplexities of {letter} compare with no other group's. Beside {first}: {scored.reasons(other)}."
        for letter, other in others
    ]
    lossless = {entry.values["group"] for entry in entries if entry.values["val_bits_per_byte"] is not None}
    for sha256 in dict.fromkeys(scored.protocol["text sha256"] for scored in groups.values() if scored.protocol):
        same = [letter for letter, scored in groups.items() if scored.protocol.get("text sha256") == sha256]
        whole = [letter for letter in same if letter in lossless]
        if len(whole) > 1:
            text = f"Bits per byte compare across {' and '.join(whole)}: the same text, of which nothing is lost"
            notes.append(f"{text}. But how windows overlap and which short texts are skipped may differ.")
        if len(same) > 1:
            text = f"{' and '.join(same)} hold the same text. To score two models on the words that both know:"
            notes.append(f"{text} newllm compare RUN RUN --shared-words")
    if older := [entry.values["run"] for entry in entries if not entry.scored.digest]:
        notes.append(f"No hash of the validation ids is recorded, what else is stands for it: {', '.join(older)}.")
    return notes


def write(comparison: Comparison, folder: Path) -> None:
    """comparison.md, .csv, .json and .png, each whole, and of a run's folder no more than its name."""
    comparison = replace(comparison, entries=[entry.without_place() for entry in comparison.entries])
    make_folder(folder)
    image, options = picture(comparison), {"format": "png", "dpi": 110, "metadata": {"Software": None}}
    write_atomic(folder / "comparison.png", lambda file: image.savefig(file, **options))
    write_text_atomic(folder / "comparison.json", comparison.to_json())
    write_text_atomic(folder / "comparison.csv", csv_text(comparison.frame()))
    title = f"# Comparison of {len(comparison.entries)} runs\n\n![validation perplexity](comparison.png)\n\n"
    write_text_atomic(folder / "comparison.md", title + table_text(comparison))


def table_text(comparison: Comparison) -> str:
    """Markdown: a table of scores for each group, the set-up of all where it differs, and the notes."""
    rows, parts = comparison.rows(), []
    for letter, scored in comparison.groups.items():
        group = [row for row in rows if row["group"] == letter]
        parts += [f"## {letter}: {markdown_text(scored)}", _table(group, _SCORES)]
        if ranked := [row for row in group if row["rank"] and not row["published"]]:
            best, name = ranked[0], markdown_text(ranked[0]["run"])
            parts.append(f"Best of these runs: #{best['number']} {name}, PPL {best['val_ppl']:.2f}.")
    parts += ["## Set-up", _table(rows, _SET_UP)]
    differing = []
    for name in (name for name in rows[0] if name.startswith("setting.") and name[8:] not in _PROTOCOL):
        values: dict[str, list[str]] = {}
        for row in (row for row in rows if comparison.entries[row["number"] - 1].settings):
            values.setdefault(json.dumps(row[name]), []).append(f"#{row['number']}")
        differing.append(f"{name[8:]}: " + "; ".join(f"{value} ({', '.join(by)})" for value, by in values.items()))
    parts += ["Other settings that differ:", markdown_list(differing)] if differing else []
    notes = [*comparison.notes, *(f"{row['run']}: {row['note']}" for row in rows if row["note"])]
    parts += ["## Notes", markdown_list(notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def _table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """The columns in which rows differ, padded so that they line up in a terminal too, and in words what all share."""
    names = [name for name in names if COLUMNS[name][2]]
    cells = {name: [_cell(name, row[name]) for row in rows] for name in names}
    found = {name: set(cells[name]) - {""} for name in names}
    shared = [name for name in names if len(found[name]) == 1 < len(rows) and name != "val_ppl"]
    columns = [["#", *(str(row["number"]) for row in rows)], ["run", *(_cell("run", row["run"]) for row in rows)]]
    for name in (name for name in names if found[name] and name not in shared):
        best = [name == "val_ppl" and row["rank"] == 1 for row in rows]
        columns.append([COLUMNS[name][2], *(f"**{c}**" if b else c for c, b in zip(cells[name], best, strict=True))])
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    lines = ["| " + " | ".join(row) + " |" for row in zip(*padded, strict=True)]
    lines.insert(1, "|" + "|".join("-" * (len(column[0]) + 2) for column in padded) + "|")
    told = ", ".join(f"{COLUMNS[name][2]} {min(found[name])}" for name in shared)
    return "\n".join(lines) + (f"\n\nThe same for all, where known: {told}." if told else "")


def _cell(name: str, value: Any) -> str:
    """A value in a table of Markdown, empty where it is missing."""
    return "" if value is None else markdown_text(COLUMNS[name][1](value))


def picture(comparison: Comparison):
    """Validation perplexity over steps, tokens and training time, 13 x 4.4 inches; published curves grey and dashed."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    figure.suptitle("Validation perplexity (lower is better)", fontsize=12)
    panels, letter, handles, counts = figure.subplots(1, 3, sharey=True), "", [], {True: count(), False: count()}
    drawn = [(number, entry) for number, entry in enumerate(comparison.entries, start=1) if entry.curve]
    for number, entry in drawn:
        if len(comparison.groups) > 1 and entry.values["group"] != letter:
            letter = entry.values["group"]
            handles.append(Line2D([], [], linestyle="none", label=f"group {letter}: compare within it only"))
        line = _LINES[list(comparison.groups).index(entry.values["group"]) % 4]
        style, name = _style(entry, next(counts[entry.values["published"]]), line), entry.values["run"]
        shown = name if len(name) <= 30 else f"{name[:14]}…{name[-15:]}"
        handles.append(Line2D([], [], label=plot_text(f"{number}  {shown}"), **style))
        for axes, what in zip(panels, _PANELS, strict=True):
            axes.plot([row[what] for row in entry.curve], [row["val_ppl"] for row in entry.curve], **style)
    for axes, (what, title) in zip(panels, _PANELS.items(), strict=True):
        axes.set_xlabel(title)
        axes.grid(alpha=0.25)
        if values := [row[what] for _, entry in drawn for row in entry.curve if row[what] > 0]:
            _scale_cost(axes, what, min(values), max(values))
        else:
            axes.text(0.5, 0.5, "nothing recorded", ha="center", transform=axes.transAxes)
    if drawn:
        ppls = [row["val_ppl"] for _, entry in drawn for row in entry.curve]
        set_perplexity_axis(panels[0], min(ppls), max(ppls))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8 if len(handles) <= 24 else 6)
    return figure


def _style(entry: Entry, number: int, line: Any) -> dict[str, Any]:
    """Colour and marker tell runs apart, the line their groups; published ones are grey and dashed."""
    if entry.values["published"]:
        color, line = _GREYS[number % 3]
        return {"color": color, "linestyle": line, "linewidth": 1.4, "zorder": 1}
    marks = {"marker": _MARKERS[number % 5], "markersize": 4, "markevery": max(1, len(entry.curve) // 10)}
    return {"color": _COLOURS[number % 7], "linestyle": line, "linewidth": 1.6, **marks}


def _scale_cost(axes, what: str, low: float, high: float) -> None:
    from matplotlib import ticker

    if high > 20 * low:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    if what == "train_seconds":
        every = ticker.MultipleLocator(next((time for time in _TIMES if high <= 6 * time), high))
        axes.xaxis.set_major_locator(ticker.FixedLocator(_TIMES[::3]) if high > 20 * low else every)
        axes.xaxis.set_major_formatter(lambda seconds, _: report.duration(seconds))
