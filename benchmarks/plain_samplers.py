"""The baselines of `sampling.py`: DiffuLLaMA's sampler and the block sampler of LLaDA and Fast-dLLM in plain PyTorch,
following their authors' code, written independently. Neither has a cache; both compute logits at every position."""

import torch
import torch.nn.functional as F
from plain_torch import Llama
from torch import Tensor


def logits_of(model: Llama, tokens: Tensor, visible: Tensor | None, mask_id: int) -> Tensor:
    """fp32 [b, n, v]; the mask is never proposed."""
    hidden = model(tokens, torch.arange(tokens.shape[1]), visible)
    logits = hidden @ model.embed.weight.T
    logits[..., mask_id] = torch.finfo(logits.dtype).min
    return logits


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the most likely tokens that hold p of the probability; the others get the dtype's minimum."""
    ordered, indices = torch.sort(logits, descending=True)
    remove = torch.cumsum(F.softmax(ordered, -1), -1) > p
    remove[..., 1:] = remove[..., :-1].clone()
    remove[..., 0] = False
    return logits.masked_fill(torch.zeros_like(remove).scatter_(-1, indices, remove), torch.finfo(logits.dtype).min)


@torch.no_grad()
def diffullama(model: Llama, tokens: Tensor, maskable: Tensor, mask_id: int, steps: int, temperature: float,
               p: float) -> Tensor:
    """Random order (`generate_samples_v2`): all masked at first, each revealed with probability 1/t at step t, outputs
    shifted. tokens: int [b, n]; maskable: bool [b, n]."""
    xt = tokens.masked_fill(maskable, mask_id)
    for t in range(steps, 0, -1):
        logits = logits_of(model, xt, None, mask_id) / temperature
        scores = torch.log_softmax(top_p(logits, p), -1)
        x0 = torch.distributions.Categorical(logits=scores).sample()
        x0 = torch.cat([tokens[:, :1], x0[:, :-1]], 1)
        x0 = torch.where(maskable, x0, xt)
        reveal = maskable & (torch.rand(xt.shape) < 1 / t)
        xt, maskable = torch.where(reveal, x0, xt), maskable & ~reveal
    return xt


@torch.no_grad()
def blocks(model: Llama, tokens: Tensor, masked: Tensor, mask_id: int, size: int,
           threshold: float) -> tuple[Tensor, int]:
    """Fills blocks in order, each forward pass over the whole canvas; commits every token whose confidence exceeds the
    threshold, and at least one. A block sees itself and everything before it. Returns tokens [b, n] and the batch's
    NFE."""
    n, batch_nfe = tokens.shape[1], 0
    index = torch.arange(n) // size
    visible = index[:, None] >= index
    x = tokens.masked_fill(masked, mask_id)
    for start in range(0, n, size):
        open_positions = (index == start // size) & masked
        while open_positions.any():
            p, x0 = F.softmax(logits_of(model, x, visible, mask_id), -1).max(-1)
            p = torch.where(open_positions, p, -torch.inf)
            commit = open_positions & ((p > threshold) | (torch.arange(n) == p.argmax(1, keepdim=True)))
            x, open_positions, masked = torch.where(commit, x0, x), open_positions & ~commit, masked & ~commit
            batch_nfe += 1
    return x, batch_nfe
