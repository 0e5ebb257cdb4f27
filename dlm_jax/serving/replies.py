"""OpenAI's shapes of answers, chunks and errors."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.sampling.lane import Progress
from dlm_jax.sampling.render import printable
from dlm_jax.serving.answer import Answer
from dlm_jax.serving.bodies import Chat, Common, Completion, Infill
from dlm_jax.serving.service import Work

# What an answer is called, whole and as a chunk of a stream.
OBJECTS = {Completion: ("text_completion", "text_completion"), Infill: ("text_completion", "text_completion"),
           Chat: ("chat.completion", "chat.completion.chunk")}
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def whole(id: str, body: Common, work: Work) -> dict[str, Any]:
    """The answer to a request without `stream`."""
    choices = [choice(i, answer, body, work, answer_text(answer, body, work, i), whole=True)
               for i, answer in enumerate(work.answers)]
    return {**head(id, body, work), "choices": choices, "usage": usage(work)}


def head(id: str, body: Common, work: Work) -> dict[str, Any]:
    """The fields that answers and chunks begin with."""
    kind = OBJECTS[type(body)][body.stream]
    return {"id": id, "object": kind, "created": int(time.time()), "model": work.model}


def answer_text(answer: Answer, body: Common, work: Work, i: int) -> str:
    """The text of a choice: with its prompt if the request says so, or around the holes."""
    if isinstance(body, Infill):
        pieces, tokens = work.lm.text_tokenizer().pieces, work.jobs[i].request.tokens
        return "".join(pieces(tokens[:answer.first])) + answer.text + "".join(pieces(tokens)[answer.last:])
    return echoed(body, work, i) + answer.text


def echoed(body: Common, work: Work, i: int) -> str:
    """The prompt, where the answer is to begin with it."""
    if not (isinstance(body, Completion) and body.echo):
        return ""
    return work.lm.text_tokenizer().decode(work.jobs[i].prompt)


def choice(i: int, answer: Answer, body: Common, work: Work, text: str, whole: bool, since: int = 0) -> dict[str, Any]:
    """A choice of an answer, or what a chunk adds to one: `text`, and the tokens from number `since` on."""
    ended = {"index": i, "finish_reason": answer.reason}
    logprobs: dict[str, Any] | None = None
    if isinstance(body, Chat):
        if body.logprobs:
            logprobs = {"content": [{"token": token.piece, "logprob": token.log_p, "bytes": list(token.piece.encode()),
                                     "top_logprobs": []} for token in answer.shown()[since:]], "refusal": None}
        says = {"message": {"role": "assistant", "content": text}} if whole else {"delta": {"content": text}}
        return {**ended, **says, "logprobs": logprobs}
    if isinstance(body, Completion) and body.logprobs is not None:
        shown, start = answer.shown()[since:], len(echoed(body, work, i))
        logprobs = {"tokens": [token.piece for token in shown], "token_logprobs": [token.log_p for token in shown],
                    "top_logprobs": None, "text_offset": [start + token.offset for token in shown]}
    return {**ended, "text": text, "logprobs": logprobs}


def chunk(id: str, body: Common, work: Work, i: int, text: str, since: int) -> dict[str, Any]:
    """A chunk of a stream."""
    return {**head(id, body, work),
            "choices": [choice(i, work.answers[i], body, work, text, whole=False, since=since)]}


def opening(id: str, body: Common, work: Work) -> dict[str, Any]:
    """The chunk with which a chat begins."""
    choices = [{"index": i, "finish_reason": None, "logprobs": None, "delta": {"role": "assistant", "content": ""}}
               for i in range(len(work.answers))]
    return {**head(id, body, work), "choices": choices}


def closing(id: str, body: Common, work: Work) -> dict[str, Any]:
    """The chunk with which a stream ends that was asked for its usage."""
    return {**head(id, body, work), "choices": [], "usage": usage(work)}


def usage(work: Work) -> dict[str, Any]:
    """What the answer took; `forward_passes`, ours, counts those that each choice took part in."""
    written = sum(len(answer.tokens) for answer in work.answers)
    return {"prompt_tokens": work.prompt_tokens, "completion_tokens": written,
            "total_tokens": work.prompt_tokens + written,
            "forward_passes": sum(answer.forwards for answer in work.answers)}


Cell = list[Any]  # text or None where masked, commit step, confidence


def cells(tokenizer: Tokenizer, progress: Progress, n: int) -> list[Cell]:
    """The first n positions as a step left them."""
    trace, row = progress.trace, progress.row
    masked, ids = trace.masked[row, :n], trace.tokens[row, :n]
    known = np.where(masked, 0 if tokenizer.mask_id is None else tokenizer.mask_id, ids)
    return [[None if hidden else printable(piece), 0 if hidden else int(step), 0.0 if hidden else round(float(p), 4)]
            for piece, hidden, step, p in zip(tokenizer.pieces(known.tolist()), masked, trace.commit_step[row],
                                              trace.confidence[row])]


def denoising(old: list[Cell], new: list[Cell], progress: Progress) -> Mapping[str, Any]:
    """What a step changed: [position, text or null where masked, commit step, confidence] of each position that is not
    as before."""
    changes = [[position, *cell] for position, cell in enumerate(new)
               if position >= len(old) or old[position] != cell]
    return {"forward_passes": int(progress.trace.nfe[progress.row]), "changes": changes}
