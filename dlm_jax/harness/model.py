"""The model type `dlm_jax` of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    lm_eval --model dlm_jax --model_args pretrained=DIR,likelihood=decoding_order --tasks hellaswag

Texts become tokens as the harness's own type `hf` makes them, so an autoregressive model gets the same scores here and
there. A score depends on its question, the seed and the model: not on batch sizes, the order of requests, or what else
is in a batch.
"""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM, hash_args
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dlm_jax.errors import UserError
from dlm_jax.evaluation.log_likelihood import AR, denoising_recipe
from dlm_jax.evaluation.prediction import Denoiser
from dlm_jax.evaluation.questions import Choice, Question, Score, Scorer
from dlm_jax.language_model import LanguageModel, load
from dlm_jax.sampling.requests import continuation
from dlm_jax.sampling.sample import Sample
from dlm_jax.sampling.settings import Settings

# The harness would bootstrap in forked processes, and a fork of a process with threads, as JAX has, may wait forever.
os.environ.setdefault("DISABLE_MULTIPROC", "1")
QUESTIONS_AT_ONCE = 64  # scored together; what is done is in the harness's cache after each such group
GENERATED_AT_ONCE = 32
SETTINGS = {field.name for field in dataclasses.fields(Settings)}


@register_model("dlm_jax")
class HarnessModel(TemplateLM):
    """A model of this library, with the harness's interface."""

    def __init__(self, pretrained: str | LanguageModel, likelihood: str = "monte_carlo", max_draws: int = 32,
                 batch_size: int | str | None = None, max_gen_toks: int = 256, add_bos_token: bool | None = None,
                 max_batch_size: int | None = None, device: str | None = None, **settings: Any) -> None:
        """Loads a model.

        pretrained: what `dlm_jax.load` takes, or a model. likelihood: how a diffusion model's log likelihood is found,
        by `monte_carlo` or in its `decoding_order`. max_draws: the most draws per question of the former.
        batch_size: the most texts per batch, which no result depends on. Default, and `auto` or 1, which the harness
        passes by default: as many as hold `Scorer.batch_tokens`, and 32 to generate.
        max_gen_toks: tokens to generate for tasks that do not say. add_bos_token: whether a text starts with a start
        token; default: as its tokenizer does it. max_batch_size, device: without effect; the harness passes them.
        settings: the fields of `Settings`, of which guidance and seed hold for likelihoods as well.

        Raises `UserError` for settings that are unknown or out of range, and for a model that cannot be loaded.
        """
        super().__init__()
        if jax.process_count() > 1:
            raise UserError("the harness runs on one host and this is one of several; start it on a single one")
        unknown = sorted(settings.keys() - SETTINGS)
        if unknown:
            raise UserError(f"{unknown[0]} is no setting of this model; choose from likelihood, max_draws, batch_size, "
                            f"max_gen_toks, add_bos_token, {', '.join(sorted(SETTINGS))}")
        self.lm = pretrained if isinstance(pretrained, LanguageModel) else load(pretrained)
        self.settings = Settings(**settings)
        self.tokenizer = self.lm.text_tokenizer().wrapped
        self.max_gen_toks, self.add_bos_token = max_gen_toks, add_bos_token
        self.batch_rows = None if batch_size in (None, "auto", 1, "1") else int(batch_size)
        if min(1 if self.batch_rows is None else self.batch_rows, max_gen_toks) < 1:
            raise UserError(f"batch_size and max_gen_toks must be at least 1, not {batch_size} and {max_gen_toks}")
        spec, config = self.lm.spec, self.lm.config
        if not spec.is_diffusion and self.settings.cfg_scale:
            raise UserError("guidance is for models that denoise and this one is autoregressive; leave out cfg_scale")
        denoiser = Denoiser(config, denoising_recipe(spec) if spec.is_diffusion else AR, spec.mask_token_id,
                            self.settings.cfg_scale)
        self.scorer = Scorer(self.lm.params, denoiser, likelihood, int(max_draws), self.settings.seed,
                             batch_rows=self.batch_rows)
        self.draws: Counter[int] = Counter()  # how many likelihoods took how many draws
        # (tokens, forward passes) of what was written for a document; `run.evaluate` keeps them with the answers.
        self.costs: MutableMapping[str, tuple[int, int]] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id if self.lm.spec.eos_token_id is None else self.lm.spec.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that a likelihood without context starts from."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        """Tokens of the model's context."""
        return self.lm.config.max_length

    @property
    def tokenizer_name(self) -> str:
        """What identifies the tokenizer in the harness's cache of requests."""
        return f"dlm_jax-{self.lm.text_tokenizer().fingerprint()}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat by the tokenizer's template, ready for the assistant's answer."""
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False,
                                                  add_generation_prompt=add_generation_prompt,
                                                  continue_final_message=not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a text that begins with the start token gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if string.startswith(self.tokenizer.decode([self.prefix_token_id])):
                add_special_tokens = False
        flags = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **flags)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        spec = self.lm.spec
        return {"model_type": self.lm.config.family, "rule": spec.rule, "alignment": spec.alignment,
                "block_size": spec.block_size, "likelihood": self.method, "max_draws": self.scorer.max_draws,
                "draws": {str(draws): count for draws, count in sorted(self.draws.items())},
                "settings": dataclasses.asdict(self.settings)}

    @property
    def method(self) -> str:
        """How likelihoods are found."""
        return "left_to_right" if self.scorer.model.autoregressive else self.scorer.method

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, whether greedy decoding writes it) of each (context, continuation).

        Those of one document are one question, whose choices share their noise.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(document_of(request), []).append(i)
        questions = [self.question([requests[i].args for i in members]) for members in groups.values()]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for members, scores in zip(groups.values(), self.scored(questions, disable_tqdm)):
            for i, score in zip(members, scores):
                results[i] = score.log_p, score.greedy
            self.remember("loglikelihood", {i: requests[i] for i in members}, results)
        return results

    def question(self, pairs: Sequence[tuple[str, str]]) -> Question:
        """The question of these (context, continuation); equal ones get equal noise."""
        return Question(repr(sorted(pairs)), [self.choice(*pair) for pair in pairs])

    def remember(self, kind: str, requests: dict[int, Instance], results: Sequence[Any]) -> None:
        """Puts results into the harness's cache, all or none: a question's choices are scored together."""
        if self.cache_hook.dbdict is not None:
            found = {hash_args(kind, request.args): results[i] for i, request in requests.items()}
            self.cache_hook.dbdict.update(found)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each text, in windows of the model's context that predict every token once."""
        windows = [self.windows(*request.args) for request in requests]
        questions = [Question(repr(window), [Choice(*window)]) for own in windows for window in own]
        scores = self.scored(questions, disable_tqdm)
        results = []
        for i, own in enumerate(windows):
            results.append(sum(next(scores)[0].log_p for _ in own))
            self.remember("loglikelihood_rolling", {i: requests[i]}, results)
        return results

    def windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """(context, tokens to predict) of each window of a text."""
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id,
                                            self.scorer.model.max_tokens - 1, context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def choice(self, context: str, continuation: str) -> Choice:
        """A continuation of a context as tokens; a context that is too long loses its beginning."""
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if after[:1] == before:
                after = after[1:]
        room = self.scorer.model.max_tokens - len(after)
        return Choice(before[-max(room, 1):] or [self.prefix_token_id], after, max(len(continuation.encode()), 1))

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        """(log p, greedy) of each ((context, continuation), context tokens, continuation tokens)."""
        questions = [Question(repr(texts), [Choice(context, tokens)]) for texts, context, tokens in requests]
        return [(score.log_p, score.greedy) for score, in self.scored(questions, True)]

    def scored(self, questions: Sequence[Question], silent: bool) -> Iterator[list[Score]]:
        """The scores of each question, in groups that are scored together."""
        with tqdm(total=len(questions), desc=f"log likelihood, {self.method}", disable=silent) as bar:
            for start in range(0, len(questions), QUESTIONS_AT_ONCE):
                group = self.scorer.score(questions[start:start + QUESTIONS_AT_ONCE])
                bar.update(len(group))
                for scores in group:
                    self.draws.update(score.draws for score in scores)
                    yield scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What each context is continued with, up to the first of the request's own stop sequences."""
        seen: Counter[str] = Counter()
        jobs: dict[tuple[Settings, int], list[tuple[int, list[int], int]]] = {}
        for i, request in enumerate(requests):
            context, arguments = request.args
            settings, length, _ = self.generation(arguments)
            prompt = self.tok_encode(context)[-(self.max_length - length):]
            number = stream_of(context, seen[repr(request.args)])  # a task may ask the same several times
            seen[repr(request.args)] += 1
            jobs.setdefault((settings, length), []).append((i, prompt, number))
        results = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate", disable=disable_tqdm) as bar:
            for (settings, length), group in jobs.items():
                group.sort(key=lambda job: len(job[1]))
                size = self.batch_rows or GENERATED_AT_ONCE
                for batch in (group[start:start + size] for start in range(0, len(group), size)):
                    for i, sample, text in self.generate(batch, settings, length):
                        results[i] = cut(text, self.generation(requests[i].args[1])[2])
                        self.costs[document_of(requests[i])] = sample.new_tokens, sample.nfe
                        self.remember("generate_until", {i: requests[i]}, results)
                        bar.update()
        return results

    def generate(self, jobs: Sequence[tuple[int, list[int], int]], settings: Settings, length: int
                 ) -> Iterator[tuple[int, Sample, str]]:
        """The number, sample and new text of each job (number, prompt, random stream), as one batch."""
        requests = [continuation(prompt, length) for _, prompt, _ in jobs]
        samples = self.lm.fill(requests, settings, [stream for _, _, stream in jobs])
        for (i, prompt, _), sample in zip(jobs, samples):
            yield i, sample, self.lm.text_tokenizer().decode(sample.tokens[len(prompt):])

    def generation(self, arguments: dict[str, Any]) -> tuple[Settings, int, list[str]]:
        """(settings, most tokens, stop sequences) of a request's own arguments, over the model's settings."""
        own = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        until, length, sample = own.pop("until"), own.pop("max_gen_toks"), own.pop("do_sample", False)
        unknown = sorted(own.keys() - SETTINGS)
        if unknown:
            raise UserError(f"this model has no generation argument {unknown[0]}; choose from "
                            f"{', '.join(sorted(SETTINGS))}")
        if not sample and "temperature" not in arguments:  # then the temperature is the model's own
            own.pop("temperature", None)
        if length >= self.max_length:
            raise UserError(f"max_gen_toks {length} leaves no room for a context in the model's {self.max_length} "
                            "tokens; set a smaller one")
        return dataclasses.replace(self.settings, **own), length, [stop for stop in until if stop]


def document_of(request: Instance) -> str:
    """What identifies the document of a request: its task and number, or else its context."""
    if request.task_name is None or request.doc_id is None:
        return repr(request.args[0])
    return document_name(request.task_name, request.doc_id)


def document_name(task: str, number: int) -> str:
    """What identifies a document of a task."""
    return f"{task} {number}"


def stream_of(context: str, repeat: int) -> int:
    """The random stream of a context's continuation."""
    return int.from_bytes(hashlib.sha256(f"{repeat} {context}".encode("utf-8", "surrogatepass")).digest()[:4]) >> 1


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop sequences."""
    return text[:min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]
