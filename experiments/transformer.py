"""A decoder-only transformer over bytes: pre-norm, rotary positions, nothing exotic."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

VOCABULARY = 256


class Attention(nn.Module):
    """Causal self-attention: b x T x width -> b x T x width."""

    cos: Tensor  # T x h / 2, with h = width / heads
    sin: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        half = width // heads // 2
        angle = torch.outer(torch.arange(context), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)  # b x heads x T x h
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(b, t, width))
        return mixed

    def rotate(self, x: Tensor) -> Tensor:
        """Turns pairs of coordinates by an angle that grows with the position (Su et al. 2021, RoFormer, eq. 34)."""
        x1, x2 = x.chunk(2, dim=-1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)


class Block(nn.Module):
    """Attention, then a feed-forward layer of four times the width, each added to the residual stream."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads, context)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class Transformer(nn.Module):
    """Logits of the next byte at each position: b x T bytes (int64) -> b x T x 256, T = context.

    Weights depend on `seed` alone: normal with standard deviation 1 / sqrt(inputs), smaller by 1 / sqrt(2 depth) where
    a matrix writes to the residual stream (Radford et al. 2019, GPT-2). Embeddings have standard deviation 1: smaller
    ones drown in what the blocks add, and short runs then spend most steps on single-byte frequencies.
    """

    def __init__(self, width: int, depth: int, heads: int, context: int, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads, context) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        self.logits = nn.Linear(width, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, matrix in self.named_parameters():
            if matrix.ndim == 2:
                inputs = 1 if name == "embedding.weight" else matrix.shape[1]  # an embedding looks up one row
                residual = (2 * depth) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(matrix, std=residual * inputs**-0.5, generator=generator)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.logits(self.norm(x))
        return logits


def next_byte_loss(model: Transformer, windows: NDArray[np.uint8]) -> Tensor:
    """Mean loss in nats a byte on windows, n x (T + 1) -> (), with bf16 matrix products on a GPU."""
    device = model.logits.weight.device
    text = torch.from_numpy(windows.astype(np.int64)).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(text[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())


def adamw(model: Transformer, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    gains = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=betas, fused=True)
