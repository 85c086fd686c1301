"""newllm evaluate, newllm generate: what one does with a trained model."""

from __future__ import annotations

import json
from typing import Any

import click

from newllm_lib.config import SPECIAL_TOKENS, UNK


@click.command()
@click.argument("run")
@click.option("--data", multiple=True, help="Other text than the run's own (as for train).")
@click.option("--split", default="validation", show_default=True, help="train, validation or test.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    help="Number format of the products.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def evaluate(run: str, data: tuple[str, ...], split: str, precision: str, as_json: bool) -> None:
    """Score RUN (a run's folder, its model/ folder, or a checkpoint) on a split, by the run's own data protocol."""
    from newllm_lib import runs

    source = data[0] if len(data) == 1 else data or None
    metrics = runs.evaluate(run, source, split=split, precision=precision)
    if as_json:
        click.echo(json.dumps(metrics.to_dict(), indent=2))
        return
    click.echo(f"{run}, {split} split: {metrics.tokens:,} targets, {metrics.unknown_share:.1%} of them <UNK>")
    click.echo(f"  perplexity   {metrics.perplexity:10.3f}   over known words {metrics.perplexity_known:10.3f}")
    click.echo(f"  loss         {metrics.loss:10.4f}   over known words {metrics.loss_known:10.4f}  (nats a token)")
    click.echo(f"  accuracy     {metrics.accuracy:10.2%}   over known words {metrics.accuracy_known:10.2%}")


@click.command()
@click.argument("run")
@click.option("--prompt", default="", help="Text to go on from (empty: the start of a text).")
@click.option("--tokens", "max_new_tokens", default=60, show_default=True, help="Most new tokens.")
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", default=0, show_default=True, help="Draw from this many of the likeliest tokens (0 = all).")
@click.option("--top-p", default=1.0, show_default=True, help="Draw from the likeliest that reach this probability.")
@click.option("--allow-unknown", is_flag=True, help=f"Let {SPECIAL_TOKENS[1]} be drawn too.")
@click.option("--seed", type=int, default=None, help="Seed of the draw; without it, another text each time.")
@click.option(
    "--samples", type=click.IntRange(1), default=1, show_default=True, help="How many texts, with consecutive seeds."
)
@click.option("--json", "as_json", is_flag=True, help="Print the texts as a JSON list.")
def generate(run: str, prompt: str, samples: int, seed: int | None, as_json: bool, **options: Any) -> None:
    """Write text with RUN: a run's folder, its model/ folder, or a checkpoint file."""
    from newllm_lib import runs
    from newllm_lib.writing import generate_text

    model, tokenizer, *_ = runs.load_model(run)
    if UNK in tokenizer.encode(prompt):
        click.echo(
            f"warning: words of the prompt are not in the vocabulary and are read as {SPECIAL_TOKENS[UNK]}", err=True
        )
    seeds = [None if seed is None else seed + number for number in range(samples)]
    texts = [generate_text(model, tokenizer, prompt, chosen, **options) for chosen in seeds]
    click.echo(json.dumps(texts, ensure_ascii=False, indent=2) if as_json else "\n\n".join(texts))
