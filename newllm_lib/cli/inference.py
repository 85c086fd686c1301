"""newllm evaluate, newllm generate: what one does with a trained model."""

from __future__ import annotations

import sys
from typing import Any

import click

from newllm_lib.cli.output import echo, echo_exact, echo_json
from newllm_lib.config import SPECIAL_TOKENS, UNK
from newllm_lib.data.encodings import decoded


@click.command()
@click.argument("run")
@click.option("--data", multiple=True, help="Other text than the run's own (as for train).")
@click.option("--split", default="validation", show_default=True, help="train, validation, test, or all of the text.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    help="Number format of the products.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def evaluate(run: str, data: tuple[str, ...], split: str, precision: str, device: str, as_json: bool) -> None:
    """Score RUN (a run's folder, its model/ folder, or a checkpoint) on a split, by the run's own data protocol."""
    from newllm_lib import runs

    source = data[0] if len(data) == 1 else data or None
    metrics = runs.evaluate(run, source, split=split, precision=precision, device=device)
    if as_json:
        echo_json(metrics.to_dict())
        return
    text = "whole text" if split == "all" else f"{split} split"
    echo(f"{run}, {text}: {metrics.tokens:,} targets, {metrics.unknown_share:.1%} of them <UNK>")
    known = ("", "", "")
    if metrics.bits_per_byte is None:
        values = (
            _wide(metrics.perplexity_known),
            f"{metrics.loss_known:10.4f}",
            f"{metrics.accuracy_known:10.2%}",
        )
        known = tuple(f"   over known words {value}" for value in values)
    echo(f"  perplexity   {_wide(metrics.perplexity)}{known[0]}")
    echo(f"  loss         {metrics.loss:10.4f}{known[1]}  (nats a token)")
    echo(f"  accuracy     {metrics.accuracy:10.2%}{known[2]}")
    if metrics.bits_per_byte is not None:
        echo(f"  bits a byte  {metrics.bits_per_byte:10.4f}   word-level perplexity {metrics.word_perplexity:.4g}")
    if metrics.bits_per_byte_known is not None:
        share = f"{metrics.unknown_bytes_share:.1%} of the bytes"
        echo(f"               {metrics.bits_per_byte_known:10.4f}   without the pieces that spell <unk> ({share})")


@click.command()
@click.argument("run")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; repeat for several (none: a new text).")
@click.option("--prompts", "file", type=click.File("rb"), help="UTF-8 file with one prompt per line (- = stdin).")
@click.option("--tokens", "max_new_tokens", default=60, show_default=True, help="Most new tokens.")
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", default=0, show_default=True, help="Draw from this many of the likeliest tokens (0 = all).")
@click.option("--top-p", default=1.0, show_default=True, help="Draw from the likeliest that reach this probability.")
@click.option("--allow-unknown", is_flag=True, help=f"Let {SPECIAL_TOKENS[1]} be drawn too.")
@click.option("--stop", multiple=True, help="End a text before this text; repeat for several.")
@click.option("--seed", type=int, default=None, help="Seed of the draw; without it, another text each time.")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Texts for each prompt.")
@click.option("--interactive", is_flag=True, help="Prompts from the keyboard, one text with its context carried on.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: prompt, text, tokens, log-probabilities, the end.")
def generate(run: str, prompts: tuple[str, ...], file, interactive: bool, **options: Any) -> None:
    """Write text with RUN: a run's folder, a model folder, or a checkpoint file."""
    from newllm_lib import runs
    from newllm_lib.generation import Writer, seeded_generator

    model, tokenizer, *_ = runs.load_model(run)
    seed, samples, as_json = options.pop("seed"), options.pop("samples"), options.pop("as_json")
    if interactive:
        if prompts or file or as_json or samples > 1:
            raise click.UsageError("--interactive takes its prompts from the keyboard, one text at a time")
        _converse(Writer(model, tokenizer), tokenizer, seeded_generator(model, seed), options)
        return
    if file:
        prompts += _lines(file)
        if not prompts:
            raise click.UsageError(f"--prompts {file.name}: holds no prompt")
    if wrong := [prompt for prompt in prompts if _surrogates(prompt)]:
        raise click.UsageError(f"prompt {wrong[0]!r}: not UTF-8")
    _warn_unknown(tokenizer, prompts)
    texts = _texts(model, tokenizer, [prompt for prompt in prompts or ("",) for _ in range(samples)], seed, options)
    if as_json:
        echo_json([text._asdict() for text in texts], ascii_only=False)
    else:
        echo_exact("\n\n".join(text.prompt + text.text for text in texts))


def _surrogates(text: str) -> bool:
    """Whether a text holds what Python makes of bytes that are not UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _lines(file) -> tuple[str, ...]:
    """The prompts of a file: its lines, without the blank ones at its end, which an editor may have left."""
    name = getattr(file, "name", "-")
    text = decoded(file.read(), f"--prompts {name}", name).replace("\r\n", "\n").replace("\r", "\n")
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return tuple(lines)


_BATCH = 256
"""Texts written at once: enough for products at full speed."""


def _texts(model, tokenizer, prompts: list[str], seed: int | None, options: dict[str, Any]) -> list:
    from newllm_lib.generation import generate_texts

    texts = []
    for start in range(0, len(prompts), _BATCH):
        chosen = None if seed is None else seed + start
        texts += generate_texts(model, tokenizer, prompts[start : start + _BATCH], chosen, **options)
    return texts


def _converse(writer, tokenizer, generator, options: dict[str, Any]) -> None:
    """Read a line, write its continuation as it comes, until the end of the input or Ctrl-C at the prompt."""
    echo("Type text to append it. Enter alone lets the model continue. /new starts a new text, Ctrl-D quits.", err=True)
    while True:
        try:
            line = input("> " if sys.stdin and sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt, RuntimeError):  # the last where there is no standard input
            echo(err=True)
            return
        except UnicodeDecodeError as error:
            raise click.ClickException(f"the input is not UTF-8 ({error})") from error
        if line.strip() == "/new":
            writer.reset()
            continue
        _warn_unknown(tokenizer, (line,))
        try:
            for piece in writer.write(line, generator=generator, **options):
                echo_exact(piece, nl=False)
        except KeyboardInterrupt:
            echo(" (stopped)", nl=False, err=True)
        echo()


def _warn_unknown(tokenizer, prompts: tuple[str, ...]) -> None:
    if any(UNK in tokenizer.encode(prompt) for prompt in prompts):
        echo(f"warning: words of the prompt are not in the vocabulary and are read as {SPECIAL_TOKENS[UNK]}", err=True)


def _wide(perplexity: float) -> str:
    """A perplexity in a column of ten."""
    return f"{perplexity:10.3f}" if perplexity < 1e6 else f"{perplexity:10.3g}"
