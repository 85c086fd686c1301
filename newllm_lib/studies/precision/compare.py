"""Two runs on the same batches: where their curves part, and by how much."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pandas import DataFrame


_BAND = 4.0
"""Curves part where they differ by more than so many standard errors of what another draw of batches would give."""


def last_value(values: Any) -> float | None:
    """The last of a series; None of an empty one."""
    return float(values.iloc[-1]) if len(values) else None


def compare_runs(
    first: DataFrame, other: DataFrame, first_rows: DataFrame, other_rows: DataFrame, window: int
) -> dict[str, Any]:
    """A run beside the first: whether they read the same batches, where they part and by how much (other - first)."""
    both = first.merge(other, on="batch", suffixes=("", "_other"))
    rows = first_rows.merge(other_rows, on="step", suffixes=("", "_other"))
    losses, other_losses = both["loss"].to_numpy(), both["loss_other"].to_numpy()
    parted, band = parting(losses, other_losses, window)
    gaps, sizes = trailing_means(other_losses - losses, window), np.abs(other_losses - losses)
    val = (rows["val_loss_other"] - rows["val_loss"]).to_numpy()
    return {
        "batches": len(both),
        "same_batches": int((both["digest"] == both["digest_other"]).sum()),
        "band": band,
        "parted_at": None if parted is None else int(both["batch"].iloc[parted]),
        "rejoined_at": None if parted is None else _rejoined_at(both["batch"], np.abs(gaps) > band),
        "train_largest": _largest(gaps),
        "gap_first": float(sizes[0]) if len(sizes) else None,
        "gap_last": float(np.median(sizes[-window:])) if len(sizes) else None,
        **around_the_first_skip(both, sizes, window),
        "validations": len(val),
        "val_last": float(val[-1]) if len(val) else None,
        "val_mean": float(np.abs(val).mean()) if len(val) else None,
        "distance": last_value(other["distance"].dropna()),
    }


def _rejoined_at(batches: Any, beyond: np.ndarray) -> int | None:
    """The batch from which curves stay together to the end; beyond (n,): whether they are apart, for the last n."""
    if beyond[-1]:
        return None
    return int(batches.iloc[len(batches) - 1 - int(beyond[::-1].argmax()) + 1])


def around_the_first_skip(both: DataFrame, sizes: np.ndarray, window: int) -> dict[str, Any]:
    """Where the other run first skipped a step, and the mean difference (n,) over a window before and after."""
    skips = np.flatnonzero(both["skipped_other"])
    if not len(skips):
        return {"first_skip": None, "gap_before_skip": None, "gap_after_skip": None}
    first = int(skips[0])
    before, after = sizes[max(0, first - window + 1) : first + 1], sizes[first + 1 :][:window]
    return {
        "first_skip": int(both["batch"].iloc[first]),
        "gap_before_skip": float(before.mean()),  # its own loss too: that was before the update
        "gap_after_skip": float(after.mean()) if len(after) else None,
    }


def _largest(values: np.ndarray) -> float | None:
    """The value with the largest size, with its sign."""
    return float(values[np.abs(values).argmax()]) if len(values) else None


def parting(first: np.ndarray, other: np.ndarray, window: int) -> tuple[int | None, float]:
    """The index from which two curves of losses (n,) stay apart, None where they never do, and what counts as apart.

    The means of `window` steps up to a step must differ by more than the band there and for a window of steps on. The
    band is four standard errors of what two draws of batches would differ by: 4 sqrt(2 / window) times the spread of
    the first curve's losses from step to step, the trend left out. Curves that read the same batches share that spread,
    so a smaller difference is real too; but nobody could see it in the curves.
    """
    band = _BAND * math.sqrt(2 / window) * spread(first)
    beyond = np.abs(trailing_means(other - first, window)) > band
    if len(beyond) < window:
        return None, band
    stays = np.lib.stride_tricks.sliding_window_view(beyond, window).all(axis=1)
    return (int(stays.argmax()) + window - 1 if stays.any() else None), band


def spread(losses: np.ndarray) -> float:
    """Standard deviation of losses (n,) around their trend, from the median size of a change between two steps."""
    changes = np.abs(np.diff(losses))
    return float(np.median(changes)) / (0.6745 * math.sqrt(2)) if len(changes) else 0.0


def trailing_means(values: np.ndarray, window: int) -> np.ndarray:
    """(n - window + 1,): the mean of the `window` values up to each, from the first that has so many."""
    if len(values) < window:
        return np.empty(0)
    return np.lib.stride_tricks.sliding_window_view(values, window).mean(axis=1)


def smoothing_window(steps: int) -> int:
    """Steps that curves are smoothed over: a twentieth of them, at least five."""
    return max(5, round(steps / 20))
