"""The calls of the API, by resource: which route each one takes, and what its answer becomes."""

import logging
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar, overload

from lemcal_async.codec import decode_rows, from_wire
from lemcal_async.errors import (
    ConfigurationError,
    DuplicateHookError,
    MeetingNotFoundError,
    ResponseDecodeError,
)
from lemcal_async.exchange import Answer, Body, Exchange
from lemcal_async.models import Hook, Meeting, MeetingType, User
from lemcal_async.responses import object_of, read_json, rows_of
from lemcal_async.urls import check_target_url, quote_id, with_query

logger = logging.getLogger("lemcal_async")

T = TypeVar("T")
M = TypeVar("M", Hook, Meeting, MeetingType, User)


async def me(exchange: Exchange) -> User:
    """Fetch the account itself."""
    return read_model(await exchange.send("GET", "/me", "/me"), User)


class Meetings:
    """The booked meetings of an account."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def list(self, meeting_type_id: str | None = None) -> list[Meeting]:
        """Fetch all booked meetings, or those of one meeting type; there is no pagination (documented).

        Raises ResponseDecodeError when some rows cannot be read, with the others in its ``rows``.
        """
        return read_models(self._exchange, await self._fetch(meeting_type_id), "meetings", Meeting)

    async def get(self, meeting_id: str, meeting_type_id: str | None = None) -> Meeting:
        """Fetch one meeting. The service has no call for that: it is found in the list.

        ``meeting_type_id`` narrows the list. Raises MeetingNotFoundError if it is not there.
        """
        quote_id(meeting_id, "meeting_id")
        answer = await self._fetch(meeting_type_id)
        rows = _rows(answer, "meetings")
        for row in rows:
            if isinstance(row, dict) and row.get("_id") == meeting_id:  # pyright: ignore[reportUnknownMemberType]
                return decode(row, Meeting, answer)
        raise MeetingNotFoundError(
            f"{answer.call}: {meeting_id!r} is not among the {len(rows)} meetings in the list; check the id "
            "and the account, and that it was not removed; a new booking can take a moment to show",
            call=answer.call,
            status_code=404,
        )

    def _fetch(self, meeting_type_id: str | None) -> Coroutine[Any, Any, Answer]:
        if meeting_type_id is not None:
            quote_id(meeting_type_id, "meeting_type_id")
        target = with_query("/meetings", {"meetingTypeId": meeting_type_id})
        return self._exchange.send("GET", "/meetings", target)


class MeetingTypes:
    """The kinds of meeting that an account offers."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def list(self) -> list[MeetingType]:
        """Fetch all meeting types. Raises ResponseDecodeError as ``meetings.list`` does."""
        answer = await self._exchange.send("GET", "/meetingTypes", "/meetingTypes")
        return read_models(self._exchange, answer, "meetingTypes", MeetingType)

    async def get(self, meeting_type_id: str) -> MeetingType:
        """Fetch one meeting type. Raises MeetingTypeNotFoundError."""
        target = f"/meetingTypes/{quote_id(meeting_type_id, 'meeting_type_id')}"
        return read_model(await self._exchange.send("GET", "/meetingTypes/{id}", target), MeetingType)


class Hooks:
    """The webhooks of an account: URLs that lemcal posts new bookings to."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    @overload
    async def create(
        self,
        target_url: str,
        *,
        meeting_type_id: str | None = None,
        any_meeting_type: bool = False,
        exist_ok: Literal[False] = False,
    ) -> Hook: ...
    @overload
    async def create(
        self,
        target_url: str,
        *,
        meeting_type_id: str | None = None,
        any_meeting_type: bool = False,
        exist_ok: bool,
    ) -> Hook | None: ...
    async def create(
        self,
        target_url: str,
        *,
        meeting_type_id: str | None = None,
        any_meeting_type: bool = False,
        exist_ok: bool = False,
    ) -> Hook | None:
        """Have new bookings of one meeting type, or of any, posted to ``target_url``.

        Keep the id: the service lists no hooks (documented by absence), so a lost one cannot be
        deleted. Raises DuplicateHookError if the target has one already; with ``exist_ok`` it
        returns None then. A POST is never repeated after it may have been processed: then
        APIConnectionError says so, and calling again with ``exist_ok=True`` is safe.
        """
        selector = {"anyMeetingType": True} if meeting_type_id is None else {"meetingTypeId": meeting_type_id}
        body = Body({"targetUrl": target_url, **selector})
        del target_url  # it often carries a token, and a traceback may show local variables
        check_target_url(body.data["targetUrl"])
        if (meeting_type_id is None) == (not any_meeting_type):
            raise ConfigurationError("hooks.create() takes either meeting_type_id= or any_meeting_type=True")
        if meeting_type_id is not None:
            quote_id(meeting_type_id, "meeting_type_id")
        try:
            answer = await self._exchange.send("POST", "/hooks", "/hooks", body)
        except DuplicateHookError:
            if exist_ok:
                return None
            raise
        return read_model(answer, Hook)

    async def delete(self, hook_id: str) -> None:
        """Delete a hook. Raises HookNotFoundError, but not when a repeated attempt finds it gone."""
        answer = await self._exchange.send("DELETE", "/hooks/{id}", f"/hooks/{quote_id(hook_id, 'hook_id')}")
        if answer.body.strip():  # documented as 204 and empty; a page would be another server's answer
            json_of(answer)


def json_of(answer: Answer) -> Any:
    """Return the JSON of an answer, None for a 204."""
    return read_json(answer.status_code, answer.body, answer.call)


def data_of(answer: Answer, into: type[Any] | None) -> Any:
    """Return the JSON of an answer, or the model or models that were asked for."""
    return json_of(answer) if into is None else decode(json_of(answer), into, answer)


def read_model(answer: Answer, into: type[M]) -> M:
    """Make a model of an answer that is one object."""
    return decode(object_of(json_of(answer), answer.call, status=answer.status_code), into, answer)


def read_models(exchange: Exchange, answer: Answer, name: str, into: type[M]) -> list[M]:
    """Make models of an answer that is a list; unreadable rows are reported, not lost."""
    rows = _rows(answer, name)
    models, bad_rows = decode_rows(rows, into)
    if not bad_rows:
        return models
    first = bad_rows[0]
    message = (
        f"{answer.call}: {len(bad_rows)} of {len(rows)} rows cannot be read "
        f"(the first is row {first.index}: {first.reason})"
    )
    if exchange.options.skip_bad_rows:
        logger.warning("%s; they are left out", message)
        return models
    raise ResponseDecodeError(
        f"{message}; the others are in .rows, on_bad_row='skip' goes on without these",
        call=answer.call,
        status_code=answer.status_code,
        rows=models,
        bad_rows=bad_rows,
    )


def _rows(answer: Answer, name: str) -> list[Any]:
    return rows_of(json_of(answer), (name, "data"), answer.call, status=answer.status_code)


def decode(data: Any, into: type[T], answer: Answer) -> T:
    """Make a model of an answer's data; the error says which call it came from."""
    try:
        return from_wire(data, into)
    except ResponseDecodeError as error:
        problem, rows, bad_rows = str(error), error.rows, error.bad_rows
    del data  # that of a hook holds its token, and a traceback may show local variables
    raise ResponseDecodeError(
        f"{answer.call}: {problem}",
        call=answer.call,
        status_code=answer.status_code,
        rows=rows,
        bad_rows=bad_rows,
    )
