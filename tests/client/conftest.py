"""An in-memory transport, for behavior that a server on a real socket cannot be made to show."""

import pickle
import socket
from collections.abc import Callable
from typing import Any, Self

import anyio
import httpcore
import httpx

from lemcal_async import AsyncLemcal, RetryPolicy
from lemcal_async.errors import LemcalError
from lemcal_async.ratelimit import Unlimited
from lemcal_async.sandbox import Sandbox

USER_ID = "usr_BuDuyx4chjoNfcmzM"
KEY = "hush-4f9Zq-hush-Wm27"
TOKEN = "wh-token-8Lp3-quiet"
TARGET = f"https://example.com/lemcal?token={TOKEN}"

ONCE = RetryPolicy(attempts=1)
AT_ONCE = RetryPolicy(backoff=0.0)  # retries without delays

Handler = Callable[[httpx.Request], httpx.Response]


UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


class Wire(httpx.AsyncBaseTransport):
    """Responds with ``handler``, and records the requests and whether it was closed.

    Like the default wire, it reports when a request is sent, unless ``reports_sending`` is set to False.
    """

    reports_sending = True

    def __init__(self, handler: Handler | None = None) -> None:
        self._handler = handler or (lambda _: httpx.Response(200, json={"_id": "x"}))
        self.requests: list[httpx.Request] = []
        self.entered = False
        self.closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Return the handler's response, or raise its exception."""
        self.requests.append(request)
        try:
            return self._handler(request)
        except UNSENT:
            raise
        except BaseException:
            info = {"request": httpcore.Request(request.method, str(request.url))}
            await request.extensions["trace"]("http11.send_request_headers.started", info)
            raise

    async def __aenter__(self) -> Self:
        self.entered = True
        return self

    async def aclose(self) -> None:
        """Record the call."""
        self.closed = True

    def client(self, **options: Any) -> AsyncLemcal:
        """Return a client on this wire, by default without a rate limit or retries."""
        return AsyncLemcal(
            **{
                "user_id": USER_ID,
                "api_key": KEY,
                "transport": self,
                "limiter": Unlimited(),
                "retry": ONCE,
                **options,
            }
        )


def responding(status: int = 200, **content: Any) -> Wire:
    """Return a wire that gives the same response to every request."""
    return Wire(lambda _: httpx.Response(status, **content))


def failing(error: Exception) -> Wire:
    """Return a wire that fails every request."""

    def handler(request: httpx.Request) -> httpx.Response:
        setattr(error, "request", request)  # noqa: B010 - a real transport's error holds the credentials, too
        raise error

    return Wire(handler)


def check_plain(error: BaseException) -> None:
    """Check that an error has a one-line message, survives pickling, and has no cause or context."""
    assert isinstance(error, LemcalError)
    assert str(error) == " ".join(str(error).split())
    assert (None, None) == (error.__cause__, error.__context__)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(error), str(error), vars(error)) == (type(copy), str(copy), vars(copy))


def unused_base_url() -> str:
    """Return a base URL where connections are refused."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


async def wait_for_requests(sandbox: Sandbox, count: int) -> None:
    """Wait until ``count`` requests have arrived."""
    with anyio.fail_after(30):
        while len(sandbox.requests) < count:  # noqa: ASYNC110 - there is no event for this
            await anyio.sleep(0.005)
