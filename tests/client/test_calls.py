"""Every call of the client: what it sends, and how it decodes the responses."""

import json
import logging
from typing import Any

import httpx
import pytest

from lemcal_async import AsyncLemcal, Hook, Meeting, MeetingType, User, __version__, from_wire, to_wire
from lemcal_async.errors import (
    BadRequestError,
    ConfigurationError,
    DuplicateHookError,
    HookNotFoundError,
    MeetingNotFoundError,
    MeetingTypeNotFoundError,
    MethodNotAllowedError,
    NotFoundError,
    ResponseDecodeError,
)
from lemcal_async.sandbox import Sandbox, faults
from lemcal_async.sandbox.faults import Fault

from .conftest import AT_ONCE, TARGET, Wire, responding

pytestmark = pytest.mark.anyio


def routes(sandbox: Sandbox) -> list[tuple[str, str, str]]:
    """Return the requests in order of arrival."""
    return [(seen.method, seen.path, seen.query) for seen in sandbox.requests]


# --------------------------------------------------------------------------- the calls


async def test_me(lemcal_sandbox: Sandbox) -> None:
    """``me`` returns the account."""
    async with lemcal_sandbox.client() as lemcal:
        user = await lemcal.me()
    account = lemcal_sandbox.accounts[0]
    assert isinstance(user, User)
    assert (account.user_id, account.email, account.public_identifier) == (
        user.id,
        user.email,
        user.public_identifier,
    )
    assert [("GET", "/me", "")] == routes(lemcal_sandbox)


async def test_meetings_list(lemcal_sandbox: Sandbox) -> None:
    """``meetings.list`` returns all meetings, in the server's order."""
    async with lemcal_sandbox.client() as lemcal:
        meetings = await lemcal.meetings.list()
    assert from_wire(lemcal_sandbox.meetings(), list[Meeting]) == meetings
    assert 12 == len(meetings)
    assert [("GET", "/meetings", "")] == routes(lemcal_sandbox)


async def test_meetings_list_of_one_type(lemcal_sandbox: Sandbox) -> None:
    """With a meeting type, the server filters the list."""
    type_id = lemcal_sandbox.meeting_types()[1]["_id"]
    async with lemcal_sandbox.client() as lemcal:
        meetings = await lemcal.meetings.list(type_id)
        assert meetings == await lemcal.meetings.list(meeting_type_id=type_id)
    assert {type_id} == {meeting.meeting_type_id for meeting in meetings}
    assert [("GET", "/meetings", f"meetingTypeId={type_id}")] * 2 == routes(lemcal_sandbox)


async def test_meetings_get(lemcal_sandbox: Sandbox) -> None:
    """``meetings.get`` finds the meeting in the list, optionally of one meeting type."""
    wanted = lemcal_sandbox.meetings()[3]
    async with lemcal_sandbox.client() as lemcal:
        meeting = await lemcal.meetings.get(wanted["_id"])
        assert meeting == await lemcal.meetings.get(wanted["_id"], meeting_type_id=wanted["meetingTypeId"])
    assert wanted == to_wire(meeting)
    assert [("GET", "/meetings", ""), ("GET", "/meetings", f"meetingTypeId={wanted['meetingTypeId']}")] == (
        routes(lemcal_sandbox)
    )


async def test_meetings_get_of_an_unknown_id(lemcal_sandbox: Sandbox) -> None:
    """An id that is not in the list, or not in the given meeting type's list, raises MeetingNotFoundError."""
    wanted = lemcal_sandbox.meetings()[0]
    other_type = lemcal_sandbox.meeting_types()[1]["_id"]
    async with lemcal_sandbox.client() as lemcal:
        with pytest.raises(
            MeetingNotFoundError, match="'mee_unknown' is not among the 12 meetings"
        ) as caught:
            await lemcal.meetings.get("mee_unknown")
        with pytest.raises(MeetingNotFoundError):
            await lemcal.meetings.get(wanted["_id"], other_type)
    assert ("GET", "/meetings", 404, 1) == (
        caught.value.method,
        caught.value.route,
        caught.value.status_code,
        caught.value.attempts,
    )


async def test_meeting_types_list(lemcal_sandbox: Sandbox) -> None:
    """``meeting_types.list`` returns all meeting types, including disabled ones."""
    async with lemcal_sandbox.client() as lemcal:
        types = await lemcal.meeting_types.list()
    assert from_wire(lemcal_sandbox.meeting_types(), list[MeetingType]) == types
    assert {"enabled", "disabled"} == {type_.status for type_ in types}
    assert [("GET", "/meetingTypes", "")] == routes(lemcal_sandbox)


