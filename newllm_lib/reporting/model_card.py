"""The model card: what a model is, how it was trained and scored, and how to use it, from the run's record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from newllm_lib.config import ModelConfig
from newllm_lib.config.portable import portable
from newllm_lib.escaping import markdown_code, markdown_text
from newllm_lib.reporting import report
from newllm_lib.reporting.formatting import counted, ppl_text
from newllm_lib.reporting.record import CARD, damaged_record, holds_run, read_record

_HUB_DATASETS = {"wikitext-2": "Salesforce/wikitext", "wikitext-103": "Salesforce/wikitext"}
_TEXT_LICENSES = {"wikitext-2": "cc-by-sa-3.0", "wikitext-103": "cc-by-sa-3.0", "builtin": "other"}
"""Of the texts that have a name on every machine, as the hub writes them."""


def card_of(folder: Path, config: ModelConfig) -> str:
    """The card of a run or of a model folder: made from its record, as it lies there, or a plain one.

    RunError where the record is damaged.
    """
    if not holds_run(folder):
        kept = folder / CARD
        return kept.read_text("utf-8", errors="replace") if kept.is_file() else model_card(None, config)
    record = read_record(folder)
    with damaged_record(folder):
        return model_card(record, config)


def model_card(record: dict[str, Any] | None, config: ModelConfig) -> str:
    """README.md of a model folder: the hub's metadata, then Markdown. record: run.json, None where it is not known."""
    record = record and portable(record)
    parts = [
        _metadata(record),
        f"# {markdown_text(record['run']) if record else 'New-LLM'}",
        _introduction(config),
        _use(),
    ]
    if record:
        parts += [
            "## Result",
            report.summary_text(record),
            report.result_text(record),
            "## Training",
            _training(record),
        ]
        if record.get("samples"):
            parts += ["## Samples", "\n\n".join(report.quoted(sample) for sample in record["samples"])]
    parts += ["## Limits", _limits(record), ""]
    return "\n\n".join(parts)


def _limits(record: dict[str, Any] | None) -> str:
    """What a reader should not expect, as far as the perplexity tells; none is claimed where it is not known."""
    best = (record or {}).get("best") or {}
    ppl = best.get("val_ppl")
    known = (
        f"A validation perplexity of {ppl_text(ppl)} means that, on average, the model is as unsure of the next token "
        f"as of a choice between {ppl_text(ppl)} equally likely ones. "
        if ppl is not None and math.isfinite(ppl)
        else ""
    )
    return (
        f"A small model trained on a small text. {known}Its sentences need not make sense. It repeats what its "
        "training text says about people and places, true or not, and must not be used as a source of facts. The "
        "license above is that of the training text; whoever publishes this model decides on its own."
    )


def _metadata(record: dict[str, Any] | None) -> str:
    """The hub's metadata as YAML between two lines; the scores only where the text is one that the hub has."""
    from huggingface_hub import EvalResult, ModelCardData  # a quarter of a second, for export alone

    name = record["data"]["name"] if record else None
    dataset, best = _HUB_DATASETS.get(name), (record or {}).get("best") or {}
    scores = [
        EvalResult(
            task_type="text-generation", dataset_type=dataset, dataset_name=name, dataset_split="validation",
            dataset_config=f"{name}-v1", metric_type=metric, metric_value=round(best[column], 4), metric_name=told,
        )
        for column, metric, told in _SCORES
        if dataset and best.get(column) is not None and math.isfinite(best[column])
    ]  # fmt: skip
    data = ModelCardData(
        license=_TEXT_LICENSES.get(name, "unknown"),
        language="en" if name in _TEXT_LICENSES else None,
        library_name="newllm_lib",
        pipeline_tag="text-generation",
        tags=["new-llm", "language-model"],
        datasets=[dataset] if dataset else None,
        metrics=["perplexity", "accuracy"],
        model_name=str(record["run"]) if scores else None,
        eval_results=scores or None,
    )
    return f"---\n{data.to_yaml()}\n---"


_SCORES = (
    ("val_ppl", "perplexity", "perplexity of the model's own tokens"),
    ("val_accuracy", "accuracy", "share of the model's own tokens that are predicted"),
)
"""Column of the history, the hub's name of the metric, and what is counted."""


def _introduction(config: ModelConfig) -> str:
    return (
        f"New-LLM: a language model without attention, whose memory is one vector of {config.context_dim} numbers, "
        f"carried from token to token. {config.num_parameters:,} parameters: {counted(config.num_layers, 'layer')} of "
        f"{config.hidden_dim}, embedding {config.embed_dim}, vocabulary {config.vocab_size:,}."
    )


def _use() -> str:
    return (
        "```python\n"
        "import newllm_lib as nl\n"
        'model, tokenizer, *_ = nl.load_model("this/folder")\n'
        'print(nl.generate_text(model, tokenizer, "the", seed=1))\n'
        "```\n\n"
        'The weights alone: `nl.NewLLM.from_pretrained("this/folder")`. In a shell: `newllm generate this/folder`.'
    )


def _training(record: dict[str, Any]) -> str:
    data, environment = record["data"], record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [f"- {markdown_text(name)}: {markdown_text(text)}" for name, text in record["plan"] if name != "run"]
    lines += [
        f"- data sha256: {markdown_text(data['fingerprint'])}",
        f"- command: {', then '.join(map(markdown_code, record['commands']))}",
        f"- versions: {markdown_text(versions)}",
    ]
    return "\n".join(lines)
