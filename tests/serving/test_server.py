"""`dlm serve` as a real process, asked by the official `openai` client and by clients that misbehave."""

import contextlib
import http.client
import json
import signal
import socket
import threading
import time
import urllib.parse

import numpy as np
import openai
import pytest
from openai import OpenAI

from dlm_jax.language_model import load

KEY, CONTEXT = "sesame", 128  # of server_process.py
PROMPT = "def add(a, b):\n    return"
AR = "model-autoregressive"


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def lm(model_directory):
    return load(model_directory)


def new_text(lm, sample):
    """What the sampler wrote, without its prompt."""
    pieces = lm.text_tokenizer().pieces(sample.tokens)
    return "".join(piece for piece, step in zip(pieces, sample.commit_step) if step)


def test_a_completion_is_the_text_that_the_library_writes(client, lm):
    for settings in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}):
        answer = client.completions.create(model="model", prompt=PROMPT, max_tokens=20, logprobs=0, **settings)
        sample = lm.sample(PROMPT, max_tokens=20, unmasking="threshold:0.5", **settings)
        [choice] = answer.choices
        assert choice.text == new_text(lm, sample) and choice.finish_reason == "length"
        assert answer.usage.completion_tokens == 20 and answer.usage.prompt_tokens == len(lm.encode(PROMPT))
        assert answer.usage.forward_passes == sample.nfe
        assert "".join(choice.logprobs.tokens) == choice.text
        np.testing.assert_allclose(np.exp(choice.logprobs.token_logprobs), sample.confidence[-20:], rtol=1e-4)


def test_the_causal_half_is_served_beside_the_model(client, lm):
    assert [model.id for model in client.models.list()] == ["model", AR]
    answer = client.completions.create(model=AR, prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == new_text(lm, lm.sample(PROMPT, max_tokens=12, unmasking="speculate"))
    assert answer.usage.forward_passes == 12


def test_a_stream_gives_the_same_text_in_parts(client):
    arguments = {"model": AR, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**arguments)
    chunks = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0].text for chunk in chunks[:-1]]
    assert "".join(parts) == whole.choices[0].text and len(parts) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_every_denoising_step_is_streamed_on_request(client, lm):
    chunks = list(client.completions.create(model="model", prompt=PROMPT, max_tokens=16, temperature=0, stream=True,
                                            extra_body={"stream_options": {"include_steps": True}}))
    cells, passes = {}, []
    for chunk in chunks:
        cells |= {position: cell for position, *cell in chunk.denoising["changes"]}
        passes.append(chunk.denoising["forward_passes"])
    sample = lm.sample(PROMPT, max_tokens=16, unmasking="threshold:0.5")
    assert [cells[i][1] for i in range(len(cells))] == sample.commit_step
    assert "".join(cells[i][0] for i in range(len(cells))) == "".join(lm.text_tokenizer().pieces(sample.tokens))
    assert passes == sorted(passes) and passes[-1] == sample.nfe and len(set(passes)) == len(passes)


def test_choices_and_prompts_are_numbered_and_drawn_apart(client):
    arguments = {"model": "model", "max_tokens": 12, "temperature": 1.0, "n": 3, "seed": 5}
    answer = client.completions.create(prompt=["import ", PROMPT], **arguments)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == list(range(6)) and len(set(texts)) == 6
    alone = client.completions.create(prompt=PROMPT, **arguments)
    assert [choice.text for choice in alone.choices] == texts[3:]
    assert client.completions.create(prompt=[[5, 6, 7], [5, 6, 8]], model="model", max_tokens=2).choices[1].index == 1


def test_without_a_seed_draws_differ_and_with_one_they_do_not(client):
    def draw(**seed):
        return client.completions.create(model="model", prompt="x", max_tokens=16, temperature=1.0,
                                         **seed).choices[0].text
    assert draw() != draw() and draw(seed=1) == draw(seed=1)


