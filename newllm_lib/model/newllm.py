"""New-LLM: a language model whose memory is one fixed-size context vector, carried from token to token."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import skip_init

from newllm_lib.config import ModelConfig
from newllm_lib.errors import ConfigError
from newllm_lib.model import decoding
from newllm_lib.model.recurrence import ENGINES, Dropout, Weights
from newllm_lib.system.files import write_text_atomic
from newllm_lib.system.hub import own_hub_token


class NewLLM(nn.Module, PyTorchModelHubMixin, library_name="newllm_lib"):
    """The model of the series: `logits, context = model(tokens, context)`.

    The first layer is kept in two halves (token and context) and the three context heads as one matrix; the
    formulas and the parameter count are the published ones. Initial values are drawn from torch's global
    generator; call `initialise(generator)` to draw them again from one of your own.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if isinstance(config, dict):
            config = ModelConfig(**config)
        self.config = config
        self.card = ""  # the model card, Markdown with the hub's metadata; "" = a plain one
        self.companions: dict[str, str] = {}  # texts that save_pretrained writes beside the weights, by file name
        layer = functools.partial(skip_init, nn.Linear)  # initialise() draws every value, so nn.Linear need not
        values = torch.empty(
            config.vocab_size, config.embed_dim
        )  # skip_init of nn.Embedding imports torch._dynamo: 2 s
        self.embedding = nn.Embedding.from_pretrained(values, freeze=False)
        self.from_token = layer(config.embed_dim, config.hidden_dim)
        self.from_context = layer(config.context_dim, config.hidden_dim, bias=False)
        self.layers = nn.ModuleList(layer(config.hidden_dim, config.hidden_dim) for _ in range(config.num_layers - 1))
        self.context_heads = layer(config.hidden_dim, 3 * config.context_dim)
        self.context_norm = nn.LayerNorm(config.context_dim)
        self.output = layer(config.hidden_dim, config.vocab_size)
        self.initialise()

    @classmethod
    def fresh(cls, config: ModelConfig, seed: int, device: str | torch.device = "cpu") -> NewLLM:
        """The weights with which a run of this seed begins; drawn on the CPU, and therefore the same on any device."""
        model = cls(config)
        model.initialise(torch.Generator().manual_seed(seed))
        return model.to(device)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *, token: str | bool | None = None, **options):
        """The weights of a folder or of a repository on the hub; options as of `PyTorchModelHubMixin`.

        token: None = that of HF_TOKEN or of the stored login; nothing is asked for.
        """
        token = own_hub_token() if token is None else token
        return super().from_pretrained(pretrained_model_name_or_path, token=token, **options)

    def push_to_hub(self, repo_id: str, *, token: str | None = None, **options) -> str:
        """Upload weights, tokenizer and card; options as of `PyTorchModelHubMixin`, token as of `from_pretrained`.

        ConfigError without any token.
        """
        token = token or own_hub_token()
        if not token:
            raise ConfigError(
                "push_to_hub needs a token: set HF_TOKEN, log in with huggingface_hub.login(), or pass token=..."
            )
        return super().push_to_hub(repo_id, token=token, **options)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.output.weight.device

    def _save_pretrained(self, save_directory: Path) -> None:
        """The weights, and the tokenizer where it is known; called by `save_pretrained` and `push_to_hub`."""
        super()._save_pretrained(save_directory)
        for name, text in self.companions.items():
            write_text_atomic(save_directory / name, text)

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """The card that was written from the run's report, where there is one."""
        return ModelCard(self.card) if self.card else super().generate_model_card(*args, **kwargs)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw every initial value.

        With `init_std` a number: weights N(0, init_std^2), as published. With None: std gain * sqrt(2 / fan-in) for
        the ReLU layers (He et al. 2015, arXiv 1502.01852; the first one's fan-in is E + C) and gain * sqrt(1 / H)
        for the context heads. Embedding and output head have standard deviations of their own; biases are 0 but
        for the forget gate's.
        """
        config = self.config
        fan_in = config.embed_dim + config.context_dim
        self.embedding.weight.normal_(0, config.embedding_std, generator=generator)
        self.from_token.weight.normal_(0, self._std(2 / fan_in), generator=generator)
        self.from_context.weight.normal_(0, self._std(2 / fan_in), generator=generator)
        for layer in self.layers:
            layer.weight.normal_(0, self._std(2 / config.hidden_dim), generator=generator)
        self.context_heads.weight.normal_(0, self._std(1 / config.hidden_dim), generator=generator)
        self.output.weight.normal_(0, config.output_std, generator=generator)
        for layer in (self.from_token, *self.layers, self.context_heads, self.output):
            layer.bias.zero_()
        self.context_heads.bias[config.context_dim : 2 * config.context_dim] = config.forget_gate_bias
        self.context_norm.reset_parameters()

    def _std(self, variance: float) -> float:
        config = self.config
        return config.init_std if config.init_std is not None else config.init_gain * math.sqrt(variance)

    def weights(self) -> Weights:
        """What an engine needs, as views of the parameters."""
        return Weights(
            embedding=self.embedding.weight,
            token=self.from_token.weight,
            token_bias=self.from_token.bias,
            context=self.from_context.weight,
            layers=tuple((layer.weight, layer.bias) for layer in self.layers),
            heads=self.context_heads.weight,
            heads_bias=self.context_heads.bias,
            norm=self.context_norm.weight,
            norm_bias=self.context_norm.bias,
            clamp=self.config.context_clamp,
        )

    def initial_context(self, rows: int) -> Tensor:
        """The empty context (rows, C): zeros."""
        weight = self.context_norm.weight
        return torch.zeros(rows, self.config.context_dim, dtype=weight.dtype, device=weight.device)

    def hidden(
        self,
        tokens: Tensor,
        context: Tensor | None = None,
        lengths: Tensor | None = None,
        dropout: Dropout | None = None,
        engine: Callable = ENGINES["reference"],
        checked: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The last hidden layer (B, T, H) at each token and the context (B, C) after the last real one.

        tokens (B, T) int64; context (B, C) or None for the empty one; lengths (B,) int64, real tokens a row, or
        None for all. In training mode dropout draws its seed from torch's generator unless one is given. checked:
        whether the tokens are known to be what `check_tokens` asks for, which makes the host wait for a GPU.
        """
        if not checked:
            self.check_tokens(tokens)
        context = self.check_context(context, len(tokens))
        if dropout is None and self.training and self.config.dropout > 0:
            dropout = Dropout(self.config.dropout, int(torch.randint(2**62, ())), tokens.device)
        return engine(self.weights(), tokens, context, lengths, dropout)

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of the next token after each of tokens (B, T), and the context (B, C) after the last."""
        hidden, context = self.hidden(tokens, context)
        return linear(hidden, *self.head), context

    def generate(self, tokens: Tensor, max_new_tokens: int = 50, **options) -> decoding.Generation:
        """New tokens (B, N) after a prompt (B, T), the context to go on from, and log-probabilities.

        A named tuple (tokens, context, log_probs); options as for `newllm_lib.model.newllm.decoding.generate`.
        """
        return decoding.generate(self, tokens, max_new_tokens, **options)

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        """Weight (V, H) and bias (V,) of the output layer."""
        return self.output.weight, self.output.bias

    def check_context(self, context: Tensor | None, rows: int) -> Tensor:
        """The context (rows, C), the empty one for None; ValueError for another shape."""
        if context is None:
            return self.initial_context(rows)
        if context.shape != (rows, self.config.context_dim):
            raise ValueError(f"context has shape {tuple(context.shape)}: must be {(rows, self.config.context_dim)}")
        return context

    def check_tokens(self, tokens: Tensor) -> None:
        """ValueError unless tokens are int64, (rows, length), not empty, beside the weights, and in the vocabulary."""
        if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.numel() == 0:
            raise ValueError(
                f"tokens is {tokens.dtype} of shape {tuple(tokens.shape)}: must be int64 of shape (rows, length), "
                "not empty"
            )
        if tokens.device != self.device:
            raise ValueError(f"tokens are on {tokens.device}: must be on {self.device}, where the model is")
        low, high = torch.stack(torch.aminmax(tokens)).tolist()
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"tokens range from {low} to {high}: must be 0 to {self.config.vocab_size - 1}, the model's vocabulary"
            )
