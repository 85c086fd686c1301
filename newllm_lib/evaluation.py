"""Loss, perplexity and accuracy, weighted by tokens.

Perplexity is exp(sum of nll / number of real targets), never a mean of batch means. "Known" figures take the same
sums over the targets that are not `<UNK>` (softmax over the whole vocabulary).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from newllm_lib.config import PAD, UNK
from newllm_lib.data.dataset import Split
from newllm_lib.errors import DataError
from newllm_lib.model.loss import token_losses
from newllm_lib.model.newllm import NewLLM
from newllm_lib.model.recurrence import ENGINES
from newllm_lib.system.hardware import Precision
from newllm_lib.system.memory import fewer_rows, is_out_of_memory


@dataclass(frozen=True)
class Metrics:
    """Scores of a model on a split; losses in nats a token, shares from 0 to 1."""

    loss: float
    perplexity: float
    accuracy: float
    loss_known: float
    perplexity_known: float
    accuracy_known: float
    unknown_share: float
    tokens: int
    bits_per_byte: float | None
    """nll / ln 2 / UTF-8 bytes of the scored text, the ends of texts paid for; None where the tokenizer loses text."""
    word_perplexity: float | None
    """exp(nll / words), words being the scored bytes over the bytes a word of the split; None as above."""
    bits_per_byte_known: float | None = None
    """The same over the targets that spell no literal `<unk>`; None where the text has none, or as above."""
    unknown_bytes_share: float | None = None
    """Share of the scored bytes that are in the other targets, those that spell it."""

    def to_dict(self) -> dict[str, float | None]:
        """Field names and plain numbers."""
        return dataclasses.asdict(self)


class MetricSums:
    """Running sums, kept in float64 on the device of the model; `result` divides once, at the end.

    token_bytes (V,) int64: the UTF-8 bytes of each id, on that device; None where the tokenizer loses text.
    """

    def __init__(self, token_bytes: Tensor | None = None, bytes_per_word: float = math.nan):
        self._sums: Tensor | float = 0.0
        self._bytes: Tensor | float = 0.0
        self._unknown: Tensor | float = 0.0  # nll and bytes of the targets that spell <unk>
        self._token_bytes, self._bytes_per_word = token_bytes, bytes_per_word

    def add(self, nll: Tensor, correct: Tensor, targets: Tensor, spelled: Tensor | None = None) -> None:
        """Count nll (N,), correct (N,) and the real targets (N,) they belong to; spelled (N,): which spell `<unk>`."""
        known = targets != UNK
        rows = torch.stack([nll.double(), correct.double(), torch.ones_like(nll, dtype=torch.float64)])
        sums = self._sums + torch.cat([rows.sum(1), (rows * known).sum(1)])
        size = self._bytes if self._token_bytes is None else self._bytes + self._token_bytes[targets].sum()
        unknown = self._unknown
        if spelled is not None and self._token_bytes is not None:
            rows = torch.stack([nll.double(), self._token_bytes[targets].double()])
            unknown = unknown + (rows * spelled).sum(1)
        # all or none: memory may run out before, and the batch comes again
        self._sums, self._bytes, self._unknown = sums, size, unknown

    def result(self) -> Metrics:
        """The metrics of all that was added; DataError when nothing was."""
        if isinstance(self._sums, float):
            raise DataError("there is no token to score")
        nll, correct, tokens, nll_known, correct_known, tokens_known = self._sums.tolist()
        size = float(self._bytes)  # 0 for a tokenizer that loses text
        nll_spelled, spelled = (0.0, 0.0) if isinstance(self._unknown, float) else self._unknown.tolist()
        return Metrics(
            bits_per_byte=nll / math.log(2) / size if size else None,
            word_perplexity=perplexity(nll, size / self._bytes_per_word) if size else None,
            loss=nll / tokens,
            perplexity=perplexity(nll, tokens),
            accuracy=correct / tokens,
            loss_known=nll_known / tokens_known if tokens_known else math.nan,
            perplexity_known=perplexity(nll_known, tokens_known),
            accuracy_known=correct_known / tokens_known if tokens_known else math.nan,
            unknown_share=1 - tokens_known / tokens,
            tokens=round(tokens),
            bits_per_byte_known=(nll - nll_spelled) / math.log(2) / (size - spelled) if 0 < spelled < size else None,
            unknown_bytes_share=spelled / size if 0 < spelled < size else None,
        )


@contextmanager
def copied_to(model: NewLLM, device: str) -> Iterator[NewLLM]:
    """A copy of a model on another device, whose memory is free again afterwards; the model itself if it is there."""
    if model.device == torch.device(device):
        yield model
        return
    copied = copy.deepcopy(model).to(device)
    try:
        yield copied
    finally:
        del copied
        torch.cuda.empty_cache()


@torch.no_grad()
def evaluate_split(
    model: NewLLM,
    split: Split,
    *,
    precision: Precision,
    batch_size: int = 256,
    engine: Callable = ENGINES["reference"],
    fewer: Callable[[int, str], int] = fewer_rows,
    each: Callable[[float], None] = lambda share: None,
) -> Metrics:
    """Scores of a model on a split, without dropout; the model's training mode is left as it was.

    Windows are read `batch_size` at a time, each from an empty context; a stream is read in order, its lanes side by
    side (`batch_size` of them at most), with the context carried over. Where memory runs out, the same rows come
    again, from then on as many at a time as `fewer(rows, failure)` says; MemoryError where one is too many.
    `each` is called with the share that is done, above 0 to 1.
    """
    device = model.device
    ids, spelled = torch.from_numpy(split.ids), split.spelled_unknown
    marks = torch.zeros(1).expand(ids.shape) if spelled is None else torch.from_numpy(spelled)
    token_bytes = None if split.token_bytes is None else torch.from_numpy(split.token_bytes).to(device)
    sums, context, size = MetricSums(token_bytes, split.bytes_per_word), None, batch_size
    was_training = model.training
    model.eval()
    try:
        batches = (ids, marks) if split.carries_context else (ids.split(batch_size), marks.split(batch_size))
        for number, (rows, unknown) in enumerate(zip(*batches, strict=True)):
            parts: list[Tensor] = []
            done = 0
            while done < len(rows):
                part, failure = slice(done, done + size), None
                before = None if context is None else context[part]
                try:
                    batch, mark = rows[part].to(device, torch.int64), unknown[part].to(device)
                    parts.append(_score(model, batch, mark, before, precision, engine, sums))
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    failure = str(error)
                if failure is None:
                    done += size
                    each((number + min(1.0, done / len(rows))) / len(batches[0]))
                else:
                    size = fewer(min(size, len(rows) - done), failure)
            context = torch.cat(parts) if split.carries_context else None
    finally:
        model.train(was_training)
    return sums.result()


def _score(
    model: NewLLM,
    batch: Tensor,
    spelled: Tensor,
    context: Tensor | None,
    precision: Precision,
    engine: Callable,
    sums: MetricSums,
) -> Tensor:
    """Add the scores of ids (B, S) int64, some of which spell `<unk>` (B, S), to the sums.

    Returns the context (B, C) after them.
    """
    targets = batch[:, 1:]
    with precision.autocast(batch.device.type):
        hidden, after = model.hidden(batch[:, :-1], context, (targets != PAD).sum(1), engine=engine)
        nll, correct = token_losses(hidden, model.head, targets)
    real = targets != PAD
    sums.add(nll, correct, targets[real], spelled[:, 1:][real])
    return after


def perplexity(nll: float, tokens: float) -> float:
    """exp(nll / tokens); NaN without tokens, infinity where it overflows."""
    if not tokens:
        return math.nan
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf
