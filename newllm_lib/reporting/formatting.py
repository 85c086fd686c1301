"""Numbers, times and tables as text."""

from __future__ import annotations

COLUMNS = {
    "step": "step", "epoch": "epoch", "val_ppl": "perplexity", "val_accuracy": "accuracy",
    "val_loss": "validation loss", "train_loss": "training loss", "val_ppl_known": "known perplexity",
    "val_bits_per_byte": "bits a byte", "lr": "learning rate", "train_seconds": "seconds",
}  # fmt: skip
"""How the columns of a history are called, and in which order they are shown, wherever a person reads them."""


def duration(seconds: float) -> str:
    """Seconds in the two largest units that they have: 45 s, 2 min 25 s, 3 h 5 min, 27 h."""
    least, names = (1, ("min", "s")) if round(seconds) < 3600 else (60, ("h", "min"))
    parts = zip(divmod(round(seconds / least), 60), names, strict=True)
    return " ".join(f"{count} {name}" for count, name in parts if count) or "0 s"


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number of things: 1 thread, 2 threads, 1,000 steps; plural: of a noun that does not just take an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def named_lines(lines: list[tuple[str, str]]) -> list[str]:
    """(name, text) as lines, the texts below each other."""
    return [f"{name:>13}  {text}" for name, text in lines]


def ppl_text(perplexity: float) -> str:
    """A perplexity to two places; that of a run that diverged, which may have 184 digits, as 1.2e+184."""
    return f"{perplexity:.2f}" if perplexity < 1e7 else f"{perplexity:.2g}"


def markdown_table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown; `|` in a cell is escaped."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def time_span(seconds: float) -> str:
    """A length of time in words."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return "less than a minute"
    if minutes < 60:
        return counted(minutes, "minute")
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