async def test_meeting_types_get(lemcal_sandbox: Sandbox) -> None:
    """``meeting_types.get`` returns one meeting type, or raises MeetingTypeNotFoundError."""
    wanted = lemcal_sandbox.meeting_types()[2]
    async with lemcal_sandbox.client() as lemcal:
        assert wanted == to_wire(await lemcal.meeting_types.get(wanted["_id"]))
        with pytest.raises(MeetingTypeNotFoundError, match="meeting type not found") as caught:
            await lemcal.meeting_types.get("met_unknown")
    assert "/meetingTypes/{id}" == caught.value.route
    assert ("GET", f"/meetingTypes/{wanted['_id']}", "") == routes(lemcal_sandbox)[0]


async def test_hook_for_any_meeting_type(lemcal_sandbox: Sandbox) -> None:
    """A hook is created, and deleted by its id."""
    async with lemcal_sandbox.client() as lemcal:
        hook = await lemcal.hooks.create(TARGET, any_meeting_type=True)
        assert [to_wire(hook)] == lemcal_sandbox.hooks()
        assert isinstance(hook, Hook)
        assert (TARGET, True, None) == (hook.target_url, hook.any_meeting_type, hook.meeting_type_id)
        await lemcal.hooks.delete(hook.id)
        assert [] == lemcal_sandbox.hooks()
        with pytest.raises(HookNotFoundError, match="hook not found") as caught:
            await lemcal.hooks.delete(hook.id)
    assert "/hooks/{id}" == caught.value.route


async def test_hook_for_one_meeting_type(lemcal_sandbox: Sandbox) -> None:
    """The request contains either the meeting type or anyMeetingType, never both."""
    type_id = lemcal_sandbox.meeting_types()[0]["_id"]
    async with lemcal_sandbox.client() as lemcal:
        hook = await lemcal.hooks.create(TARGET, meeting_type_id=type_id)
        with pytest.raises(MeetingTypeNotFoundError):
            await lemcal.hooks.create(TARGET, meeting_type_id="met_unknown")
    assert (type_id, None) == (hook.meeting_type_id, hook.any_meeting_type)
    wire = responding(json={"_id": "hoo_1"})
    await wire.client().hooks.create(TARGET, meeting_type_id="met_1")
    await wire.client().hooks.create(TARGET, any_meeting_type=True)
    assert [
        {"targetUrl": TARGET, "meetingTypeId": "met_1"},
        {"targetUrl": TARGET, "anyMeetingType": True},
    ] == [json.loads(request.content) for request in wire.requests]


async def test_existing_hook(lemcal_sandbox: Sandbox) -> None:
    """A 409 raises DuplicateHookError, or returns None with ``exist_ok=True``."""
    async with lemcal_sandbox.client() as lemcal:
        first = await lemcal.hooks.create(TARGET, any_meeting_type=True, exist_ok=True)
        assert isinstance(first, Hook)
        with pytest.raises(DuplicateHookError, match="Duplicate hook"):
            await lemcal.hooks.create(TARGET, any_meeting_type=True)
        assert None is await lemcal.hooks.create(TARGET, any_meeting_type=True, exist_ok=True)
    assert 1 == len(lemcal_sandbox.hooks())


async def test_exist_ok_does_not_hide_other_errors(lemcal_sandbox: Sandbox) -> None:
    """``exist_ok=True`` affects only a 409."""
    lemcal_sandbox.inject(faults.status(400, "Invalid targetUrl"))
    async with lemcal_sandbox.client() as lemcal:
        with pytest.raises(BadRequestError, match="Invalid targetUrl"):
            await lemcal.hooks.create(TARGET, any_meeting_type=True, exist_ok=True)


async def test_delete_succeeds_if_a_retry_gets_404(lemcal_sandbox: Sandbox) -> None:
    """The first attempt deleted the hook, but its response was lost."""
    async with lemcal_sandbox.client(retry=AT_ONCE) as lemcal:
        hook = await lemcal.hooks.create(TARGET, any_meeting_type=True)
        lemcal_sandbox.inject(faults.reset_after_processing())
        await lemcal.hooks.delete(hook.id)
    assert [] == lemcal_sandbox.hooks()
    assert [None, 404] == [seen.status_code for seen in lemcal_sandbox.requests[1:]]