@pytest.mark.parametrize("stream", (False, True))
def test_a_text_ends_before_the_first_stop(client, stream):
    arguments = {"model": AR, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    free = client.completions.create(**arguments).choices[0].text
    stop = free[len(free) // 2:len(free) // 2 + 3]
    answer = client.completions.create(**arguments, stop=[stop, "@@never@@"], stream=stream)
    if stream:
        chunks = list(answer)
        text, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert text == free[:free.index(stop)] and reason == "stop"


def test_a_suffix_makes_the_completion_a_hole(client, lm):
    answer = client.completions.create(model="model", prompt="def f(", suffix="):\n    pass", max_tokens=4,
                                       temperature=0, echo=True)
    ids, after = lm.encode("def f("), lm.text_tokenizer().encode_inside("):\n    pass")
    from dlm_jax.sampling.requests import Request
    from dlm_jax.sampling.settings import Settings
    request = Request([*ids, 0, 0, 0, 0, *after], [*[False] * len(ids), *[True] * 4, *[False] * len(after)], stop=False)
    [sample] = lm.fill([request], Settings("threshold:0.5"))
    assert answer.choices[0].text == "def f(" + new_text(lm, sample)
    with pytest.raises(openai.BadRequestError, match="cannot fill a hole"):
        client.completions.create(model=AR, prompt="def f(", suffix=")")


def test_a_text_with_holes_comes_back_filled(server, lm):
    status, answer = server.post("/v1/infill", {"text": "x = [MASK:3] + [MASK:2]\n", "temperature": 0})
    assert status == 200
    assert answer["choices"][0]["text"] == lm.infill("x = [MASK:3] + [MASK:2]\n", unmasking="threshold:0.5").text


def test_a_chat_is_the_text_of_its_template(client, lm):
    messages = [{"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    answer = client.chat.completions.create(model="model", messages=messages, temperature=0, logprobs=True)
    text = "# system: Be brief.\n# user: Hello\n# assistant:"
    expected = new_text(lm, lm.sample(text, max_tokens=12, unmasking="threshold:0.5"))
    assert answer.choices[0].message.content == expected
    assert "".join(token.token for token in answer.choices[0].logprobs.content) == expected
    chunks = list(client.chat.completions.create(model="model", messages=messages, temperature=0, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected
    with pytest.raises(openai.BadRequestError, match="template refuses these messages: no developers"):
        client.chat.completions.create(model="model", messages=[{"role": "developer", "content": "x"}])


REFUSED = {
    "a key": ({}, {"Authorization": "Bearer wrong"}, 401, "valid key"),
    "another model": ({"model": "gpt-9"}, {}, 404, "choose one of model, "),
    "an unknown field": ({"tools": []}, {}, 400, "the field 'tools' is not supported"),
    "a text for true": ({"stream": "false"}, {}, 400, "stream: input should be a valid boolean"),
    "a text for a number": ({"max_tokens": "5"}, {}, 400, "max_tokens"),
    "no tokens": ({"max_tokens": 0}, {}, 400, "greater than or equal to 1"),
    "too many tokens": ({"max_tokens": CONTEXT}, {}, 400, "shorten the text"),
    "penalties": ({"presence_penalty": 0.5}, {}, 400, "presence_penalty"),
    "alternatives": ({"logprobs": 3}, {}, 400, "logprobs"),
    "many choices": ({"n": 17}, {}, 400, "n: input"),
    "a temperature": ({"temperature": -1.0}, {}, 400, "temperature must be 0 or lie in"),
    "a strategy": ({"unmasking": "magic"}, {}, 400, "not an unmasking strategy"),
    "a block": ({"block": 4}, {}, 400, "decodes blocks of 8"),
    "no prompt": ({"prompt": None}, {}, 400, "prompt"),
    "an id outside": ({"prompt": [10**6]}, {}, 400, "outside the vocabulary"),
    "no id": ({"prompt": []}, {}, 400, "prompt"),
    "the mask token": ({"prompt": "a <|mask|> b"}, {}, 400, "contains the mask token"),
    "a media type": ({}, {"Content-Type": "text/plain"}, 415, "application/json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_in_a_sentence(server, name):
    fields, headers, status, words = REFUSED[name]
    body = {"model": "model", "prompt": "x", "max_tokens": 2, **fields}
    code, answer = server.post("/v1/completions", {k: v for k, v in body.items() if v is not None}, **headers)
    assert code == status and words in answer["error"]["message"]
    assert answer["error"]["type"] == {401: "authentication_error", 404: "not_found_error"}.get(
        code, "invalid_request_error")


@pytest.mark.parametrize("data,status,words", ((b"{", 400, "not JSON"), (b"[1]", 400, "must be a JSON object"),
                                               (b'{"prompt": "\\ud800"}', 400, "surrogate"),
                                               (b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}", 400, "nested"),
                                               (b'{"seed": NaN}', 400, "NaN"), (b" " * (2**20 + 1), 413, "exceeds")))
def test_a_body_that_is_no_request_is_refused(server, data, status, words):
    code, answer = server.post("/v1/completions", data)
    assert code == status and words in answer["error"]["message"]


def test_other_paths_methods_and_hosts_are_refused(server):
    assert server.post("/v1/embeddings", {})[0] == 404 and server.get("/v1/completions")[0] == 405
    assert server.get("/health", Host="evil.example")[0] == 400  # another site's name that leads here
    assert server.get("/v1/models")[0] == server.get("/metrics")[0] == 401
    assert server.get("/v1/models/model", Authorization=f"Bearer {KEY}")[0] == 200
    assert server.get("/v1/models/other", Authorization=f"Bearer {KEY}")[0] == 404


def malformed(random):
    """The bytes of a request in which something was changed at random."""
    odd = (None, True, -1, 0, 1e300, 2**40, "", "x" * 300, "\x00\x1b[2J<script>", [], [[]], [None], {}, {"a": {}})
    body = {"model": "model", "prompt": "x", "max_tokens": 1, "temperature": 0, "stop": ["q"], "n": 1, "steps": 1}
    for _ in range(random.integers(1, 3)):
        name = random.choice([*body, "suffix", "seed", "top_p", "stream_options", "zzz"])
        body[name] = odd[random.integers(len(odd))]
    data = bytearray(json.dumps(body).encode())
    for _ in range(random.integers(0, 3)):
        data[random.integers(len(data))] = random.integers(256)
    return bytes(data[:random.integers(1, len(data) + 1)] if random.random() < 0.2 else data)


@pytest.mark.parametrize("count", (150, pytest.param(1000, marks=pytest.mark.slow)))
def test_malformed_bodies_get_a_sentence_and_no_traceback(server, count):
    random = np.random.default_rng(count)
    statuses = set()
    for _ in range(count):
        status, answer = server.post("/v1/completions", malformed(random))
        statuses.add(status)
        if status != 200:
            message = answer["error"]["message"]
            assert 400 <= status < 500 and message and "\n" not in message and len(message) < 1200, (status, message)
    assert 400 in statuses and "Traceback" not in server.logged()


def test_a_client_that_goes_away_frees_its_row(server):
    body = json.dumps({"model": "model", "prompt": "x", "max_tokens": 120, "unmasking": "confidence", "stream": True})
    host, port = urllib.parse.urlsplit(server.url).netloc.split(":")
    for stream in (True, False):
        text = body if stream else body.replace("true", "false")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
                               f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
            if stream:
                assert b"200 OK" in connection.recv(2000)
    until(lambda: json.loads(server.get("/health")[1])
          == {"status": "ok", "waiting": 0, "active": 0, "compiling": False})


def until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_many_requests_at_once_get_the_texts_that_they_get_alone(server, lm):
    random = np.random.default_rng(0)
    asked = [{"model": ("model", AR)[i % 2], "prompt": random.integers(0, 500, int(random.integers(1, 60))).tolist(),
              "max_tokens": int(random.integers(1, 40)), "temperature": i % 3 / 2, "seed": i} for i in range(40)]
    answers = [None] * len(asked)

    def ask(i):
        answers[i] = server.post("/v1/completions", asked[i])[1]["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(0, len(asked), 4):
        assert server.post("/v1/completions", asked[i])[1]["choices"][0]["text"] == answers[i]


def test_metrics_count_what_was_served_and_logs_hold_no_text(server):
    server.post("/v1/completions", {"prompt": "a very secret prompt", "max_tokens": 3})
    status, text = server.get("/metrics", Authorization=f"Bearer {KEY}")
    value = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert status == 200 and float(value["dlm_tokens_total"]) > 3 and float(value["dlm_forward_passes"]) > 0
    log = server.logged()
    assert "secret" not in log and "jaxtyping" not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert lines[-2]["completion_tokens"] == 3 or lines[-1]["completion_tokens"] == 3


def test_a_page_denoises_and_shows_markup_as_text(server, browse, tmp_path):
    prompt = "<img src=x onerror=alert(1)><b>x\x1b[2J"
    address = f"{server.url}/#prompt={urllib.parse.quote(prompt, safe='')}&tokens=16&key={KEY}&run"
    with browse(address, tmp_path) as page:
        page.wait("document.querySelectorAll('.caption').length == 2 && [...document.querySelectorAll('.caption')]"
                  ".every(caption => caption.textContent.includes('16 of 16 tokens'))")
        assert page.value("document.querySelectorAll('.text img, .text b').length") == 0
        text = page.value("document.querySelector('.text').textContent")
        assert text.startswith("<img src=x onerror=alert(1)><b>x") and "\x1b" not in text
        page.value("$('time').value = 0; show()")
        assert "2 of 16" not in page.value("$('panels').innerText")
        page.value("$('prompt').value = 'x = [MASK:3]'; run()")
        page.wait("$('panels').innerText.includes('3 of 3 tokens')")
        assert "cannot fill a hole" in page.value("$('panels').innerText")  # the autoregressive model says why not


@pytest.mark.parametrize("answers", [False, True])
def test_a_server_that_is_stopped_while_it_starts_or_compiles_ends_as_any_other(answers, model_directory, start_server,
                                                                                tmp_path):
    with start_server(model_directory, tmp_path, "--rows", "2") as server:
        if answers:
            server.get("/health")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 143
        assert "terminate called" not in server.logged() and "Traceback" not in server.logged()


def test_a_second_ctrl_c_ends_the_server_at_once_and_quietly(model_directory, start_server, tmp_path):
    with start_server(model_directory, tmp_path, "--rows", "1") as server:
        def ask():
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                server.post("/v1/completions", {"prompt": "x", "max_tokens": 100, "unmasking": "confidence"})

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: json.loads(server.get("/health")[1])["active"])
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert server.process.wait(60) == 130
        for thread in threads:
            thread.join()
        assert "ended at once" in server.logged() and "Traceback" not in server.logged()


@pytest.mark.slow
def test_sigterm_lets_requests_end_and_a_killed_server_can_be_started_again(model_directory, start_server, tmp_path):
    body = {"prompt": "x", "max_tokens": 100, "unmasking": "confidence"}
    found = []
    with start_server(model_directory, tmp_path, "--rows", "1") as first:
        thread = threading.Thread(target=lambda: found.append(first.post("/v1/completions", body)))
        thread.start()
        until(lambda: json.loads(first.get("/health")[1])["active"])
        first.process.send_signal(signal.SIGTERM)
        thread.join()
        assert first.process.wait(60) == 143 and found[0][0] == 200
        assert "answered what it had begun" in first.logged()
    with start_server(model_directory, tmp_path, "--rows", "1") as second:
        def ask():
            try:
                second.post("/v1/completions", body)
            except OSError as error:
                found.append(error)
        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: json.loads(second.get("/health")[1])["active"])
        second.process.kill()
        thread.join()
        assert isinstance(found[-1], OSError)
    with start_server(model_directory, tmp_path, "--rows", "1") as third:
        assert third.post("/v1/completions", body)[1]["choices"][0]["text"] == found[0][1]["choices"][0]["text"]
