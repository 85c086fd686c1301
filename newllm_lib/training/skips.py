"""When skipped steps stop an FP16 run, and the diagnosis it ends with. Pure functions of numbers and names.

A few skipped steps are normal: the loss scale starts high and is halved at each of them. Many mean that the run makes
no progress, and a skip at a loss scale below 1 that none will help.
"""

from __future__ import annotations

from collections.abc import Sequence

from newllm_lib.reporting.formatting import counted

_NAMES = 4
"""Parameters that a diagnosis names; of more it gives the number."""


def remembered(recent: Sequence[int], skipped: bool, limit: int) -> list[int]:
    """The last 2 x `limit` attempts (1 = skipped) once another one is added to `recent`."""
    return [*recent, int(skipped)][-2 * limit :]


def diagnosis(recent: Sequence[int], limit: int, loss_scale: float, parameters: Sequence[str]) -> str | None:
    """Why a run stops at a skipped step, None where it goes on.

    recent: as `remembered`, the last one being this step; limit: TrainConfig.max_skipped_steps; loss_scale: of this
    step; parameters: those whose gradient was not finite. The run stops at `limit` skips in a row, at more than half of
    2 x `limit` attempts, which a single good step now and then does not hide, and at a loss scale below 1.
    """
    in_a_row = next((count for count, skipped in enumerate(reversed(recent)) if not skipped), len(recent))
    if loss_scale < 1:
        what = (
            f"a step was skipped at a loss scale of {loss_scale:g}, below 1: no loss scale makes its gradients finite"
        )
    elif in_a_row >= limit:
        were = "was" if in_a_row == 1 else "were"
        what = f"{counted(in_a_row, 'step')} in a row {were} skipped because of gradients that are not finite"
    elif sum(recent) > limit:
        what = f"{sum(recent)} of the last {len(recent)} steps were skipped because of gradients that are not finite"
    else:
        return None
    return (
        f"{what}. The gradient of {listed(parameters)} left the range of FP16 (largest number 65,504; loss scale "
        f"{loss_scale:g}). A run keeps its precision, so train another one with precision = fp32, or bf16 where the "
        "hardware has it (if this one has a name, under another name)"
    )


def listed(parameters: Sequence[str]) -> str:
    """The first few parameters by name, and how many more there are."""
    more = len(parameters) - _NAMES
    return ", ".join(parameters[:_NAMES]) + (f" and {more} more" if more > 0 else "")
