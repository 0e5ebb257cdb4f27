"""Limits of the server, with a batcher that never serves."""

import json
import socket
import threading
import time

import pytest
import uvicorn

from dlm_jax.language_model import load
from dlm_jax.serving import app
from dlm_jax.serving.batcher import Batcher
from dlm_jax.serving.service import Service

BODY = {"prompt": "x", "max_tokens": 3}


class Stuck(Batcher):
    """Takes jobs and serves none."""

    def _run(self):
        with self.wake:
            self.wake.wait_for(lambda: self.stopping)


class Broken(Batcher):
    """Cannot compute."""

    def _open(self, where, job):
        raise RuntimeError("the device is gone")


def running(model_directory, server_at, kind, **limits):
    """A server in this process, without keys."""
    models = {"model": load(model_directory)}
    batcher = kind(models, rows=2, context=64, max_waiting=2)
    service = Service(models, {"unmasking": "threshold:0.5"}, batcher, chat_tokens=8)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app.make_app(service, app.Limits(**limits)), log_config=None,
                                           timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    return server_at(f"http://127.0.0.1:{listening.getsockname()[1]}"), batcher, server, thread


@pytest.fixture
def stuck(model_directory, server_at, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
    found = running(model_directory, server_at, Stuck, seconds=1.5, body_bytes=1000)
    yield found
    found[2].should_exit = True
    found[3].join(20)


@pytest.mark.parametrize("stream", (False, True))
def test_a_request_that_takes_too_long_gets_504(stuck, stream):
    server, batcher, *_ = stuck
    status, answer = server.post("/v1/completions", {**BODY, "stream": stream})
    assert status == 504 and "not finished in time" in answer["error"]["message"]
    assert all(job.cancelled for _, job in batcher.waiting)


def test_a_full_queue_answers_429_and_when_to_come_back(stuck):
    server, batcher, *_ = stuck
    status, answer = server.post("/v1/completions", {**BODY, "n": 3})
    assert status == 400 and "3 sequences and 2 may wait" in answer["error"]["message"] and not batcher.waiting
    waiting = [threading.Thread(target=server.post, args=("/v1/completions", BODY)) for _ in range(2)]
    for thread in waiting:
        thread.start()
    while len(batcher.waiting) < 2:
        time.sleep(0.01)
    data = json.dumps(BODY).encode()
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
        answer = connection.makefile("rb").read().lower()
    assert b" 429 " in answer and b"retry-after: 1" in answer and b"rate_limit_error" in answer
    for thread in waiting:
        thread.join()


def test_a_body_that_does_not_arrive_gets_408(stuck):
    with socket.create_connection(stuck[0].url.removeprefix("http://").split(":")) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in connection.recv(4000)


def test_a_long_body_gets_413_before_it_has_all_arrived(stuck):
    with socket.create_connection(stuck[0].url.removeprefix("http://").split(":")) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                           b"Content-Length: 100000000\r\n\r\n" + b" " * 2000)
        assert b" 413 " in connection.recv(4000)


@pytest.mark.parametrize("stream", (False, True))
def test_a_failed_forward_pass_is_an_error_of_its_requests_and_the_server_stays(model_directory, server_at, stream):
    server, batcher, host, thread = running(model_directory, server_at, Broken)
    status, answer = server.post("/v1/completions", {**BODY, "stream": stream})
    assert status == 500 and answer["error"]["message"] == "the model failed on this request; the server's log says how"
    health = json.loads(server.get("/health")[1])
    assert health.pop("compiling") in (True, False)
    assert health == {"status": "ok", "waiting": 0, "active": 0}
    host.should_exit = True
    thread.join(20)


def test_an_error_of_ours_is_json_as_well(stuck, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(Service, "prepare", fail)
    status, answer = stuck[0].post("/v1/completions", BODY)
    assert status == 500 and answer["error"]["message"] == "the server failed; its log says how"
