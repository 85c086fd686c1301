"""What `compare_precisions` tells: its findings in sentences, precisions.md and precisions.png."""

from __future__ import annotations

from typing import Any

from newllm_lib.escaping import markdown_list, markdown_text
from newllm_lib.reporting.formatting import counted
from newllm_lib.studies.precision.rounding import ALL


def findings(record: dict[str, Any]) -> list[str]:
    """What a study's record says, one sentence or two each."""
    first = record["runs"][0]
    found = [_what_was_compared(record, first)]
    control = next((item for item in record["comparisons"] if run_of(record, item)["seed"] != first["seed"]), None)
    for item in record["comparisons"]:
        if item is not control:
            found += _of_one_format(record, item, control)
    found += [_skipped(record, run) for run in record["runs"] if run["loss_scale"]]
    found += [f"{run['label']} broke down: {run['failure']}" for run in record["runs"] if run["failure"]]
    if control:
        found.append(
            f"The yardstick is one other seed ({run_of(record, control)['seed']}: other initial weights, other "
            "batches): one draw of the difference between seeds, not its spread."
        )
    return found


def run_of(record: dict[str, Any], comparison: dict[str, Any]) -> dict[str, Any]:
    """The run that a comparison compares with the first."""
    return next(run for run in record["runs"] if run["label"] == comparison["label"])


def _what_was_compared(record: dict[str, Any], first: dict[str, Any]) -> str:
    ran = [run["precision"] for run in record["runs"] if run["seed"] == first["seed"]]
    text = f"{' and '.join(ran)} on {record['data']}, preset {record['preset']}, seed {first['seed']}"
    missing = [name for name in record["precisions_asked"] if name not in ran]
    reasons = "; ".join(run["reason"] for run in record["runs"] if run["substituted"] or "emulated" in run["reason"])
    if missing:
        text += f". {' and '.join(missing)} was asked for and did not run here ({reasons})"
    elif reasons:
        text += f" ({reasons})"
    engines = {run["engine"] for run in record["runs"]}
    if len(engines) > 1:
        text += f". The engines differ as well ({', '.join(sorted(engines))}), so it is not the format alone"
    return text + "."


def _of_one_format(record: dict[str, Any], item: dict[str, Any], control: dict[str, Any] | None) -> list[str]:
    """One format beside the first: the same batches, one step, where they part, by how much."""
    first, run = record["runs"][0], run_of(record, item)
    names = f"{run['label']} and {first['label']}"
    same = "the same" if item["same_batches"] == item["batches"] else f"{item['same_batches']} equal ones among the"
    found = [
        f"{names} read {same} {counted(item['batches'], 'batch', 'batches')} (compared by hash) from the same initial "
        "weights with the same dropout masks."
    ]
    found += [_one_step(record, name, run["precision"]) for name in _states(record, run["precision"])]
    found.append(_parting(item, names, record["window"], control))
    if item["val_last"] is not None:
        found.append(_validation(item, first, run, control))
    if item["distance"] is not None:
        text = (
            f"Their weights end {_percent(item['distance'])} of their size apart; training moved them by "
            f"{_percent(first['moved'])}"
        )
        found.append(
            text + (f"; with another seed they are {_percent(control['distance'])} apart." if control else ".")
        )
    return found


def _states(record: dict[str, Any], precision: str) -> list[str]:
    return list(dict.fromkeys(row["weights"] for row in record["rounding"] if row["precision"] == precision))


def _one_step(record: dict[str, Any], weights: str, precision: str) -> str:
    rows = [row for row in record["rounding"] if (row["precision"], row["weights"]) == (precision, weights)]
    whole = next(row for row in rows if row["part"] == ALL)
    parts = [row for row in rows if row["part"] != ALL and row["gradient_error"] is not None]
    worst = max(parts, key=lambda row: row["gradient_error"])
    return (
        f"At the same {weights} weights, on the same batch, {precision} changes the loss by "
        f"{_percent(whole['loss_error'])} and the gradient by {_percent(whole['gradient_error'])} (most in "
        f"{worst['part']}: {_percent(worst['gradient_error'])}); the next batch changes the gradient by "
        f"{_percent(whole['other_batch'])}."
    )


