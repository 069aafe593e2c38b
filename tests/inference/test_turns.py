"""The event loop and the model's thread: neither disturbs the other in a short pass, neither waits for a long one."""

from __future__ import annotations

import asyncio
import threading
import time

from inference.server import turns as module
from inference.server.start import Gathered
from inference.server.turns import Turns, TurnsSelector


def loop_of(turns: Turns) -> asyncio.SelectorEventLoop:
    """Return a loop whose thread is woken by calls from others."""
    loop = asyncio.SelectorEventLoop(TurnsSelector(turns))
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def called(loop: asyncio.SelectorEventLoop, call) -> threading.Event:
    """Let the loop make a call; the event is set after it."""
    done = threading.Event()
    loop.call_soon_threadsafe(lambda: (call(), done.set()))
    return done


def test_a_pass_begins_when_the_loop_rests(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 10)
    turns, order = Turns(), []
    loop = loop_of(turns)
    begun = threading.Event()
    called(loop, lambda: (begun.set(), time.sleep(0.05), order.append("loop")))
    begun.wait()
    with turns.pass_():
        order.append("pass")
    assert order == ["loop", "pass"] and not turns.passing
    loop.call_soon_threadsafe(loop.stop)


def test_the_loop_works_when_a_short_pass_has_ended(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 10)
    turns, order = Turns(), []
    loop = loop_of(turns)
    assert called(loop, lambda: None).wait(10)
    while turns.busy:
        time.sleep(0.001)
    with turns.pass_():
        done = called(loop, lambda: order.append("loop"))
        time.sleep(0.05)
        order.append("pass")
    assert done.wait(10) and order == ["pass", "loop"]
    loop.call_soon_threadsafe(loop.stop)


def test_neither_waits_for_long():
    """A pass of a large model and a request that takes its time: each is over before the other, which began first, ends."""
    turns, hold = Turns(), threading.Event()
    loop = loop_of(turns)
    with turns.pass_():
        assert called(loop, lambda: None).wait(10)
    called(loop, hold.wait)
    with turns.pass_():
        assert not hold.is_set()
    hold.set()
    loop.call_soon_threadsafe(loop.stop)


def test_what_is_written_in_a_turn_of_the_loop_is_sent_at_once():
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
        for data in (b"head", b"", b"body"):
            transport.write(data)
        assert raw.sent == []
        await asyncio.sleep(0)
        assert raw.sent == [b"headbody"]
        transport.write(b"end")
        transport.close()
        assert raw.sent[1:] == [b"end"] and raw.closed and transport.sent is raw.sent
        await asyncio.sleep(0)
        assert len(raw.sent) == 2

    asyncio.run(talk())
