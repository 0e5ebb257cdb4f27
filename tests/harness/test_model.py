"""The model type `dlm_jax` of lm-evaluation-harness, beside the harness's own `hf` and without the faults of peers."""

import dataclasses
import json
import random

import pytest

import dlm_jax
from dlm_jax.errors import UserError

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'dlm-jax[eval]'")

from lm_eval.api.instance import Instance

from dlm_jax.evaluation.questions import Choice, Question
from dlm_jax.harness.model import HarnessModel, cut
from dlm_jax.sampling.requests import continuation
from dlm_jax.sampling.settings import Settings

CONTEXTS = ["Once upon a time, there was a little", "Lily and Tom went to the park. They", "", "One day, a dog  ",
            "The sun was hot. " * 12 + "So the boy"]
CONTINUATIONS = [" girl named Lily.", " wanted to play.", " a", " saw a big red ball and a small bird in the tree."]
STORIES = ["Once upon a time there was a cat.", "Tom had a ball. " * 90]  # the second is longer than a context


def requests(kind, arguments, task="task"):
    return [Instance(kind, {}, each, 0, (task, i, 1)) for i, each in enumerate(arguments)]


def pairs():
    return requests("loglikelihood", [(context, text) for context in CONTEXTS for text in CONTINUATIONS])


@pytest.fixture(scope="module")
def stories(shared):
    return shared / "stories260k"


@pytest.fixture(scope="module")
def base(stories):
    return dlm_jax.load(stories)


@pytest.fixture(scope="module")
def blocks(base):
    """A block-causal model: the base, asked in another way."""
    masked = base.with_mask()
    spec = dataclasses.replace(masked.spec, rule="block_causal", block_size=8)
    return dataclasses.replace(masked, spec=spec)


@pytest.fixture(scope="module")
def bidirectional(base):
    masked = base.with_mask()
    return dataclasses.replace(masked, spec=dataclasses.replace(masked.spec, rule="bidirectional"))


@pytest.fixture(scope="module")
def hf(stories):
    pytest.importorskip("accelerate", reason="needs accelerate, which the harness's own model type uses")
    from lm_eval.models.huggingface import HFLM
    return HFLM(pretrained=str(stories), dtype="float32", device="cpu", batch_size=4)


def test_likelihoods_of_an_autoregressive_model_are_those_of_the_harness_own_type(base, hf):
    ours = HarnessModel(base).loglikelihood(pairs(), disable_tqdm=True)
    theirs = hf.loglikelihood(pairs(), disable_tqdm=True)
    for (log_p, greedy), (expected, also) in zip(ours, theirs, strict=True):
        assert log_p == pytest.approx(expected, abs=1e-4 * max(1, abs(expected)))
        assert greedy == also
    assert len({greedy for _, greedy in ours}) == 2


def test_rolling_likelihoods_are_those_of_the_harness_own_type(base, hf):
    texts = requests("loglikelihood_rolling", [(text,) for text in STORIES])
    assert len(base.text_tokenizer().encode(STORIES[1])) > base.config.max_length
    ours, theirs = HarnessModel(base).loglikelihood_rolling(texts, disable_tqdm=True), hf.loglikelihood_rolling(texts)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_greedy_texts_are_those_of_the_harness_own_type(base, hf):
    until = {"until": ["."], "max_gen_toks": 24}
    asked = requests("generate_until", [(context, until) for context in CONTEXTS if context])
    assert HarnessModel(base).generate_until(asked, disable_tqdm=True) == hf.generate_until(asked, disable_tqdm=True)