@pytest.mark.parametrize("fault", [faults.html_200(), faults.empty_string_200(), faults.status(200, "OK")])
async def test_delete_with_an_unexpected_response(lemcal_sandbox: Sandbox, fault: Fault) -> None:
    """An HTML page or text comes from another server, so nothing was deleted."""
    async with lemcal_sandbox.client() as lemcal:
        hook = await lemcal.hooks.create(TARGET, any_meeting_type=True)
        lemcal_sandbox.inject(fault)
        with pytest.raises(ResponseDecodeError, match=r"^DELETE /hooks/\{id\}: 200 OK, but the body is "):
            await lemcal.hooks.delete(hook.id)
    assert 1 == len(lemcal_sandbox.hooks())


@pytest.mark.parametrize("body", [b"", b"\r\n", b'{"deleted": true}'])
async def test_delete_with_status_200(body: bytes) -> None:
    """A 200 with an empty or JSON body is a success, like the documented 204."""
    wire = responding(content=body)
    await wire.client().hooks.delete("hoo_1")
    assert ["/api/lemcal/hooks/hoo_1"] == [request.url.path for request in wire.requests]


# --------------------------------------------------------------------------- request


async def test_request(lemcal_sandbox: Sandbox) -> None:
    """``request`` calls any path, through the same layers, and returns plain JSON."""
    async with lemcal_sandbox.client() as lemcal:
        response = await lemcal.request("GET", "/me")
    assert (200, lemcal_sandbox.user_id) == (response.status_code, response.data["_id"])
    assert "19" == response.headers["x-ratelimit-remaining"]
    assert all(name == name.lower() for name in response.headers)
    assert lemcal_sandbox.requests[0].user_id == lemcal_sandbox.user_id


async def test_request_into_a_model(lemcal_sandbox: Sandbox) -> None:
    """``into`` takes a model or a list of a model."""
    async with lemcal_sandbox.client() as lemcal:
        user = (await lemcal.request("GET", "/me", into=User)).data
        meetings = (await lemcal.request("GET", "/meetings", into=list[Meeting])).data
        assert await lemcal.me() == user
        assert await lemcal.meetings.list() == meetings


async def test_request_into_the_wrong_model(lemcal_sandbox: Sandbox) -> None:
    """The error names the call; for a list, it holds the good rows."""
    async with lemcal_sandbox.client() as lemcal:
        with pytest.raises(
            ResponseDecodeError, match=r"^GET /meetings: expected an object, got list$"
        ) as caught:
            await lemcal.request("GET", "/meetings", into=Meeting)
        assert ("/meetings", 200, []) == (caught.value.route, caught.value.status_code, caught.value.rows)
        lemcal_sandbox.inject(faults.json([{"_id": "mee_1"}, {}]))
        with pytest.raises(ResponseDecodeError, match=r"^GET /meetings: 1 of 2 rows") as caught:
            await lemcal.request("GET", "/meetings", into=list[Meeting])
    assert ([Meeting("mee_1")], [1]) == (caught.value.rows, [bad.index for bad in caught.value.bad_rows])


@pytest.mark.parametrize(
    ("into", "path", "other"),
    [
        (dict, "/me", "/meetings"),
        (dict[str, Any], "/me", "/meetings"),
        (list, "/meetings", "/me"),
        (list[Any], "/meetings", "/me"),
    ],
)
async def test_request_into_plain_json(lemcal_sandbox: Sandbox, into: Any, path: str, other: str) -> None:
    """Only the kind of JSON is checked: object or list."""
    async with lemcal_sandbox.client() as lemcal:
        response = await lemcal.request("GET", path, into=into)
        assert (await lemcal.request("GET", path)).data == response.data
        with pytest.raises(ResponseDecodeError, match=f"^GET {other}: 200 OK, but the body is an"):
            await lemcal.request("GET", other, into=into)


@pytest.mark.parametrize("into", [list[int], list[dict[str, Any]], tuple, str, Meeting("mee_1")])
async def test_request_into_an_unsupported_type(into: Any) -> None:
    """An unsupported ``into`` raises TypeError before anything is sent."""
    wire = Wire()
    with pytest.raises(TypeError, match=r"pass a model such as Meeting, or list\[Meeting\]"):
        await wire.client().request("GET", "/me", into=into)
    assert [] == wire.requests


