"""Receiving the webhooks of lemcal, which carry no signature: nothing in a delivery is believed.

``WebhookReceiver`` is an ASGI app that takes a delivery as a hint, fetches the meeting back from the
account, and only then calls a handler or wakes the synchronisation. It needs no web framework.
"""

from lemcal_async.webhooks.checks import Wakes
from lemcal_async.webhooks.decision import MAX_BODY_BYTES
from lemcal_async.webhooks.memory import BoundedMemory, Claim, Memory
from lemcal_async.webhooks.receiver import WebhookReceiver
from lemcal_async.webhooks.tenants import Tenant

__all__ = ["MAX_BODY_BYTES", "BoundedMemory", "Claim", "Memory", "Tenant", "Wakes", "WebhookReceiver"]
