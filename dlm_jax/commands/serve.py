"""`dlm serve`: an HTTP server with OpenAI's API, continuous batching, and a page to try the model on."""

import argparse
import dataclasses
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm_jax.commands.arguments import (
    MODEL_HELP,
    Arguments,
    add_decoding_flags,
    add_tensor_flag,
    integer_at_least,
)
from dlm_jax.errors import Stopped, UserError
from dlm_jax.schema.json_text import read_regular

if TYPE_CHECKING:
    from dlm_jax.serving.service import Service

MAX_KEYS = 2**20  # bytes of a file of keys
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm serve`."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--beside", metavar="MODEL",
                        help="a second model, such as the autoregressive base, for the page to compare with (default: "
                             "the model's own causal half, where it has one)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                        help="where to listen (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=integer_at_least(0), default=8000, metavar="N",
                        help="port (default 8000); 0 takes a free one and says which")
    parser.add_argument("--rows", type=integer_at_least(1), default=16, metavar="N",
                        help="sequences that are computed together (default 16)")
    parser.add_argument("--context", type=integer_at_least(64), default=2048, metavar="N",
                        help="tokens of a prompt and its answer at most (default 2048, or the model's context)")
    parser.add_argument("--max-tokens", type=integer_at_least(1), default=256, metavar="N",
                        help="new tokens of a chat answer that asks for no number (default 256)")
    parser.add_argument("--queue", type=integer_at_least(1), default=256, metavar="N",
                        help="sequences that may wait for a row; further requests get status 429 (default 256)")
    parser.add_argument("--timeout", type=integer_at_least(1), default=300, metavar="SECONDS",
                        help="time for a request, after which it gets status 504 (default 300)")
    parser.add_argument("--api-keys", metavar="FILE",
                        help="a file of keys, one per line, of which requests must carry one (default: the "
                             "environment's DLM_API_KEY, or none)")
    add_tensor_flag(parser)
    add_decoding_flags(parser)


def run(a: Arguments) -> dict[str, Any]:
    """Serves until SIGTERM or Ctrl-C, and then finishes what it has begun."""
    try:
        import uvicorn

        from dlm_jax.serving.app import Limits, make_app
    except ImportError as error:
        raise UserError(f"the server needs {error.name}; install it with pip install 'dlm-jax[serve]'") from error
    keys = read_keys(a)
    service = make_service(a)
    listening = bind(a.host, a.port)
    hosts = ("localhost", "127.0.0.1", "[::1]") if a.host in LOOPBACK else ("*",)
    app = make_app(service, Limits(keys, seconds=a.timeout, hosts=hosts))
    set_up_logs()
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=a.timeout))
    received: list[int] = []

    def stop(caught: int, _: object) -> None:  # uvicorn answers signals while it runs, and passes them on at its end
        received.append(caught)
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    address = f"http://{f'[{a.host}]' if ':' in a.host else a.host}:{listening.getsockname()[1]}"
    print(f"serving {', '.join(service.models)} at {address} (the API at {address}/v1); Ctrl-C ends it", flush=True)
    server.run(sockets=[listening])
    service.batcher.stop()
    answered = "ended at once" if server.force_exit else "answered what it had begun, and ended"  # at a second Ctrl-C
    raise Stopped(answered, received[0] if received else signal.SIGTERM)


def make_service(a: Arguments) -> "Service":
    """The models and how they are served. Raises `UserError` for settings that no request can be served with."""
    from dlm_jax.language_model import LanguageModel, load
    from dlm_jax.sampling.settings import Settings
    from dlm_jax.serving.batcher import Batcher
    from dlm_jax.serving.service import Service, causal_half, example
    defaults = {field.name: getattr(a, field.name) for field in dataclasses.fields(Settings) if field.name != "seed"}
    name = name_of(a.model)
    models: dict[str, LanguageModel] = {name: load(a.model, a.tensor)}
    if a.beside is not None:
        models[name_of(a.beside) if name_of(a.beside) != name else f"{name}-beside"] = load(a.beside, a.tensor)
    elif (half := causal_half(models[name])) is not None:
        models[f"{name}-autoregressive"] = half
    for lm in models.values():
        lm.text_tokenizer()
    examples = [(each, example(defaults)) for each in models]
    return Service(models, defaults, Batcher(models, a.rows, a.context, a.queue, examples), a.max_tokens)


def read_keys(a: Arguments) -> tuple[str, ...]:
    """The keys of which a request must carry one."""
    if a.api_keys is None:
        return tuple(key for key in [os.environ.get("DLM_API_KEY", "")] if key)
    try:
        keys = read_regular(Path(a.api_keys), MAX_KEYS).decode().split()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"cannot read keys from {a.api_keys} ({error}); name a file with a key in each line") from None
    if not keys:
        raise UserError(f"{a.api_keys} holds no key; write one into each line")
    return tuple(keys)


def name_of(source: str) -> str:
    """What clients call a model: the last part of its path or hub id."""
    return Path(source.rstrip("/")).name or source


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `UserError` if there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host} port {port} ({error}); choose another --port or --host") from None


def set_up_logs() -> None:
    """One line of JSON per request on stderr; of libraries, warnings only."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("dlm_jax.serving").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").addFilter(lambda record: not is_cancellation(record))


def is_cancellation(record: logging.LogRecord) -> bool:
    """Whether a log record tells of a task that was cut off, as all are at a second Ctrl-C."""
    return "asyncio.exceptions.CancelledError" in logging.Formatter().format(record)
