"""The bench's rows as a table and a plot."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from newllm_lib.escaping import markdown_text, plot_text
from newllm_lib.reporting.curves import draw_or_warn, own_style
from newllm_lib.reporting.formatting import counted
from newllm_lib.studies.bench.execution_choice import choice_text
from newllm_lib.studies.bench.inference_speed import inference_text
from newllm_lib.system.files import write_atomic

SERIES = {
    "published": ("published loop", "#777777"),
    "reference": ("reference", "#d9701e"),
    "fused": ("fused", "#1f6fb4"),
    "graph": ("fused, one CUDA graph", "#7a3fb4"),
    "lstm": ("torch.nn.LSTM", "#3a9a5b"),
}
GROWTH = {
    "batch": "batch (sequences)",
    "length": "sequence length (ids)",
    "hidden_dim": "hidden width",
    "num_layers": "layers",
}
"""What grows, and how the plot calls it."""


def table_text(result: dict[str, Any]) -> str:
    """Markdown: a table of every row, each beside the published loop at the same size where that was run."""
    environment = result["environment"]
    head = (
        f"{markdown_text(environment['device_name'])}, {counted(environment['threads'], 'thread')}, torch "
        f"{markdown_text(environment['versions']['torch'])}.\n"
    )
    parts = [head, _rows_text(result["rows"]) if result["rows"] else ""]
    parts += [choice_text(result["execution"]) if result.get("execution") else ""]
    parts += [inference_text(result["inference"]) if "inference" in result else ""]
    return "\n".join(part for part in parts if part)


def _rows_text(rows: list[dict[str, Any]]) -> str:
    """The table of steps."""
    lines = [
        "Medians of steps taken in turn; slots count padding, tokens do not; the share is the work on real tokens over "
        "the measured rate of matrix products of the same shapes and format.",
        "",
        "| subject | precision | dropout | batch | length | hidden | layers | ms a step | slots/s | tokens/s "
        "| x published | share of product rate | memory above the model |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = published_seconds(row, rows)
        cells = [
            SERIES[row["subject"]][0],
            row["precision"],
            f"{row['dropout']:g}",
            str(row["batch"]),
            str(row["length"]),
            str(row["hidden_dim"]),
            str(row["num_layers"]),
            f"{1000 * row['seconds']:,.{0 if row['seconds'] >= 0.1 else 1}f}",
            f"{row['slots_per_second']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{base / row['seconds']:.2f}" if base else "",
            f"{row['product_share']:.0%}" if row["product_share"] else "",
            f"{row['memory_bytes'] / 2**30:.2f} GiB" if row.get("memory_bytes") else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def published_seconds(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Seconds of the published loop at the size of a row, if it was measured in the same part."""
    same = ("part", "batch", "length", "hidden_dim", "num_layers", "dropout")
    for other in rows:
        if other["subject"] == "published" and all(other[name] == row[name] for name in same):
            return other["seconds"]
    return None


def write_plot(path: Path, result: dict[str, Any]) -> None:
    """One panel for each thing that grows: tokens a second of every subject."""
    draw_or_warn(path, lambda: _write_plot(path, result))


@own_style()
def _write_plot(path: Path, result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    parts = [part for part in GROWTH if any(row["part"] == part for row in result["rows"])]
    figure = Figure(figsize=(4.6 * len(parts), 4.2), layout="constrained")
    figure.suptitle(f"Training speed on {plot_text(result['environment']['device_name'])}", fontsize=12)
    for part, axes in zip(parts, figure.subplots(1, len(parts), squeeze=False)[0], strict=True):
        for subject, (label, color) in SERIES.items():
            rows = [row for row in result["rows"] if row["part"] == part and row["subject"] == subject]
            if rows:
                speeds = [row["tokens_per_second"] for row in rows]
                axes.plot([row[part] for row in rows], speeds, "o-", color=color, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row[part] for row in result["rows"] if row["part"] == part}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(bottom=0)
        axes.set_title("tokens a second", fontsize=11)
        axes.set_xlabel(GROWTH[part])
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    write_atomic(path, lambda file: file.write(image.getvalue()))
