"""The server under load: many clients at once, against one at a time and against waiting for whole batches.

    python benchmarks/serve.py MODEL

Starts `dlm serve MODEL`, and sends the same requests, of mixed lengths, in three ways: `--clients` at a time; one at a
time; and as a server without continuous batching would serve them, `--clients` together and the next ones when all of
those have been answered. Checks that every text is the one that was written alone, and prints tokens per second, the
median and the 99th percentile of the time to an answer, and the server's memory at a quarter and at the end of the
run with many clients.
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import jax
import numpy as np
from train_step import processor

from dlm_jax.language_model import load

Body = dict[str, object]
Answer = tuple[str, int, float]  # text, its tokens, and the seconds that it took
CLIENT = threading.local()  # each thread is a client


def make_requests(a: argparse.Namespace) -> list[Body]:
    """Requests of mixed lengths, each with a seed of its own."""
    random = np.random.default_rng(0)
    lm = load(a.model)
    banned = {lm.spec.mask_token_id, lm.spec.eos_token_id, lm.spec.bos_token_id}
    ids = [i for i in range(lm.config.vocab_size) if i not in banned]
    return [{"prompt": random.choice(ids, int(random.integers(4, a.prompt_tokens + 1))).tolist(), "seed": i,
             "max_tokens": int(random.integers(4, a.max_tokens + 1)), "temperature": a.temperature}
            for i in range(a.requests)]


def ask(url: str, body: Body) -> Answer:
    """The answer to a request. A client keeps its connection."""
    began = time.perf_counter()
    if not hasattr(CLIENT, "connection"):
        CLIENT.connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=600)
    CLIENT.connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = json.load(CLIENT.connection.getresponse())
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"], time.perf_counter() - began


def many_at_a_time(url: str, requests: Sequence[Body], clients: int, progress: Callable[[], None]) -> list[Answer]:
    """Each client sends its next request when its last one was answered."""
    def one(body: Body) -> Answer:
        answer = ask(url, body)
        progress()
        return answer

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, requests))


def in_whole_batches(url: str, requests: Sequence[Body], clients: int) -> list[Answer]:
    """The next requests are sent when all before them were answered."""
    answers: list[Answer] = []
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        for first in range(0, len(requests), clients):
            answers += pool.map(lambda body: ask(url, body), requests[first:first + clients])
    return answers


def memory(pid: int) -> float:
    """MB that a process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def timed(way: Callable[[], list[Answer]]) -> tuple[list[Answer], float]:
    """The answers, and tokens per second."""
    began = time.perf_counter()
    answers = way()
    return answers, sum(tokens for _, tokens, _ in answers) / (time.perf_counter() - began)


def measure(url: str, pid: int, a: argparse.Namespace) -> list[str]:
    """The lines of the table."""
    requests, alone = make_requests(a), make_requests(a)[:a.alone]
    while json.load(urllib.request.urlopen(f"{url}/health"))["compiling"]:
        time.sleep(0.1)
    many_at_a_time(url, requests[:2 * a.clients], a.clients, lambda: None)  # warms up
    held: list[float] = []
    together, fast = timed(lambda: many_at_a_time(url, requests, a.clients, lambda: held.append(memory(pid))))
    batches, middle = timed(lambda: in_whole_batches(url, requests, a.clients))
    single, slow = timed(lambda: many_at_a_time(url, alone, 1, lambda: None))
    lines = [f"{a.requests} requests, {a.clients} at a time, {date.today()}, {processor()}, "
             f"Python {platform.python_version()}, jax {jax.__version__}",
             "| way | tokens/s | | median s | 99 % within s |", "|---|---:|---:|---:|---:|"]
    for name, answers, speed in (("one at a time", single, slow), ("whole batches", batches, middle),
                                 ("continuous batching", together, fast)):
        seconds = [taken for _, _, taken in answers]
        lines.append(f"| {name} | {speed:,.0f} | {speed / slow:.2f}x | {np.median(seconds):.3f} | "
                     f"{np.quantile(seconds, 0.99):.3f} |")
    same = sum(x[0] == y[0] for x, y in zip(together, batches)) + sum(x[0] == y[0] for x, y in zip(together, single))
    lines.append(f"{same} of {len(batches) + len(single)} texts are the same whoever else was served")
    lines.append(f"memory of the server: {held[len(held) // 4]:.0f} MB after a quarter, {held[-1]:.0f} MB at the end")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--alone", type=int, default=60, help="of these, how many are also sent one at a time")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--unmasking", default="confidence")
    a = parser.parse_args(arguments)
    command = [sys.executable, "-m", "dlm_jax", "serve", a.model, "--port", "0", "--rows", str(a.rows), "--context",
               str(a.context), "--unmasking", a.unmasking, "--queue", str(a.requests)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ)
    try:
        assert server.stdout is not None
        url = re.search(r" at (\S+) ", server.stdout.readline())
        assert url is not None, "the server did not start; run dlm serve by itself"
        print("\n".join(measure(url[1], server.pid, a)))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
