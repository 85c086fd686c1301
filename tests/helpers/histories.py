"""Histories of runs, row by row, as a trainer gives them to what shows them."""

import math


def row(epoch=1.0, **changes):
    """A row of a history in which nothing is wrong."""
    values = {
        "step": round(10 * epoch), "epoch": float(epoch), "train_loss": 4.0, "val_loss": 3.5, "val_ppl": 33.1,
        "val_accuracy": 0.34, "val_ppl_known": 90.0, "val_bits_per_byte": None, "val_word_ppl": None,
        "val_bits_per_byte_known": None, "lr": 1e-3,
        "clip": 1.0, "train_seconds": 12.5, "tokens_per_second": 1000.0, "peak_memory_bytes": 1, "skipped_steps": 0,
    }  # fmt: skip
    return values | changes


def history(**columns):
    """Rows of one epoch each from whole columns; the loss goes with the perplexity."""
    rows = []
    for epoch, values in enumerate(zip(*columns.values(), strict=True), start=1):
        changes = dict(zip(columns, values, strict=True))
        if changes.get("val_ppl", 0) > 0:
            changes["val_loss"] = math.log(changes["val_ppl"])
        rows.append(row(epoch, **changes))
    return rows
