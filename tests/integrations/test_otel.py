"""Spans and metrics of real calls, exported to memory by the OpenTelemetry SDK."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import anyio
import attrs
import httpx
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from lemcal_async import RetryPolicy, errors, events
from lemcal_async.otel import instrument
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.sync import MemoryStore, sync_meetings
from lemcal_async.webhooks import WebhookReceiver

pytestmark = pytest.mark.anyio

AT_ONCE = RetryPolicy(backoff=0.0)
COUNTS = {"created": 5, "changed": 4, "canceled": 3, "disappeared": 2, "restored": 1, "unchanged": 100}


class Telemetry:
    """Collects the exported spans and metrics."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meters = MeterProvider([self._reader], shutdown_on_exit=False)

    @property
    def spans(self) -> list[ReadableSpan]:
        """The ended spans, in order of their end."""
        return list(self._exporter.get_finished_spans())

    def points(self, name: str) -> list[tuple[dict[str, Any], Any]]:
        """Return the attributes of each point of a metric, and its count or value."""
        data = self._reader.get_metrics_data()
        return [
            (dict(point.attributes or {}), getattr(point, "count", getattr(point, "value", None)))
            for resource in (data.resource_metrics if data else [])
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    """Instrument the package for one test."""
    telemetry = Telemetry()
    stop = instrument(telemetry.tracers, telemetry.meters)
    yield telemetry
    stop()
    telemetry.tracers.shutdown()
    telemetry.meters.shutdown()


async def test_span_per_call(telemetry: Telemetry, lemcal_sandbox: Sandbox) -> None:
    """Each call has a span with attempts and waits, as a child of the caller's span."""
    lemcal_sandbox.inject(faults.status(500), times=2)
    tracer = telemetry.tracers.get_tracer("service")
    async with lemcal_sandbox.client(retry=AT_ONCE) as lemcal:
        with tracer.start_as_current_span("GET /page"):
            await lemcal.meetings.list(lemcal_sandbox.meeting_types()[0]["_id"])
        await lemcal.meeting_types.get(lemcal_sandbox.meeting_types()[0]["_id"])
    first, page, second = telemetry.spans
    assert ("GET /meetings", SpanKind.CLIENT) == (first.name, first.kind)
    assert page.context is not None
    assert (page.context.span_id, None) == (first.parent and first.parent.span_id, second.parent)
    attributes: dict[str, Any] = dict(first.attributes or {})
    assert attributes.pop("lemcal.waited") >= 0
    url = httpx.URL(lemcal_sandbox.base_url)
    server: dict[str, Any] = {"server.address": "127.0.0.1", "server.port": url.port}
    expected: dict[str, Any] = {
        "http.request.method": "GET",
        "url.template": "/meetings",
        "http.response.status_code": 200,
    }
    expected |= server
    assert {**expected, "lemcal.attempts": 3} == attributes
    assert "GET /meetingTypes/{id}" == second.name
    assert first.start_time is not None
    assert page.start_time is not None
    assert page.start_time <= first.start_time + 5_000_000  # the two use different clocks
    assert StatusCode.UNSET == first.status.status_code
    assert [({"url.template": "/meetings", "lemcal.reason": "500"}, 2)] == telemetry.points("lemcal.retries")


@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [
        (faults.status(401), 401, "AuthenticationError"),
        (faults.status(500), 500, "ServerError"),
        (faults.reset_after_processing(), None, "APIConnectionError"),
        (faults.slow(5), None, "DeadlineExceededError"),
    ],
)
async def test_failed_call(
    telemetry: Telemetry, lemcal_sandbox: Sandbox, fault: faults.Fault, status: int | None, error: str
) -> None:
    """The span of a failed call has its status and error."""
    lemcal_sandbox.inject(fault)
    async with lemcal_sandbox.client(retry=RetryPolicy(attempts=1), deadline=0.3) as lemcal:
        with pytest.raises(errors.LemcalError):
            await lemcal.me()
    (span,) = telemetry.spans
    attributes = dict(span.attributes or {})
    assert (status, error) == (attributes.get("http.response.status_code"), attributes["error.type"])
    assert (StatusCode.ERROR, error) == (span.status.status_code, span.status.description)
    ((labels, count),) = telemetry.points("lemcal.call.duration")
    assert (error, 1) == (labels["error.type"], count)


