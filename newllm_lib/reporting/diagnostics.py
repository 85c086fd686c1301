"""What the history of a run warns of: a plateau, skipped steps, a validation that turns up. Pure functions of rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from newllm_lib.reporting.formatting import ppl_text

Row = dict[str, Any]
"""A row of the history, as `Progress.validated` gets it; what an imported run does not know is None."""


def best_row(history: list[Row]) -> Row | None:
    """The row with the lowest validation loss; one that is not finite, or not known, is never the best."""
    known = (row for row in history if row["val_loss"] is not None and math.isfinite(row["val_loss"]))
    return min(known, key=lambda row: row["val_loss"], default=None)


def number(row: Row, name: str) -> float:
    """A value of a row; NaN, which is neither above nor below anything, where it has none."""
    return math.nan if row[name] is None else row[name]


def plateau(history: list[Row], unknown_share: float | None) -> str | None:
    """Five validations that moved the perplexity by less than 1%, at the accuracy of saying <UNK> always.

    unknown_share: the fraction of validation targets that are <UNK>; without any there is no such plateau.
    """
    last = history[-5:]
    if len(last) < 5 or not unknown_share:
        return None
    values = [number(row, "val_ppl") for row in last]
    moved = max(values) / min(values) - 1 if all(map(math.isfinite, values)) else math.inf
    at_share = all(abs(number(row, "val_accuracy") - unknown_share) < 0.005 for row in last)
    if moved >= 0.01 or not at_share:
        return None
    return (
        f"plateau: over 5 validations the perplexity moved by {moved:.1%}, and the accuracy is the share of <UNK> "
        f"({unknown_share:.1%}): the model says <UNK> and nothing else"
    )


def skipped_steps(history: list[Row]) -> str | None:
    """Steps that were skipped since the validation before."""
    counts = [0, *(row["skipped_steps"] or 0 for row in history[-2:])]
    new = counts[-1] - counts[-2]
    if new <= 0:
        return None
    return (
        f"skipped steps: {new} since the validation before, {counts[-1]} in all, because gradients were not finite; "
        "a few are normal in FP16, while the loss scale settles"
    )


def turning_up(history: list[Row]) -> str | None:
    """Three validations in a row more than 1% above the best perplexity, the training loss below that of the best."""
    best, last = best_row(history), history[-3:]
    if best is None or len(last) < 3:
        return None
    lowest = number(best, "val_ppl")
    above = all(number(row, "val_ppl") > 1.01 * lowest for row in last)
    falls = all(number(row, "train_loss") < number(best, "train_loss") for row in last)
    if not (above and falls):
        return None
    return (
        f"validation turns up: three in a row at a perplexity more than 1% above the best, {ppl_text(lowest)} at epoch "
        f"{best['epoch']:.2f}, while the training loss falls: more training makes the model worse on new text"
    )


def findings(history: list[Row], unknown_share: float | None) -> dict[str, str]:
    """What the newest row of a history warns of: kind -> text; empty where there is nothing to say."""
    found = {
        "plateau": plateau(history, unknown_share),
        "skipped_steps": skipped_steps(history),
        "turning_up": turning_up(history),
    }
    return {kind: text for kind, text in found.items() if text}


class Spell(NamedTuple):
    """A stretch of validations that all warned of the same thing."""

    text: str
    """As the last of them said it."""
    first_epoch: float
    last_epoch: float
    active: bool
    """Whether the newest validation still warns of it."""

    def __str__(self) -> str:
        first, last = f"{self.first_epoch:.2f}", f"{self.last_epoch:.2f}"
        if first == last:
            return f"epoch {first}: {self.text}"
        return f"since epoch {first}: {self.text}" if self.active else f"epochs {first} to {last}: {self.text}"


def follow(spells: dict[str, Spell], history: list[Row], unknown_share: float | None) -> dict[str, Spell]:
    """The newest spell of each kind (kind -> Spell), after a history that has one row more than `spells` knows."""
    epoch = history[-1]["epoch"]
    after = {kind: spell._replace(active=False) for kind, spell in spells.items()}
    for kind, text in findings(history, unknown_share).items():
        begun = spells[kind].first_epoch if kind in spells and spells[kind].active else epoch
        after[kind] = Spell(text, begun, epoch, True)
    return after


def every_spell(history: list[Row], unknown_share: float | None) -> list[Spell]:
    """All that a history warned of from its first row to its last, as it began."""
    every, newest = {}, {}
    for count in range(1, len(history) + 1):
        newest = follow(newest, history[:count], unknown_share)
        every |= {(kind, spell.first_epoch): spell for kind, spell in newest.items()}
    return list(every.values())
