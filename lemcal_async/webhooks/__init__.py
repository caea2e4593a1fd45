"""Receiving the webhooks of lemcal, which carry no signature: nothing in a delivery is believed.

``WebhookReceiver`` is an ASGI app that takes a delivery as a hint, fetches the meeting back from the
account, and only then calls a handler or wakes the synchronisation. It needs no web framework.
"""

from lemcal_async.webhooks._dispatch import BoundedMemory, Claim, Memory
from lemcal_async.webhooks._http import MAX_BODY_BYTES
from lemcal_async.webhooks._receiver import Wakes, WebhookReceiver
from lemcal_async.webhooks._tenants import Tenant

__all__ = ["MAX_BODY_BYTES", "BoundedMemory", "Claim", "Memory", "Tenant", "Wakes", "WebhookReceiver"]
