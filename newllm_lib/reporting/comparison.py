"""Runs beside each other and beside the published ones: which scores compare, why others do not, a table, a picture.

Perplexities are ranked only among runs that scored the very same predictions: a group. Groups are called A, B, ...
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from newllm_lib.config import ModelConfig, TrainConfig, flat_fields
from newllm_lib.config import published as series
from newllm_lib.config.places import user_path
from newllm_lib.errors import ConfigError, FileMissingError, RunError
from newllm_lib.reporting.formatting import counted, duration, ppl_text
from newllm_lib.reporting.record import HISTORY, HISTORY_COLUMNS, RunRecord, finite, read_history, read_record
from newllm_lib.system.files import file_errors

PUBLISHED_SEQUENCES, PUBLISHED_TOKENS = 51_026, 2_748_486
"""Training sequences, and real targets in them, of one epoch of the published protocol."""
PUBLISHED_SHAPES = {"l4_5_layers": {"num_layers": 5}, "l4_advanced": {"context_dim": 512, "num_layers": 12}}
"""Where the model of a published run is not the baseline's."""


_TEXT, _COUNT, _RATIO = ("object", str), ("Int64", "{:,}".format), ("float", ppl_text)
_MILLIONS, _GIB = ("Int64", lambda n: f"{n / 1e6:.3g} M"), ("Int64", lambda n: f"{n / 2**30:.2f} GiB")
COLUMNS = {  # name: type in pandas, format, and title where it is printed
    "run": (*_TEXT, ""), "published": ("bool", str, ""), "group": (*_TEXT, "group"), "rank": (*_COUNT, ""),
    "preset": (*_TEXT, "preset"), "data": (*_TEXT, "data"), "tokenizer": (*_TEXT, "tokenizer"),
    "parameters": (*_COUNT, "parameters"), "batch_size": (*_COUNT, "batch"),
    "lr": ("float", "{:.3g}".format, "learning rate"),
    "optimizer": (*_TEXT, "optimizer"), "precision": (*_TEXT, "precision"), "engine": (*_TEXT, "engine"),
    "device": (*_TEXT, "device"), "peak_memory_bytes": (*_GIB, "memory"), "faithful": (*_TEXT, "faithful"),
    "val_ppl": (*_RATIO, "perplexity"), "val_loss": ("float", "{:.4f}".format, ""),
    "val_accuracy": ("float", "{:.1%}".format, "accuracy"), "val_ppl_known": (*_RATIO, "known perplexity"),
    "val_bits_per_byte": ("float", "{:.4f}".format, "bits a byte"), "val_word_ppl": (*_RATIO, "word perplexity"),
    "epochs": (*_RATIO, "epochs"), "steps": (*_COUNT, "steps"), "tokens_seen": (*_MILLIONS, "tokens"),
    "train_seconds": ("float", duration, "time"), "tokens_per_second": ("float", "{:,.0f}".format, "tokens/s"),
    "status": (*_TEXT, "status"), "folder": (*_TEXT, ""), "note": (*_TEXT, ""),
}  # fmt: skip
"""Scores are those of the best validation, costs those up to the last one; seconds are of training alone."""

SET_UP_COLUMNS = list(COLUMNS)[2 : list(COLUMNS).index("val_ppl")]
SCORE_COLUMNS = [name for name in COLUMNS if name not in SET_UP_COLUMNS]
PROTOCOL_SETTINGS = {
    "tokenizer": "", "sentencepiece_model": "sentencepiece", "vocab_size": "", "layout": "", "sequence_length": "",
    "stride": "windows", "min_words": "windows", "eval_lanes": "stream",
}  # fmt: skip
"""Settings that make ids of a text, and the tokenizer or layout that reads them ("" = every one)."""
_COVERED = {*SET_UP_COLUMNS, "lr_rule", "lr_base", "batch_base"}  # settings that columns show


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

    def to_json(self) -> str:
        """Rows, groups and notes."""
        values = {"rows": self.rows(), "groups": {a: asdict(b) for a, b in self.groups.items()}, "notes": self.notes}
        return json.dumps(finite(values), indent=2, allow_nan=False) + "\n"


