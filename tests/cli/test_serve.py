"""OpenAI's API over loopback: what it answers, what it refuses, and that misbehaving clients do not affect others.

Needs starlette and uvicorn, which the extra [serve] brings, and [test] with it.
"""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from random import Random

import numpy as np
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from PIL import Image
from support.toy_models import ToyTokenizer

import minigemma as mg
from benchmarks.serve import Served, fate
from minigemma import cli
from minigemma.cli import serve
from minigemma.cli.random_weights import random_model
from minigemma.text.engine import Engine
from minigemma.text.prompt import conversation_ids
from tests.support.small_models import EYES, SEEING

TINY = Path(__file__).parents[2] / "weights" / "tiny-gemma-3"
GREEDY = {"temperature": 0, "max_tokens": 12}


@contextmanager
def served(model, parallel=4, queue=8, key=None):
    """A server of this process, on a free port."""
    with Engine(model, parallel, queue) as engine, serve.bound("127.0.0.1", 0) as listener:
        server = serve.Server(engine, serve.Api(engine, ("tiny", "path/of/tiny"), key).app())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        server.address, server.engine = listener.getsockname(), engine
        try:
            yield server
        finally:
            engine.stop()
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def model():
    return mg.load(TINY)


@pytest.fixture(scope="module")
def server(model):
    with served(model) as made:
        yield made


def ask(server, path, body=None, **headers):
    """Status, headers and body of an answer; a body that is a dict is sent as JSON."""
    connection = HTTPConnection(*server.address, timeout=120)
    content = json.dumps(body) if isinstance(body, dict) else body
    connection.request("GET" if body is None else "POST", path, content, headers)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, dict(reply.getheaders()), content


def complete(server, body, path="/v1/completions"):
    status, _, content = ask(server, path, body)
    return status, json.loads(content)


