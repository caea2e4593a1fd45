"""A wire that answers from memory, for what a server on a real socket cannot be brought to do."""

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
AT_ONCE = RetryPolicy(backoff=0.0)  # retries, without the waits between them

Handler = Callable[[httpx.Request], httpx.Response]


UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


class Wire(httpx.AsyncBaseTransport):
    """Answers by ``handler``, and remembers the requests and whether it was closed.

    As the default wire does, it reports when a request is sent, unless told otherwise.
    """

    reports_sending = True

    def __init__(self, handler: Handler | None = None) -> None:
        self._handler = handler or (lambda _: httpx.Response(200, json={"_id": "x"}))
        self.requests: list[httpx.Request] = []
        self.entered = False
        self.closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer, or raise what the handler raises."""
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
        """Note that somebody closed it."""
        self.closed = True

    def client(self, **options: Any) -> AsyncLemcal:
        """Return a client on this wire, without a rate limit or retries unless asked for."""
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


def answering(status: int = 200, **content: Any) -> Wire:
    """Return a wire that gives the same answer to everything."""
    return Wire(lambda _: httpx.Response(status, **content))


def failing(error: Exception) -> Wire:
    """Return a wire that never gives an answer."""

    def handler(request: httpx.Request) -> httpx.Response:
        setattr(error, "request", request)  # noqa: B010 - as a real transport's error does, it holds the credentials
        raise error

    return Wire(handler)


def check_plain(error: BaseException) -> None:
    """Check what holds for every error: one line, it pickles, and it drags nothing along."""
    assert isinstance(error, LemcalError)
    assert str(error) == " ".join(str(error).split())
    assert (None, None) == (error.__cause__, error.__context__)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(error), str(error), vars(error)) == (type(copy), str(copy), vars(copy))


def nobody_listens() -> str:
    """Return a base URL where connections are refused."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


async def seen(sandbox: Sandbox, count: int) -> None:
    """Wait until so many requests have arrived."""
    with anyio.fail_after(30):
        while len(sandbox.requests) < count:  # noqa: ASYNC110 - nothing tells
            await anyio.sleep(0.005)
