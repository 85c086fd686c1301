"""What the engines are compared with: the published loop as it was written, and an LSTM of equal size."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from newllm_lib.config import PAD, ModelConfig


class PublishedLoop(nn.Module):
    """New-LLM step by step as the series ran it: everything in the time loop, three separate heads, appended lists."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        hidden, state = config.hidden_dim, config.context_dim
        self.token_embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        widths = [config.embed_dim + state] + [hidden] * config.num_layers
        parts: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(widths):
            parts += [nn.Linear(wide, narrow), nn.ReLU(), nn.Dropout(config.dropout)]
        self.fnn_layers = nn.Sequential(*parts)
        self.token_output = nn.Linear(hidden, config.vocab_size)
        self.context_update, self.forget_gate, self.input_gate = (nn.Linear(hidden, state) for _ in range(3))
        self.context_norm = nn.LayerNorm(state)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T)."""
        context = torch.zeros(len(tokens), self.config.context_dim, device=tokens.device)
        embedded = self.token_embedding(tokens)
        logits = []
        for t in range(tokens.shape[1]):
            h = self.fnn_layers(torch.cat([embedded[:, t], context], dim=-1))
            logits.append(self.token_output(h))
            forget, write = torch.sigmoid(self.forget_gate(h)), torch.sigmoid(self.input_gate(h))
            context = forget * context + write * self.context_update(h)
            context = torch.clamp(self.context_norm(context), -self.config.context_clamp, self.config.context_clamp)
        return torch.stack(logits, dim=1)


class LSTMModel(nn.Module):
    """Embedding, one `torch.nn.LSTM` layer, output head: as many parameters as a New-LLM of `config`, to 1 %."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        vocab, embed = config.vocab_size, config.embed_dim
        # 4 h^2 + (4 embed + 8 + vocab) h + vocab (embed + 1) = parameters of the New-LLM, solved for h
        linear, constant = 4 * embed + 8 + vocab, vocab * (embed + 1) - config.num_parameters
        width = round((-linear + math.sqrt(linear**2 - 16 * constant)) / 8)
        self.embedding = nn.Embedding(vocab, embed)
        self.lstm = nn.LSTM(embed, width, batch_first=True)
        self.output = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T)."""
        return self.output(self.lstm(self.embedding(tokens))[0])


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, autocast: torch.autocast) -> float:
    """One step of a model that gives logits (B, T, V), as the series wrote it; returns the loss."""
    with autocast:
        logits = model(ids[:, :-1])
        loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), ignore_index=PAD)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss.item()