def streamed(server, body, path="/v1/completions"):
    status, headers, content = ask(server, path, body | {"stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    *chunks, done, end = content.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def user(text):
    return {"messages": [{"role": "user", "content": text}], **GREEDY}


def test_models_and_health(server):
    status, _, content = ask(server, "/v1/models")
    assert status == 200 and [each["id"] for each in json.loads(content)["data"]] == ["tiny"]
    assert json.loads(ask(server, "/v1/models/path/of/tiny")[2])["id"] == "tiny"
    assert ask(server, "/v1/models/other")[0] == 404
    assert json.loads(ask(server, "/health")[2]) == {"status": "ok"}


def test_a_completion_is_what_generate_says(server, model):
    expected = mg.generate(model, "Once upon a time", max_new_tokens=12, temperature=0, exact_logits=True)
    status, reply = complete(server, {"model": "tiny", "prompt": "Once upon a time", "top_p": 1} | GREEDY)
    assert status == 200 and reply["object"] == "text_completion" and reply["model"] == "tiny"
    assert reply["choices"] == [{"index": 0, "text": expected, "logprobs": None, "finish_reason": "length"}]
    assert reply["usage"]["completion_tokens"] == 12
    chunks = streamed(server, {"prompt": "Once upon a time", "stream_options": {"include_usage": True}} | GREEDY)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == expected
    assert chunks[-2]["choices"][0]["finish_reason"] == "length" and chunks[-2]["usage"] is None
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == reply["usage"]["total_tokens"]
    assert complete(server, {"prompt": [2, 500, 501], "max_tokens": 2})[1]["usage"]["prompt_tokens"] == 3
    assert complete(server, {"prompt": ["Once"]})[1]["usage"]["completion_tokens"] <= 16


def test_a_chat_is_laid_out_in_turns(server, model):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Go on"},
    ]
    plain = [messages[0] | {"role": "system"}, {"role": "user", "content": "Hello"}, *messages[2:]]
    ids = conversation_ids(model.tokenizer, "gemma3", plain)
    expected = mg.generate(model, ids, max_new_tokens=12, temperature=0, exact_logits=True)
    path, body = "/v1/chat/completions", {"messages": messages, "model": "path/of/tiny", **GREEDY}
    _, reply = complete(server, body, path)
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": expected, "refusal": None}
    assert reply["usage"]["prompt_tokens"] == len(ids)
    chunks = streamed(server, body, path)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length") and "usage" not in chunks[-1]
    _, again = complete(server, body, path)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_seed_and_stop(server):
    body = {"prompt": "The dog", "max_tokens": 30, "seed": 5, "temperature": 1}
    first, second = (complete(server, body)[1]["choices"][0]["text"] for _ in range(2))
    assert first == second
    stop = first[len(first) // 2 :][:3]
    _, reply = complete(server, body | {"stop": [stop]})
    assert reply["choices"][0] == {
        "index": 0,
        "text": first[: first.index(stop)],
        "logprobs": None,
        "finish_reason": "stop",
    }


def test_logprobs_of_both_forms(server, model):
    body = {"prompt": "The dog", "logprobs": 3} | GREEDY
    _, reply = complete(server, body)
    told, text = reply["choices"][0]["logprobs"], reply["choices"][0]["text"]
    tokens = list(mg.stream_generate(model, "The dog", max_new_tokens=12, temperature=0, top_logprobs=3))
    assert told["token_logprobs"] == pytest.approx([token.logprob for token in tokens], abs=1e-3)
    assert "".join(told["tokens"]) == text and told["text_offset"][0] == 0
    assert all(text[at:].startswith(token) for at, token in zip(told["text_offset"], told["tokens"], strict=True))
    assert [len(best) for best in told["top_logprobs"]] == [3] * 12
    assert all(
        best[token] == max(best.values()) for best, token in zip(told["top_logprobs"], told["tokens"], strict=True)
    )
    chunks = streamed(server, body)
    assert [each for chunk in chunks for each in chunk["choices"][0]["logprobs"]["tokens"]] == told["tokens"]
    path, body = "/v1/chat/completions", user("Hello") | {"logprobs": True, "top_logprobs": 2}
    content = complete(server, body, path)[1]["choices"][0]["logprobs"]["content"]
    assert content[0]["top_logprobs"][0] == {name: content[0][name] for name in ("token", "logprob", "bytes")}
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    assert complete(server, user("Hello") | {"top_logprobs": 2}, path)[0] == 400


def test_penalties_and_bias_steer(server, model):
    plain = {"prompt": "The dog", **GREEDY}
    text = complete(server, plain)[1]["choices"][0]["text"]
    settings = {"frequency_penalty": 2.0, "presence_penalty": 1.5, "repetition_penalty": 1.3}
    expected = mg.generate(model, "The dog", max_new_tokens=12, temperature=0, **settings)
    assert complete(server, plain | settings)[1]["choices"][0]["text"] == expected != text
    found = complete(server, plain | {"logit_bias": {"500": 1000}})[1]["choices"][0]["text"]
    assert found == model.tokenizer.decode([500] * 12)


def test_an_answer_of_a_json_schema(server):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "fox", "schema": schema, "strict": True}}
    body = {"prompt": "The dog", "response_format": wanted, "max_tokens": 60, "seed": 1}
    choice = complete(server, body)[1]["choices"][0]
    assert choice["finish_reason"] == "stop" and list(json.loads(choice["text"])) == ["age"]
    wanted["json_schema"]["schema"] = {"type": "no type"}
    status, reply = complete(server, body)
    assert status == 400 and "json_schema cannot be used" in reply["error"]["message"]
    assert reply["error"]["param"] == "response_format"


