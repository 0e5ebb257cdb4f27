"""An autoregressive model, made faster without changing a word: adapters learn to draft, and the model verifies.

    dlm self-generate MODEL --prompts texts.jsonl --prompt-tokens 16 --documents 2000 --max-tokens 120 --temperature 0 \
        --out own.jsonl
    dlm train --config gated --workdir runs/gated \
        --config.model.base=MODEL --config.data.train=own.jsonl --config.data.validation=held_out.jsonl
    dlm sample runs/gated --prompt "Once upon a time" --unmasking speculate

The recipe is `hybrid_shifted` without its autoregressive loss. The adapters act on mask tokens only (gated LoRA, arXiv
2507.11851), so what is no mask is read as by MODEL, bit for bit, and `speculate` writes what MODEL writes.

With the 260k-parameter stories LLaMA and its greedy continuations of 2,316 TinyStories, from beginnings of 16 lengths,
the 760 steps (3.1M tokens) give 2.6 tokens per forward pass with `speculate` and 3.0 with `speculate:4` (two seeds),
and with the masks of `hybrid_shifted` 2.2 and 2.6. The run took six minutes on one core of an AMD EPYC (jax 0.10.2,
2026-11-30; docs/parallel_decoding.md).
"""

from ml_collections import ConfigDict

from dlm_jax.config.shared import tiny_stories_config


def get_config() -> ConfigDict:
    # So small a half-life masks the ends of blocks only, which is what a draft has to fill in.
    c = tiny_stories_config("hybrid_shifted", ar_weight=0.0, half_life=0.002)
    c.train.steps = 760
    c.optimizer.learning_rate = 1e-2
    c.lora.gated = True
    c.lora.rank = 64
    c.lora.alpha = 64.0
    return c
