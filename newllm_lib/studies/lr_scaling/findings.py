"""What `lr_scaling` tells: its findings in sentences, lr_scaling.md and lr_scaling.png."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from newllm_lib.escaping import markdown_list, markdown_text
from newllm_lib.reporting.curves import without_missing_picture
from newllm_lib.reporting.formatting import counted, ppl_text

_WORDS = {"none": "no scaling", "linear": "the linear rule", "sqrt": "the square-root rule"}


class Place(NamedTuple):
    """A rule at a batch with an initialisation, over its seeds."""

    initialisation: str
    batch: int
    rule: str
    lr: float
    steps: int
    best: float
    """Mean over the seeds; infinity where none has a figure."""
    low: float
    high: float
    plateau: str

    @property
    def text(self) -> str:
        """Rule, rate and result."""
        rule, _, base = self.rule.partition(":")
        return f"{_WORDS[rule]}{f' from {base}' if base else ''} ({self.lr:.2g}) {self.result}"

    @property
    def result(self) -> str:
        """Perplexity, its range over seeds, and where it stands to the plateau."""
        figure = f"PPL {self.best:.1f}" if math.isfinite(self.best) else "no figure"
        spread = f" ({self.low:.1f} to {self.high:.1f})" if self.high > self.low else ""
        return figure + spread + ("" if self.plateau == "below" else f", {PLATEAU_WORDS[self.plateau]}")


PLATEAU_WORDS = {"on": "on the unigram plateau", "above": "not even down to the unigram plateau"}


def places(record: dict[str, Any]) -> list[Place]:
    """The cells of a record, seeds taken together, in the order of the record."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for cell in record["cells"]:
        groups.setdefault((cell["initialisation"], cell["batch"], cell["rule"]), []).append(cell)
    found = []
    for (initialisation, batch, rule), cells in groups.items():
        values = [math.inf if cell["best_ppl"] is None else cell["best_ppl"] for cell in cells]
        states = {cell["plateau"] for cell in cells}
        worst = next(state for state in ("above", "on", "below") if state in states)
        first = cells[0]
        found.append(
            Place(
                initialisation, batch, rule, first["lr"], first["steps"], mean(values), min(values), max(values), worst
            )
        )
    return found


# --- in words ---------------------------------------------------------------------------------------------------


def findings(record: dict[str, Any]) -> list[str]:
    """What a study's record says, as far as it says it."""
    found = places(record)
    seeds = sorted({cell["seed"] for cell in record["cells"]})
    sentences = [_budget(record)]
    for (initialisation, batch), group in _grouped(found):
        sentences.append(_at_one_batch(initialisation, batch, group))
    sentences += filter(None, [_largest_rate(found), _initialisations(found), _plateaus(record)])
    sentences += [
        f"{cell['run']} broke down and counts with the best figure it had."
        for cell in record["cells"]
        if cell["status"] == "broke down"
    ]
    if len(seeds) == 1:
        sentences.append(
            f"One seed ({seeds[0]}) for each cell: what another seed would change is not known from this grid, so "
            "small differences are no ranking."
        )
    else:
        sentences.append(f"{len(seeds)} seeds for each cell; the figures are means, with the range in brackets.")
    return sentences


def _grouped(found: list[Place]) -> Iterator[tuple[tuple[str, int], list[Place]]]:
    groups: dict[tuple[str, int], list[Place]] = {}
    for place in found:
        groups.setdefault((place.initialisation, place.batch), []).append(place)
    return iter(groups.items())


def _budget(record: dict[str, Any]) -> str:
    return (
        f"Every cell read {counted(record['sequences'], 'sequence')} of {record['data']} "
        f"({record['epochs']:.1f} epochs) with {record['parameters']:,} parameters in {record['precision']}; a larger "
        "batch made fewer steps of it."
    )


def _at_one_batch(initialisation: str, batch: int, group: list[Place]) -> str:
    """The rules at one batch, the best first; equal rates are one run."""
    rates: dict[str, Place] = {}
    for place in group:
        rates.setdefault(f"{place.lr:.6g}", place)
    start = f"{initialisation} initialisation, batch {batch} ({counted(group[0].steps, 'step')}): "
    if len(rates) == 1:
        return f"{start}all rules give the rate {group[0].lr:.2g}, {group[0].result}."
    ranked = sorted(rates.values(), key=lambda place: place.best)
    text = start + "; ".join(place.text for place in ranked) + "."
    if all(place.low == place.high for place in group):  # one seed
        return text
    apart = ranked[0].high < ranked[1].low
    return (
        f"{text} The first is {'below the others with every seed' if apart else 'not below the next with every seed'}."
    )