WRONG = {
    "no JSON": ("{", "the body is not JSON", None),
    "deep JSON": ("[" * 100_000, "the body is not JSON", None),
    "a list": ("[1]", "no JSON object", None),
    "another model": ({"prompt": "a", "model": "gpt-4"}, "'gpt-4' is not served here; 'tiny' is", "model"),
    "no prompt": ({}, "has prompt, and no messages", "prompt"),
    "messages": ({"messages": []}, "has prompt, and no messages", "prompt"),
    "two prompts": ({"prompt": ["a", "b"]}, "a request for each", "prompt"),
    "long": ({"prompt": [5] * 2000}, "the prompt has 2,000 tokens and the context holds 1,024", "prompt"),
    "ids": ({"prompt": [10**6]}, "token id 1000000 is outside", None),
    "n": ({"prompt": "a", "n": 2}, "n is 2; here it is always 1", "n"),
    "unknown": ({"prompt": "a", "grammar": "x"}, "the field 'grammar' is not supported", "grammar"),
    "temperature": ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'", "temperature"),
    "negative": ({"prompt": "a", "temperature": -1}, "temperature is -1", "temperature"),
    "max_tokens": ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0; it must be 1 or more", "max_tokens"),
    "either length": (
        {"prompt": "a", "max_tokens": "x", "max_completion_tokens": 1},
        "max_tokens is 'x'",
        "max_tokens",
    ),
    "stop": ({"prompt": "a", "stop": [1]}, "stop must be a text", "stop"),
    "format": (
        {"prompt": "a", "response_format": {"type": "json_schema"}},
        "response_format must be",
        "response_format",
    ),
    "bias": ({"prompt": "a", "logit_bias": {"fox": 1}}, "logit_bias must be an object", "logit_bias"),
    "bias of none": ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias names the token 99999", "logit_bias"),
    "penalty": ({"prompt": "a", "frequency_penalty": "x"}, "frequency_penalty is 'x'", "frequency_penalty"),
    "logprobs": ({"prompt": "a", "logprobs": 21}, "logprobs is 21; it must be from 0 to 20", "logprobs"),
    "more digits than a float": ({"prompt": "a", "temperature": 10**400}, "temperature is 1000", "temperature"),
    "more digits than float32": (
        {"prompt": "a", "presence_penalty": 10**30 * 10**30},
        "must be a finite number",
        "presence_penalty",
    ),
    "bias of many digits": ({"prompt": "a", "logit_bias": {"5": 10**400}}, "logit_bias of token 5 is 1", "logit_bias"),
    "ids of many digits": ({"prompt": [10**30]}, "token ids must be integers", None),
    "logprobs of chats": ({"prompt": "a", "top_logprobs": 5}, "top_logprobs takes messages", "top_logprobs"),
    "a long value": ({"prompt": "a", "top_p": "x" * 5000}, "xxx...xxx", "top_p"),
    "usage": ({"prompt": "a", "stream": True, "stream_options": {"include_usage": "no"}}, "include_usage", "stream"),
    "stream": ({"prompt": "a", "stream": "yes"}, "stream must be true or false", "stream"),
    "nothing, of another type": ({"prompt": "a", "stream": ""}, "stream must be true or false", "stream"),
    "one, of another type": ({"prompt": "a", "n": True}, "n is True; here it is always 1", "n"),
    "no number": ('{"prompt": "a", "temperature": NaN}', "the body is not JSON: NaN is no number", None),
    "no ids": ({"prompt": []}, "prompt must be a text, or a list of token ids", "prompt"),
    "stops": ({"prompt": "a", "stop": ["x"] * 65}, "stop has 65 texts; at most 64 are looked for", "stop"),
}


@pytest.mark.parametrize("body, told, param", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_openais_error_object(server, body, told, param):
    status, reply = complete(server, body)
    assert status == (404 if param == "model" else 400)
    error = reply["error"]
    assert told in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "message, told",
    [
        ({"role": "user", "content": [{"type": "input_audio"}]}, "neither text nor an image_url"),
        ({"role": "model", "content": "x"}, "a user first"),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{"id": "a"}]},
            "'tool_calls' of a message is not",
        ),
        ({"role": "user", "content": 5}, "must be text"),
        ("x", "messages must be a list"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}, "no vision tower"),
    ],
)
def test_wrong_messages(server, message, told):
    status, reply = complete(server, {"messages": [message]}, "/v1/chat/completions")
    assert status == 400 and told in reply["error"]["message"] and reply["error"]["param"] == "messages"


def test_wrong_addresses_and_methods(server):
    for path, body, status in (("/v2", None, 404), ("/v1/completions", None, 405), ("/v1/models", "x", 405)):
        found, _, content = ask(server, path, body)
        assert found == status and json.loads(content)["error"]["type"] == "invalid_request_error"


def test_what_http_wraps_around_a_request(server, model):
    status, headers, _ = ask(server, "/v1/completions")
    assert status == 405 and headers["allow"] == "POST"
    status, _, content = ask(server, "/v1/completions", b"\x1f\x8b", **{"Content-Encoding": "gzip"})
    assert status == 415 and "the body is in gzip" in json.loads(content)["error"]["message"]
    with served(model, key="sécret") as locked:
        for shown, status in ((b"Bearer s\xc3\xa9cret", 200), (b"Bearer s\xe9cret", 401), (b"", 401)):
            assert ask(locked, "/v1/models", Authorization=shown)[0] == status


def test_other_sites_get_nothing(server):
    for headers in ({"Host": "example.com"}, {"Sec-Fetch-Site": "cross-site"}):
        assert ask(server, "/v1/models", **headers)[0] == 403
    assert ask(server, "/v1/models", Host=f"localhost:{server.address[1]}")[0] == 200


