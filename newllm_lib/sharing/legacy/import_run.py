"""The folder of a run, written from an old file."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from newllm_lib.config import SPECIAL_TOKENS, ModelConfig, RunConfig, flat_fields, presets, published
from newllm_lib.config.places import user_path
from newllm_lib.data.dataset import Prepared, prepare
from newllm_lib.errors import ConfigError, DataError, RunError
from newllm_lib.evaluation import Metrics, evaluate_split
from newllm_lib.generation import generate_texts
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.pretrained import export_model
from newllm_lib.model.recurrence.self_check import choose_numerics
from newllm_lib.reporting import curves, report
from newllm_lib.reporting.diagnostics import best_row
from newllm_lib.reporting.formatting import counted
from newllm_lib.reporting.record import MODEL, RunRecord, write_history, write_record
from newllm_lib.runs.recorder import SAMPLE_TOKENS, command, data_facts, sample_prompts, validation_facts
from newllm_lib.sharing.legacy.old_checkpoint import SHAPE_ATTRIBUTES, History, OldFile, Recipe, read_history, read_old
from newllm_lib.sharing.legacy.safe_unpickle import Record
from newllm_lib.system.files import file_errors
from newllm_lib.system.hardware import default_eval_batch_size, environment

SCORE_TOLERANCE = 0.05
"""Share by which a perplexity here may differ from the history's before the text is doubted: the weighting of batches
makes well under 0.01."""


@file_errors()
def import_run(
    path: str | Path,
    *,
    data: str | tuple[str, ...] = "wikitext-2",
    name: str | None = None,
    results_dir: str | Path = "results",
    preset: str | None = None,
    evaluate: bool = False,
) -> Path:
    """Write the folder of a run from an old `.pt` file and return it; its status is "imported".

    data: the text of the run, from whose training split the vocabulary is made again, since the file holds none.
    name: the folder (None = the file's name without .pt). preset: the published run that this is, which the report
    then sets beside it. evaluate: score the weights on the validation split too.

    Errors as for `import_checkpoint`; RunError where the folder is there already, DataError where the vocabulary has
    another size than the model, ConfigError where the preset has another shape; NetworkError, FileError or DataError
    where the text cannot be had. In each case nothing is left behind.
    """
    old = read_old(user_path(path))
    history, recipe = read_history(old), old.recipe()
    config = _run_config(old, recipe, preset).replace(
        name=name or old.path.stem, results_dir=results_dir, data=data, tokenizer="words"
    )
    folder = Path(config.results_dir) / str(config.name)
    if folder.exists():
        raise RunError(f"{folder}: is there already; give the import another name, or move that folder away")
    prepared = prepare(config)
    _check_vocabulary(old, prepared)
    model = old.model()
    scores = _score(model, prepared) if evaluate else None
    record = _record(old, recipe, config, prepared, history, scores)
    record.samples = _samples(model, prepared)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        export_model(temporary / MODEL, model, prepared.tokenizer, protocol=prepared.config.data)
        write_record(temporary, record)
        write_history(temporary, history.rows)
        if history.rows:
            curves.write_curves(temporary, record, history.rows)
        report.write_report(temporary, record, history.rows)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _run_config(old: OldFile, recipe: Recipe, preset: str | None) -> RunConfig:
    """The preset's configuration, or the published one, with what the file says; ConfigError for another shape."""
    base = presets.get(preset) if preset else RunConfig(preset="imported")
    if preset:
        for name, value in old.shape.items():
            if getattr(base.model, name) != value:
                raise ConfigError(
                    f"preset {preset!r} has {name} {getattr(base.model, name)}, {old.path} has {value}: it is not that "
                    "run; leave the preset out, or name another"
                )
    return base.replace(**old.shape, **recipe.recognised)


def _check_vocabulary(old: OldFile, prepared: Prepared) -> None:
    size, wanted = prepared.tokenizer.vocab_size, old.shape["vocab_size"]
    if size != wanted:
        raise DataError(
            f"data {prepared.corpus_name}: the vocabulary of its training split has {size} ids, the model in "
            f"{old.path} has {wanted}: name the text that the run was trained on with data= (in the shell --data)"
        )


def _score(model: NewLLM, prepared: Prepared) -> Metrics:
    """The weights on the validation split, in FP32 on the CPU."""
    precision, engine = choose_numerics("cpu", "fp32")
    return evaluate_split(
        model,
        prepared.split("validation"),
        precision=precision,
        batch_size=prepared.config.train.eval_batch_size or default_eval_batch_size("cpu"),
        engine=engine.run,
    )


def _samples(model: NewLLM, prepared: Prepared) -> list[str]:
    """Texts after the first words (bold) of long validation texts, as the report of any run has them."""
    prompts = [prepared.tokenizer.decode(ids) for ids in sample_prompts(prepared)]
    written = generate_texts(model, prepared.tokenizer, prompts, seed=0, max_new_tokens=SAMPLE_TOKENS)
    return [f"**{sample.prompt}**{sample.text}" for sample in written]


# --- the record -------------------------------------------------------------------------------------------------


def _record(
    old: OldFile, recipe: Recipe, config: RunConfig, prepared: Prepared, history: History, scores: Metrics | None
) -> RunRecord:
    """run.json: what is known, and under "imported" what the file says; what is not known is None."""
    train, validation = prepared.split("train"), prepared.split("validation")
    doubted = scores is not None and _distance(scores, history) > SCORE_TOLERANCE
    return RunRecord(
        run=config.name,
        preset=config.preset,
        status="imported",
        identity=None,
        parameters=config.model.num_parameters,
        published_protocol=validation.digest == published.VALIDATION_DIGEST and not doubted,
        faithful=None,
        faithful_reason=None,
        decided={},
        commands=[command().replace("newllm_lib.train(", "newllm_lib.import_run(")],
        plan=_lines(old, recipe, config, prepared, history, scores),
        data=data_facts(prepared, train),
        validation=validation_facts(validation) | ({"digest": None} if doubted else {}),
        peak_memory_meaning="unknown",
        environment=environment(None),  # this machine has imported the run, not trained it
        config=config.to_dict(),
        step=None,
        total_steps=None,
        best=best_row(history.rows),
        imported={
            "file": old.path.name,
            "sha256": old.sha256,
            "config_class": old.config_class,
            "recognised": recipe.recognised,
            "rejected": recipe.rejected,
            "others": recipe.others,
            "unknown": unknown_settings(recipe),
            "notes": history.notes,
            "scores": scores.to_dict() if scores else None,
        },
    )


def unknown_settings(recipe: Recipe) -> list[str]:
    """Settings of the recipe that the file does not tell; run.json has a preset's or the published value for them."""
    return [
        name
        for name, item in flat_fields().items()
        if item.section in ("model", "train") or name in ("sequence_length", "stride", "min_words")
        if name not in recipe.recognised and name not in SHAPE_ATTRIBUTES
    ]


def _theirs(history: History) -> float | None:
    """The history's own perplexity for the weights in the file: that of its last epoch."""
    value = history.rows[-1]["val_ppl"] if history.rows else None
    return value if value is not None and math.isfinite(value) else None


def _distance(scores: Metrics, history: History) -> float:
    """Relative distance of the perplexity here from the history's for the same weights; 0 where that has none."""
    theirs = _theirs(history)
    return abs(scores.perplexity / theirs - 1) if theirs else 0.0


def _lines(
    old: OldFile, recipe: Recipe, config: RunConfig, prepared: Prepared, history: History, scores: Metrics | None
) -> list[tuple[str, str]]:
    """(what, what was found) for the reader."""
    stand_in = f"the preset {config.preset}" if config.preset in presets.PRESETS else "the published baseline"
    texts = {split: len(encoded) for split, encoded in prepared.texts.items()}
    lines = [
        ("file", f"{old.path.name}, sha256 {old.sha256[:16]}…"),
        ("model", _shape_text(config.model)),
        ("history", _history_text(history)),
        ("weights", _weights_text(history)),
        *(("note", note) for note in history.notes),
        ("config", _config_text(old, recipe)),
        ("recognised", _listed(recipe.recognised) or "nothing"),
        *(("not taken", text) for text in recipe.rejected),
        *([("not recognised", _listed(recipe.others))] if recipe.others else []),
        ("unknown", f"every other setting of the recipe; in run.json {stand_in} stands for it"),
        ("data", f"{prepared.corpus_name}: {texts['train']:,} training and {texts['validation']:,} validation texts; "
                 "that the run used them is assumed, the file does not tell"),
        ("tokenizer", f"made again: the {config.model.vocab_size - len(SPECIAL_TOKENS):,} most frequent words of "
                      f"the training split of {prepared.corpus_name}; the file holds none"),
    ]  # fmt: skip
    return lines + ([("scored here", _scores_text(scores, history))] if scores else [])


def _shape_text(model: ModelConfig) -> str:
    return (
        f"{model.num_parameters:,} parameters ({counted(model.num_layers, 'layer')} of {model.hidden_dim}, embedding "
        f"{model.embed_dim}, context {model.context_dim}, vocabulary {model.vocab_size}), by the tensors' shapes"
    )


def _config_text(old: OldFile, recipe: Recipe) -> str:
    config = old.payload.get("config")
    if config is None:
        return "none in the file"
    text = f"an object of {old.config_class}" if isinstance(config, Record) else f"a {type(config).__name__}"
    stored = recipe.recognised or recipe.rejected or recipe.others
    return text if stored else f"{text}, with no stored value (those of a class itself are not in a file)"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def _history_text(history: History) -> str:
    best = best_row(history.rows)
    found = f", best validation perplexity {best['val_ppl']:.2f} after epoch {best['epoch']}" if best else ""
    epochs = counted(len(history.rows), "epoch")
    return f"{epochs}{found}, as the file has it (the series weighted batches by rows, not tokens)"


def _weights_text(history: History) -> str:
    """Which epoch the weights are of: a file is written after the last epoch of its own lists."""
    if not history.rows:
        return "of an unknown epoch: the lists are empty"
    last, best = history.rows[-1]["epoch"], best_row(history.rows)
    if best is None or best["epoch"] == last:
        return f"after epoch {last}, the last of the history" + (" and its best" if best else "")
    return (
        f"after epoch {last}, the last of the history; its best was epoch {best['epoch']} (PPL {best['val_ppl']:.2f}), "
        "whose weights this file does not hold"
    )


def _scores_text(scores: Metrics, history: History) -> str:
    text = (
        f"PPL {scores.perplexity:.2f}, accuracy {scores.accuracy:.1%} over {scores.tokens:,} validation targets, "
        "weighted by tokens"
    )
    theirs, share = _theirs(history), _distance(scores, history)
    if not theirs:
        return f"{text}; the history has no figure for these weights"
    text += f"; the history's own figure for these weights is {theirs:.2f} ({share:.1%} apart)"
    if share <= SCORE_TOLERANCE:
        return text
    return f"{text}: THEY DIFFER, so the text or the vocabulary is hardly that of the run"
