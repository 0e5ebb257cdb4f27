"""Batches for reinforcement learning: the model answers prompts, and its answers are rewarded.

A batch holds `group_size` answers to each of a few prompts. The prompts are those of the training records, and which
ones, as well as every draw, is a function of (train.seed, step): a run that was killed and resumed sees the same.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.config import Config
from dlm_jax.data.dataset import Dataset
from dlm_jax.data.mixture import Mixture
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.diffusion.trajectory import advantages
from dlm_jax.errors import UserError
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.weights import Params
from dlm_jax.parallel.mesh import global_batch, outside_mesh
from dlm_jax.sampling.generation import generate
from dlm_jax.sampling.requests import Request
from dlm_jax.sampling.sample import Sample
from dlm_jax.sampling.settings import Settings
from dlm_jax.sampling.unmasking import Speculate, parse_unmasking
from dlm_jax.segments import split_prompt_bit
from dlm_jax.training.batches import Batch
from dlm_jax.training.goodput import GoodputClock
from dlm_jax.training.rewards import REWARDS
from dlm_jax.training.step import TrainState

Prompt = tuple[list[int], list[int]]  # the tokens of a prompt, and of its answer in the data


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Called as rollouts(state): the batch of the next step, from the model as it is now."""

    config: Config
    bundle: Bundle
    training: Dataset
    tokenizer: Tokenizer
    full_params: Callable[[TrainState], Params]
    clock: GoodputClock

    def __call__(self, state: TrainState) -> Batch:
        """Tokens, segments and commit steps int32 [b, n], and advantages and rewards fp32 [b]."""
        step, group = int(state.step), self.config.reinforce.group_size
        prompts = [prompt for prompt in self._prompts(step) for _ in range(group)]
        samples = self._answers(self.full_params(state), prompts, step)
        rewards = np.array([self._reward(sample, prompt) for sample, prompt in zip(samples, prompts)], np.float32)
        scale = np.asarray(advantages(jnp.asarray(rewards.reshape(-1, group)))).reshape(-1)
        rows = [self._row(sample, prompt) for sample, prompt in zip(samples, prompts)]
        self.clock.spend("data")
        size = len(prompts)
        return tuple(global_batch(array, size) for array in (*(np.stack(x) for x in zip(*rows)), scale, rewards))

    def _prompts(self, step: int) -> list[Prompt]:
        """Those of this step, each from a record of its own."""
        random = np.random.default_rng((self.config.train.seed, step))
        count = self.config.train.global_batch_size // self.config.reinforce.group_size
        rows = random.integers(0, self.training.records, count).tolist()
        found = []
        for tokens, segments in zip(*self.training.rows(rows)):
            pairs = pairs_of(tokens, segments)
            prompt, answer = pairs[random.integers(len(pairs))]
            found.append((prompt[-(self.training.length - self.config.reinforce.max_tokens):], answer))
        return found

    def _answers(self, params: Params, prompts: list[Prompt], step: int) -> list[Sample]:
        """One answer to each prompt, drawn from the model; nothing stops it, so that each has all its blocks."""
        settings = self.config.reinforce
        requests = [Request([*prompt, *[0] * settings.max_tokens],
                            [*[False] * len(prompt), *[True] * settings.max_tokens], stop=False)
                    for prompt, _ in prompts]
        seed = int(np.random.default_rng((self.config.train.seed, step, 1)).integers(2**31))
        how = Settings(unmasking=settings.unmasking, temperature=1.0, seed=seed)
        return outside_mesh(lambda copy: generate(copy, self.bundle.config, self.bundle.spec, requests, how), params)

    def _reward(self, sample: Sample, prompt: Prompt) -> float:
        question, reference = prompt
        answer = sample.tokens[len(question):]
        end = answer.index(self.tokenizer.eos_id) if self.tokenizer.eos_id in answer else len(answer)
        return REWARDS[self.config.reinforce.reward](*map(self.tokenizer.decode, (question, answer[:end], reference)))

    def _row(self, sample: Sample, prompt: Prompt) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, segments and commit steps [n]: up to the end of the block in which the answer ends."""
        n, size, first = self.training.length, self.config.recipe.block_size or self.training.length, len(prompt[0])
        answer = sample.tokens[first:]
        last = first + (answer.index(self.tokenizer.eos_id) if self.tokenizer.eos_id in answer else len(answer) - 1)
        end = min((last // size + 1) * size, len(sample.tokens), n)
        tokens, segments, commit_step = np.zeros((3, n), np.int32)
        tokens[:end], segments[:end], commit_step[:end] = sample.tokens[:end], 1, sample.commit_step[:end]
        return tokens, segments, commit_step


def pairs_of(tokens: np.ndarray, segments: np.ndarray) -> list[Prompt]:
    """The pairs of a record. Raises `UserError` if it has none."""
    numbers, is_prompt = (np.asarray(x) for x in split_prompt_bit(segments))
    found = []
    for number in range(1, int(numbers.max(initial=0)) + 1):
        prompt, answer = tokens[(numbers == number) & is_prompt], tokens[(numbers == number) & ~is_prompt]
        if len(prompt):
            found.append((prompt.tolist(), answer.tolist()))
    if not found:
        raise UserError("reinforce.reward needs prompts and data.train has a record without any; make it with `dlm "
                        "prepare --pairs`")
    return found


def check_rollouts(config: Config, training: Dataset | Mixture, tokenizer: Tokenizer | None) -> None:
    """Raises `UserError` for what reinforcement learning cannot use."""
    settings = config.reinforce
    if settings.reward not in REWARDS:
        raise UserError(f"there is no reward '{settings.reward}'; choose one of {', '.join(REWARDS)}")
    if isinstance(parse_unmasking(settings.unmasking).selector, Speculate):
        raise UserError("with reinforce.unmasking speculate the causal half writes and diffusion drafts only; choose "
                        "another unmasking strategy")
    if tokenizer is None or tokenizer.eos_id is None:
        raise UserError("reinforce.reward reads answers as text, and the model has no tokenizer with an end token")
    if jax.process_count() > 1:
        raise UserError("reinforcement learning runs on one host; unset reinforce.reward or start one process")
    if not isinstance(training, Dataset):
        raise UserError("reinforcement learning takes its prompts from one source; name one in data.train")
    if settings.max_tokens >= training.length:
        raise UserError(f"reinforce.max_tokens {settings.max_tokens} leaves no room for a prompt in records of "
                        f"{training.length} tokens; lower it")
    pairs_of(*(x[0] for x in training.rows([0])))


def example_rollouts(config: Config, training: Dataset | Mixture) -> Batch:
    """A batch of zeros with the shapes and the layout of `Rollouts`."""
    size = config.train.global_batch_size
    rows, numbers = np.zeros((size, training.length), np.int32), np.zeros(size, np.float32)
    return tuple(global_batch(array, size) for array in (rows, rows, rows, numbers, numbers))