def _parting(item: dict[str, Any], names: str, window: int, control: dict[str, Any] | None) -> str:
    if item["train_largest"] is None:
        return f"Too few steps to say where {names} part: the curves are compared as means of {window}."
    band = f"±{item['band']:.3f} nats, what another draw of batches can do to means of {counted(window, 'step')}"
    if item["parted_at"] is None:
        text = f"The training curves of {names} never part: they stay within {band}"
    else:
        text = f"The training curves of {names} part at batch {item['parted_at']}, by more than {band}"
        if item["rejoined_at"]:
            text += f", and are within it again from batch {item['rejoined_at']}"
    text += f". At most they are {abs(item['train_largest']):.4f} apart"
    if control and control["train_largest"] is not None:
        text += f" (another seed: {abs(control['train_largest']):.4f})"
    first, last = item["gap_first"], item["gap_last"]
    return (
        f"{text}. On one and the same batch the losses differ by {first:.1e} at the start and by {last:.1e} at the end."
    )


def _validation(
    item: dict[str, Any], first: dict[str, Any], run: dict[str, Any], control: dict[str, Any] | None
) -> str:
    text = (
        f"The validation loss ends {item['val_last']:+.4f} nats from that of {first['label']} (PPL "
        f"{run['final_ppl']:.2f} against {first['final_ppl']:.2f}), {item['val_mean']:.4f} on average over "
        f"{counted(item['validations'], 'validation')}"
    )
    if not control or control["val_mean"] is None:
        return text + "."
    ratio = item["val_mean"] / control["val_mean"] if control["val_mean"] else float("inf")
    verdict = "below" if ratio < 1 else "not below"
    return (
        f"{text}. Another seed: {control['val_last']:+.4f} and {control['val_mean']:.4f}. The difference between the "
        f"formats is {verdict} that between two seeds ({ratio:.2g} times it)."
    )


def _skipped(record: dict[str, Any], run: dict[str, Any]) -> str:
    start, end = run["loss_scale"]
    text = (
        f"{run['label']}: {run['skipped_steps']} of {run['batches']} steps were skipped because a gradient overflowed; "
        f"the loss scale went from {start:g} to {end:g}."
    )
    item = next((item for item in record["comparisons"] if item["label"] == run["label"]), {})
    if item.get("gap_before_skip") is None or item["gap_after_skip"] is None:
        return text
    return (
        f"{text} A skipped step is an update less, which is more than rounding: around the first one (batch "
        f"{item['first_skip']}) the difference on the same batch went from {item['gap_before_skip']:.1e} to "
        f"{item['gap_after_skip']:.1e}."
    )


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def table_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each run, the comparison with the first beside its own figures."""
    beside = {item["label"]: item for item in record["comparisons"]}
    rows = []
    for run in record["runs"]:
        item = beside.get(run["label"], {})
        rows.append(
            {
                "run": run["label"],
                "final PPL": run["final_ppl"],
                "best PPL": run["best_ppl"],
                "same batches": f"{item['same_batches']} of {item['batches']}" if item else "",
                "parted at batch": (item["parted_at"] or "never") if item else "",
                "validation apart, last": item.get("val_last"),
                "validation apart, mean": item.get("val_mean"),
                "weights apart": item.get("distance"),
                "skipped steps": run["skipped_steps"],
                "training seconds": run["train_seconds"],
            }
        )
    return rows


def text(record: dict[str, Any]) -> str:
    """precisions.md: findings, the table of runs, the errors of one step."""
    rows = [{name: _cell(value) for name, value in row.items()} for row in table_rows(record)]
    rounding = [
        {
            "format": row["precision"],
            "weights": row["weights"],
            "part": row["part"],
            "gradient error": _percent(row["gradient_error"]),
            "another batch": _percent(row["other_batch"]),
        }
        for row in record["rounding"]
    ]
    environment = record["environment"]
    versions, commit = environment["versions"], environment["git_commit"] or "unknown"
    machine = f"{environment['device_name']}, torch {versions['torch']}, commit {commit}"
    return "\n".join(
        [
            "# One run in several number formats",
            "",
            markdown_list(record["findings"]),
            "",
            "![curves](precisions.png)",
            "",
            "## Runs",
            "",
            "Apart is this run minus the first: of the last validation loss, and the mean size over all validations "
            "(nats); of the weights, ||w - w_first|| / ||w_first||. Seconds are of training as it happened, not a "
            "benchmark.",
            "",
            _table(rows),
            "",
            "## One step at the same weights, on the same batch",
            "",
            "Relative to the FP32 gradient of that part of the model; another batch = the FP32 gradient of the next "
            "batch, the yardstick.",
            "",
            _table(rounding),
            "",
            f"{markdown_text(machine)}. Every figure is in study.json, every step in steps.csv.",
            "",
        ]
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else markdown_text(value)


def _table(rows: list[dict[str, str]]) -> str:
    if not rows:
        return "Nothing to show."
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])
