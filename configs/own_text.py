"""A base converted on what it writes itself, which it then writes several tokens at a time.

    dlm self-generate MODEL --prompts texts.jsonl --prompt-tokens 13 --documents 2000 --max-tokens 120 --temperature 0 \
        --out own.jsonl
    dlm train --config own_text --workdir runs/own_text \
        --config.model.base=MODEL --config.data.train=own.jsonl --config.data.validation=held_out.jsonl

With the 260k-parameter stories LLaMA, continuations of 2,316 TinyStories from beginnings of 8, 13, 20 and 30 tokens and
600 steps (2.5M tokens, two seeds): 2.86 ± 0.05 tokens per forward pass with `speculate` at 0.570 nats per token under
the base, where as many steps on the stories give 1.30 at 0.604 and the base itself has 0.527. Longer, from beginnings
of 16 lengths: 3.1, 3.8 and 4.2 with `speculate:4` after 3, 12 and 50M tokens (docs/parallel_decoding.md).
"""

from ml_collections import ConfigDict

from dlm_jax.config.shared import tiny_stories_config


def get_config() -> ConfigDict:
    c = tiny_stories_config("hybrid_shifted")
    c.train.steps = 600
    return c
