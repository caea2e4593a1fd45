"""Receive lemcal's webhooks. They are unsigned, so nothing in a delivery is trusted.

``WebhookReceiver`` treats a delivery as a hint: it fetches the meeting from the account, and only then calls
a handler. With ``wake=`` alone, it fetches nothing and wakes the synchronization, which finds what is new. It
is an ASGI app that needs no web framework.
"""

from lemcal_async.webhooks._dispatch import Claim, Dedup, InMemoryDedup
from lemcal_async.webhooks._http import MAX_BODY_BYTES, hook_url
from lemcal_async.webhooks._receiver import Wakes, WebhookReceiver
from lemcal_async.webhooks._tenants import Tenant

__all__ = [
    "MAX_BODY_BYTES",
    "Claim",
    "Dedup",
    "InMemoryDedup",
    "Tenant",
    "Wakes",
    "WebhookReceiver",
    "hook_url",
]
