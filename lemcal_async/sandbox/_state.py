"""The sandbox's state: accounts, meetings, meeting types, hooks. Thread-safe, without I/O.

A meeting is stored as the JSON text to send, so that callers always get copies and a list of 20,000 meetings
is a single join.
"""

import base64
import json
import random
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs

from lemcal_async.sandbox._demo import (
    DemoAccount,
    Guest,
    SandboxAccount,
    make_account,
    make_meeting,
    new_id,
    wire_time,
)
from lemcal_async.sandbox._responses import dumps


class UnknownMeetingTypeError(LookupError):
    """The account has no such meeting type."""


class DuplicateHookError(ValueError):
    """The account already has this hook."""


@attrs.frozen
class _Meeting:
    meeting_type_id: object
    text: bytes


class _AccountState:
    def __init__(self, demo: DemoAccount) -> None:
        self.account = demo.account
        self.user = demo.user
        self.meeting_types = {entry["_id"]: entry for entry in demo.meeting_types}
        self.meetings = {entry["_id"]: _stored(entry) for entry in demo.meetings}
        self.hooks: dict[str, dict[str, Any]] = {}


class SandboxState:
    """The data of all accounts. Accounts are identified by their index."""

    def __init__(self, *, accounts: int, meetings: int, seed: int) -> None:
        self._lock = threading.Lock()
        self.revision = 0  # incremented with every change
        self._rng = random.Random(f"lemcal sandbox {seed}")  # noqa: S311  # made-up data, not a secret
        self._states = [_AccountState(make_account(seed, index, meetings)) for index in range(accounts)]
        self._by_user = {state.account.user_id: index for index, state in enumerate(self._states)}
        self.accounts: tuple[SandboxAccount, ...] = tuple(state.account for state in self._states)

    def identify(self, authorization: str) -> tuple[str | None, int | None]:
        """Return a Basic header's user id if it is known, and the account if the API key is correct."""
        scheme, _, encoded = authorization.partition(" ")
        try:
            user_id, _, api_key = base64.b64decode(encoded, validate=True).decode().partition(":")
        except ValueError:  # not base64, UTF-8 or ASCII
            return None, None
        index = self._by_user.get(user_id)
        if index is None or scheme.lower() != "basic":
            return None, None
        return user_id, index if api_key == self.accounts[index].api_key else None

    def user(self, account: int) -> dict[str, Any]:
        """Return the account's user."""
        return dict(self._states[account].user)

    def meeting_types(self, account: int) -> list[dict[str, Any]]:
        """Return copies of the account's meeting types."""
        copies: list[dict[str, Any]] = json.loads(dumps(list(self._states[account].meeting_types.values())))
        return copies

    def meetings(self, account: int, meeting_type_id: str | None = None) -> bytes:
        """Return the JSON list of the account's meetings, optionally of one type."""
        with self._lock:
            meetings = list(self._states[account].meetings.values())
        if meeting_type_id is not None:
            meetings = [meeting for meeting in meetings if meeting.meeting_type_id == meeting_type_id]
        return b"[%b]" % b",".join([meeting.text for meeting in meetings])

    def book(
        self,
        account: int,
        *,
        meeting_type_id: str | None,
        public: bool,
        guest: Guest | None,
        start: datetime | None,
        changes: dict[str, Any],
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Add a meeting, and return it with the hooks that it fires.

        The meeting type defaults to the account's first. ``changes`` are wire fields that override the rest.
        """
        now = datetime.now(UTC)
        with self._lock:
            state = self._states[account]
            meeting_type = state.meeting_types.get(meeting_type_id or next(iter(state.meeting_types)))
            if meeting_type is None:
                raise UnknownMeetingTypeError(f"no meeting type {meeting_type_id} in account {account}")
            morning = now.replace(hour=9, minute=0, second=0, microsecond=0)
            soon = morning + timedelta(days=self._rng.randrange(1, 15), hours=self._rng.randrange(8))
            meeting = make_meeting(
                self._rng,
                state.account,
                meeting_type,
                start=start or soon,
                created=now,
                public=public,
                guest=guest,
            )
            meeting |= changes
            if meeting["_id"] in state.meetings:
                raise ValueError(f"there is already a meeting {meeting['_id']}")
            state.meetings[meeting["_id"]] = stored = _stored(meeting)
            self.revision += 1
            fired = [dict(hook) for hook in state.hooks.values() if _matches(hook, stored.meeting_type_id)]
        return json.loads(stored.text), fired

    def edit(self, meeting_id: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Replace wire fields of a meeting and return it. Raises LookupError if it does not exist."""
        if "_id" in changes:
            raise ValueError("a meeting's id cannot be changed")
        with self._lock:
            state = self._owner(meeting_id)
            meeting: dict[str, Any] = json.loads(state.meetings[meeting_id].text) | changes
            state.meetings[meeting_id] = _stored(meeting)
            self.revision += 1
        return meeting

    def cancel(self, meeting_id: str) -> dict[str, Any]:
        """Cancel a meeting now and return it. Raises LookupError if it does not exist."""
        return self.edit(meeting_id, {"canceledAt": wire_time(datetime.now(UTC))})

    def remove(self, meeting_id: str) -> None:
        """Remove a meeting. Raises LookupError if it does not exist."""
        with self._lock:
            del self._owner(meeting_id).meetings[meeting_id]
            self.revision += 1

    def hooks(self, account: int) -> list[dict[str, Any]]:
        """Return copies of the account's hooks."""
        with self._lock:
            return [dict(hook) for hook in self._states[account].hooks.values()]

    def add_hook(self, account: int, target_url: str, meeting_type_id: str | None) -> dict[str, Any]:
        """Add a hook for one meeting type, or for any (None), and return it.

        Raises UnknownMeetingTypeError, or DuplicateHookError if a hook has the same target and meeting type.
        """
        scope = {"anyMeetingType": True} if meeting_type_id is None else {"meetingTypeId": meeting_type_id}
        wanted = {"targetUrl": target_url, **scope}
        with self._lock:
            state = self._states[account]
            if meeting_type_id is not None and meeting_type_id not in state.meeting_types:
                raise UnknownMeetingTypeError(meeting_type_id)
            if any(wanted.items() <= hook.items() for hook in state.hooks.values()):
                raise DuplicateHookError
            hook_id = new_id(self._rng, "hoo")
            hook = {"_id": hook_id, **wanted, "createdAt": wire_time(datetime.now(UTC))}
            state.hooks[hook_id] = hook
            self.revision += 1
        return dict(hook)

    def delete_hook(self, account: int, hook_id: str) -> bool:
        """Delete a hook. Return False if the account has no such hook."""
        with self._lock:
            deleted = self._states[account].hooks.pop(hook_id, None) is not None
            self.revision += deleted
        return deleted

    def _owner(self, meeting_id: str) -> _AccountState:
        for state in self._states:
            if meeting_id in state.meetings:
                return state
        raise LookupError(f"there is no meeting {meeting_id}")


def _stored(meeting: dict[str, Any]) -> _Meeting:
    return _Meeting(meeting.get("meetingTypeId"), dumps(meeting))


def _matches(hook: dict[str, Any], meeting_type_id: object) -> bool:
    return hook.get("anyMeetingType") is True or hook["meetingTypeId"] == meeting_type_id
