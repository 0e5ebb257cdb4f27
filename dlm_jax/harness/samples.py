"""What a model writes on its own: how likely another model finds it, and how varied it is.

A low perplexity alone says little, since a text that repeats itself has one (arXiv 2409.02908), so the measures of
variety stand beside it.
"""

import collections
import math
from collections.abc import Hashable, Sequence

from dlm_jax.errors import UserError
from dlm_jax.evaluation.log_likelihood import Likelihood
from dlm_jax.language_model import LanguageModel
from dlm_jax.sampling.settings import Settings

BATCH = 32
BLEU_SAMPLES = 50  # texts whose self-BLEU is taken; it compares all pairs


def evaluate_samples(lm: LanguageModel, judge: LanguageModel, settings: Settings, count: int, max_tokens: int
                     ) -> dict[str, float]:
    """Draws `count` texts of up to `max_tokens` tokens without a prompt. Returns their perplexity under `judge`, an
    autoregressive model, with its standard error over the texts, `variety` of their tokens, their self-BLEU, and tokens
    per forward pass.

    Raises `UserError` at temperature 0, where all texts are one, and if the judge is no autoregressive model.
    """
    if settings.temperature == 0:
        raise UserError("at temperature 0 every sample is the same text; set --temperature, say to 1")
    if judge.spec.is_diffusion:
        raise UserError("the judge of a perplexity is an autoregressive model and this one denoises; name another")
    texts, tokens, nfe = [], [], 0
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        request = lm.continuation("", max_tokens)
        for sample in lm.fill([request] * len(numbers), settings, numbers):
            texts.append(sample.text)
            tokens.append(sample.tokens[request.masked.index(True):])
            nfe += sample.nfe
    perplexity, error = perplexity_of([judge.ar_nll(text) for text in texts if len(judge.encode(text)) > 1])
    return {"perplexity": perplexity, "perplexity_stderr": error, **variety(tokens),
            "self_bleu": self_bleu(texts[:BLEU_SAMPLES]), "tokens_per_forward": sum(map(len, tokens)) / max(nfe, 1),
            "samples": count}


def perplexity_of(texts: Sequence[Likelihood]) -> tuple[float, float]:
    """The perplexity of all tokens of the texts, and its standard error over the texts, of which there is a likelihood
    each: that of a ratio of sums (Cochran, Sampling Techniques, section 2.11), carried through the exponential."""
    n, tokens = len(texts), sum(text.tokens for text in texts)
    if not tokens:
        raise UserError("all samples are empty, so they have no perplexity; check the model, or raise --temperature")
    nats = math.fsum(text.nats for text in texts) / tokens
    squares = math.fsum((text.nats - nats * text.tokens)**2 for text in texts)
    return math.exp(nats), math.exp(nats) * math.sqrt(n / max(n - 1, 1) * squares) / tokens


def variety(texts: Sequence[Sequence[Hashable]]) -> dict[str, float]:
    """The mean entropy of a text's unigrams, in nats; the share of distinct n-grams among all (distinct-n, Li et al.
    2016); and the share of 4-grams that the same text has had before (repetition, Welleck et al. 2020)."""
    grams = {n: [list(zip(*(text[i:] for i in range(n)))) for text in texts] for n in (1, 2, 3, 4)}
    entropies = [entropy(collections.Counter(unigrams)) for unigrams in grams[1]]
    repeated = [1 - share_distinct(fours) for fours in grams[4] if fours]
    return {"entropy": mean(entropies), "repetition": mean(repeated),
            **{f"distinct_{n}": share_distinct([gram for own in grams[n] for gram in own]) for n in (1, 2, 3)}}


def entropy(counts: collections.Counter) -> float:
    """The entropy of the empirical distribution, in nats."""
    total = counts.total()
    return -math.fsum(count / total * math.log(count / total) for count in counts.values())


def share_distinct(grams: Sequence[Hashable]) -> float:
    """The number of distinct entries over that of all; 1 if there are none."""
    return len(set(grams)) / len(grams) if grams else 1.0


def mean(values: Sequence[float]) -> float:
    """The mean, 0 of nothing."""
    return math.fsum(values) / len(values) if values else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """The mean BLEU of each text against all others, from 0 to 1 (Zhu et al. 2018), by the package sacrebleu. High
    where the texts resemble each other."""
    from sacrebleu import BLEU
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, [*texts[:i], *texts[i + 1:]]).score / 100 for i, text in enumerate(texts)]
    return mean(scores) if len(texts) > 1 else 0.0
