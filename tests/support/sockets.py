"""HTTP as bytes on a socket: clients that send what no library would."""

import json
import socket
from dataclasses import dataclass
from http.client import HTTPResponse
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

PATIENCE_S = 30.0  # then the test has gone wrong
FLOOD_BYTES = 100_000_000
FLOOD_BLOCK = 1 << 18
MOST_TAKEN = 32 << 20  # of what is not kept: read and thrown away, or in the system's buffers


@dataclass(frozen=True)
class Reply:
    """What came back, and how much could be sent before the server would take no more."""

    raw: bytes
    num_sent: int

    @property
    def response(self) -> HTTPResponse:
        """The first final response, its head read."""
        response = HTTPResponse(_Replayed(self.raw))  # type: ignore[arg-type]  # all it needs
        response.begin()
        return response

    @property
    def error(self) -> dict[str, Any]:
        """The error of a response in the API's form, which must be its connection's last."""
        response = self.response
        assert response.headers["content-type"] == "application/json"
        assert response.headers["connection"] == "close"
        assert response.headers["x-request-id"]
        content = response.read()
        assert self.raw.endswith(content)
        body = json.loads(content)
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        error: dict[str, Any] = body["error"]
        return error


class _Replayed:
    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def makefile(self, _mode: str) -> BytesIO:
        return BytesIO(self.raw)


def dial(url: str, *, receive_buffer: int | None = None) -> socket.socket:
    """A connection to a server. `receive_buffer` limits what is received before it is read."""
    address = urlsplit(url)
    assert address.hostname is not None
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(PATIENCE_S)
    connection.connect((address.hostname, address.port))
    return connection


def post(path: str, body: dict[str, Any], *headers: str, version: str = "1.1") -> bytes:
    """A whole request."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: x", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(content)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + content


def exchange(url: str, data: bytes, *, flood: bytes = b"", half_close: bool = False) -> Reply:
    """Send this, then the flood again and again, as far as the server takes it; read to the end."""
    block = flood * (FLOOD_BLOCK // len(flood)) if flood else b""
    blocks = [data] + [block] * (FLOOD_BYTES // len(block) if flood else 0)
    num_sent = 0
    with dial(url) as connection:
        try:
            for part in blocks:
                for at in range(0, len(part), FLOOD_BLOCK):
                    connection.sendall(part[at : at + FLOOD_BLOCK])
                    num_sent += len(part[at : at + FLOOD_BLOCK])
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass
        return Reply(read_to_end(connection), num_sent)


def read_to_end(connection: socket.socket) -> bytes:
    """All that comes until the server closes or resets the connection."""
    parts: list[bytes] = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)
