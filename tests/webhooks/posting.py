"""A sender that can deliver malformed requests: raw bytes on a socket, and the parsed response."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import attrs


@attrs.frozen
class Response:
    """A receiver's response. A status code of None means that there was none."""

    status_code: int | None
    outcome: str | None
    headers: Mapping[str, str]

    @property
    def summary(self) -> tuple[int | None, str | None]:
        """The status code and the outcome."""
        return self.status_code, self.outcome


NO_REPLY = Response(None, None, {})


async def post(
    port: int,
    body: bytes | Sequence[bytes],
    *,
    query: str,
    path: str = "/hook",
    method: str = "POST",
    length: int | None = None,
    leave: bool = False,
    pause: float = 0.0,
) -> Response:
    """Send a request and read its response.

    Several parts are sent chunked, ``pause`` seconds apart. ``length`` overrides the Content-Length header.
    With ``leave``, the connection is closed once the request is sent.
    """
    parts = [body] if isinstance(body, bytes) else [*body]
    if isinstance(body, bytes):
        framing = f"Content-Length: {len(body) if length is None else length}"
    else:
        framing = "Transfer-Encoding: chunked"
        parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]
    head = f"{method} {path}{query} HTTP/1.1\r\nHost: receiver\r\nConnection: close\r\n{framing}\r\n\r\n"
    async with await anyio.connect_tcp("127.0.0.1", port) as stream, anyio.create_task_group() as tasks:
        received: list[bytes] = []

        async def read() -> None:
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:
                    received.append(await stream.receive())

        # Read from the start: after an early rejection, the connection may break before the body is sent.
        if not leave:
            tasks.start_soon(read)
        with contextlib.suppress(anyio.BrokenResourceError):
            await stream.send(head.encode() + (parts.pop(0) if not pause else b""))
            for part in parts:
                await anyio.sleep(pause)
                await stream.send(part)
    return _read(b"".join(received))


def _read(received: bytes) -> Response:
    if not received:
        return NO_REPLY
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    try:
        content: Any = json.loads(body)
    except ValueError:
        content = {}
    return Response(int(first.split()[1]), content.get("status"), headers)
