"""The cost of a burst of webhooks: list calls, and the senders' wait for their responses.

200 deliveries of 200 different meetings arrive within a second over real sockets, while lemcal accepts 20
requests per 2 s. The baseline is a typical hand-written receiver, which fetches the list for each delivery
through the same client and limiter. Ratios come from the same run.

``--plot FILE.png`` draws the responses over time (needs matplotlib).
"""

import argparse
import functools
import json
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import attrs
import httpx
import uvicorn

from lemcal_async import AsyncLemcal, Meeting
from lemcal_async.sandbox import Sandbox
from lemcal_async.transport import PooledTransport
from lemcal_async.webhooks import WebhookReceiver

DELIVERIES = 200
SECONDS = 1.0
TOKEN = "benchmark"

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]
Make = Callable[[AsyncLemcal, Callable[[Meeting], Awaitable[None]]], App]


@attrs.frozen
class Burst:
    """The result of a burst. ``latencies`` and ``ended`` (when each response arrived) are in seconds."""

    latencies: list[float]
    ended: list[float]
    statuses: set[int]
    handled: int
    list_calls: int
    refused: int

    @property
    def p95(self) -> float:
        """The latency that 95 % stay below."""
        return statistics.quantiles(self.latencies, n=20)[-1]


def receiver(lemcal: AsyncLemcal, keep: Callable[[Meeting], Awaitable[None]]) -> App:
    """Return the receiver under test."""
    return WebhookReceiver(lemcal, token=TOKEN, on_meeting=keep)


def by_hand(lemcal: AsyncLemcal, keep: Callable[[Meeting], Awaitable[None]]) -> App:
    """Return the baseline: a list call for each delivery."""

    async def app(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        more = True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        data = json.loads(body)
        await keep(await lemcal.meetings.get(data["_id"], data["meetingTypeId"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app


@asynccontextmanager
async def serving(app: App) -> AsyncIterator[str]:
    """Serve an app on loopback."""
    config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server._serve, [listener])  # noqa: SLF001 - without its signal handlers
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/?token={TOKEN}"
            server.should_exit = True


async def burst(make: Make, *, types: int, meetings: int, latency: tuple[float, float]) -> Burst:
    """Send the deliveries and measure."""
    handled: list[str] = []
    latencies: list[float] = []
    ended: list[float] = []
    statuses: set[int] = set()

    async def keep(meeting: Meeting) -> None:
        handled.append(meeting.id)

    with Sandbox(meetings=meetings, latency=latency).serve() as sandbox:
        kinds = [entry["_id"] for entry in sandbox.meeting_types()][:types]
        booked = [sandbox.book(meeting_type_id=kinds[number % len(kinds)]) for number in range(DELIVERIES)]
        async with (
            sandbox.client() as lemcal,
            serving(make(lemcal, keep)) as url,
            PooledTransport() as sender,
        ):
            began = time.monotonic()

            async def deliver(number: int) -> None:
                await anyio.sleep(SECONDS * number / DELIVERIES)
                sent = time.monotonic()
                request = httpx.Request("POST", url, json=booked[number])
                request.extensions["timeout"] = httpx.Timeout(60).as_dict()
                answer = await sender.handle_async_request(request)
                await answer.aread()
                statuses.add(answer.status_code)
                latencies.append(time.monotonic() - sent)
                ended.append(time.monotonic() - began)

            async with anyio.create_task_group() as tasks:
                for number in range(DELIVERIES):
                    tasks.start_soon(deliver, number)
        seen = [request for request in sandbox.requests if request.path == "/meetings"]
    assert {meeting["_id"] for meeting in booked} == set(handled)
    return Burst(
        latencies,
        sorted(ended),
        statuses,
        len(handled),
        len(seen),
        sum(request.status_code == 429 for request in seen),
    )


CASES: dict[str, dict[str, Any]] = {
    "one type, 12 other meetings, 2 ms": {"types": 1, "meetings": 12, "latency": (0.002, 0.002)},
    "all types, 12 other meetings, 40-200 ms": {"types": 99, "meetings": 12, "latency": (0.04, 0.2)},
    "all types, 5,000 other meetings, 40-200 ms": {"types": 99, "meetings": 5000, "latency": (0.04, 0.2)},
}


def measure(baseline: list[Burst], ours: list[Burst]) -> Iterator[tuple[str, str, str]]:
    """Yield the name, value and bound of each measurement."""
    for case, options in CASES.items():
        result = anyio.run(functools.partial(burst, receiver, **options))
        ours.append(result)
        yield case, "", ""
        yield "  handled, status codes", f"{result.handled}, {result.statuses}", "200, {200}"
        yield "  list calls", f"{result.list_calls} ({result.refused} refused)", "3"
        yield "  response time, median", f"{statistics.median(result.latencies):.2f} s", ""
        yield "  response time, p95", f"{result.p95:.2f} s", "3 s"
    case, options = next(iter(CASES.items()))
    result = anyio.run(functools.partial(burst, by_hand, **options))
    baseline.append(result)
    yield f"by hand: {case}", "", ""
    yield "  list calls", f"{result.list_calls} ({result.refused} refused)", ""
    yield "  response time, p95", f"{result.p95:.2f} s = {result.p95 / ours[0].p95:.0f} x WebhookReceiver", ""


def plot(file: str, baseline: Burst, ours: Burst) -> None:
    """Draw the responses over time."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for name, result in (("WebhookReceiver", ours), ("one list call per delivery", baseline)):
        axes.step([0.0, *result.ended], range(DELIVERIES + 1), where="post", label=name)
    axes.set_xlabel("seconds")
    axes.set_ylabel("responses")
    axes.legend()
    plt.savefig(file, dpi=120)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--plot", metavar="FILE.png")
    arguments = parser.parse_args()
    baseline: list[Burst] = []
    ours: list[Burst] = []
    print(f"{DELIVERIES} deliveries in {SECONDS:.0f} s; lemcal accepts 20 requests per 2 s\n")
    print(f"{'measurement':<48} {'measured':<28} bound")
    for name, measured, bound in measure(baseline, ours):
        print(f"{name:<48} {measured:<28} {bound}", flush=True)
    if arguments.plot:
        plot(arguments.plot, baseline[0], ours[0])


if __name__ == "__main__":
    main()