def test_a_body_that_is_too_large(server, monkeypatch):
    monkeypatch.setattr(serve, "LARGEST", 100_000)
    status, _, content = ask(server, "/v1/completions", {"prompt": "a" * 300_000})
    assert status == 413 and "at most 100,000" in json.loads(content)["error"]["message"]


def test_a_body_that_does_not_come(server, monkeypatch):
    monkeypatch.setattr(serve, "PATIENCE", 0.2)
    with socket.create_connection(server.address) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert client.recv(100).startswith(b"HTTP/1.1 408")


def metrics(server):
    lines = ask(server, "/metrics")[2].decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_a_full_queue_and_clients_that_leave(model):
    """One answer runs and one waits; the third client is sent away; those that leave make room at the next token."""
    body = json.dumps({"prompt": "a", "max_tokens": 1000, "stream": True, "temperature": 5}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    model.eos, eos = (), model.eos
    try:
        with served(model, parallel=1, queue=1) as server:
            running, waiting = (socket.create_connection(server.address) for _ in range(2))
            running.sendall(head + body)
            assert running.recv(20).startswith(b"HTTP/1.1 200")
            waiting.sendall(head + body)
            while not server.engine.waiting:
                time.sleep(0.01)
            status, headers, content = ask(server, "/v1/completions", {"prompt": "a"})
            assert status == 429 and 1 <= int(headers["retry-after"]) <= 60
            assert json.loads(content)["error"]["type"] == "rate_limit_error"
            waiting.close()
            running.shutdown(socket.SHUT_WR)  # half-closed: as good as gone
            assert complete(server, {"prompt": "a", "max_tokens": 3})[0] == 200
            assert metrics(server)['minigemma_requests_total{outcome="cancelled"}'] >= 1
            assert metrics(server)['minigemma_requests_total{outcome="refused"}'] == 1
            assert metrics(server)["minigemma_requests_running"] == 0
            running.close()
    finally:
        model.eos = eos


def test_a_key(model):
    with served(model, key="geheim") as server:
        for headers in ({}, {"Authorization": "Bearer geheimer"}, {"Authorization": "geheim"}):
            status, _, content = ask(server, "/v1/models", **headers)
            assert status == 401 and json.loads(content)["error"]["code"] == "invalid_api_key"
        assert ask(server, "/v1/models", Authorization="Bearer geheim", Host="example.com")[0] == 200
        assert ask(server, "/health")[0] == 200


def test_many_at_once_are_answered_alike(server):
    """Sixteen clients, of which some send what is wrong or leave; the others get what each gets alone."""
    bodies = [{"prompt": f"Day {i} of the week", "seed": i, "temperature": 1, "max_tokens": 20} for i in range(8)]
    alone = [complete(server, body)[1]["choices"][0]["text"] for body in bodies]
    found, fates = [None] * 16, []

    def client(i):
        if i < 8:
            found[i] = complete(server, bodies[i])[1]["choices"][0]["text"]
        elif i % 2:
            fates.append(complete(server, "{" * i)[0])
        else:
            with socket.create_connection(server.address) as leaving:
                leaving.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")

    clients = [threading.Thread(target=client, args=(i,)) for i in range(16)]
    for each in clients:
        each.start()
    for each in clients:
        each.join(120)
    assert found[:8] == alone and fates == [400] * 4


@pytest.mark.oracle
def test_openais_own_client(server, model):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url="http://{}:{}/v1".format(*server.address), api_key="none", max_retries=0)
    assert [each.id for each in client.models.list()] == ["tiny"]
    messages, settings = [{"role": "user", "content": "Hello"}], {"model": "tiny", "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **settings)
    text = whole.choices[0].message.content
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2 and whole.usage.completion_tokens <= 12
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(messages=messages, stream=True, stream_options=options, **settings))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    expected = mg.generate(model, "The dog", max_new_tokens=12, temperature=0)
    assert client.completions.create(prompt="The dog", **settings).choices[0].text == expected
    assert (
        "".join(c.choices[0].text for c in client.completions.create(prompt="The dog", stream=True, **settings))
        == expected
    )
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(messages=messages, model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="here it is always 1") as refusal:
        client.chat.completions.create(messages=messages, n=2, **settings)
    assert refusal.value.param == "n"
    with client.chat.completions.create(messages=messages, stream=True, model="tiny", max_tokens=900) as left:
        next(iter(left))