async def test_request_params(lemcal_sandbox: Sandbox) -> None:
    """None is omitted, booleans are as in JSON, a list repeats the name, other values are quoted."""
    params = {"a": None, "b": True, "c": [1, "2"], "d": "x&y é", "e": ""}
    async with lemcal_sandbox.client() as lemcal:
        await lemcal.request("GET", "/me", params=params)
        await lemcal.request("GET", "/me", params={"a": None})
        await lemcal.request("GET", "/me", params={})
    assert ["b=true&c=1&c=2&d=x%26y+%C3%A9&e=", "", ""] == [seen.query for seen in lemcal_sandbox.requests]


async def test_request_with_json(lemcal_sandbox: Sandbox) -> None:
    """The method may be lowercase; a 204 has None as data."""
    async with lemcal_sandbox.client() as lemcal:
        body = {"targetUrl": TARGET, "anyMeetingType": True}
        hook = (await lemcal.request("post", "/hooks", json=body, into=Hook)).data
        deleted = await lemcal.request("Delete", f"/hooks/{hook.id}")
    assert (204, None) == (deleted.status_code, deleted.data)
    assert ["POST", "DELETE"] == [seen.method for seen in lemcal_sandbox.requests]


@pytest.mark.parametrize("falsy", [[], {}, 0, False, ""])
async def test_request_with_falsy_json(falsy: Any) -> None:
    """A falsy body is sent like any other."""
    wire = Wire()
    await wire.client().request("PUT", "/me", json=falsy)
    assert [falsy] == [json.loads(request.content) for request in wire.requests]


async def test_request_raises_the_same_errors(lemcal_sandbox: Sandbox) -> None:
    """A 404 and a 405 raise the usual errors; the route is the path as given."""
    async with lemcal_sandbox.client() as lemcal:
        with pytest.raises(NotFoundError) as caught:
            await lemcal.request("GET", "/nothing/here")
        with pytest.raises(MethodNotAllowedError):
            await lemcal.request("PATCH", "/me")
    assert "/nothing/here" == caught.value.route


async def test_request_quotes_its_path() -> None:
    """Characters that are already quoted are not quoted again."""
    wire = Wire()
    await wire.client().request("GET", "/a%20b/é")
    assert ["/api/lemcal/a%20b/%C3%A9"] == [request.url.raw_path.decode() for request in wire.requests]


# --------------------------------------------------------------------------- responses


@pytest.mark.parametrize("name", ["meetings", "data"])
async def test_lists_in_an_envelope(lemcal_sandbox: Sandbox, name: str) -> None:
    """A list inside either observed envelope is read."""
    async with lemcal_sandbox.client() as lemcal:
        lemcal_sandbox.inject(faults.json({name: [{"_id": "mee_1"}]}), times=2)
        assert [Meeting("mee_1")] == await lemcal.meetings.list()
        assert Meeting("mee_1") == await lemcal.meetings.get("mee_1")
        lemcal_sandbox.inject(faults.json({name: []}))
        assert [] == await lemcal.meetings.list()


@pytest.mark.parametrize("name", ["meetingTypes", "data"])
async def test_lists_of_types_in_an_envelope(lemcal_sandbox: Sandbox, name: str) -> None:
    """Meeting types are read from an envelope, too."""
    lemcal_sandbox.inject(faults.json({name: [{"_id": "met_1"}]}))
    async with lemcal_sandbox.client() as lemcal:
        assert [MeetingType("met_1")] == await lemcal.meeting_types.list()


