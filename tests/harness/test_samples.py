"""How likely and how varied samples are, against values found by hand."""

import dataclasses
import json
import math

import numpy as np
import pytest

import dlm_jax
from dlm_jax.commands.main import main
from dlm_jax.errors import UserError
from dlm_jax.evaluation.log_likelihood import Likelihood
from dlm_jax.harness.samples import evaluate_samples, perplexity_of, self_bleu, variety
from dlm_jax.sampling.settings import Settings


def test_variety_counts_what_repeats():
    found = variety([[1, 2, 1, 2, 1, 2], [3, 3, 3, 3, 3, 3]])
    assert found["entropy"] == pytest.approx(math.log(2) / 2)
    assert found["distinct_1"] == 3 / 12 and found["distinct_2"] == 3 / 10
    assert found["repetition"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert variety([[1, 2, 3, 4, 5]])["repetition"] == 0


def test_the_error_of_a_perplexity_is_that_of_resampling_the_texts():
    random = np.random.default_rng(0)
    sizes = random.integers(5, 60, 300)
    texts = [Likelihood(size * rate, int(size)) for size, rate in zip(sizes, random.normal(3, 0.5, 300))]
    perplexity, error = perplexity_of(texts)
    assert perplexity == pytest.approx(math.exp(sum(text.nats for text in texts) / sizes.sum()))
    drawn = [perplexity_of([texts[i] for i in random.integers(0, 300, 300)])[0] for _ in range(400)]
    assert error == pytest.approx(np.std(drawn), rel=0.15)
    assert perplexity_of(texts[:1] * 5)[1] == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="all samples are empty"):
        perplexity_of([])


def test_equal_texts_have_a_self_bleu_of_one_and_unlike_texts_of_nearly_none():
    pytest.importorskip("sacrebleu", reason="needs sacrebleu: pip install 'dlm-jax[eval]'")
    assert self_bleu(["the cat sat on the mat"] * 3) == pytest.approx(1)
    assert self_bleu(["the cat sat on the mat", "dogs run over green hills today"]) < 0.1


@pytest.mark.slow
def test_samples_of_a_model_are_judged_and_a_wider_temperature_is_less_likely_and_more_varied(capsys):
    pytest.importorskip("sacrebleu", reason="needs sacrebleu: pip install 'dlm-jax[eval]'")
    found = {}
    for temperature in ("0.5", "1.5"):
        flags = ["--judge", "bundled", "--samples", "8", "--max-tokens", "32", "--temperature", temperature, "--json"]
        assert main(["eval", "bundled", "--tasks", "generative_perplexity", *flags]) == 0
        found[temperature] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["0.5"]["perplexity"] < found["1.5"]["perplexity"]
    assert found["0.5"]["distinct_2"] < found["1.5"]["distinct_2"]
    assert found["1.5"]["samples"] == 8 and found["1.5"]["tokens_per_forward"] == pytest.approx(1, abs=0.2)


def test_what_cannot_be_judged_is_refused():
    lm = dlm_jax.load("bundled")
    masked = lm.with_mask()
    denoiser = dataclasses.replace(masked, spec=dataclasses.replace(masked.spec, rule="bidirectional"))
    with pytest.raises(UserError, match="set --temperature"):
        evaluate_samples(lm, lm, Settings(), 4, 8)
    with pytest.raises(UserError, match="name another"):
        evaluate_samples(lm, denoiser, Settings(temperature=1.0), 4, 8)
