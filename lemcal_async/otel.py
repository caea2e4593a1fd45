"""Events as OpenTelemetry traces and metrics. Needs the extra ``otel``; nothing else imports it.

The instruments are made by whatever providers the program has set up, or those it is given; without
an SDK they do nothing. Attributes are of low cardinality, and none holds a secret or personal data.
"""

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

try:
    from opentelemetry import metrics, trace
    from opentelemetry.trace import SpanKind, Status, StatusCode
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "opentelemetry":
        raise
    raise ImportError("this needs the extra otel: pip install 'lemcal-async[otel]'") from None

from lemcal_async import events
from lemcal_async._version import __version__

_SCOPE = "lemcal_async"
_WORD = re.compile(r"[A-Za-z-]{0,40}")
_CHANGES = ("created", "changed", "canceled", "disappeared", "restored")

Attributes: TypeAlias = dict[str, str | int | float]


def instrument(
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
) -> Callable[[], None]:
    """Trace and measure all clients and webhook receivers of this process; return what ends that.

    A span per call, with its attempts and waits, is a child of whatever span is current where the call
    is made. The metrics are listed in ``docs/observability.md``. Calling it twice counts twice.
    """
    return events.subscribe(_Listener(tracer_provider, meter_provider))


def _template(route: str) -> str:
    """Return a route without what may be an id or a name: ``request()`` takes any path."""
    return "/".join(part if _WORD.fullmatch(part) else "{id}" for part in route.split("/"))


class _Listener:
    """Turns each event into what it is called there."""

    def __init__(
        self, tracer_provider: trace.TracerProvider | None, meter_provider: metrics.MeterProvider | None
    ) -> None:
        self._tracer = trace.get_tracer(_SCOPE, __version__, tracer_provider)
        meter = metrics.get_meter(_SCOPE, __version__, meter_provider)
        self._calls = meter.create_histogram("lemcal.call.duration", "s", "Calls, waits and retries included")
        self._queue = meter.create_histogram("lemcal.queue.duration", "s", "Waits for the rate limit")
        self._pauses = meter.create_histogram("lemcal.pause.duration", "s", "Holds of a key after a 429")
        self._refusals = meter.create_counter("lemcal.refusals", "{answer}", "429 answers")
        self._retries = meter.create_counter("lemcal.retries", "{attempt}", "Attempts that were repeated")
        self._foreign = meter.create_counter(
            "lemcal.foreign_requests", "{request}", "Requests of others with the same key"
        )
        self._fallbacks = meter.create_counter(
            "lemcal.limiter.fallbacks", "{fallback}", "Times the limiter went on with less than it had"
        )
        self._pool = meter.create_histogram(
            "lemcal.pool.connections", "{connection}", "Connections in use, seen by each request"
        )
        self._gate = meter.create_histogram("lemcal.pool.duration", "s", "Waits for a connection")
        self._deliveries = meter.create_histogram("lemcal.webhook.duration", "s", "Webhook deliveries")
        self._syncs = meter.create_histogram("lemcal.sync.duration", "s", "Synchronisations of an account")
        self._changes = meter.create_counter("lemcal.sync.changes", "{meeting}", "Changes that it found")
        self._handlers: Mapping[type[Any], Callable[[Any], None]] = {
            events.CallEnded: self._call_ended,
            events.Retried: self._retried,
            events.Granted: self._granted,
            events.Paused: lambda event: self._pauses.record(event.seconds),
            events.ForeignUse: lambda event: self._foreign.add(event.requests),
            events.FellBack: lambda event: self._fallbacks.add(1),  # noqa: ARG005 - its reason is in words
            events.PoolEntered: self._pool_entered,
            events.WebhookHandled: self._webhook_handled,
            events.AccountSynced: self._account_synced,
        }

    def __call__(self, event: events.Event) -> None:
        """Pass it on; one that is not known here is left alone."""
        handle = self._handlers.get(type(event))
        if handle is not None:
            handle(event)

    def _call_ended(self, event: events.CallEnded) -> None:
        route = _template(event.route)
        attributes: Attributes = {"http.request.method": event.method, "url.template": route}
        if event.status is not None:
            attributes["http.response.status_code"] = event.status
        if event.error is not None:
            attributes["error.type"] = event.error
        self._calls.record(event.seconds, attributes)
        if event.status == 429:
            self._refusals.add(1, {"url.template": route})
        ended = time.time_ns()
        span = self._tracer.start_span(
            f"{event.method} {route}",
            kind=SpanKind.CLIENT,
            attributes={**attributes, "lemcal.attempts": event.attempts, "lemcal.waited": event.waited},
            start_time=ended - int(event.seconds * 1e9),
        )
        if event.error is not None:
            span.set_status(Status(StatusCode.ERROR, event.error))
        span.end(ended)

    def _granted(self, event: events.Granted) -> None:
        self._queue.record(event.waited, {"lemcal.priority": event.priority})

    def _retried(self, event: events.Retried) -> None:
        self._retries.add(1, {"url.template": _template(event.route), "lemcal.reason": event.reason})
        if event.reason == "429":
            self._refusals.add(1, {"url.template": _template(event.route)})

    def _pool_entered(self, event: events.PoolEntered) -> None:
        self._pool.record(event.in_use)
        self._gate.record(event.waited)

    def _webhook_handled(self, event: events.WebhookHandled) -> None:
        attributes: Attributes = {
            "lemcal.outcome": event.outcome,
            "http.response.status_code": event.status,
        }
        self._deliveries.record(event.seconds, attributes)

    def _account_synced(self, event: events.AccountSynced) -> None:
        self._syncs.record(event.seconds, {"lemcal.failed": event.failed})
        for kind in _CHANGES:
            if count := getattr(event, kind):
                self._changes.add(count, {"lemcal.change": kind})
