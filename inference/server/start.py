"""Bind the port, serve until a signal comes, answer what is in work, end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from errors import UserError
from inference.server.limits import Gate
from inference.server.turns import TurnsSelector


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; port 0 takes a free one. UserError if that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: {reason}; name another port, or end what listens there.") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the address at which a bound socket is asked."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


HEAD = b"HTTP/1.1 "


class Gathered:
    """A connection's transport that sends the head of an answer together with the beginning of its body, when the loop turns."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport, self.loop, self.parts = transport, asyncio.get_running_loop(), []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        """Send a head later, with what is written meanwhile, and else at once."""
        if not self.parts and not data.startswith(HEAD):
            self.transport.write(data)
            return
        if not self.parts:
            self.loop.call_soon(self.flush)
        self.parts.append(data)

    def flush(self) -> None:
        """Send now."""
        data = b"".join(self.parts)
        self.parts.clear()
        if data:
            self.transport.write(data)

    def close(self) -> None:
        """Send what is left, and close."""
        self.flush()
        self.transport.close()


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1. httptools, which it prefers, takes headers of any length and what is hardly HTTP; h11 refuses both."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin."""
        super().connection_made(Gathered(transport))

    def on_response_complete(self) -> None:
        """Send the end of an answer before the next pieces of others are made: its client may ask again meanwhile."""
        self.transport.flush()
        super().on_response_complete()


def server_of(gate: Gate) -> uvicorn.Server:
    """Return uvicorn's server for the application. A first signal ends it when all is answered, a second one at once."""
    config = uvicorn.Config(gate, http=Connection, log_config=None, access_log=False, server_header=False, lifespan="off")
    config.get_loop_factory = lambda: lambda: asyncio.SelectorEventLoop(TurnsSelector(gate.service.pass_here))
    server = uvicorn.Server(config)

    def drain() -> None:
        gate.service.end()
        while gate.service.in_work:
            time.sleep(0.05)
        server.should_exit = True

    def stop(number: int, frame: FrameType | None) -> None:
        if gate.service.ending:
            server.should_exit = server.force_exit = True
        else:
            threading.Thread(target=drain, daemon=True).start()  # a handler must not wait for a lock

    server.handle_exit = stop
    return server


@contextlib.contextmanager
def background(gate: Gate) -> Iterator[str]:
    """Serve in a thread of this process, at a free port of the loopback whose address is given."""
    bound, server = bind("127.0.0.1", 0), server_of(gate)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield url_of(bound)
    finally:
        server.should_exit = True
        thread.join()
        gate.service.close()
