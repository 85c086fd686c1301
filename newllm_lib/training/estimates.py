"""What a run costs: memory from the shapes, time from a measured speed."""

from __future__ import annotations

from typing import NamedTuple

from newllm_lib.config import ModelConfig
from newllm_lib.reporting.formatting import duration
from newllm_lib.training.setup import Setup

FAR_APART = 10
"""Updates between two validations from which on two that are a single update apart are one."""


class Speed(NamedTuple):
    """How fast a run trains here, and how that is known."""

    tokens_per_second: float
    """Real targets, validation left out."""
    basis: str
    """In words: what was measured, and what was scaled to it."""
    validation_seconds: float | None = None
    """Of one validation and the saving after it; None where that was never measured."""

    def training_seconds(self, setup: Setup, done: int = 0) -> float:
        """Of the steps that are left after `done` ones, validations left out."""
        left = max(0, setup.total_steps - done)
        return left * setup.train_split.num_tokens / setup.steps_per_epoch / self.tokens_per_second

    def total_seconds(self, setup: Setup, done: int = 0) -> float:
        """Of what is left after `done` steps, with validation and saving as far as they were measured."""
        return self.training_seconds(setup, done) + (self.validation_seconds or 0) * validations_left(setup, done)

    def total_text(self, setup: Setup, done: int = 0) -> str:
        """The time that is left, and how that is known."""
        counted = "included" if self.validation_seconds is not None else "not counted"
        return (
            f"about {duration(self.total_seconds(setup, done))}, validation and saving {counted} "
            f"({self.tokens_per_second:,.0f} tokens/s, {self.basis})"
        )


def validations_left(setup: Setup, done: int = 0) -> int:
    """Validations of a run after `done` steps: every `validate_every_steps`, and at the ends of epochs and of the run.

    As `Trainer` does, one that is a single step away from such an end is left out.
    """
    total, epoch, every = setup.total_steps, setup.steps_per_epoch, setup.config.train.validate_every_steps
    ends = {*range(epoch * (done // epoch + 1), total, epoch), total} if done < total else set()
    if not every:
        return len(ends)
    near = {0} if every < FAR_APART else {-1, 0, 1}
    near_an_end = {end + shift for end in ends for shift in near if (end + shift) % every == 0}
    return len(ends) + total // every - done // every - sum(done < step <= total for step in near_an_end)


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters that multiply each token: the token half of the first layer is looked up, not multiplied."""
    h, c = config.hidden_dim, config.context_dim
    return h * c + (config.num_layers - 1) * h * h + 3 * c * h + config.vocab_size * h


def memory_estimate_bytes(setup: Setup) -> int:
    """Training memory beside torch itself: weights, gradients, optimizer, and what the backward pass keeps."""
    train, model = setup.config.train, setup.config.model
    states = 1 if train.optimizer == "muon" else 2
    fixed = model.num_parameters * 4 * (2 + states)
    rows = min(train.micro_batch_size or train.batch_size, train.batch_size)
    slots = rows * (setup.config.data.sequence_length - 1)
    width = 4 if setup.precision.name == "fp32" else 2
    of_slots = _reference_bytes if setup.engine.name == "reference" else _packed_bytes
    return fixed + of_slots(model, width, slots)


def _reference_bytes(model: ModelConfig, width: int, slots: int) -> int:
    """What the reference engine keeps for each slot: a layer's output (and mask), the gates in FP32, the ends."""
    layers = model.num_layers * model.hidden_dim * (2 * width + 1 if model.dropout else width)
    gates = model.context_dim * (3 * width + 11 * 4)
    ends = (model.embed_dim + 2 * model.hidden_dim) * (4 + width) + model.vocab_size * width
    # 1.25: what allocators keep; fits within 10 % the growth measured at batch 128 and 512 (results/LOG.md)
    return int(1.25 * slots * (layers + gates + ends)) + (64 << 20)


def _packed_bytes(model: ModelConfig, width: int, slots: int) -> int:
    """What the fused engine keeps: every output once, and a block of the backward loop's gradients twice.

    Against the growth measured at batch 32 to 2048: within 15 % in bf16, up to 25 % too high in FP32.
    """
    layers = model.num_layers * model.hidden_dim + 3 * model.context_dim
    ends = 4 * model.hidden_dim + model.context_dim + model.vocab_size
    kept = slots * (width * (layers + ends) + 4 * model.context_dim)
    return int(1.1 * kept) + min(slots, 1 << 14) * 2 * width * layers + (128 << 20)
