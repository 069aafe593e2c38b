"""What stands before every request: API keys, the size of its body, the log, the metrics, and the end of the server."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from errors import UserError, refuse
from inference.server.protocol import Refusal
from inference.server.service import Service, stopping

logger = logging.getLogger("sanbu")

KEYS_VARIABLE = "SANBU_API_KEY"
BODY_SECONDS = 60  # for a body to arrive; of one that is too large the rest is thrown away, so that its sender gets the answer


def read_keys(file: str | None) -> list[bytes]:
    """Return the API keys of a file, one a line (# begins a comment), or else of SANBU_API_KEY, separated by commas."""
    if file is None:
        return [key.strip().encode() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"--api_key_file {file}: {reason}; name a text file with one key a line.") from error
    keys = [line.strip().encode() for line in lines if line.strip() and not line.strip().startswith("#")]
    refuse(not keys, f"--api_key_file {file} holds no key; write one a line.")
    return keys


def is_loopback(host: str) -> bool:
    """Return True for an address that other machines do not reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def knows(keys: list[bytes], header: bytes) -> bool:
    """Return True if an Authorization header holds one of the keys. Takes as long for any wrong key."""
    kind, _, given = header.partition(b" ")
    found = [hmac.compare_digest(key, given.strip()) for key in keys]
    return kind.lower() == b"bearer" and any(found)


async def body_of(request: Any, limit: int) -> bytes:
    """Return the body of a request. Raises Refusal: 413 above ``limit`` bytes, 415 for another type than JSON, 408 if it stays
    away, 499 if the client goes before its end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also what a browser may send from any page without asking
        raise Refusal(415, f"Content-Type is {kind or 'missing'}; send application/json.")

    parts, size = [], 0
    try:
        with within(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    parts.append(part)
    except asyncio.TimeoutError:
        raise Refusal(408, f"the body did not arrive within {BODY_SECONDS} s.") from None
    except ClientDisconnect:
        raise gone(request) from None
    if size > limit:
        raise Refusal(413, f"the body has more than {limit} bytes; ask in smaller parts.")
    return b"".join(parts)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise asyncio.TimeoutError in this task after so many seconds. asyncio.wait_for does it by another task, at ten times the
    cost; asyncio.timeout is not in Python 3.10.
    """
    task, late = asyncio.current_task(), []

    def cancel() -> None:
        late.append(True)
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, cancel)
    try:
        yield
    except asyncio.CancelledError:
        if not late:
            raise
        if hasattr(task, "uncancel"):
            task.uncancel()
        raise asyncio.TimeoutError from None
    finally:
        timer.cancel()


def gone(request: Any) -> Refusal:
    """Write down that the client of a request has closed the connection; returns what ends the work on it."""
    request.scope["notes"]["ended"] = "client-gone"
    return Refusal(499, "the client closed the connection.")


Handler = Callable[[Service, Request], Awaitable[Any]]


class Gate:
    """The ASGI application: refuses without a key and while the server ends, lets the function of a path answer, counts, and
    writes one line a request. paths: path -> method and function; below: the same for all paths that begin so.
    """

    def __init__(
        self, service: Service, keys: list[bytes], paths: dict[str, tuple[str, Handler]], below: tuple[str, str, Handler]
    ) -> None:
        self.service, self.keys, self.paths, self.below = service, keys, paths, below

    async def __call__(self, scope: dict, receive: Callable[[], Awaitable], send: Callable[[dict], Awaitable]) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        status, begin = 499, time.monotonic()  # nginx's number for a client that went away

        async def noting(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        notes: dict[str, Any] = {}
        scope["notes"] = notes  # the log line's words
        self.service.in_work += 1
        try:
            response = await self.answer(scope, receive)
            await response(scope, receive, noting)
        except asyncio.CancelledError:
            notes["ended"] = "client-gone"
            raise
        finally:
            self.service.in_work -= 1
            path, seconds = scope["path"], time.monotonic() - begin
            known = path if path in self.paths else "other"
            self.service.metrics.requests.labels(known, str(status)).inc()
            self.service.metrics.seconds.labels(known).observe(seconds)
            if path not in ("/health", "/metrics"):
                words = [f"{name}={value}" for name, value in notes.items()]
                target = scope.get("raw_path", b"").decode("latin-1")[:200]  # still encoded: no line breaks
                client = (scope.get("client") or ("-",))[0]
                logger.info("%s %s %s %d %.3fs %s", client, scope["method"], target, status, seconds, " ".join(words))

    async def answer(self, scope: dict, receive: Callable[[], Awaitable]) -> Any:
        """Return the response to a request, itself an ASGI application."""
        try:
            refusal = self.refusal(scope)
            if refusal is not None:
                raise refusal
            return await self.handler(scope)(self.service, Request(scope, receive))
        except Refusal as refusal:
            return JSONResponse(refusal.body, refusal.status, refusal.headers)
        except Exception:
            logger.exception("a request failed")
            refusal = Refusal(500, "the server failed on this request; its log says why.")
            return JSONResponse(refusal.body, refusal.status)

    def handler(self, scope: dict) -> Handler:
        """Return the function that answers a path. Raises Refusal for a path, or a method, that does not exist."""
        known = self.paths.get(scope["path"])
        if known is None and scope["path"].startswith(self.below[0]):
            known = self.below[1:]
        if known is None:
            raise Refusal(404, f"there is no such path; there are {', '.join(self.paths)}.")
        if scope["method"] != known[0]:
            raise Refusal(405, f"this path does not take {scope['method']}.", Allow=known[0])
        return known[1]

    def refusal(self, scope: dict) -> Refusal | None:
        """Return why a request is not even read, or None."""
        if scope["path"] == "/health":
            return None
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if self.keys and not knows(self.keys, header):
            problem = "the API key is wrong" if header else "there is no API key"
            return Refusal(
                401, f"{problem}; send the header Authorization: Bearer KEY.", code="invalid_api_key", WWW_Authenticate="Bearer"
            )
        if self.service.ending and scope["path"] != "/metrics":
            return stopping()
        return None
