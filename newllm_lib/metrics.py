"""Loss, perplexity and accuracy, weighted by tokens.

Perplexity is exp(sum of nll / number of real targets), never a mean of batch means. "Known" figures take the same
sums over the targets that are not `<UNK>` (softmax over the whole vocabulary).
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from newllm_lib.buffers import BUFFERS
from newllm_lib.config import PAD, UNK
from newllm_lib.errors import DataError
from newllm_lib.hardware import Precision, is_out_of_memory
from newllm_lib.model import NewLLM
from newllm_lib.recurrence import ENGINES
from newllm_lib.recurrence.gradient_sums import weight_gradient
from newllm_lib.text.prepare import Split

_CHUNK_LOGITS = 1 << 19
"""Logits that exist in FP32 at one time: 2 MiB, which stay in a CPU's cache between the passes over them."""
_ROW_STEP = 256
"""Rows are padded to a multiple of it: every new shape costs the CPU's bf16 library a compiled kernel of about 1 MiB,
and the number of real targets differs from batch to batch."""


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
        self._token_bytes, self._bytes_per_word = token_bytes, bytes_per_word

    def add(self, nll: Tensor, correct: Tensor, targets: Tensor) -> None:
        """Count nll (N,), correct (N,) and the real targets (N,) they belong to."""
        known = targets != UNK
        rows = torch.stack([nll.double(), correct.double(), torch.ones_like(nll, dtype=torch.float64)])
        sums = self._sums + torch.cat([rows.sum(1), (rows * known).sum(1)])
        size = self._bytes if self._token_bytes is None else self._bytes + self._token_bytes[targets].sum()
        self._sums, self._bytes = sums, size  # both or none: memory may run out before, and the batch comes again

    def result(self) -> Metrics:
        """The metrics of all that was added; DataError when nothing was."""
        if isinstance(self._sums, float):
            raise DataError("there is no token to score")
        nll, correct, tokens, nll_known, correct_known, tokens_known = self._sums.tolist()
        size = float(self._bytes)  # 0 for a tokenizer that loses text
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
        )


