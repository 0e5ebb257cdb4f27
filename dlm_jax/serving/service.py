"""From bodies to jobs, and from jobs to answers."""

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

from dlm_jax.errors import UserError
from dlm_jax.language_model import LanguageModel
from dlm_jax.sampling.lane import Job, Progress
from dlm_jax.sampling.requests import Request, check_length, continuation
from dlm_jax.sampling.settings import Settings
from dlm_jax.serving.answer import Answer
from dlm_jax.serving.batcher import Batcher
from dlm_jax.serving.bodies import Chat, Common, Completion, Infill

COMPLETION_TOKENS = 16  # of a completion that asks for no number, as OpenAI's


class NoModel(Exception):
    """The request names a model that is not served."""


class Failed(Exception):
    """A forward pass failed; the log says how."""


class Update(NamedTuple):
    """What a round did for one choice."""

    choice: int
    progress: Progress


@dataclasses.dataclass
class Work:
    """A request of the API as jobs: for each prompt `n` of them."""

    model: str
    lm: LanguageModel
    jobs: list[Job]
    answers: list[Answer]
    prompt_tokens: int
    events: "asyncio.Queue[tuple[int, Progress | None]]"


class Service:
    """What the server does, without HTTP."""

    def __init__(self, models: dict[str, LanguageModel], defaults: dict[str, Any], batcher: Batcher,
                 chat_tokens: int) -> None:
        self.models, self.defaults, self.batcher, self.chat_tokens = models, defaults, batcher, chat_tokens

    def card(self, name: str) -> dict[str, Any]:
        """A model as /v1/models lists it, with what the page needs to know about it."""
        spec = self.models[name].spec
        return {"id": name, "object": "model", "created": 0, "owned_by": "dlm-jax", "denoises": spec.is_diffusion,
                "rule": spec.rule, "block_size": spec.block_size, "token_causal": spec.clean_half == "token_causal",
                "context": min(self.batcher.context, self.models[name].config.max_length),
                "unmasking": self.defaults["unmasking"]}

    def prepare(self, body: Common, loop: asyncio.AbstractEventLoop) -> Work:
        """The jobs of a body. Raises `UserError` and `NoModel`. It tokenizes, so a thread of its own runs it."""
        name = body.model or next(iter(self.models))
        if name not in self.models:
            raise NoModel(f"there is no model '{name[:100]}'; choose one of {', '.join(self.models)}")
        lm = self.models[name]
        settings = Settings(**{**self.defaults, "seed": secrets.randbelow(2**32), **body.settings()})
        requests = self.requests(lm, body)
        events: asyncio.Queue[tuple[int, Progress | None]] = asyncio.Queue()
        every_pass = body.stream and bool(body.stream_options and body.stream_options.include_steps)
        every_round = body.stream or bool(body.stops)
        jobs = [Job(request, settings, number, Listener(i * body.n + number, events, loop), every_round, every_pass)
                for i, request in enumerate(requests) for number in range(body.n)]
        answers = [Answer(lm.text_tokenizer(), job, body.stops) for job in jobs]
        return Work(name, lm, jobs, answers, sum(request.masked.count(False) for request in requests), events)

    def requests(self, lm: LanguageModel, body: Common) -> list[Request]:
        """One request for each prompt of the body."""
        if isinstance(body, Infill):
            found = lm.with_holes(body.text)
            if len(found) > 1:
                raise UserError("a hole here has one width; write [MASK:n]")
            return found
        if isinstance(body, Chat):
            return [self.continued(lm, chat_ids(lm, body), body.max_completion_tokens or body.max_tokens,
                                   self.chat_tokens)]
        assert isinstance(body, Completion)
        prompts = [lm.encode(p) if isinstance(p, str) else p for p in prompts_of(body)]
        if body.suffix is None:
            return [self.continued(lm, prompt, body.max_tokens, COMPLETION_TOKENS) for prompt in prompts]
        return [with_suffix(lm, prompt, body.suffix, body.max_tokens or COMPLETION_TOKENS) for prompt in prompts]

    def continued(self, lm: LanguageModel, prompt: list[int], wanted: int | None, default: int) -> Request:
        """The request to continue a prompt by the tokens wanted, or by the default or as many as there is room for."""
        context = min(lm.config.max_length, self.batcher.context)
        check_length(len(prompt) + (wanted or 1), context)
        return continuation(prompt, wanted or min(default, context - len(prompt)))

    async def updates(self, work: Work) -> AsyncGenerator[Update]:
        """Submits the jobs and gives what happens to them until all have ended; cancels the rest on the way out.

        Raises `QueueFull` and `UserError` before anything is computed, and `Failed`.
        """
        self.batcher.submit(work.model, work.jobs)
        open_choices = set(range(len(work.jobs)))
        try:
            while open_choices:
                choice, progress = await work.events.get()
                if progress is None:
                    raise Failed("the model failed on this request; the server's log says how")
                if choice in open_choices:
                    work.answers[choice].add(progress)
                    yield Update(choice, progress)
                    if work.answers[choice].reason is not None:
                        work.jobs[choice].cancelled = True
                        open_choices.discard(choice)
        finally:
            for job in work.jobs:
                job.cancelled = True

    async def finish(self, work: Work) -> None:
        """Runs the jobs to their end."""
        async with contextlib.aclosing(self.updates(work)) as updates:
            async for _ in updates:
                pass


def causal_half(lm: LanguageModel) -> LanguageModel | None:
    """The model as the autoregressive one that its finished text sees, where it has one."""
    if lm.spec.clean_half != "token_causal":
        return None
    return dataclasses.replace(lm, spec=lm.spec.as_autoregressive())


def example(settings: dict[str, Any]) -> Job:
    """The shortest job by these settings."""
    return Job(continuation([0], 1), Settings(**settings), 0, lambda job, progress: None)


@dataclasses.dataclass(frozen=True)
class Listener:
    """Hands what the batcher's thread tells a job over to the event loop."""

    choice: int
    events: "asyncio.Queue[tuple[int, Progress | None]]"
    loop: asyncio.AbstractEventLoop

    def __call__(self, job: Job, progress: Progress | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(self.events.put_nowait, (self.choice, progress))


def prompts_of(body: Completion) -> Sequence[Any]:
    """The prompts, each a text or token ids."""
    prompt = body.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def with_suffix(lm: LanguageModel, prompt: list[int], suffix: str, width: int) -> Request:
    """The request to fill a hole between a prompt and what follows it."""
    if not lm.spec.is_diffusion:
        raise UserError("a plain autoregressive model cannot fill a hole; leave out suffix, or choose another model")
    after = lm.text_tokenizer().encode_inside(suffix)
    check_length(len(prompt) + width + len(after), lm.config.max_length)
    return Request([*prompt, *[0] * width, *after],
                   [*[False] * len(prompt), *[True] * width, *[False] * len(after)], stop=False)


def chat_ids(lm: LanguageModel, body: Chat) -> list[int]:
    """The ids of a chat by the tokenizer's template, ready for the answer."""
    from jinja2 import TemplateError
    tokenizer = lm.text_tokenizer()
    if not tokenizer.wrapped.chat_template:
        raise UserError("this model's tokenizer has no chat template; use /v1/completions")
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    try:
        text = tokenizer.wrapped.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"the model's chat template refuses these messages: {error}") from None
    ids = tokenizer.encode(text)
    start = lm.spec.start_id
    return ids if start is None or ids[:1] == [start] else [start, *ids]
