"""Keeps other web sites away from the page and the controls.

The sandbox asks for no credentials, so a web site in the same browser could drive it: by a form or a script
that sends requests across sites, or by a name that it points at this machine (DNS rebinding). Browsers say
who is asking, in Origin, Sec-Fetch-Site and Host; programs send none of the first two.
"""

import ipaddress
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Guard:
    """An ASGI app around the page and the controls; ``own_host`` returns the name they are served under."""

    def __init__(self, app: ASGIApp, own_host: Callable[[], str | None]) -> None:
        self._app = app
        self._own_host = own_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse what comes from another site, and pass on the rest."""
        if scope["type"] == "http" and (problem := problem_of(Request(scope), self._own_host())):
            await PlainTextResponse(problem, 403)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def problem_of(request: Request, own_host: str | None) -> str | None:
    """Return why a request is refused, None if it is not."""
    host = request.headers.get("host", "")
    name = _hostname(f"//{host}")
    if name != own_host and not _is_local_name(name):
        return f"the sandbox is not at {host[:100]!r}; use localhost or an IP address"
    if request.method in _SAFE_METHODS:  # other sites cannot read the response
        return None
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        return "the request comes from another web site"
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return "the request comes from another web site"
    return None


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_local_name(host: str) -> bool:
    """Whether no stranger can point this name at this machine: an IP address, localhost, or no domain."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.endswith(".localhost") or (bool(host) and "." not in host)
    return True
