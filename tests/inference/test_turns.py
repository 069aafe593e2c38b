"""The event loop and short passes of the model share a thread: passes run when nothing comes in, and do not wait for long."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the packages of requirements-serve.txt are not installed")

from inference.chatbot import Sampling, load_chatbot
from inference.served import open_model
from inference.server.app import build_app
from inference.server.service import Limits, Service
from inference.server.start import Gathered, background
from inference.server.turns import PATIENCE, TurnsSelector
from tests.http import post, raw
from tests.tiny import tiny_checkpoint


def run(pass_here, talk) -> None:
    """Run a coroutine in a loop that calls pass_here when it would wait."""
    loop = asyncio.SelectorEventLoop(TurnsSelector(pass_here))
    try:
        loop.run_until_complete(asyncio.wait_for(talk(loop), 30))
    finally:
        loop.close()


def test_a_pass_runs_in_the_loops_thread_once_nothing_is_left_to_do():
    order, due = [], []

    def pass_here() -> bool:
        if not due:
            return False
        order.append(due.pop())
        return True

    async def talk(loop) -> None:
        due.append(threading.get_ident())
        for step in range(3):
            order.append(step)
            await asyncio.sleep(0)  # others may work, but no time passes
        while len(order) < 4:
            await asyncio.sleep(0.001)

    run(pass_here, talk)
    assert order == [0, 1, 2, threading.get_ident()]


def test_passes_go_on_though_something_comes_in_all_the_time():
    passed = []

    async def talk(loop) -> None:
        end = time.monotonic() + 40 * PATIENCE
        while time.monotonic() < end:
            await asyncio.sleep(0)

    run(lambda: bool(passed.append(time.monotonic())) or True, talk)
    assert 4 <= len(passed) <= 45, len(passed)


def test_a_loop_without_passes_sleeps_until_it_is_called():
    asked = []

    async def talk(loop) -> None:
        woken = asyncio.Event()
        timer = threading.Timer(0.2, lambda: loop.call_soon_threadsafe(woken.set))
        timer.start()
        await woken.wait()

    begin = time.thread_time()
    run(lambda: bool(asked.append(1)), talk)
    assert len(asked) < 20 and time.thread_time() - begin < 0.1


def test_a_head_is_sent_with_the_beginning_of_its_body_and_all_else_at_once():
    class Transport:
        def __init__(self) -> None:
            self.sent, self.closed = [], False

        def write(self, data: bytes) -> None:
            assert not self.closed
            self.sent.append(data)

        def close(self) -> None:
            self.closed = True

    async def talk() -> None:
        raw = Transport()
        transport = Gathered(raw)
        head = b"HTTP/1.1 200 \r\n\r\n"
        for data in (head, b"", b"body"):
            transport.write(data)
        assert raw.sent == []
        await asyncio.sleep(0)
        assert raw.sent == [head + b"body"]
        transport.write(b"more")
        assert raw.sent[1:] == [b"more"]
        transport.write(head)
        transport.close()
        assert raw.sent[2:] == [head] and raw.closed and transport.sent is raw.sent
        await asyncio.sleep(0)
        assert len(raw.sent) == 3

    asyncio.run(talk())


def test_who_waits_for_the_first_token_or_may_ask_again_is_told_first():
    told, service = [], Service.__new__(Service)
    service.calls, service.loop, service.thread = deque(), None, threading.get_ident()
    first, later = SimpleNamespace(tokens=[5]), SimpleNamespace(tokens=[5, 6])
    for name, about in (("later", later), ("ended", Future()), ("later too", later), ("first", first)):
        service.tell(partial(told.append, name), about)
    service.wake()
    assert told == ["first", "ended", "later", "later too"] and not service.calls


def said(url: str, seed: int, stream: bool, length: int) -> str:
    """What a server answers to a question, whole or in pieces."""
    ask = {"messages": [{"role": "user", "content": "How?"}], "max_tokens": length, "temperature": 0.7, "seed": seed}
    ask["stream"] = stream
    answer = raw(url, post("/v1/chat/completions", json.dumps(ask).encode())).decode()
    if not stream:
        return json.loads(answer.partition("\r\n\r\n")[2])["choices"][0]["message"]["content"]
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(one)["choices"][0]["delta"].get("content", "") for one in events)


@pytest.mark.parametrize("small", [0, 2**22])
def test_a_server_says_the_same_in_either_thread(tmp_path, monkeypatch, small):
    """Six questions at once, some as streams; the server ends when all is answered."""
    monkeypatch.setattr("inference.server.service.SMALL", small)
    folder = tiny_checkpoint(tmp_path, "llama")
    service = Service(open_model(str(folder)), Limits(max_new_tokens=64))
    assert service.worker.lent is (small > 0)
    with background(build_app(service)) as url, ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(said, url, seed, seed % 2 == 0, 9 + seed) for seed in range(6)]
        for seed, answer in enumerate(asked):
            alone = load_chatbot(str(folder), Sampling(9 + seed, temperature=0.7, top_p=1.0, seed=seed))
            assert answer.result() == alone.answer("How?")
        last = pool.submit(said, url, 9, False, 60)
        while not service.worker.in_work:
            time.sleep(0.001)
        service.end()
        assert last.result()
    service.worker.thread.join(10)
    assert not service.worker.alive and not service.worker.in_work
