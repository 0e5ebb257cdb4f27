"""The baseline of `train_step.py`: the same LLaMA and the same two objectives in plain PyTorch, written independently.

Eager code as a PyTorch user would write it: fused SDPA, fused RMSNorm, fused AdamW, logits for the masked tokens only.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Pre-norm LLaMA block with grouped-query attention."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, mlp_width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.k = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o = nn.Linear(heads * head_dim, width, bias=False)
        self.gate, self.up = nn.Linear(width, mlp_width, bias=False), nn.Linear(width, mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        b, n, _ = x.shape
        h = self.norm1(x)
        q = self.q(h).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(h).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(h).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(b, n, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (half-split): x [b, heads, n, head_dim]; cos, sin [n, head_dim / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Llama(nn.Module):
    """LLaMA with a tied head; `forward` returns hidden states [b, n, width] for tokens int [b, n]."""

    def __init__(self, vocab: int, width: int, depth: int, heads: int, kv_heads: int, head_dim: int,
                 mlp_width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList([Block(width, heads, kv_heads, head_dim, mlp_width) for _ in range(depth)])
        self.norm = nn.RMSNorm(width, 1e-5)
        self.frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        angles = positions[:, None] * self.frequency
        cos, sin = angles.cos(), angles.sin()
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return self.norm(x)


def block_diffusion_mask(length: int, block: int) -> torch.Tensor:
    """BD3-LM's three-part mask over [noisy || clean], bool [2L, 2L]."""
    b = torch.arange(length) // block
    same, before = b[:, None] == b, b[:, None] > b
    return torch.cat([torch.cat([same, before], 1), torch.cat([torch.zeros_like(same), same | before], 1)])


class Trainer:
    """AdamW with gradient clipping on the masked-diffusion loss with weight 1/t, divided by the number of targets.

    block: 0 is the one-stream shifted objective, any other value two streams with blocks of that size. micro_batches:
    how many equal parts a batch is split into, run one after the other.
    """

    def __init__(self, model: Llama, mask_id: int, block: int, learning_rate: float, micro_batches: int = 1) -> None:
        self.model, self.mask_id, self.block, self.micro_batches = model, mask_id, block, micro_batches
        self.optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.95),
                                           weight_decay=0.1, fused=True)
        self.masks: dict[int, torch.Tensor] = {}

    def noise(self, b: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens are masked, bool [b, n], and the noise level t of each, float [b, n]."""
        blocks = n // self.block if self.block else 1
        t = (torch.randperm(b * blocks) + torch.rand(())).view(b, blocks) / (b * blocks)
        t = (1e-3 + (1 - 1e-3) * t).repeat_interleave(n // blocks, 1)
        masked = torch.rand(b, n) < t
        masked[:, 0] = False
        return masked, t

    def loss_sum(self, tokens: torch.Tensor, masked: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Sum of the cross-entropy of the masked tokens, weighted by 1/t, in nats."""
        n = tokens.shape[1]
        noisy = torch.where(masked, self.mask_id, tokens)
        positions = torch.arange(n)
        if self.block:
            mask = self.masks.setdefault(n, block_diffusion_mask(n, self.block))
            hidden = self.model(torch.cat([noisy, tokens], 1), positions.repeat(2), mask)[:, :n][masked]
        else:
            hidden = self.model(noisy, positions, None)[:, :-1][masked[:, 1:]]
        losses = F.cross_entropy(hidden @ self.model.embed.weight.T, tokens[masked], reduction="none")
        return (losses / t[masked]).sum()

    def step(self, tokens: torch.Tensor) -> float:
        """One optimizer step; returns the loss."""
        b, n = tokens.shape
        micro_batches = zip(*(x.chunk(self.micro_batches) for x in (tokens, *self.noise(b, n))))
        self.optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for micro_batch in micro_batches:
            loss = self.loss_sum(*micro_batch) / (b * (n - 1))
            loss.backward()
            value += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        assert math.isfinite(value)
        return value
