"""Our versions of DiffuLLaMA's two samplers against the authors' code, step by step (`generate_samples` and
`generate_samples_v2` of HKUNLP/DiffuLLaMA). Theirs gets the first token, shifts, and drops index 0 at the end."""

import jax
import numpy as np

from dlm_jax.sampling.trace import fold_keys

MASK, TAU = 30, 0.8


def topk_masking(scores, cutoff_len):
    return scores < np.sort(scores)[cutoff_len]


def shifted_log_p(model, xt, tau):
    """log softmax(logits / tau), each position's from the output before it; the mask is never proposed."""
    logits = np.array(model.logits(xt[None]))[0].astype(np.float64) / tau
    logits[:, MASK] = -np.inf
    log_p = logits - np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1, keepdims=True)) - logits.max(
        -1, keepdims=True)
    return np.concatenate([log_p[:1], log_p[:-1]])


def confidence_sampler(model, x, src_mask, steps, tau):
    """`generate_samples` with gsm=True, which takes the most likely token."""
    initial = maskable = ~src_mask
    xt = np.where(maskable, MASK, x)
    for t in range(steps, 0, -1):
        log_p = shifted_log_p(model, xt, tau)
        x0, scores = np.where(maskable, log_p.argmax(-1), xt), log_p.max(-1)
        if t == 1:
            return x0[1:]
        cutoff = int(initial.sum() * ((t - 1) / steps))
        lowest = topk_masking(np.where(initial, scores, 1000.0), cutoff)
        xt = np.where(maskable & ~lowest, x0, xt)
        maskable = maskable & lowest


def test_the_confidence_sampler_equals_the_authors(toy, prompts):
    model = toy("bidirectional", "shifted")
    for steps in (1, 5, 8, 24):
        samples = model.continued(prompts, 24, unmasking=f"diffullama_confidence:{TAU}", steps=steps)
        for prompt, sample in zip(prompts, samples, strict=True):
            x = np.array([*prompt, *[0] * 24])
            theirs = confidence_sampler(model, x, np.arange(len(x)) < len(prompt), steps, TAU)
            assert sample.tokens[1:] == theirs.tolist()
            assert sample.nfe <= steps  # it runs ahead of its schedule where committed positions score low


def test_the_random_sampler_equals_the_authors(toy, prompts):
    """The same draws in a plain loop: at t = T-1 .. 1 each masked position is revealed with probability 1 / (t + 1), as
    the forward pass before proposed it, and the last one fills the rest."""
    model, steps = toy("bidirectional", "shifted"), 6
    sample = model.continued(prompts[1:2], 20, unmasking="diffullama_random", steps=steps)[0]
    prompt = prompts[1]
    key = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(1))
    tokens, masked = np.array([*prompt, *[0] * 20]), np.arange(26) >= 6
    for number, t in enumerate(range(steps, 0, -1)):
        x0 = shifted_log_p(model, np.where(masked, MASK, tokens), 1.0).argmax(-1)
        u = np.asarray(jax.random.uniform(fold_keys(fold_keys(key, np.array([number])), 1)[0], (64,)))[:26]
        reveal = masked & (u < 1 / t) if t > 1 else masked
        tokens, masked = np.where(reveal, x0, tokens), masked & ~reveal
    assert sample.tokens == tokens.tolist() and max(sample.commit_step) <= steps
