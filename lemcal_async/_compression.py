"""Undoing the content encoding of a body, a piece at a time and bounded: a bomb is small until it bursts.

Requests ask for gzip and deflate, and other encodings are refused. A wire may have decompressed the body
already and left the header as it was; a body that reads as JSON is taken as it is.
"""

import io
import re
import zlib
from collections.abc import Iterator

from anyio.lowlevel import checkpoint

_PIECE = 2**16  # bytes that are decompressed at once
_TURN = 2**21  # bytes of output after which the event loop gets its turn: 12 MB take 30 ms

_GZIP = 16 + zlib.MAX_WBITS
_RAW_DEFLATE = -zlib.MAX_WBITS


KNOWN = frozenset({"", "identity", "gzip", "x-gzip", "deflate"})


class CompressionError(Exception):
    """The body cannot be decompressed; the message says why, without quoting it."""


async def decompress(encoding: str, body: bytes, max_bytes: int) -> bytes:
    """Return the body as it was before it was compressed; raises CompressionError.

    The event loop gets its turn in between; canceled, what came of it is dropped.
    """
    encoding = encoding.strip().lower()
    if _is_plain(encoding, body):
        return body
    # Not a list to be joined in the end: that would take 8 ms for 12 MB, all in one go.
    content = io.BytesIO()
    size = turn = 0
    for piece in _pieces(encoding, body):
        size += len(piece)
        if size > max_bytes:
            raise CompressionError(f"the answer is over {max_bytes} bytes when decompressed")
        content.write(piece)
        if size // _TURN > turn:
            turn = size // _TURN
            await checkpoint()
    return content.getvalue()


def _is_plain(encoding: str, body: bytes) -> bool:
    if encoding in ("", "identity") or not body:
        return True
    # No gzip or zlib stream begins like this, but one of raw deflate can.
    return body[:1] in b'[{"' and not (encoding == "deflate" and _inflates(body))


def _inflates(body: bytes) -> bool:
    stream = zlib.decompressobj(_RAW_DEFLATE)
    try:
        stream.decompress(body[:_PIECE], _PIECE)
    except zlib.error:
        return False
    return not stream.unused_data


def _pieces(encoding: str, body: bytes) -> Iterator[bytes]:
    window = _window(encoding, body)
    stream = zlib.decompressobj(window)
    at, rest = 0, b""
    while rest or at < len(body):
        if not rest:
            rest, at = body[at : at + _PIECE], at + _PIECE
        if stream.eof:
            if window != _GZIP:  # gzip allows several members in a row; others end here
                return
            stream = zlib.decompressobj(window)
        try:
            yield stream.decompress(rest, _PIECE)
        except zlib.error:
            raise CompressionError(f"the answer is not {encoding}, as its header says") from None
        rest = stream.unused_data if stream.eof else stream.unconsumed_tail
    while not stream.eof:
        piece = stream.decompress(b"", _PIECE)
        if not piece:
            raise CompressionError("the compressed answer breaks off")
        yield piece


def _window(encoding: str, body: bytes) -> int:
    """Return what zlib takes for the format."""
    if encoding in ("gzip", "x-gzip"):
        return _GZIP
    if encoding == "deflate":
        # Called deflate, it may be zlib's format (as the standard says) or the raw one (as some send it).
        return zlib.MAX_WBITS if _is_zlib(body) else _RAW_DEFLATE
    shown = re.sub(r"[^a-z0-9, -]", "", encoding)[:20]  # it is the server's text
    raise CompressionError(f"the answer is compressed with {shown}, not with gzip or deflate as asked")


def _is_zlib(body: bytes) -> bool:
    return len(body) > 1 and body[0] & 0x0F == 8 and (body[0] * 256 + body[1]) % 31 == 0
