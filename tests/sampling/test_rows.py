"""Continuous batching: requests come and go, and each text is the one that it would be alone."""

import numpy as np
import pytest

from dlm_jax.errors import UserError
from dlm_jax.sampling.lane import NOTHING, Job, Lane, common_starts, lane_key
from dlm_jax.sampling.requests import Request, continuation
from dlm_jax.sampling.rows import admit, advance_rows, new_rows
from dlm_jax.sampling.settings import Settings

CONTEXT = 64
WAYS = [("causal", "shifted", None, "block_causal", {}),
        ("block_causal", "shifted", 4, "token_causal", {"unmasking": "speculate:2"}),
        ("block_causal", "shifted", 4, "block_causal", {"unmasking": "threshold:0.05"}),
        ("causal", "shifted", None, "block_causal", {"unmasking": "jacobi:6"}),
        ("block_causal", "same_position", 4, "block_causal", {"unmasking": "confidence", "steps": 3}),
        ("bidirectional", "same_position", None, "block_causal", {"unmasking": "entropy", "steps": 4}),
        ("bidirectional", "shifted", None, "block_causal", {"block": 8})]
IDS = [f"{rule}-{how.get('unmasking', alignment)}" for rule, alignment, _, _, how in WAYS]

# The first and the third of them in every run, the others in `make test-slow`.
SOME = [pytest.param(*way, id=name, marks=() if i in (0, 2) else pytest.mark.slow)
        for i, (way, name) in enumerate(zip(WAYS, IDS))]


def ignore(job, progress):
    """A listener that takes no notice."""


def jobs_of(requests, how, listener=ignore):
    """Half of them greedy and half drawn, each with a seed of its own."""
    return [Job(request, Settings(temperature=i % 2, seed=i, **how), 0, listener) for i, request in enumerate(requests)]


def lane_for(model, job, size=3):
    key = lane_key(job, model.config, model.spec, CONTEXT)
    return Lane(model.params, model.config, model.spec, job, key.length, size)


def serve(lane, jobs, passes=5):
    """The samples of jobs, served in the order in which rows become free."""
    waiting, samples = list(jobs), {}
    for job in jobs:
        job.listener = lambda job, progress: samples.update({job: progress.sample})
    while waiting or lane.busy:
        while waiting and lane.free:
            lane.admit(waiting.pop(0))
        lane.advance(passes)
    return [samples[job] for job in jobs]


@pytest.fixture
def requests():
    """Seven requests of unequal lengths, some of which begin alike."""
    random = np.random.default_rng(1)
    start = random.integers(0, 30, 13).tolist()
    prompts = [start[:n] for n in (3, 13, 8)] + [random.integers(0, 30, n).tolist() for n in (1, 17, 8)]
    return [continuation(prompt, new) for prompt, new in zip([*prompts, [*start, 5, 6]], (9, 20, 3, 14, 7, 12, 10))]


@pytest.mark.parametrize("rule,alignment,block,half,how", WAYS, ids=IDS)
def test_a_text_does_not_depend_on_who_else_is_served(toy, requests, rule, alignment, block, half, how):
    model = toy(rule, alignment, block, half=half)
    jobs = jobs_of(requests, how)
    alone = [model.filled([job.request], **vars(job.settings))[0] for job in jobs]
    served = serve(lane_for(model, jobs[0]), jobs)
    for sample, expected in zip(served, alone):
        assert (sample.tokens, sample.nfe, sample.commit_step) == (expected.tokens, expected.nfe, expected.commit_step)
        np.testing.assert_allclose(sample.confidence, expected.confidence, rtol=2e-5)


@pytest.mark.parametrize("rule,alignment,block,half,how", SOME)
def test_an_end_token_ends_a_text_as_it_does_alone(toy, requests, rule, alignment, block, half, how):
    free = toy(rule, alignment, block, half=half).filled([requests[1]], **how)[0]
    end = free.tokens[18]  # of 13 + 20
    model = toy(rule, alignment, block, eos=end, half=half)
    jobs = [Job(request, Settings(**how), 0, ignore) for request in requests]
    alone = [model.filled([job.request], **how)[0] for job in jobs]
    assert [sample.tokens for sample in serve(lane_for(model, jobs[0]), jobs)] == [sample.tokens for sample in alone]
    assert len(alone[1].tokens) < len(requests[1].tokens)


def test_holes_are_filled_beside_continuations(toy, requests):
    model = toy("block_causal", "same_position", 4)
    hole = Request([1, 2, 3, 0, 0, 4, 5, 6, 7, 0, 0, 0, 8], [t == 0 for t in (1, 2, 3, 0, 0, 4, 5, 6, 7, 0, 0, 0, 8)],
                   stop=False)
    jobs = jobs_of([requests[0], hole, requests[1]], {})
    served = serve(lane_for(model, jobs[0]), jobs)
    assert served[1].tokens == model.filled([hole], **vars(jobs[1].settings))[0].tokens


def test_new_requests_compile_nothing(toy, requests):
    model = toy("block_causal", "shifted", 4)
    jobs = jobs_of(requests, {"unmasking": "threshold:0.5"})
    lane = lane_for(model, jobs[0])
    serve(lane, jobs[:2])
    programs = [function._cache_size() for function in (admit, advance_rows, new_rows)]
    ways = [Settings(f"threshold:0.{i + 1}", temperature=i / 4, top_k=i, top_p=0.9, seed=9) for i in range(len(jobs))]
    others = [Job(job.request, how, 0, ignore) for job, how in zip(jobs, ways)]
    assert {lane_key(job, model.config, model.spec, CONTEXT) for job in others} \
        == {lane_key(jobs[0], model.config, model.spec, CONTEXT)}
    serve(lane, others)
    assert [function._cache_size() for function in (admit, advance_rows, new_rows)] == programs


