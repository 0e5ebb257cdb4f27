"""GPT-2 small to a diffusion model: DiffuGPT-S (arXiv 2410.17891, table 4 and appendix B.2).

131B tokens of FineWeb in records of 512 tokens; one stream, shifted; the causal mask opens over 10,000 steps.

    dlm prepare --text 'fineweb/*.parquet' --model gpt2 --length 512 --out data/fineweb
    dlm train --config diffugpt_s --workdir runs/diffugpt_s --config.model.base=MODEL

Compiled but not run yet (`dlm aot --topology v5e:2x4`, 2026-11-30; docs/pods.md): fits, with 7.74 GiB of a chip's 16,
and a step takes 0.276 s on 8 chips by the compiler's schedule; on one H200, 46.11 GiB of 131 and at least 0.106 s.
"""

from ml_collections import ConfigDict

from dlm_jax.config.shared import diffugpt_config


def get_config() -> ConfigDict:
    c = diffugpt_config()
    c.model.base = "gpt2"
    c.data.seq_length = 512
    c.train.steps = 1_000_000
    c.train.global_batch_size = 256
    c.train.grad_accum_steps = 2  # 16 records per chip at a time, on 8 chips
    c.checkpoint.every = 2000
    c.evaluate.every = 5000
    return c
