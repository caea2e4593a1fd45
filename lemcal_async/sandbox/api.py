"""The routes of the API: a call of a known account in, an answer out. Pure but for the world's state.

Knows the documented routes, checks and error texts. Rate limit, credentials and faults come before it,
in app.py.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import httpx

from lemcal_async.sandbox.answers import Answer, json_data, json_text, text
from lemcal_async.sandbox.world import DuplicateHookError, UnknownMeetingTypeError, World


@attrs.frozen
class Call:
    """A request of ``account``; ``path`` is below the prefix."""

    account: int
    method: str
    path: str
    query: Mapping[str, str] = attrs.field(factory=dict[str, str])
    body: bytes = b""


def answer_call(world: World, call: Call) -> Answer:
    """Carry the call out."""
    account = call.account
    routes: dict[str, Callable[[], Answer]] = {}
    match call.path.split("/")[1:]:
        case ["me"]:
            routes["GET"] = lambda: json_data(200, world.user(account))
        case ["meetings"]:
            meeting_type_id = call.query.get("meetingTypeId")
            routes["GET"] = lambda: json_text(200, world.meetings(account, meeting_type_id))
        case ["meetingTypes"]:
            routes["GET"] = lambda: json_data(200, world.meeting_types(account))
        case ["meetingTypes", item] if item:
            routes["GET"] = lambda: _meeting_type(world, account, item)
        case ["hooks"]:
            routes["POST"] = lambda: _create_hook(world, account, _json_object(call.body))
        case ["hooks", item] if item:
            routes["DELETE"] = lambda: _delete_hook(world, account, item)
        case _:
            return text(404, "Not Found")
    if call.method not in routes:
        return text(405, "Method Not Allowed", {"Allow": ", ".join(routes)})
    return routes[call.method]()


def _meeting_type(world: World, account: int, meeting_type_id: str) -> Answer:
    for meeting_type in world.meeting_types(account):
        if meeting_type["_id"] == meeting_type_id:
            return json_data(200, meeting_type)
    return text(404, "meeting type not found")


def _create_hook(world: World, account: int, wanted: dict[str, Any]) -> Answer:
    target_url, meeting_type_id = wanted.get("targetUrl"), wanted.get("meetingTypeId")
    any_type = wanted.get("anyMeetingType") is True  # wins over an id (documented)
    if not target_url:
        return text(400, "You must provide a targetUrl")
    if not _is_web_url(target_url):
        return text(400, "Invalid targetUrl")
    if not any_type and not meeting_type_id:
        return text(400, "You must provide either a meetingTypeId or anyMeetingType")
    try:
        hook = world.add_hook(account, target_url, None if any_type else str(meeting_type_id))
    except UnknownMeetingTypeError:
        return text(404, "meeting type not found")
    except DuplicateHookError:
        return text(409, "Duplicate hook")
    return json_data(200, hook)


def _delete_hook(world: World, account: int, hook_id: str) -> Answer:
    return Answer(204) if world.delete_hook(account, hook_id) else text(404, "hook not found")


def _json_object(body: bytes) -> dict[str, Any]:
    """Return the body's object; what is none counts as empty, so that its first field is missed."""
    try:
        data: object = json.loads(body)
    except ValueError:
        return {}
    return dict[str, Any](data) if isinstance(data, dict) else {}  # pyright: ignore[reportUnknownArgumentType]  # a JSON object has str keys


def _is_web_url(target: object) -> bool:
    if not isinstance(target, str):
        return False
    try:
        url = httpx.URL(target)
    except (httpx.InvalidURL, ValueError):  # ValueError: half a surrogate pair
        return False
    return url.scheme in {"http", "https"} and bool(url.host)