def _largest_rate(found: list[Place]) -> str:
    """In how many places the best rule is simply the one with the largest rate."""
    contests = [group for _, group in _grouped(found) if len({f"{place.lr:.6g}" for place in group}) > 1]
    if not contests:
        return ""
    won = sum(min(group, key=lambda p: p.best).lr == max(place.lr for place in group) for group in contests)
    return (
        f"The best rule is the one with the largest rate in {won} of {len(contests)} places where the rules differ."
        + (" That speaks for a larger rate here, not for the form of a rule." if won == len(contests) else "")
    )


def _initialisations(found: list[Place]) -> str:
    """How two initialisations compare at equal batch and rule."""
    names = list(dict.fromkeys(place.initialisation for place in found))
    if len(names) != 2:
        return ""
    by_name = {name: {(p.batch, f"{p.lr:.6g}"): p for p in found if p.initialisation == name} for name in names}
    ratios = [first.best / by_name[names[1]][key].best for key, first in by_name[names[0]].items()]
    ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
    better = sum(ratio > 1 for ratio in ratios)
    text = f"At equal batch and rate {names[1]} is below {names[0]} in {better} of {counted(len(ratios), 'run')}"
    return text + (
        f"; PPL of {names[0]} over that of {names[1]}: {min(ratios):.2f} to {max(ratios):.2f}." if ratios else "."
    )


def _plateaus(record: dict[str, Any]) -> str:
    """Which runs never saw more than the word frequencies."""
    own = {cell["run"]: cell for cell in record["cells"]}.values()
    text = f"Knowing the word frequencies alone gives PPL {record['unigram_ppl']:.1f} (the unigram plateau)"
    for name in dict.fromkeys(cell["initialisation"] for cell in own):
        cells = [cell for cell in own if cell["initialisation"] == name]
        left = sum(cell["plateau"] == "below" for cell in cells)
        text += f"; {name} got below it in {left} of {counted(len(cells), 'run')}"
    return text + "."


def text(record: dict[str, Any], folder: Path | None = None) -> str:
    """lr_scaling.md: findings, every cell, what was changed; folder: where its picture is, if it could be drawn."""
    titles = ("initialisation", "batch", "rule", "lr", "seed", "steps", "best PPL", "final PPL", "accuracy", "plateau")
    lines = ["| " + " | ".join(titles) + " | run |", "|" + "---|" * (len(titles) + 1)]
    for cell in record["cells"]:
        accuracy = "" if cell["accuracy"] is None else f"{cell['accuracy']:.1%}"
        values = (cell["initialisation"], cell["batch"], cell["rule"], f"{cell['lr']:.3g}", cell["seed"], cell["steps"])
        figures = ("" if cell[name] is None else ppl_text(cell[name]) for name in ("best_ppl", "final_ppl"))
        row = [*map(markdown_text, values), *figures, accuracy, *map(markdown_text, (cell["plateau"], cell["run"]))]
        lines.append("| " + " | ".join(row) + " |")
    train, environment = record["config"]["train"], record["environment"]
    settings = [
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in fields.items())
        for name, fields in record["initialisations"].items()
    ]
    report = "\n".join(
        [
            "# Learning-rate rules, batches, initialisations",
            "",
            markdown_list(record["findings"]),
            "",
            "![grid and curves](lr_scaling.png)",
            "",
            "## Cells",
            "",
            "Cells of equal rate share a run. Plateau: best perplexity above, on (within 10 %) or below that of the "
            "word frequencies.",
            "",
            *lines,
            "",
            "## What differs, and what does not",
            "",
            markdown_list(settings),
            "",
            f"All else is equal: {train['optimizer']}, betas {train['beta1']} and {train['beta2']}, weight decay "
            f"{train['weight_decay']:g}, {train['lr_schedule']} rate, clipping {train['clip_by_epoch']}, dropout "
            f"{record['config']['model']['dropout']:g}. Rules start from {train['lr_base']:g} at batch "
            f"{train['batch_size']} unless they name another batch.",
            "",
            markdown_text(
                f"{record['precision']}: {record['precision_reason']}. {environment['device_name']}, torch "
                f"{environment['versions']['torch']}, commit {environment['git_commit'] or 'unknown'}."
            ),
            "",
        ]
    )
    return without_missing_picture(report, folder) if folder else report