def fewer_rows(rows: int, failure: str) -> int:
    """Half as many rows (rounded up) to compute at a time after memory ran out; MemoryError where it was one row.

    Frees what the failed try has left behind. Call it outside of the `except` block, whose traceback keeps the tensors
    of the try alive; failure: what its error said.
    """
    gc.collect()
    BUFFERS.release()
    torch.cuda.empty_cache()
    if rows == 1:
        raise MemoryError(
            f"memory ran out with one sequence at a time ({' '.join(failure.split())[:300]}). Less is needed by a "
            "smaller model (hidden_dim, num_layers, vocab_size) and by a shorter sequence_length"
        )
    return -(-rows // 2)


@torch.no_grad()
def evaluate_split(
    model: NewLLM,
    split: Split,
    *,
    precision: Precision,
    batch_size: int = 256,
    engine: Callable = ENGINES["reference"],
    fewer: Callable[[int, str], int] = fewer_rows,
) -> Metrics:
    """Scores of a model on a split, without dropout; the model's training mode is left as it was.

    Windows are read `batch_size` at a time, each from an empty context; a stream is read in order, its lanes side by
    side (`batch_size` of them at most), with the context carried over. Where memory runs out, the same rows come
    again, from then on as many at a time as `fewer(rows, failure)` says; MemoryError where one is too many.
    """
    device = model.output.weight.device
    ids = torch.from_numpy(split.ids)
    token_bytes = None if split.token_bytes is None else torch.from_numpy(split.token_bytes).to(device)
    sums, context, size = MetricSums(token_bytes, split.bytes_per_word), None, batch_size
    was_training = model.training
    model.eval()
    try:
        for rows in ids if split.carries_context else ids.split(batch_size):
            parts: list[Tensor] = []
            done = 0
            while done < len(rows):
                part, failure = slice(done, done + size), None
                before = None if context is None else context[part]
                try:
                    parts.append(_score(model, rows[part].to(device, torch.int64), before, precision, engine, sums))
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    failure = str(error)
                if failure is None:
                    done += size
                else:
                    size = fewer(min(size, len(rows) - done), failure)
            context = torch.cat(parts) if split.carries_context else None
    finally:
        model.train(was_training)
    return sums.result()


def _score(
    model: NewLLM, batch: Tensor, context: Tensor | None, precision: Precision, engine: Callable, sums: MetricSums
) -> Tensor:
    """Add the scores of ids (B, S) int64 to the sums; returns the context (B, C) after them."""
    targets = batch[:, 1:]
    with precision.autocast(batch.device.type):
        hidden, after = model.hidden(batch[:, :-1], context, (targets != PAD).sum(1), engine=engine)
        nll, correct = token_losses(hidden, model.head, targets)
    sums.add(nll, correct, targets[targets != PAD])
    return after


def perplexity(nll: float, tokens: float) -> float:
    """exp(nll / tokens); NaN without tokens, infinity where it overflows."""
    if not tokens:
        return math.nan
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def token_losses(hidden: Tensor, head: tuple[Tensor, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each real target, and whether it was the likeliest.

    hidden (B, T, H); head = weight (V, H) and bias (V,); targets (B, T) int64, PAD where there is none. Returns nll
    (N,) float32 (float64 for float64 input) in nats and correct (N,) bool, over the N targets that are not PAD in
    row-major order. Logits are made in chunks, so (tokens x V) never exists whole in FP32; what the gradient needs is
    kept in the type of the products.
    """
    real = targets != PAD
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        places = real.reshape(-1).nonzero().squeeze(1)
        count = len(places)
        # with the first row, whose extra losses are cut off again; at least once, for there may be no target at all
        places = pad(places, (0, -count % _ROW_STEP if count else _ROW_STEP))
        rows, wanted = (
            hidden.reshape(-1, hidden.shape[-1]).to(dtype).index_select(0, places),
            targets.reshape(-1)[places],
        )
        nll, correct = _TokenLosses.apply(rows, *head, wanted)
    return nll[:count], correct[:count]


class _TokenLosses(torch.autograd.Function):
    """Linear layer and cross entropy together: nll = logsumexp(logits) - logits[target].

    The gradient d nll / d logits = softmax - onehot is made in the forward pass, chunk by chunk while the logits are
    at hand, and kept in the type of the products, which is that of `hidden`; the backward pass is two large products.
    Weight and bias are cast here and not by the caller, so that their gradients, sums over all targets, never pass
    through 16 bits.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """nll (N,) and correct (N,) for hidden (N, H), weight (V, H), bias (V,) and targets (N,)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        ctx.types = weight.dtype, bias.dtype
        weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
        nll = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        correct = torch.empty_like(nll, dtype=torch.bool)
        slopes = BUFFERS.empty(len(hidden), len(weight), like=hidden) if any(ctx.needs_input_grad) else None
        for part in _chunks(len(hidden), len(weight)):
            wanted = targets[part, None]
            logits = linear(hidden[part], weight, bias)  # (n, V)
            shares = logits.log_softmax(1, dtype=wide)
            correct[part] = _is_first_largest(shares, targets[part])
            nll[part] = -shares.gather(1, wanted).squeeze(1)
            if slopes is not None:
                shares = shares.exp_()
                slopes[part] = shares.scatter_add_(1, wanted, shares.new_full(wanted.shape, -1.0))
        ctx.save_for_backward(hidden, weight, slopes)
        ctx.mark_non_differentiable(correct)
        return nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_nll: Tensor, _grad_correct: Tensor):
        """With s the slopes (N, V) and g the gradient of nll: g s W, (g s)^T h and (g s)^T 1."""
        hidden, weight, slopes = ctx.saved_tensors
        largest = grad_nll.abs().amax().clamp(min=torch.finfo(grad_nll.dtype).tiny)  # keeps FP16 in its range
        share = (grad_nll / largest).to(hidden.dtype)[:, None]  # (N, 1), at most 1
        grad_hidden = (slopes @ weight).mul_(share).mul_(largest)
        grad_weight = weight_gradient(slopes, hidden * share).mul_(largest)
        grad_bias = weight_gradient(share, slopes).squeeze(0).mul_(largest)
        weight_type, bias_type = ctx.types
        return grad_hidden, grad_weight.to(weight_type), grad_bias.to(bias_type), None


def _is_first_largest(values: Tensor, index: Tensor) -> Tensor:
    """`values.argmax(1) == index` for values (n, V), index (n,): on a CPU argmax takes 50 times as long as amax."""
    if values.device.type != "cpu":
        return values.argmax(1) == index
    largest = values.amax(1, keepdim=True)
    hit = values.gather(1, index[:, None]) == largest
    hit = hit.squeeze(1)
    rows = hit.nonzero().squeeze(1)
    tied = rows[(values[rows] == largest[rows]).sum(1) > 1]  # equal logits are common in BF16
    hit[tied] = values[tied].argmax(1) == index[tied]
    return hit


def _chunks(rows: int, vocab_size: int) -> list[slice]:
    size = max(1, _CHUNK_LOGITS // vocab_size // _ROW_STEP) * _ROW_STEP
    return [slice(start, start + size) for start in range(0, rows, size)]