@pytest.mark.parametrize("likelihood", (pytest.param("monte_carlo", marks=pytest.mark.slow), "decoding_order"))
@pytest.mark.parametrize("name", ("blocks", "bidirectional"))
def test_batch_size_order_and_company_change_no_likelihood(name, likelihood, request):
    lm, settings = request.getfixturevalue(name), {"likelihood": likelihood, "max_draws": 8}
    some = pairs()[:6]
    expected = HarnessModel(lm, **settings).loglikelihood(some, disable_tqdm=True)
    order = list(range(len(expected)))
    random.Random(0).shuffle(order)
    shuffled = HarnessModel(lm, batch_size=3, **settings).loglikelihood([some[i] for i in order], disable_tqdm=True)
    for place, i in enumerate(order):
        assert shuffled[place][0] == pytest.approx(expected[i][0], abs=1e-3)
        assert shuffled[place][1] == expected[i][1]
    alone = HarnessModel(lm, **settings).loglikelihood(some[3:4], disable_tqdm=True)
    assert alone[0][0] == pytest.approx(expected[3][0], abs=1e-3)


@pytest.mark.parametrize("name", ("base", "blocks", "bidirectional"))
def test_each_request_has_its_own_stop_sequences_length_and_temperature(name, request):
    lm = request.getfixturevalue(name)
    own = [{"until": ["zzz"], "max_gen_toks": 16}, {"until": [" "], "max_gen_toks": 16},
           {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}]
    asked = requests("generate_until", [("Once upon a time", each) for each in own])
    model = HarnessModel(lm)
    whole, word, hot = model.generate_until(asked, disable_tqdm=True)
    assert word == whole.split(" ")[0] if not whole.startswith(" ") else word == ""
    assert hot != whole[:len(hot)]
    backwards = HarnessModel(lm, batch_size=2).generate_until(asked[::-1], disable_tqdm=True)
    assert backwards == [hot, word, whole]


def test_a_question_asked_again_is_answered_anew_at_a_temperature_and_alike_without(base):
    hot, cold = ({"max_gen_toks": 12, "until": [], **extra} for extra in ({"do_sample": True, "temperature": 1.0}, {}))
    model = HarnessModel(base)
    first, second = model.generate_until(requests("generate_until", [("Once", hot)] * 2), disable_tqdm=True)
    again = model.generate_until(requests("generate_until", [("Once", cold)] * 2), disable_tqdm=True)
    assert first != second and again[0] == again[1]


def test_greedy_by_decoding_order_is_what_the_sampler_writes(blocks, bidirectional):
    for lm in (blocks, bidirectional):
        model = HarnessModel(lm, likelihood="decoding_order")
        prompt = "Once upon a time there"
        ids = model.tok_encode(prompt)
        [sample] = lm.fill([continuation(ids, 6)], Settings())
        for tokens, greedy in ((sample.tokens[len(ids):], True), ([*sample.tokens[len(ids):-1], 9], False)):
            [[score]] = model.scorer.score([Question("q", [Choice(ids, tokens)])])
            assert score.greedy == greedy


def test_what_the_harness_writes_names_the_draws_that_were_taken(blocks):
    model = HarnessModel(blocks, max_draws=16)
    model.loglikelihood(pairs()[:3], disable_tqdm=True)
    info = json.loads(json.dumps(model.get_model_info()))
    assert sum(info["draws"].values()) == 3 and set(info["draws"]) <= {"8", "16"}


def test_a_chat_is_written_by_the_tokenizers_own_template(base):
    model = HarnessModel(base)
    model.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    assert model.apply_chat_template([{"role": "user", "content": "Hello"}]) == "[user] Hello\n[assistant]"


@pytest.mark.parametrize("settings,said", (({"likelihod": "exact"}, "likelihod is no setting"),
                                           ({"max_draws": 3}, "multiple of 8"), ({"batch_size": 0}, "at least 1"),
                                           ({"cfg_scale": 1.0}, "guidance is for models that denoise")))
def test_settings_that_cannot_be_are_refused(base, settings, said):
    with pytest.raises(UserError, match=said):
        HarnessModel(base, **settings)


def test_a_generation_argument_that_is_not_known_is_refused(base):
    with pytest.raises(UserError, match="no generation argument num_beams"):
        HarnessModel(base).generate_until(requests("generate_until", [("a", {"num_beams": 4})]))


def test_a_text_ends_before_the_first_stop_sequence():
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", ["two"]) == cut("one", []) == "one"