async def test_canceled_call(telemetry: Telemetry, lemcal_sandbox: Sandbox) -> None:
    """A canceled call has a span, too."""
    lemcal_sandbox.inject(faults.slow(5))
    async with lemcal_sandbox.client() as lemcal:
        with anyio.move_on_after(0.1):
            await lemcal.me()
    assert ["Cancelled"] == [dict(span.attributes or {})["error.type"] for span in telemetry.spans]


async def test_refusals(telemetry: Telemetry, lemcal_sandbox: Sandbox) -> None:
    """Every 429 is counted, whether or not it is retried."""
    lemcal_sandbox.inject(faults.too_many_requests("0.05"), times=2)
    async with lemcal_sandbox.client(retry=RetryPolicy(attempts=2)) as lemcal:
        with pytest.raises(errors.RateLimitError):
            await lemcal.me()
    assert [({"url.template": "/me"}, 2)] == telemetry.points("lemcal.refusals")
    assert [({"url.template": "/me", "lemcal.reason": "429"}, 1)] == telemetry.points("lemcal.retries")


async def test_connection_pool(telemetry: Telemetry, lemcal_sandbox: Sandbox) -> None:
    """Each request records the connections in use and its wait for one."""
    async with lemcal_sandbox.client() as lemcal, anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(lemcal.me)
    assert [({}, 5)] == telemetry.points("lemcal.pool.connections")
    assert [({}, 5)] == telemetry.points("lemcal.pool.duration")


async def test_deliveries(telemetry: Telemetry, lemcal_sandbox: Sandbox) -> None:
    """Deliveries are recorded with their outcomes."""

    async def ignore(meeting: object) -> None:
        """Accept the booking."""

    async with lemcal_sandbox.client() as lemcal:
        receiver = WebhookReceiver(lemcal, token="hush-1", on_meeting=ignore)
        transport = httpx.ASGITransport(receiver)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as sender:
            for token in ("hush-1", "hush-2"):
                await sender.post("/", params={"token": token}, json=lemcal_sandbox.book())
    points = telemetry.points("lemcal.webhook.duration")
    found = {(labels["lemcal.outcome"], labels["http.response.status_code"]) for labels, _ in points}
    assert {("handled", 200), ("rejected", 401)} == found


async def test_synchronization(telemetry: Telemetry, lemcal_sandbox: Sandbox) -> None:
    """A synchronization records its duration and the changes found."""
    async with lemcal_sandbox.client() as lemcal:
        report = await sync_meetings([lemcal], MemoryStore())
    assert [({"lemcal.failed": False}, 1)] == telemetry.points("lemcal.sync.duration")
    assert [({"lemcal.change": "created"}, report.created)] == telemetry.points("lemcal.sync.changes")


def test_other_events(telemetry: Telemetry) -> None:
    """Events of the limiter and the synchronization are recorded; events without a metric are ignored."""
    for event in (
        events.Queued("0123abcd", "bulk", 3),
        events.Granted("0123abcd", "bulk", 0.5),
        events.Paused("0123abcd", 1.283),
        events.ForeignUse("0123abcd", 7),
        events.FellBack("0123abcd", "Redis at redis://:secret@host is unreachable"),
        events.AccountSynced("usr_1", 0.5, failed=False, **COUNTS),
        events.AccountSynced("usr_2", 0.1, failed=True, **dict.fromkeys(COUNTS, 0)),
    ):
        events.emit(event)
    assert [({"lemcal.priority": "bulk"}, 1)] == telemetry.points("lemcal.queue.duration")
    assert [({}, 1)] == telemetry.points("lemcal.pause.duration")
    assert [({}, 7)] == telemetry.points("lemcal.foreign_requests")
    assert [({}, 1)] == telemetry.points("lemcal.limiter.fallbacks")
    syncs = telemetry.points("lemcal.sync.duration")
    assert [({"lemcal.failed": False}, 1), ({"lemcal.failed": True}, 1)] == syncs
    changes = {labels["lemcal.change"]: count for labels, count in telemetry.points("lemcal.sync.changes")}
    assert {**COUNTS, "unchanged": 100} == {**changes, "unchanged": 100}  # unchanged meetings are not changes


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/meetings", "/meetings"),
        ("/meeting-types", "{path}"),
        ("/meetings/mee_BuDuyx4chjoNfcmzM", "{path}"),
        ("/leads/jane@example.com/notes", "{path}"),
        ("/x/AbCdEfGhIjKlMnOpQ", "{path}"),
    ],
)
async def test_routes_are_few(telemetry: Telemetry, lemcal_sandbox: Sandbox, path: str, route: str) -> None:
    """No id or address in a path passed to ``request()`` becomes an attribute."""
    async with lemcal_sandbox.client() as lemcal:
        try:
            await lemcal.request("GET", path)
        except errors.LemcalError as error:
            assert error.status_code == 404  # noqa: PT017 - most of these paths do not exist
    assert [f"GET {route}"] == [span.name for span in telemetry.spans]