@file_errors()
def collect(runs, *, published: bool = True) -> Comparison:
    """What `compare` shows; see there."""
    runs = [runs] if isinstance(runs, (str, Path)) or hasattr(runs, "folder") else runs
    folders = {(path := user_path(getattr(run, "folder", run))).resolve(): path for run in runs}
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
    record = read_record(folder)
    try:
        begun = record.best or (folder / HISTORY).exists()  # written a moment after run.json
        rows = read_history(folder).astype({"step": float, "val_ppl": float}) if begun else None
        rows = [] if rows is None else rows.reindex(columns=HISTORY_COLUMNS).astype(float).to_dict("records")
        return _run(folder, label, record, rows)
    except RunError:
        raise
    except (FileMissingError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder}: run.json or history.csv is damaged: not what a run writes ({error!r})") from error


def _run(folder: Path, label: str, record: RunRecord, rows: list[dict[str, float]]) -> Entry:
    best, last = record.best or {}, rows[-1] if rows else {"step": record.step}
    data, decided, machine, config = record.data or {}, record.decided, record.environment or {}, record.config
    settings = {  # that define a result; one that is younger than the record had its default
        name: config[item.section].get(name, item.default)
        for name, item in flat_fields().items()
        if item.metadata["identity"] and config.get(item.section)
    }
    imported = record.imported or {}
    known = {name: value for name, value in settings.items() if name not in imported.get("unknown", ())}
    note = f"not faithful: {record.faithful_reason}" if record.faithful_reason else None
    note = "imported; that it scored this text is assumed, unknown settings are left out" if imported else note
    plan = dict(record.plan or ())
    planned = plan.get("learning rate", plan.get("rate", "nan")).split(":")[0]  # the peak, to three digits
    per_epoch, seconds = float(data.get("training_tokens") or math.nan), last.get("train_seconds") or math.nan
    tokens = per_epoch * last.get("epoch", math.nan)
    threads = (
        f", {counted(machine['threads'], 'thread')}" if machine.get("device") == "cpu" and "threads" in machine else ""
    )
    values = {
        "run": label, "published": False, "preset": record.preset, "data": data.get("name"),
        "tokenizer": known.get("tokenizer"), "parameters": record.parameters, "status": record.status,
        "batch_size": decided.get("batch_size") or known.get("batch_size"), "optimizer": known.get("optimizer"),
        "lr": known.get("lr") or float(planned), "precision": decided.get("precision"),
        "engine": decided.get("engine"), "device": name + threads if (name := machine.get("device_name")) else None,
        "epochs": last.get("epoch"), "steps": last["step"], "tokens_seen": tokens, "train_seconds": seconds,
        "tokens_per_second": tokens / seconds, "peak_memory_bytes": record.peak_memory_bytes,
        "faithful": record.faithful, "folder": str(folder), "note": note,
    } | {name: best.get(name) for name in COLUMNS if name.startswith("val_")}  # fmt: skip
    curve = [row | {"tokens": per_epoch * row["epoch"]} for row in rows if math.isfinite(row["val_ppl"])]
    return Entry(values, curve, _scored(record, settings), known)


def _scored(record: RunRecord, settings: dict[str, Any]) -> Scored:
    data, digest = record.data or {}, (record.validation or {}).get("digest")
    if not digest and record.published_protocol:  # which has always been decided by the ids themselves
        digest = series.VALIDATION_DIGEST
    readers = {"", settings.get("tokenizer"), settings.get("layout")}
    protocol = {name: settings[name] for name, by in PROTOCOL_SETTINGS.items() if name in settings and by in readers}
    doubted = record.imported and not digest  # by the import itself, which scored the weights
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
