"""Decompressing a body in chunks, with a size limit against decompression bombs.

Requests accept gzip and deflate; other encodings are errors. A wire may already have decompressed the body
without removing the header, so a body that starts like JSON is returned unchanged.
"""

import io
import re
import zlib
from collections.abc import Iterator

from anyio.lowlevel import checkpoint

_CHUNK_SIZE = 2**16  # bytes of input and output of one decompression step
_BYTES_PER_TURN = 2**21  # of output, after which other tasks run: 12 MB take 30 ms

_GZIP = 16 + zlib.MAX_WBITS
_RAW_DEFLATE = -zlib.MAX_WBITS


SUPPORTED = frozenset({"", "identity", "gzip", "x-gzip", "deflate"})


class CompressionError(Exception):
    """The body cannot be decompressed; the message says why, without quoting it."""


async def decompress(encoding: str, body: bytes, max_bytes: int) -> bytes:
    """Return the decompressed body; raises CompressionError.

    Yields to the event loop regularly.
    """
    encoding = encoding.strip().lower()
    if _is_plain(encoding, body):
        return body
    # Not a list of chunks: joining 12 MB at the end would block the event loop for 8 ms.
    content = io.BytesIO()
    size = turn = 0
    for chunk in _chunks(encoding, body):
        size += len(chunk)
        if size > max_bytes:
            raise CompressionError(f"the response is over {max_bytes} bytes when decompressed")
        content.write(chunk)
        if size // _BYTES_PER_TURN > turn:
            turn = size // _BYTES_PER_TURN
            await checkpoint()
    return content.getvalue()


def _is_plain(encoding: str, body: bytes) -> bool:
    if encoding in ("", "identity") or not body:
        return True
    # No gzip or zlib stream starts like this, but a raw deflate stream can.
    return body[:1] in b'[{"' and not (encoding == "deflate" and _is_raw_deflate(body))


def _is_raw_deflate(body: bytes) -> bool:
    stream = zlib.decompressobj(_RAW_DEFLATE)
    try:
        stream.decompress(body[:_CHUNK_SIZE], _CHUNK_SIZE)
    except zlib.error:
        return False
    return not stream.unused_data


def _chunks(encoding: str, body: bytes) -> Iterator[bytes]:
    wbits = _wbits(encoding, body)
    stream = zlib.decompressobj(wbits)
    position, rest = 0, b""
    while rest or position < len(body):
        if not rest:
            rest, position = body[position : position + _CHUNK_SIZE], position + _CHUNK_SIZE
        if stream.eof:
            if wbits != _GZIP:  # only gzip allows several members in a row
                return
            stream = zlib.decompressobj(wbits)
        try:
            yield stream.decompress(rest, _CHUNK_SIZE)
        except zlib.error:
            raise CompressionError(f"the response is not {encoding}, contrary to its header") from None
        rest = stream.unused_data if stream.eof else stream.unconsumed_tail
    while not stream.eof:
        chunk = stream.decompress(b"", _CHUNK_SIZE)
        if not chunk:
            raise CompressionError("the compressed response is truncated")
        yield chunk


def _wbits(encoding: str, body: bytes) -> int:
    """Return zlib's ``wbits`` argument for the format."""
    if encoding in ("gzip", "x-gzip"):
        return _GZIP
    if encoding == "deflate":
        # "deflate" means zlib's format according to the standard, but some servers send raw deflate.
        return zlib.MAX_WBITS if _is_zlib(body) else _RAW_DEFLATE
    shown = re.sub(r"[^a-z0-9, -]", "", encoding)[:20]  # the server's text
    raise CompressionError(f"the response is compressed with {shown}, not gzip or deflate as requested")


def _is_zlib(body: bytes) -> bool:
    return len(body) > 1 and body[0] & 0x0F == 8 and (body[0] * 256 + body[1]) % 31 == 0
