# SPDX-License-Identifier: BSD-3-Clause
"""A small causal language model in the shape of MiniMind, in one file.

RMSNorm before every block, rotary positions, grouped-query attention, a SwiGLU feed-forward, and an
output head that is the embedding table itself. Sequences are padded on the right: attention is
causal, so no real token ever sees the padding behind it, and the only place where padding can do
harm is the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The sizes of a model; the vocabulary of 6400 is MiniMind's."""

    vocab_size: int = 6400
    dim: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2  # each key and value head serves heads / kv_heads query heads
    max_len: int = 128
    rope_base: float = 10_000.0


def rope_table(config: Config) -> Tensor:
    """cos and sin of position * base^(-2i / head_dim): [2, max_len, head_dim / 2]."""
    half = config.dim // config.heads // 2
    frequency = config.rope_base ** (-torch.arange(half) / half)
    angle = torch.outer(torch.arange(config.max_len), frequency)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + half}) of every head by the angle of their position."""
    cos, sin = rope[:, : x.shape[-2]]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.dim // config.heads
        self.q = nn.Linear(config.dim, config.heads * self.head_dim, bias=False)
        self.k = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(config.heads * self.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        def split(y: Tensor, heads: int) -> Tensor:  # [B, T, heads * d] -> [B, heads, T, d]
            return y.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

        q = rotate(split(self.q(x), self.heads), rope)
        k = rotate(split(self.k(x), self.kv_heads), rope)
        v = split(self.v(x), self.kv_heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = -(-8 * dim // 3 // 64) * 64  # 8/3 dim, rounded up to a multiple of 64
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = SwiGLU(config.dim)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class MiniMind(nn.Module):
    """tokens [B, T] -> logits [B, T, V]; `hidden` stops before the head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.register_buffer("rope", rope_table(config), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.rope)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.embed.weight)  # the head is tied
