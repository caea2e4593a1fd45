"""Exports events as OpenTelemetry traces and metrics. Requires the ``otel`` extra; nothing else imports it.

The instruments come from the program's global providers, or from those it passes; without an OpenTelemetry
SDK they do nothing. Attributes have low cardinality and contain no secrets, ids or personal data.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

try:
    from opentelemetry import metrics, trace
    from opentelemetry.trace import SpanKind, Status, StatusCode
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "opentelemetry":
        raise
    raise ImportError("lemcal_async.otel requires the extra otel: pip install 'lemcal-async[otel]'") from None

from lemcal_async import events
from lemcal_async._version import __version__

_SCOPE = "lemcal_async"
_ROUTES = frozenset({"/me", "/meetings", "/meetingTypes", "/meetingTypes/{id}", "/hooks", "/hooks/{id}"})
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 300.0)
_CONNECTIONS = (1, 2, 5, 10, 20, 50, 75, 100, 200, 500)
_FLEET = {
    "accounts": ("{account}", "Accounts in the fleet"),
    "due": ("{account}", "Accounts that are due"),
    "oldest_due": ("s", "Time for which the oldest due account has been due"),
    "queued": ("{batch}", "Batches of turns in the queue"),
    "running": ("{turn}", "Turns in progress"),
    "failing": ("{account}", "Accounts whose last turn failed"),
    "paused": ("{account}", "Paused accounts"),
    "undelivered": ("{change}", "Changes waiting for their handler"),
    "oldest_undelivered": ("s", "Time for which the oldest undelivered change has been waiting"),
    "parked": ("{change}", "Parked changes"),
    "workers": ("{worker}", "Workers"),
}
_CHANGES = ("created", "changed", "canceled", "disappeared", "restored")

Attributes: TypeAlias = dict[str, str | int | float]


def instrument(
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
) -> Callable[[], None]:
    """Trace and measure all clients and receivers of this process; return a function that stops it.

    Each call gets a span, with its attempts and waits, as a child of the caller's current span.
    ``docs/observability.md`` lists the metrics. Calling this twice records everything twice.

    Args:
        tracer_provider: The provider for spans. Defaults to the global tracer provider.
        meter_provider: The provider for metrics. Defaults to the global meter provider.
    """
    return events.subscribe(_Listener(tracer_provider, meter_provider))


def _template(route: str) -> str:
    """Return a known route unchanged; hide other paths, because they may contain ids and names."""
    return route if route in _ROUTES else "{path}"


class _Listener:
    """Converts events to spans and metrics."""

    def __init__(
        self, tracer_provider: trace.TracerProvider | None, meter_provider: metrics.MeterProvider | None
    ) -> None:
        self._tracer = trace.get_tracer(_SCOPE, __version__, tracer_provider)
        meter = metrics.get_meter(_SCOPE, __version__, meter_provider)
        self._calls = _histogram(meter, "lemcal.call.duration", "Calls, including waits and retries")
        self._queue = _histogram(meter, "lemcal.queue.duration", "Waits for the rate limit")
        self._pauses = _histogram(meter, "lemcal.pause.duration", "Pauses of a key after a 429")
        self._refusals = meter.create_counter("lemcal.refusals", "{response}", "429 responses")
        self._retries = meter.create_counter("lemcal.retries", "{attempt}", "Attempts that were retried")
        self._foreign = meter.create_counter(
            "lemcal.foreign_requests", "{request}", "Requests by other clients with the same key"
        )
        self._fallbacks = meter.create_counter(
            "lemcal.limiter.fallbacks", "{fallback}", "Times a limiter fell back to a safer mode"
        )
        self._pool = meter.create_histogram(
            "lemcal.pool.connections",
            "{connection}",
            "Connections in use, sampled by each request",
            explicit_bucket_boundaries_advisory=_CONNECTIONS,
        )
        self._connection_waits = _histogram(meter, "lemcal.pool.duration", "Waits for a connection")
        self._deliveries = _histogram(meter, "lemcal.webhook.duration", "Webhook deliveries")
        self._syncs = _histogram(meter, "lemcal.sync.duration", "Synchronizations of an account")
        self._changes = meter.create_counter("lemcal.sync.changes", "{meeting}", "Changes found")
        self._fleet = {
            name: meter.create_gauge(f"lemcal.fleet.{name}", unit, description)
            for name, (unit, description) in _FLEET.items()
        }
        self._handlers: Mapping[type[Any], Callable[[Any], None]] = {
            events.CallEnded: self._call_ended,
            events.Retried: self._retried,
            events.Granted: self._granted,
            events.Paused: lambda event: self._pauses.record(event.seconds),
            events.ForeignUse: lambda event: self._foreign.add(event.requests),
            events.FellBack: lambda event: self._fallbacks.add(1),  # noqa: ARG005 - the reason is free text
            events.PoolEntered: self._pool_entered,
            events.WebhookHandled: self._webhook_handled,
            events.AccountSynced: self._account_synced,
            events.FleetSampled: self._fleet_sampled,
        }

    def __call__(self, event: events.Event) -> None:
        """Record an event; ignore unknown ones."""
        handle = self._handlers.get(type(event))
        if handle is not None:
            handle(event)

    def _call_ended(self, event: events.CallEnded) -> None:
        route = _template(event.route)
        attributes: Attributes = {
            "http.request.method": event.method,
            "url.template": route,
            "server.address": event.server_address,
            "server.port": event.server_port,
        }
        if event.status_code is not None:
            attributes["http.response.status_code"] = event.status_code
        if event.error is not None:
            attributes["error.type"] = event.error
        self._calls.record(event.seconds, attributes)
        if event.status_code == 429:
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
        self._connection_waits.record(event.waited)

    def _webhook_handled(self, event: events.WebhookHandled) -> None:
        attributes: Attributes = {
            "lemcal.outcome": event.outcome,
            "http.response.status_code": event.status_code,
        }
        self._deliveries.record(event.seconds, attributes)

    def _fleet_sampled(self, event: events.FleetSampled) -> None:
        for name, gauge in self._fleet.items():
            value = getattr(event.status, name)
            if value is not None:
                gauge.set(value)

    def _account_synced(self, event: events.AccountSynced) -> None:
        self._syncs.record(event.seconds, {"lemcal.failed": event.failed})
        for kind in _CHANGES:
            if count := getattr(event, kind):
                self._changes.add(count, {"lemcal.change": kind})


def _histogram(meter: metrics.Meter, name: str, description: str) -> metrics.Histogram:
    """Return a histogram in seconds, with buckets to match: the SDK's default buckets suit milliseconds."""
    return meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=_SECONDS)
