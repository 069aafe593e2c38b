"""HTTP by hand, for requests that no client would send."""

import socket


def raw(url: str, request: bytes, wait: bool = True) -> bytes:
    """What a server answers to these bytes; without ``wait`` the connection is cut at once."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        parts = []
        while wait and (part := connection.recv(65536)):
            parts.append(part)
        return b"".join(parts)


def post(path: str, body: bytes, *headers: str, kind: str = "application/json") -> bytes:
    """The bytes of a POST."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body
