"""What stands before every request: API keys, the size of its body, the log, the metrics, and the end of the server."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

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

    async def whole() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
        if size > limit:
            raise Refusal(413, f"the body has more than {limit} bytes; ask in smaller parts.")
        return b"".join(parts)

    try:
        return await asyncio.wait_for(whole(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refusal(408, f"the body did not arrive within {BODY_SECONDS} s.") from None
    except ClientDisconnect:
        request.scope["notes"]["ended"] = "client-gone"
        raise Refusal(499, "the client closed the connection.") from None


class Gate:
    """ASGI middleware: refuses without a key and while the server ends, counts, and writes one line a request."""

    def __init__(self, app: Any, service: Service, keys: list[bytes], paths: Sequence[str]) -> None:
        self.app, self.service, self.keys, self.paths = app, service, keys, paths

    async def __call__(self, scope: dict, receive: Callable[[], Awaitable], send: Callable[[dict], Awaitable]) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
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
            refusal = self.refusal(scope)
            if refusal is None:
                await self.app(scope, receive, noting)
            else:
                await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, noting)
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