async def test_histogram_buckets_suit_seconds(telemetry: Telemetry, lemcal_sandbox: Sandbox) -> None:
    """The SDK's default buckets range from 5 to 10,000, which suits milliseconds."""
    async with lemcal_sandbox.client() as lemcal:
        await lemcal.me()
    data: Any = telemetry._reader.get_metrics_data()
    bounds = {
        metric.name: tuple(metric.data.data_points[0].explicit_bounds)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.unit == "s"
    }
    assert {"lemcal.call.duration", "lemcal.queue.duration"} <= bounds.keys()
    assert {(0.005, 300.0)} == {(each[0], each[-1]) for each in bounds.values()}


async def test_no_secrets(telemetry: Telemetry, lemcal_sandbox: Sandbox) -> None:
    """Spans and metrics contain no key, token or e-mail address."""
    token = "wh-token-8Lp3-quiet"
    async with lemcal_sandbox.client(retry=RetryPolicy(attempts=1)) as lemcal:
        await lemcal.hooks.create(f"https://example.com/?token={token}", any_meeting_type=True)
        with pytest.raises(errors.DuplicateHookError):
            await lemcal.hooks.create(f"https://example.com/?token={token}", any_meeting_type=True)
        meetings = await lemcal.meetings.list()
        lemcal_sandbox.inject(faults.status(401, f"{lemcal_sandbox.api_key} {token}"))
        with pytest.raises(errors.AuthenticationError):
            await lemcal.me()
    shown = "".join(span.to_json() for span in telemetry.spans) + repr(telemetry._reader.get_metrics_data())
    emails = [meeting.guest.email for meeting in meetings if meeting.guest and meeting.guest.email]
    assert emails
    for secret in (lemcal_sandbox.api_key, token, *emails):
        assert secret not in shown


async def test_stop(lemcal_sandbox: Sandbox) -> None:
    """After ``stop()``, nothing is recorded, and no events are created."""
    telemetry = Telemetry()
    stop = instrument(telemetry.tracers, telemetry.meters)
    stop()
    assert not events.wanted()
    async with lemcal_sandbox.client() as lemcal:
        await lemcal.me()
    assert ([], []) == (telemetry.spans, telemetry.points("lemcal.call.duration"))


async def test_events_without_opentelemetry(lemcal_sandbox: Sandbox) -> None:
    """Events can be received without OpenTelemetry."""
    received: list[events.Event] = []
    unsubscribe = events.subscribe(received.append)
    lemcal_sandbox.inject(faults.status(503, headers={"Retry-After": "0.02"}))
    began = anyio.current_time()
    try:
        async with lemcal_sandbox.client(retry=AT_ONCE) as lemcal:
            await lemcal.me()
    finally:
        unsubscribe()
    retried, ended = [event for event in received if isinstance(event, events.Retried | events.CallEnded)]
    assert events.Retried("GET", "/me", 1, "503", 0.02) == retried
    assert isinstance(ended, events.CallEnded)
    assert 0.02 <= ended.waited <= ended.seconds <= anyio.current_time() - began
    port = httpx.URL(lemcal_sandbox.base_url).port or 0
    expected = events.CallEnded("GET", "/me", "127.0.0.1", port, 200, None, 2, 0, 0)
    assert expected == attrs.evolve(ended, waited=0, seconds=0)


def test_import_error_names_the_extra() -> None:
    """Without OpenTelemetry, the ImportError names the extra."""
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "try:\n"
        "    import lemcal_async.otel\n"
        "except ImportError as error:\n"
        "    assert \"pip install 'lemcal-async[otel]'\" in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)


def test_without_an_sdk() -> None:
    """With only the OpenTelemetry API, instrumenting works and records nothing."""
    program = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from lemcal_async import events, otel\n"
        "stop = otel.instrument()\n"
        "events.emit(events.CallEnded('GET', '/me', 'api.lemcal.com', 443, 200, None, 1, 0.0, 0.1))\n"
        "stop()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)