def test_a_short_soak(model):
    """That of `python -m benchmarks.serve`, which leaves, sends what is wrong or too large, and half-closes."""
    lost = []

    def client(number):
        chance = Random(number)
        for _ in range(2):
            try:
                lost.extend(name for name in [fate(soaked, chance)] if name == "lost")
            except OSError as error:
                lost.append(error)

    with served(model, parallel=3, queue=2) as server:
        soaked = object.__new__(Served)
        soaked.port = server.address[1]
        clients = [threading.Thread(target=client, args=(number,)) for number in range(12)]
        for each in clients:
            each.start()
        for each in clients:
            each.join(120)
        assert lost == [] and complete(server, {"prompt": "a", "max_tokens": 2})[0] == 200


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_images():
    model = random_model(SEEING, "f32")
    model.tokenizer = ToyTokenizer()
    pixels = np.random.default_rng(3).integers(0, 255, (70, 90, 3)).astype(np.uint8)
    parts = [{"type": "image_url", "image_url": {"url": png(pixels)}}, {"type": "text", "text": "x"}]
    ids = conversation_ids(model.tokenizer, "gemma3", [{"role": "user", "content": "x", "images": (0,)}], vision=EYES)
    expected = mg.generate(model, ids, [pixels], max_new_tokens=4, temperature=0)
    with served(model) as server:
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4, "temperature": 0}
        for _ in range(2):
            _, reply = complete(server, body, "/v1/chat/completions")
            assert reply["choices"][0]["message"]["content"] == expected
            parts[0]["image_url"]["url"] = re.sub("(.{76})", r"\1\n", png(pixels))  # lines, as of the shell's base64
        for url, told in (
            ("https://example.com/cow.png", "must come as a data URL"),
            ("data:image/png;base64,!!", "not base64"),
            ("data:image/png;base64,é", "not base64"),
            ("data:image/png;base64,aGVsbG8=", "is no picture"),
            ("data:image/png;base64,", "is empty"),
            (None, "must come as a data URL"),
        ):
            parts[0]["image_url"]["url"] = url
            status, reply = complete(server, body, "/v1/chat/completions")
            assert status == 400 and told in reply["error"]["message"]


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_command_and_its_answers(which):
    command = [sys.executable, "-m", "minigemma", "serve", "-m", str(TINY), "--port", "0", "-t", "1", "--api-key", "k"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        told = next(line for line in process.stderr if "serving" in line)
        port = int(told.split(":")[3].split("/")[0])
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"prompt": "a", "max_tokens": 1000, "stream": True})
        connection.request("POST", "/v1/completions", body, {"Authorization": "Bearer k"})
        reply = connection.getresponse()
        reply.read(10)
        process.send_signal(which)
        rest = reply.read()
        assert b"the server is stopping" in rest or rest.endswith(b"[DONE]\n\n")
        reply.close()
        connection.close()
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.stderr.close()


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--host", "0.0.0.0"], "other machines can reach 0.0.0.0"),
        (["--host", "no such host", "--api-key", "k"], "cannot be taken"),
        (["--api-key", "@nowhere/key"], "nowhere/key: No such file"),
        (["-c", "4096"], "the context is 1,024 tokens and -c asks for 4,096"),
    ],
)
def test_what_cannot_be_served(flags, told, capsys):
    assert cli.main(["serve", "-m", str(TINY), *flags]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert cli.main(["serve", "-m", str(TINY), "--port", str(other.getsockname()[1])]) == 1
    assert "cannot be taken (Address already in use); choose another with --port" in capsys.readouterr().err


def test_more_caches_than_there_is_memory_for(capsys, monkeypatch):
    monkeypatch.setattr("minigemma.files.memory.memory_limit", lambda: 350_000_000)
    monkeypatch.setattr(serve, "warm_up", None)
    assert cli.main(["serve", "-m", str(TINY), "--parallel", "256"]) == 1
    assert "with 512 caches of 1,024 tokens, needs" in capsys.readouterr().err


def test_without_the_extra_one_sentence(tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ImportError('no uvicorn')")
    path = os.pathsep.join([str(tmp_path), str(Path(mg.__file__).parents[1])])
    command = [sys.executable, "-m", "minigemma", "serve", "-m", str(TINY)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)
    assert run.returncode == 1
    assert run.stderr.endswith('serving takes starlette and uvicorn: pip install "minigemma[serve]"\n')
