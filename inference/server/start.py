"""Bind the port, serve until a signal comes, answer what is in work, end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType

import uvicorn

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


def server_of(gate: Gate) -> uvicorn.Server:
    """Return uvicorn's server for the application. A first signal ends it when all is answered, a second one at once."""
    # httptools, which uvicorn prefers where it is installed, takes headers of any length and what is hardly HTTP; h11 refuses both.
    config = uvicorn.Config(gate, http="h11", log_config=None, access_log=False, server_header=False, lifespan="off")
    config.get_loop_factory = lambda: lambda: asyncio.SelectorEventLoop(TurnsSelector(gate.service.turns))
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
