"""Questions: continuations of contexts whose likelihoods are compared, with as many draws as the comparison needs.

The choices of one question share their noise, so that what separates them is not drowned in it, and draws are added
until the best choice is settled. A score depends on its question, the seed and the model, and neither on other
questions nor on how they are batched.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.errors import UserError
from dlm_jax.evaluation.estimators import STRATA, decoding_order, diffullama_draw, left_to_right, masked_draw
from dlm_jax.evaluation.intervals import estimate
from dlm_jax.evaluation.prediction import Denoiser, Rows
from dlm_jax.models.padding import next_power_of_two
from dlm_jax.models.weights import Params
from dlm_jax.typing import Array, Float, Key

METHODS = ("monte_carlo", "decoding_order", "diffullama")
CONFIDENCE = 0.99  # that the best choice is the best, or that a lone likelihood is within `TOLERANCE`
TOLERANCE = 0.01  # of a lone likelihood
MIN_LENGTH = 32  # of a padded row


class Choice(NamedTuple):
    """A continuation of a context, as tokens."""

    context: Sequence[int]  # at least one
    continuation: Sequence[int]  # at least one
    size: int = 1  # of its text, say in bytes; the best choice is also sought per unit of it


class Question(NamedTuple):
    """Choices that are compared, and what their noise is drawn from. There may be one."""

    key: str
    choices: Sequence[Choice]


class Score(NamedTuple):
    """log p(continuation | context), in nats."""

    log_p: float  # an estimate of its lower bound by Monte Carlo, or DiffuLLaMA's score; else exact
    error: float  # standard error of the estimate; 0 where it is exact
    greedy: bool  # whether greedy decoding, one token at a time, writes the continuation
    draws: int  # forward passes over noise; 0 where there is none


@dataclasses.dataclass(frozen=True)
class Scorer:
    """How questions are scored. Raises `UserError` for settings that are out of range."""

    params: Params
    model: Denoiser
    method: str = "monte_carlo"  # of a diffusion model; an autoregressive one is exact
    max_draws: int = 32
    seed: int = 0
    batch_tokens: int = 8192  # of a batch, padding included
    batch_rows: int | None = None  # continuations of a batch; default: as many as `batch_tokens` hold

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"'{self.method}' is not a way to a likelihood; choose one of {', '.join(METHODS)}")
        if self.max_draws < STRATA or self.max_draws % STRATA:
            raise UserError(f"the number of draws must be a multiple of {STRATA}, not {self.max_draws}")

    def score(self, questions: Sequence[Question]) -> list[list[Score]]:
        """The scores of the choices of each question.

        Raises `UserError` for a choice that is longer than the model's context.
        """
        choices = [choice for question in questions for choice in question.choices]
        for choice in choices:
            check(choice, self.model)
        if self.model.autoregressive:
            exact = [Score(float(log_p), 0.0, bool(greedy), 0) for log_p, greedy in self.each(left_to_right, choices)]
            return regroup(exact, questions)
        wanted = np.full(len(choices), self.method == "decoding_order")
        decoded = self.each(decoding_order, choices, wanted)
        if self.method == "decoding_order":
            return regroup([Score(float(log_p), 0.0, bool(greedy), 0) for log_p, greedy in decoded], questions)
        greedy = regroup([bool(greedy) for _, greedy in decoded], questions)
        draws = self.diffullama_draws(questions) if self.method == "diffullama" else self.draw_until_settled(questions)
        return [[monte_carlo_score(row, g) for row, g in zip(rows, hits)] for rows, hits in zip(draws, greedy)]

    def draw_until_settled(self, questions: Sequence[Question]) -> list[Float[np.ndarray, "choices draws"]]:
        """The NELBO of each choice of each question, in nats, for every draw that the question took."""
        draws = [np.zeros((len(question.choices), 0)) for question in questions]
        keys = self.keys(questions)
        waiting = list(range(len(questions)))
        for first in range(0, self.max_draws, STRATA):
            if not waiting:
                break
            rows = [(choice, q, draw) for q in waiting for choice in questions[q].choices
                    for draw in range(first, first + STRATA)]
            choices, of_question, numbers = zip(*rows)
            nats = iter(self.each(masked_draw, choices, keys[np.array(of_question)], np.array(numbers)))
            for q in waiting:
                new = [[next(nats) for _ in range(STRATA)] for _ in questions[q].choices]
                draws[q] = np.concatenate([draws[q], np.asarray(new)], 1)
            waiting = [q for q in waiting if not settled(draws[q], [choice.size for choice in questions[q].choices])]
        return draws

    def diffullama_draws(self, questions: Sequence[Question]) -> list[Float[np.ndarray, "choices draws"]]:
        """The terms of DiffuLLaMA's score of each choice, in nats per token, with t = 1/T, 2/T, .. 1 for T draws."""
        steps = np.arange(1, self.max_draws + 1)
        rows = [(choice, q, step) for q, question in enumerate(questions) for choice in question.choices
                for step in steps]
        choices, of_question, numbers = zip(*rows)
        keys = jax.vmap(jax.random.fold_in)(self.keys(questions)[np.array(of_question)], np.array(numbers))
        nats = iter(self.each(diffullama_draw, choices, keys, np.array(numbers, np.float32) / self.max_draws))
        return [np.array([[next(nats) for _ in steps] for _ in question.choices]) for question in questions]

    def keys(self, questions: Sequence[Question]) -> Key[jax.Array, " questions"]:
        """The key of each question's noise."""
        return jnp.stack([question_key(self.seed, question.key) for question in questions])

    def each(self, estimator: Callable, choices: Sequence[Choice], *columns: Array) -> list:
        """`estimator` of each choice, with its entry of the columns, in batches of similar shapes."""
        results = [None] * len(choices)
        for indices, length, size in self.batches(choices):
            rows = make_rows([choices[i] for i in indices], length)
            chosen = [column[np.array(indices)] for column in columns]
            found = jax.device_get(estimator(self.params, rows, *chosen, model=self.model, size=size))
            entries = zip(*found) if isinstance(found, tuple) else found
            for i, entry in zip(indices, entries):
                results[i] = entry
        return results

    def batches(self, choices: Sequence[Choice]) -> Iterator[tuple[list[int], int, int]]:
        """Batches of choices of similar length, in few shapes: their indices, of which the last is repeated to fill the
        batch, the tokens of a padded row, and those of its continuation."""
        unread = int(self.model.autoregressive)  # the last token of a row
        groups: dict[tuple[int, int], list[int]] = {}
        for i, choice in enumerate(choices):
            read = len(choice.context) + len(choice.continuation) - unread
            length = min(max(MIN_LENGTH, next_power_of_two(read)), self.model.config.max_length) + unread
            groups.setdefault((length, next_power_of_four(len(choice.continuation))), []).append(i)
        for (length, size), group in sorted(groups.items()):
            most = min(max(1, self.batch_tokens // length), self.batch_rows or self.batch_tokens)
            rows = min(most, next_power_of_four(len(group)))
            for start in range(0, len(group), rows):
                indices = group[start:start + rows]
                yield indices + indices[-1:] * (rows - len(indices)), length, min(size, length)


def next_power_of_four(n: int) -> int:
    """The smallest power of four that is at least `n`, and at least 4."""
    return 1 << 2 * max(1, ((n - 1).bit_length() + 1) // 2)


def regroup(flat: Sequence, questions: Sequence[Question]) -> list[list]:
    """One entry per choice of each question, from one entry per choice."""
    rest = iter(flat)
    return [[next(rest) for _ in question.choices] for question in questions]


def monte_carlo_score(draws: Float[np.ndarray, " draws"], greedy: bool) -> Score:
    """The score from a choice's draws."""
    nats = estimate(draws)
    return Score(-nats.mean, nats.error, greedy, draws.size)


def settled(draws: Float[np.ndarray, "choices draws"], sizes: Sequence[int]) -> bool:
    """Whether more draws would hardly change which choice is best, in all and per unit of its size; of a lone choice,
    whether its likelihood is known well enough."""
    if len(draws) == 1:
        nats = estimate(draws[0])
        low, high = nats.interval(CONFIDENCE)
        return high - low <= 2 * TOLERANCE * nats.mean
    for per in (np.ones(len(sizes)), np.asarray(sizes, float)):
        scaled = draws / per[:, None]
        best = np.argmin(scaled.mean(1))
        leads = [estimate(scaled[i] - scaled[best]) for i in range(len(draws)) if i != best]
        if any(lead.interval(CONFIDENCE)[0] < 0 for lead in leads):
            return False
    return True


def question_key(seed: int, text: str) -> Key[jax.Array, ""]:
    """The key of a question's noise."""
    words = np.frombuffer(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], np.uint32)
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), words[0]), words[1])


def check(choice: Choice, model: Denoiser) -> None:
    """Raises `UserError` for a choice that the model cannot score."""
    if not choice.context or not choice.continuation:
        raise UserError("a likelihood needs a token to start from and a token to predict; pass longer texts")
    total = len(choice.context) + len(choice.continuation)
    if total > model.max_tokens:
        raise UserError(f"a context and its continuation take {total} tokens and this model reads {model.max_tokens}; "
                        "shorten the context")


def make_rows(choices: Sequence[Choice], length: int) -> Rows:
    """The rows of choices, padded to `length` tokens."""
    tokens, segments = np.zeros((2, len(choices), length), np.int32)
    for row, choice in enumerate(choices):
        text = [*choice.context, *choice.continuation]
        tokens[row, :len(text)], segments[row, :len(text)] = text, 1
    first, size = np.array([(len(choice.context), len(choice.continuation)) for choice in choices], np.int32).T
    return Rows(*map(jnp.asarray, (tokens, segments, first, size)))
