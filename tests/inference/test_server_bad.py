"""Two hundred and more bad requests: each gets a clear 4xx in OpenAI's form, and the server answers as before afterwards."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the packages of requirements-serve.txt are not installed")

from inference.served import open_model
from inference.server.app import build_app
from inference.server.service import Limits, Service
from inference.server.start import background
from tests.http import post, raw
from tests.tiny import tiny_checkpoint

CHAT, TEXT, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/score"
ASK = [{"role": "user", "content": "How do I bake bread?"}]
GOOD = {"model": "tiny", "messages": ASK, "max_tokens": 6, "temperature": 0}
LIMIT = 2**16
KEY = "Authorization: Bearer right"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    served = open_model(str(tiny_checkpoint(tmp_path_factory.mktemp("server") / "tiny", "llama")))
    return Service(served, Limits(max_body=LIMIT, max_new_tokens=64, max_batch=2, max_queue=4))


@pytest.fixture(scope="module")
def url(service):
    with background(build_app(service, [b"right"])) as address:
        yield address


def body(**changes: Any) -> bytes:
    return json.dumps(GOOD | changes).encode()


def fields() -> Iterator[tuple[str, bytes, str]]:
    """(path, body, a word of the answer): every field with values of wrong types and out of range."""
    wrong = {
        "model": [1, ["tiny"], {}, True],
        "messages": [None, [], "hi", {}, [1], [None], [[]], ["hi"], [{}], [{"role": "user"}], [{"content": "x"}]],
        "max_tokens": ["6", 0, -1, 1.5, True, [], 65, 10**30],
        "max_completion_tokens": ["6", 0, -3],
        "temperature": ["0", -1, -0.001, 2.1, True, [], {}, 1e400],
        "top_p": ["1", 0, -1, 1.1, True],
        "top_k": ["1", -1, 1.5],
        "n": ["1", 0, -1, 129, 1.5, 100],
        "seed": ["1", 1.5, True, 10**30, -(10**30)],
        "stop": [1, [1], "", [""], ["x"] * 17, {}, "x" * 257],
        "stream": ["true", 1, []],
        "stream_options": [True, [], {"include_usage": "yes"}],
        "logprobs": ["yes", 1, 0],
        "top_logprobs": [1, "1", -1, 21],
        "presence_penalty": ["1", -2.1, 2.1, True],
        "frequency_penalty": ["1", -2.1, 2.1],
        "repetition_penalty": ["1", 0, -1, 11],
        "tools": ["x", [1], [{}], [{"type": "code"}], [{"type": "function", "function": {"name": 1}}]],
        "tool_choice": ["required", 1, {"type": "function", "function": {"name": "x"}}],
        "response_format": ["json", {"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
        "logit_bias": [{"5": 100.0}, [], "x"],
        "modalities": [["audio"]],
    }
    for name, values in wrong.items():
        for value in values:
            yield CHAT, body(**{name: value}), name
    roles = ["robot", "function", "", "User", None, 1]
    contents = [1, {}, [1], [{"type": "image_url", "image_url": {"url": "x"}}], [{"type": "text"}], None]
    for message in [*({"role": role, "content": "x"} for role in roles), *({"role": "user", "content": one} for one in contents)]:
        yield CHAT, body(messages=[message]), "messages"
    yield CHAT, body(messages=[*ASK, {"role": "assistant", "content": "Mix it."}]), "the last message"
    yield CHAT, body(messages=[{"role": "system", "content": "Be brief."}]), "the last message"
    yield CHAT, body(messages=[{"role": "user", "content": "bread " * 400}]), "256 that the model reads"
    yield CHAT, body(tools=[{"type": "function", "function": {"name": "x"}}]), "tools"
    yield CHAT, body(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]), "tools"
    for name in ("temprature", "max_token", "input", "prompt", "functions"):
        yield CHAT, body(**{name: 1}), name
    text = {"model": "tiny", "max_tokens": 4}
    prompts = [1, None, {}, [], [[]], [1, "x"], [-1], [10**6], [1.5], ["x", 1], [[1, 10**6]], "bread " * 400, [5] * 256]
    for prompt in prompts:
        yield TEXT, json.dumps(text | {"prompt": prompt}).encode(), ""
    for changes in ({"echo": True}, {"suffix": "x"}, {"best_of": 3}, {"logprobs": 6}, {"logprobs": True}, {"messages": ASK}):
        yield TEXT, json.dumps(text | {"prompt": "x"} | changes).encode(), next(iter(changes))
    yield TEXT, json.dumps(text).encode(), "prompt"
    yield TEXT, json.dumps(text | {"prompt": ["x"] * 7}).encode(), "7 answers"
    for scores in ({"prompts": ["a"], "answers": ["b"]}, {"prompts": ["a"], "answers": []}, {"prompts": "a", "answers": "b"}, {}):
        yield SCORE, json.dumps(scores).encode(), ""


def texts() -> Iterator[tuple[str, bytes, str]]:
    """Bodies that are no JSON, or whose text is none."""
    whole = body()
    for end in range(0, len(whole), 4):
        yield CHAT, whole[:end], "JSON"
    for wrong in (b"", b"null", b"[]", b"1", b'"x"', b"true", b"{}", b"hello", b"{'model': 'tiny'}", whole + b"}", whole + whole):
        yield CHAT, wrong, ""
    for bytes_ in (b"\xff", b"\xe4\xbd", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80"):
        yield CHAT, whole.replace(b"bake", bytes_), "JSON"
    for escape in (rb"\ud800", rb"\udc00", rb"\ud800\ud800", rb"\u12", rb"\x41"):
        yield CHAT, whole.replace(b"bake", escape), "JSON"
    yield CHAT, whole.decode().encode("utf-16"), "JSON"
    yield CHAT, b"[" * 5000, "JSON"
    yield CHAT, b'{"messages": ' + b'{"a": ' * 5000 + b"1" + b"}" * 5001, ""
    yield CHAT, whole.replace(b": 0", b": NaN"), "temperature"
    yield CHAT, whole.replace(b": 0", b": Infinity"), "temperature"
    yield CHAT, whole.replace(b'"role"', b"role"), "JSON"


def requests() -> Iterator[tuple[bytes, int, str]]:
    """(bytes of a request, the status it gets, a word of the answer)."""
    for path, content, word in (*fields(), *texts()):
        yield post(path, content, KEY), 400, word
    for model in ("tinny", "gpt-4", "", "../tiny", "x" * 5000, "tiny\n", "行"):
        yield post(CHAT, body(model=model), KEY), 404, "not served here"
    whole = body()
    for header in ("Bearer wrong", "Bearer rightt", "Bearer", "Bearer ", "right", "Basic right", ""):
        yield post(CHAT, whole, f"Authorization: {header}"), 401, "API key"
    yield post(CHAT, whole), 401, "API key"
    yield b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 401, "API key"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        yield post(CHAT, whole, KEY, kind=kind), 415, "Content-Type"
    for size in (LIMIT + 1, 10 * LIMIT, 40 * LIMIT):
        yield post(CHAT, b"x" * size, KEY), 413, "bytes"
    chunks = b"".join(b"1000\r\n" + b"x" * 4096 + b"\r\n" for _ in range(20)) + b"0\r\n\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n{KEY}\r\n"
    yield f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks, 413, "bytes"
    for method, path, status in (
        ("GET", CHAT, 405), ("PUT", CHAT, 405), ("DELETE", "/v1/models", 405), ("GET", "/", 404), ("GET", "/v1", 404),
        ("GET", "/docs", 404), ("POST", "/v1/embeddings", 404), ("GET", "/v1/models/nobody", 404), ("GET", "/%2e%2e/x", 404),
    ):  # fmt: skip
        yield f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{KEY}\r\n\r\n".encode(), status, ""
    for line in (b"hello", b"POST /", b"GET / HTTP/1.1\r\nX", b"\x16\x03\x01\x02\x00\x01"):
        yield line + b"\r\n\r\n", 400, "Invalid"
    yield b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 66_000 + b"\r\n\r\n", 400, "Invalid"
    yield f"{head}Content-Length: nine\r\n\r\n".encode(), 400, "Invalid"


def told(url: str, request: bytes) -> tuple[int, str]:
    head, _, content = raw(url, request).partition(b"\r\n\r\n")
    return int(head.split()[1]), content.decode()


def test_each_bad_request_is_told_and_the_server_lives(url, service):
    expected = json.loads(told(url, post(CHAT, body(), KEY))[1])["choices"]
    asked = list(requests())
    assert len(asked) > 200
    wrong = []
    for request, status, word in asked:
        found, content = told(url, request)
        error = {} if word == "Invalid" else json.loads(content).get("error", {})  # no HTTP: it ends before the application
        in_form = not error or (set(error) == {"message", "type", "param", "code"} and 10 < len(error["message"]) < 400)
        if found != status or word not in content or not in_form:
            wrong.append((request[-200:], status, word, found, content))
    assert not wrong, "\n".join(map(str, wrong))
    assert not service.in_work and not service.worker.in_work and not service.worker.waiting
    assert json.loads(told(url, post(CHAT, body(), KEY))[1])["choices"] == expected


def test_connections_that_are_cut_leave_nothing_behind(url, service, caplog):
    expected = json.loads(told(url, post(CHAT, body(), KEY))[1])["choices"]
    whole = post(CHAT, body(stream=True, max_tokens=64, temperature=1.5, seed=1), KEY)
    for end in (*range(0, len(whole), 16), *[len(whole)] * 5):
        raw(url, whole[:end], wait=False)
    end = time.monotonic() + 60
    while service.in_work or service.worker.in_work or service.worker.waiting:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert json.loads(told(url, post(CHAT, body(), KEY))[1])["choices"] == expected
    assert not [record for record in caplog.records if record.exc_info], "a client that goes is no error of the server"
