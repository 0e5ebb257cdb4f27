"""The HTTP side: routes, limits, keys, streams and logs."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dlm_jax.errors import UserError, shortened
from dlm_jax.sampling.page import template
from dlm_jax.schema.json_text import parse_json
from dlm_jax.serving import replies
from dlm_jax.serving.batcher import QueueFull
from dlm_jax.serving.bodies import Chat, Common, Completion, Infill, read_body
from dlm_jax.serving.metrics import Metrics
from dlm_jax.serving.service import Failed, NoModel, Service, Work

BODY_SECONDS = 30.0  # in which a body must have arrived
ENDPOINTS: dict[str, type[Common]] = {"/v1/completions": Completion, "/v1/chat/completions": Chat, "/v1/infill": Infill}
STATUS = {UserError: 400, NoModel: 404, QueueFull: 429, ClientDisconnect: 499, Failed: 500, TimeoutError: 504}
log = logging.getLogger("dlm_jax.serving.requests")


class Limits(NamedTuple):
    """What a client may ask for."""

    keys: tuple[str, ...] = ()  # bearer keys, one of which a request must carry; none: anybody may ask
    body_bytes: int = 2**20
    seconds: float = 300.0  # from a request to the end of its answer
    hosts: tuple[str, ...] = ("*",)  # the names that a request may call the server by


class Api:
    """The handlers of one server."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self.service, self.limits, self.metrics = service, limits, Metrics(service.batcher)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self.check_key(request)
        return JSONResponse({"object": "list", "data": [self.service.card(name) for name in self.service.models]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self.check_key(request)
        name = request.path_params["name"]
        if name not in self.service.models:
            raise HTTPException(404, f"there is no model '{shortened(name, 100)}'; see /v1/models")
        return JSONResponse(self.service.card(name))

    async def health(self, request: Request) -> Response:
        """GET /health. While programs are compiled, requests are served but may wait for theirs."""
        batcher = self.service.batcher
        alive = batcher.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "stopped", "waiting": len(batcher.waiting),
                             "active": batcher.active, "compiling": batcher.compiler.is_alive()},
                            200 if alive else 503)

    async def measured(self, request: Request) -> Response:
        """GET /metrics."""
        self.check_key(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def generate(self, request: Request) -> Response:
        """POST to one of ENDPOINTS: the whole answer, or a stream of its chunks."""
        began, id = time.monotonic(), f"cmpl-{uuid.uuid4().hex}"
        self.check_key(request)
        body = read_body(ENDPOINTS[request.url.path], await self.read(request))
        work = await run_in_threadpool(self.service.prepare, body, asyncio.get_running_loop())
        deadline, stream = began + self.limits.seconds, self.stream(request, id, body, work, began)
        async with leave_with_client(request), asyncio.timeout(deadline - time.monotonic()):
            if body.stream:
                first = await anext(stream)  # what is refused before that is refused with a status
            else:
                await self.service.finish(work)
        if not body.stream:
            self.done(request, id, 200, began, work)
            return JSONResponse(replies.whole(id, body, work))
        return StreamingResponse(self.sse(chain(first, stream), deadline, request, id, began, work),
                                 media_type="text/event-stream", headers={"Cache-Control": "no-store",
                                                                          "X-Accel-Buffering": "no"})

    async def stream(self, request: Request, id: str, body: Common, work: Work, began: float
                     ) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of an answer."""
        sent, steps = [0] * len(work.answers), bool(body.stream_options and body.stream_options.include_steps)
        seen: list[list[replies.Cell]] = [[] for _ in work.answers]
        tokenizer = work.lm.text_tokenizer()
        opened = False
        async with contextlib.aclosing(self.service.updates(work)) as updates:
            async for i, progress in updates:
                if not opened and isinstance(body, Chat):
                    yield replies.opening(id, body, work)
                opened, answer = True, work.answers[i]
                text = answer.new_text()
                if text or answer.reason or steps:
                    found = replies.chunk(id, body, work, i, text, sent[i])
                    if steps:
                        now = replies.cells(tokenizer, progress, len(work.jobs[i].request.tokens))
                        found["denoising"], seen[i] = replies.denoising(seen[i], now, progress), now
                    if text and not any(sent):
                        self.metrics.first_text.observe(time.monotonic() - began)
                    sent[i] = len(answer.shown())
                    yield found
        if body.stream_options and body.stream_options.include_usage:
            yield replies.closing(id, body, work)

    async def sse(self, chunks: AsyncGenerator[dict[str, Any]], deadline: float, request: Request, id: str,
                  began: float, work: Work) -> AsyncGenerator[str]:
        """The chunks as server-sent events. What goes wrong after the first of them is an event itself."""
        status = 499  # unless the client stays to the end
        try:
            async with contextlib.aclosing(chunks), asyncio.timeout(deadline - time.monotonic()):
                async for found in chunks:
                    yield f"data: {json.dumps(found, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
            status = 200
        except (Failed, TimeoutError) as error:
            status = STATUS[type(error)]
            yield f"data: {json.dumps(replies.error(status, sentence(error)))}\n\n"
        finally:
            self.done(request, id, status, began, work)

    async def read(self, request: Request) -> Any:
        """The JSON of the body, if it is no longer than allowed and arrives in time."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "send the body as Content-Type: application/json")
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    data += part
                    if len(data) > self.limits.body_bytes:
                        raise HTTPException(413, f"the body exceeds {self.limits.body_bytes} bytes; send less")
        except TimeoutError:
            message = f"the body did not arrive within {BODY_SECONDS:g} seconds; send it again"
            raise HTTPException(408, message, {"Connection": "close"}) from None
        try:
            return parse_json(bytes(data))
        except ValueError as error:
            raise HTTPException(400, f"the body is not JSON that can be read: {error}") from None

    def check_key(self, request: Request) -> None:
        """Refuses a request without a valid key. The time it takes does not tell how much of a key was right."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else b""
        matches = [hmac.compare_digest(given, valid.encode()) for valid in self.limits.keys]
        if self.limits.keys and not any(matches):
            raise HTTPException(401, "a valid key is missing; send Authorization: Bearer KEY",
                                {"WWW-Authenticate": "Bearer"})

    async def refuse(self, request: Request, error: Exception) -> Response:
        """The answer to whatever was raised."""
        headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
        status = error.status_code if isinstance(error, HTTPException) else STATUS.get(type(error), 500)
        if status == 429:
            headers["Retry-After"] = "1"
        message = error.detail if isinstance(error, HTTPException) else sentence(error)
        self.done(request, None, status, time.monotonic(), None)
        return JSONResponse(replies.error(status, message), status, headers)

    def done(self, request: Request, id: str | None, status: int, began: float, work: Work | None) -> None:
        """Counts a request and logs it, without its texts."""
        path = request.url.path if request.url.path in PATHS else "other"
        seconds = time.monotonic() - began
        self.metrics.requests.labels(path, str(status)).inc()
        line: dict[str, Any] = {"time": time.time(), "path": path, "status": status, "id": id, "seconds": seconds}
        if work is not None:
            used = replies.usage(work)
            self.metrics.prompt_tokens.inc(used["prompt_tokens"])
            self.metrics.tokens.inc(used["completion_tokens"])
            self.metrics.seconds.observe(seconds)
            line |= {"model": work.model, "choices": len(work.jobs), **used}
        log.info(json.dumps(line))


PATHS = {*ENDPOINTS, "/", "/health", "/metrics", "/v1/models"}


def make_app(service: Service, limits: Limits) -> Starlette:
    """The application."""
    api = Api(service, limits)
    page = template("serve.html")
    policy = content_policy(page)

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await run_in_threadpool(service.batcher.stop)

    posts = [Route(path, api.generate, methods=["POST"]) for path in ENDPOINTS]
    gets = [Route("/", show_page), Route("/health", api.health), Route("/metrics", api.measured),
            Route("/v1/models", api.models), Route("/v1/models/{name:path}", api.model)]
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        kind: api.refuse for kind in (HTTPException, *STATUS, Exception)}
    return Starlette(routes=[*posts, *gets], exception_handlers=handlers, lifespan=lifespan,
                     middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(limits.hosts))])


@contextlib.asynccontextmanager
async def leave_with_client(request: Request) -> AsyncIterator[None]:
    """Cancels what is inside when the client goes away."""
    task = asyncio.current_task()
    assert task is not None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if watcher.done() and not watcher.cancelled():
            task.uncancel()
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()


async def chain(first: dict[str, Any], rest: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[dict[str, Any]]:
    """`first`, and then the rest."""
    async with contextlib.aclosing(rest):
        yield first
        async for item in rest:
            yield item


def sentence(error: Exception) -> str:
    """What an error says to the client."""
    if isinstance(error, TimeoutError):
        return "the answer was not finished in time; ask for fewer tokens, or raise --timeout"
    if isinstance(error, ClientDisconnect):
        return "the client went away"
    return str(error) if isinstance(error, tuple(STATUS)) else "the server failed; its log says how"


def content_policy(page: str) -> str:
    """Lets the page run its own script and speak with its own server, and nothing else."""
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