WRONG: dict[str, tuple[Fault, str]] = {
    "page": (faults.html_200(), "the body is an HTML page, not JSON. Check the base URL and the path."),
    "nothing": (faults.empty_200(), "the body is empty."),
    "empty string": (faults.empty_string_200(), "the body is an empty string."),
    "string": (faults.json("Unauthorized"), "the body is a string, where "),
    "number": (faults.json(7), "the body is a number, where "),
    "null": (faults.json(None), "the body is null, where "),
    "half": (faults.status(200, '[{"_id": "mee_'), "the body is JSON that is cut off after 14 bytes."),
    "no content": (faults.status(204), "the body is null, where "),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("call", ["me", "list", "get", "types", "type", "hook"])
async def test_undecodable_2xx_response(lemcal_sandbox: Sandbox, wrong: str, call: str) -> None:
    """A 2xx without the expected JSON raises an error that describes the body."""
    fault, words = WRONG[wrong]
    lemcal_sandbox.inject(fault)
    async with lemcal_sandbox.client() as lemcal:
        calls: dict[str, Any] = {
            "me": lemcal.me,
            "list": lemcal.meetings.list,
            "get": lambda: lemcal.meetings.get("mee_1"),
            "types": lemcal.meeting_types.list,
            "type": lambda: lemcal.meeting_types.get("met_1"),
            "hook": lambda: lemcal.hooks.create(TARGET, any_meeting_type=True),
        }
        with pytest.raises(ResponseDecodeError) as caught:
            await calls[call]()
    assert words in str(caught.value)
    assert 1 == len(lemcal_sandbox.requests)


async def test_an_object_in_place_of_a_list_and_the_reverse(lemcal_sandbox: Sandbox) -> None:
    """Neither is converted to the other; both raise an error."""
    async with lemcal_sandbox.client() as lemcal:
        lemcal_sandbox.inject(faults.json({"_id": "mee_1"}))
        with pytest.raises(ResponseDecodeError, match="an object, where a list was expected"):
            await lemcal.meetings.list()
        lemcal_sandbox.inject(faults.json([{"_id": "usr_1"}]))
        with pytest.raises(ResponseDecodeError, match="an array, where an object was expected"):
            await lemcal.me()


async def test_model_without_an_id(lemcal_sandbox: Sandbox) -> None:
    """A missing id raises an error."""
    lemcal_sandbox.inject(faults.json({"email": "host@example.com"}))
    async with lemcal_sandbox.client() as lemcal:
        with pytest.raises(
            ResponseDecodeError, match=r"^GET /me: _id: expected a non-empty string, got null"
        ):
            await lemcal.me()


async def test_get_with_a_truncated_response_is_retried(lemcal_sandbox: Sandbox) -> None:
    """A body that breaks off in transit is a connection error, not a JSON error."""
    lemcal_sandbox.inject(faults.truncated())
    async with lemcal_sandbox.client(retry=AT_ONCE) as lemcal:
        assert 12 == len(await lemcal.meetings.list())


# --------------------------------------------------------------------------- bad rows

ROWS = [{"_id": "mee_1"}, {"_id": ""}, {"_id": 2, "start": "tomorrow"}, {"_id": "mee_3"}, None]
GOOD = [Meeting("mee_1"), Meeting("mee_3")]


async def test_bad_rows_raise(lemcal_sandbox: Sandbox) -> None:
    """The error holds the good models and the bad rows."""
    lemcal_sandbox.inject(faults.json(ROWS))
    async with lemcal_sandbox.client() as lemcal:
        with pytest.raises(
            ResponseDecodeError, match=r"^GET /meetings: 3 of 5 rows cannot be read"
        ) as caught:
            await lemcal.meetings.list()
    error = caught.value
    assert GOOD == error.rows
    assert [(1, ROWS[1]), (2, ROWS[2]), (4, None)] == [(bad.index, bad.row) for bad in error.bad_rows]
    assert ("_id: expected a string, got int", 3) == (error.bad_rows[1].reason, error.bad_row_count)
    assert 200 == error.status_code
    assert 'AsyncLemcal(on_bad_row="skip") skips bad rows' in str(error)


async def test_bad_rows_are_skipped(lemcal_sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """With ``on_bad_row="skip"``, bad rows are skipped, with a warning that shows no values."""
    lemcal_sandbox.inject(faults.json(ROWS))
    async with lemcal_sandbox.client(on_bad_row="skip") as lemcal:
        assert GOOD == await lemcal.meetings.list()
        lemcal_sandbox.inject(faults.json([{"_id": 5}, {"_id": "met_1"}]))
        assert [MeetingType("met_1")] == await lemcal.meeting_types.list()
    first, second = [record for record in caplog.records if record.name == "lemcal_async"]
    assert (logging.WARNING, logging.WARNING) == (first.levelno, second.levelno)
    assert first.getMessage().startswith(
        "GET /meetings: 3 of 5 rows cannot be read (the first is row 1: _id: "
    )
    assert "tomorrow" not in caplog.text


async def test_get_reads_only_one_row(lemcal_sandbox: Sandbox) -> None:
    """Other bad rows do not matter, and an unreadable value affects only its field."""
    async with lemcal_sandbox.client(on_bad_row="skip") as lemcal:
        lemcal_sandbox.inject(faults.json([*ROWS, {"_id": "mee_2", "start": "tomorrow"}]), times=3)
        assert GOOD[1] == await lemcal.meetings.get("mee_3")
        odd = await lemcal.meetings.get("mee_2")
        assert (None, {"start": "tomorrow"}) == (odd.start, odd.extra)
        with pytest.raises(MeetingNotFoundError, match="among the 6 meetings"):
            await lemcal.meetings.get("mee_4")


# --------------------------------------------------------------------------- what is sent


async def test_headers(lemcal_sandbox: Sandbox) -> None:
    """The User-Agent is the SDK's, JSON is accepted, and Content-Type is sent only with a body."""
    async with lemcal_sandbox.client() as lemcal:
        await lemcal.me()
        hook = await lemcal.hooks.create(TARGET, any_meeting_type=True)
        await lemcal.hooks.delete(hook.id)
    headers = [seen.headers for seen in lemcal_sandbox.requests]
    assert {f"lemcal-async/{__version__}"} == {each["user-agent"] for each in headers}
    assert {"application/json"} == {each["accept"] for each in headers}
    assert [None, "application/json", None] == [each.get("content-type") for each in headers]
    assert [None, None] == [each.get("content-length") for each in (headers[0], headers[2])]


async def test_cookies_are_not_stored(lemcal_sandbox: Sandbox) -> None:
    """A cookie from one response is not sent with later requests."""
    lemcal_sandbox.inject(faults.status(200, "[]", headers={"Set-Cookie": "session=1; Path=/"}))
    async with lemcal_sandbox.client() as lemcal:
        await lemcal.meetings.list()
        await lemcal.meetings.list()
    assert 2 == len(lemcal_sandbox.requests)
    assert all("cookie" not in seen.headers for seen in lemcal_sandbox.requests)


async def test_no_extra_requests(lemcal_sandbox: Sandbox) -> None:
    """Each call sends exactly one request."""
    async with lemcal_sandbox.client() as lemcal:
        for _ in range(3):
            await lemcal.me()
    assert ["/me"] * 3 == [seen.path for seen in lemcal_sandbox.requests]


async def test_the_default_base_url() -> None:
    """It uses https, unlike the vendor's own examples."""
    wire = Wire()
    await AsyncLemcal("usr_x", "key", transport=wire).me()
    assert ["https://api.lemcal.com/api/lemcal/me"] == [str(request.url) for request in wire.requests]
    assert [httpx.BasicAuth("usr_x", "key")._auth_header] == [
        request.headers["authorization"] for request in wire.requests
    ]


async def test_base_url_with_a_trailing_slash(lemcal_sandbox: Sandbox) -> None:
    """A trailing slash does not cause a double slash."""
    async with lemcal_sandbox.client(base_url=lemcal_sandbox.base_url + "/") as lemcal:
        await lemcal.me()
    assert ["/me"] == [seen.path for seen in lemcal_sandbox.requests]


async def test_filters_use_a_single_request(lemcal_sandbox: Sandbox) -> None:
    """Filtering needs one request; invalid filters send none."""
    async with lemcal_sandbox.client() as lemcal:
        everything = await lemcal.meetings.list()
        middle = sorted(meeting.start for meeting in everything if meeting.start)[len(everything) // 2]
        before = len(lemcal_sandbox.requests)
        upcoming = await lemcal.meetings.list(starts_after=middle, canceled=False)
        assert 1 == len(lemcal_sandbox.requests) - before
        expected = [
            each for each in everything if each.start and each.start >= middle and not each.is_canceled
        ]
        assert sorted(expected, key=lambda each: str(each.start)) == upcoming
        with pytest.raises(ConfigurationError, match="guest_email="):
            await lemcal.meetings.list(guest_email=5)  # type: ignore[arg-type]
        assert 1 == len(lemcal_sandbox.requests) - before


async def test_account_email_distinguishes_host_from_guest(lemcal_sandbox: Sandbox) -> None:
    """For unmarked attendees, it is used after ``me()``, by all views of the account and no other client."""
    async with lemcal_sandbox.client() as lemcal:
        own = (await lemcal.for_account(lemcal_sandbox.user_id, lemcal_sandbox.api_key).me()).email
        attendees = [{"email": own}, {"email": "guest@example.com"}]
        row = {"_id": "mee_1", "attendees": attendees}
        lemcal_sandbox.inject(faults.json([row]), path="/meetings", times=3)
        assert [own] == [meeting.guest and meeting.guest.email for meeting in await lemcal.meetings.list()]
        await lemcal.with_options(deadline=5).me()
        (meeting,) = await lemcal.meetings.list()
        assert "guest@example.com" == (meeting.guest and meeting.guest.email)
        assert meeting == await lemcal.meetings.get("mee_1")
        assert own == (meeting.host and meeting.host.email)
