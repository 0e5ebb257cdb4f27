"""The sampling loops of other projects, in our words: how each calls a model, greedily and by low confidence.

They need only torch and a model of transformers, and nothing of dlm_jax. Read in the sources of LLaDA (`generate.py`),
Fast-dLLM (`llada/generate.py`), dLLM (`core/samplers/mdlm.py`) and SDAR (`generate.py`), whose quirks they keep: none
forbids the mask token, which `forbid` does from outside. SDAR's confidence here is that before truncation; its own is
the one after, which is 1 everywhere for `top_k=1`.
"""

import math
from typing import Any

import torch
from torch import Tensor


def forbid(model: Any, token: int) -> None:
    """Takes a token out of the logits that `model(...)` returns, as training does with the mask token. A random model
    gives it some probability, which would count in the confidence of the others here and not in our samplers."""
    def hide(module: Any, arguments: tuple, output: Any) -> None:
        output.logits[..., token] = -1e9  # finite, because guidance subtracts it from itself

    model.register_forward_hook(hide)


def transfers(count: int, steps: int) -> list[int]:
    """How many of `count` tokens each step commits: equal parts, the first ones larger by one."""
    return [count // steps + (step < count % steps) for step in range(steps)]


def commit(x: Tensor, logits: Tensor, allowed: Tensor, count: int) -> None:
    """Writes the `count` most confident proposals of each row into x [b, n], in place."""
    confidence, best = logits.softmax(-1).max(-1)
    for row, score in enumerate(confidence.masked_fill(~allowed, -torch.inf)):
        chosen = score.topk(count).indices
        x[row, chosen] = best[row, chosen]


def with_masks(prompt: Tensor, gen_length: int, mask_id: int) -> Tensor:
    return torch.cat([prompt, torch.full((len(prompt), gen_length), mask_id)], 1)


def is_open(x: Tensor, end: int, mask_id: int) -> Tensor:
    """Masks before `end`."""
    return (x == mask_id) & (torch.arange(x.shape[1]) < end)


@torch.no_grad()
def llada(model: Any, prompt: Tensor, steps: int, gen_length: int, block_length: int, mask_id: int,
          attention_mask: Tensor | None = None, cfg_scale: float = 0.0) -> Tensor:
    """LLaDA: the whole text at every step. With guidance both texts are one batch."""
    x, blocks = with_masks(prompt, gen_length, mask_id), gen_length // block_length
    given = x != mask_id
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, torch.ones(len(x), gen_length, dtype=attention_mask.dtype)], 1)
    for block in range(blocks):
        for count in transfers(block_length, steps // blocks):
            if cfg_scale:
                both = torch.cat([x, x.masked_fill(given, mask_id)])
                seen = None if attention_mask is None else attention_mask.repeat(2, 1)
                logits, blank = model(both, attention_mask=seen).logits.chunk(2)
                logits = blank + (cfg_scale + 1) * (logits - blank)
            else:
                logits = model(x, attention_mask=attention_mask).logits
            commit(x, logits, is_open(x, prompt.shape[1] + (block + 1) * block_length, mask_id), count)
    return x


@torch.no_grad()
def fast_dllm(model: Any, prompt: Tensor, steps: int, gen_length: int, block_length: int, mask_id: int,
              prefix_cache: bool = False) -> Tensor:
    """Fast-dLLM: the first step of a block on the whole text; with the prefix cache the others from the block on, after
    the keys and values that this step had before the block."""
    x, blocks = with_masks(prompt, gen_length, mask_id), gen_length // block_length
    for block in range(blocks):
        start, end = (prompt.shape[1] + number * block_length for number in (block, block + 1))
        first, *others = transfers(block_length, steps // blocks)
        output = model(x, use_cache=True) if prefix_cache else model(x)
        commit(x, output.logits, is_open(x, end, mask_id), first)
        past = [tuple(part[:, :, :start] for part in layer) for layer in output.past_key_values or ()]
        for count in others:
            if prefix_cache:
                logits = model(x[:, start:], past_key_values=past, use_cache=True).logits
                commit(x[:, start:], logits, is_open(x[:, start:], block_length, mask_id), count)
            else:
                commit(x, model(x).logits, is_open(x, end, mask_id), count)
    return x


@torch.no_grad()
def dllm(model: Any, prompts: list[Tensor], steps: int, max_new_tokens: int, block_size: int, mask_id: int, eos_id: int,
         right_shift_logits: bool) -> Tensor:
    """dLLM: prompts of unequal length in one batch, padded on the right with the end token."""
    width, lengths = max(map(len, prompts)) + max_new_tokens, [len(prompt) for prompt in prompts]
    x, seen = torch.full((len(prompts), width), eos_id), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        x[row, :lengths[row]], x[row, lengths[row]:lengths[row] + max_new_tokens] = prompt, mask_id
        seen[row, :lengths[row] + max_new_tokens] = 1
    blocks = math.ceil(max_new_tokens / block_size)
    for block in range(blocks):
        size = min(block_size, max_new_tokens - block * block_size)
        for count in transfers(size, math.ceil(steps / blocks)):
            logits = model(x, attention_mask=seen).logits
            if right_shift_logits:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
            ends = torch.tensor(lengths)[:, None] + (block + 1) * block_size
            commit(x, logits, (x == mask_id) & (torch.arange(width) < ends), count)
    return x


@torch.no_grad()
def sdar(model: Any, prompt: Tensor, gen_length: int, block_length: int, denoising_steps: int, mask_id: int,
         cache: Any) -> Tensor:
    """SDAR: blocks counted from the start of the text, a mask of 0 and 1 with three axes, and a cache that only
    finished blocks enter."""
    n = math.ceil((prompt.shape[1] + gen_length) / block_length) * block_length
    x = with_masks(prompt, n - prompt.shape[1], mask_id)
    block_of = torch.arange(n) // block_length
    visible, places = (block_of[:, None] >= block_of).float()[None], torch.arange(n)[None]

    def outputs(start: int, end: int, store_kv: bool) -> Tensor:
        return model(x[:, start:end], attention_mask=visible[:, start:end, :end], position_ids=places[:, start:end],
                     past_key_values=cache, use_cache=True, store_kv=store_kv).logits

    prefilled = prompt.shape[1] // block_length * block_length
    if prefilled:
        outputs(0, prefilled, store_kv=True)
    for start in range(prefilled, n, block_length):
        current = x[:, start:start + block_length]
        for count in transfers(block_length, denoising_steps):
            masked = current == mask_id
            if masked.any():
                commit(current, outputs(start, start + block_length, store_kv=False), masked,
                       min(count, int(masked.sum())))
        outputs(start, start + block_length, store_kv=True)
    return x