@pytest.mark.parametrize("rule,alignment,block,half,how", WAYS, ids=IDS)
def test_the_examples_of_a_lane_need_all_of_its_programs(toy, rule, alignment, block, half, how):
    model = toy(rule, alignment, block, half=half, max_length=200)
    prompts = [[i] * length for i, length in enumerate((1, 3, 63, 64, 65, 127, 128, 129, 190))]
    jobs = [Job(continuation(prompt, 2), Settings(**how), 0, ignore) for prompt in prompts]
    lane = Lane(model.params, model.config, model.spec, jobs[0], 200, 1)
    for example in lane.examples(jobs[0]):
        serve(lane, [example])
    programs = [function._cache_size() for function in (admit, advance_rows, new_rows)]
    for job in jobs:
        serve(lane, [job])
    assert [function._cache_size() for function in (admit, advance_rows, new_rows)] == programs


@pytest.mark.parametrize("rule,block,half,unit", (("causal", None, "block_causal", 1),
                                                  ("block_causal", 4, "block_causal", 4)))
def test_the_beginning_of_a_prompt_that_a_row_holds_is_not_read_again(toy, rule, block, half, unit):
    model = toy(rule, "shifted", block, half=half, max_length=256)
    start = np.random.default_rng(2).integers(0, 30, 150).tolist()
    jobs = jobs_of([continuation(start, 4), continuation(start, 4), continuation([*start[:130], 3, 4, 5], 4)], {})
    lane = Lane(model.params, model.config, model.spec, jobs[0], 256, 2)
    [first] = serve(lane, jobs[:1])
    assert lane.read_tokens == 150
    rest = serve(lane, jobs[1:])
    again = 150 - 149 // unit * unit
    assert lane.read_tokens <= 150 + 64 + 64 and lane.read_tokens >= 150 + again
    for job, sample in zip(jobs, [first, *rest]):
        assert sample.tokens == model.filled([job.request], **vars(job.settings))[0].tokens


def test_a_cancelled_request_frees_its_row_after_the_round(toy, requests):
    model = toy("block_causal", "shifted", 4)
    seen = []

    def leave(job, progress):
        seen.append(int(progress.trace.nfe[progress.row]))
        assert progress.sample is None
        job.cancelled = len(seen) == 2

    long, other = jobs_of(requests[1:3], {})
    long.listener, long.every_pass = leave, True
    lane = lane_for(model, long, size=1)
    lane.admit(long)
    lane.advance(1)
    lane.advance(1)
    assert lane.free == [0] and seen[1] == seen[0] + 1
    assert serve(lane, [other])[0].tokens == model.filled([other.request], **vars(other.settings))[0].tokens


def test_a_round_ends_when_a_row_is_free(toy, requests):
    model = toy("causal")
    jobs = jobs_of([continuation([1, 2], 3), continuation([1, 2], 30)], {})
    lane = lane_for(model, jobs[0])
    for job in jobs:
        lane.admit(job)
    assert lane.advance(20) == 2 and lane.jobs.count(jobs[1]) == lane.busy == 1  # the prompt's pass gave a token too


def test_a_seed_draws_what_it_draws_alone(toy):
    model = toy("causal")
    for seed, number in ((2**32 - 1, 0), (2**31, 5)):
        job = Job(continuation([1, 2, 3], 12), Settings(temperature=1.0, seed=seed), number, ignore)
        [alone] = model.filled([job.request], [number], **vars(job.settings))
        assert serve(lane_for(model, job), [job])[0].tokens == alone.tokens


@pytest.mark.parametrize("rule,alignment,block,half,how", SOME)
def test_what_is_settled_does_not_change_any_more(toy, requests, rule, alignment, block, half, how):
    model, seen = toy(rule, alignment, block, half=half), []
    [job] = jobs_of(requests[1:2], how, lambda job, progress: seen.append(progress))
    lane = lane_for(model, job)
    lane.admit(job)
    while lane.busy:
        lane.advance(1)
    settled = [progress.settled for progress in seen]
    assert settled == sorted(settled) and settled[-1] == len(job.request.tokens)
    whole_canvas = rule == "bidirectional" and "block" not in how
    assert len(set(settled)) == 2 if whole_canvas else len(set(settled)) > 2
    for progress in seen:
        n = progress.settled
        assert progress.trace.tokens[progress.row, :n].tolist() == seen[-1].sample.tokens[:n]


@pytest.mark.parametrize("cache,block", (("prefix", 8), ("dual", 8)))
def test_caches_that_rows_cannot_share_are_refused(toy, requests, cache, block):
    model = toy("bidirectional", "same_position")
    [job, *_] = jobs_of(requests, {"cache": cache, "block": block})
    with pytest.raises(UserError, match=f"cannot share the cache '{cache}'"):
        lane_key(job, model.config, model.spec, CONTEXT)


def test_a_text_longer_than_the_canvas_is_refused(toy):
    model = toy("causal", max_length=128)
    with pytest.raises(UserError, match="takes 70 positions and this server has 64"):
        lane_key(Job(continuation([1] * 10, 60), Settings(), 0, ignore), model.config, model.spec, CONTEXT)


def test_common_starts():
    rows = [], [1], [1, 2, 4, 5], [1, 2, 3, 4], [2], [0, 2]
    known = np.array([[*row, *[NOTHING] * (5 - len(row))] for row in rows])
    assert common_starts([1, 2, 3], known).tolist() == [0, 1, 2, 3, 0, 0]
