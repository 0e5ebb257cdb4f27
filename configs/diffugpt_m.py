"""GPT-2 medium to a diffusion model: DiffuGPT-M (arXiv 2410.17891, table 4 and appendix B.2).

210B tokens of FineWeb in records of 1,024 tokens; one stream, shifted; the causal mask opens over 10,000 steps.

    dlm prepare --text 'fineweb/*.parquet' --model gpt2 --length 1024 --out data/fineweb
    dlm train --config diffugpt_m --workdir runs/diffugpt_m --config.model.base=MODEL

Compiled but not run yet (`dlm aot --topology v5e:4x4`, 2026-11-30; docs/pods.md): fits, with 13.36 GiB of a chip's
16, and a step takes 2.94 s on 16 chips by the compiler's schedule; on 8 H200, 17.90 GiB of 131 and at least 0.401 s.
"""

from ml_collections import ConfigDict

from dlm_jax.config.shared import diffugpt_config


def get_config() -> ConfigDict:
    c = diffugpt_config()
    c.model.base = "gpt2-medium"
    c.model.remat = "save_projections"
    c.data.seq_length = 1024
    c.train.steps = 160_000
    c.train.global_batch_size = 1280
    c.train.grad_accum_steps = 5  # 16 records per chip at a time, on 16 chips
    c.checkpoint.every = 1000
    c.evaluate.every = 2000
    return c
