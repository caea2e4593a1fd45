"""Turning a response into an error, or into the JSON data in its body.

Pure: takes the status, headers and body, and returns an exception or plain data. ``_headers`` parses the
rate-limit headers, and ``_codec`` creates models. An error message is one line: the call, the status, the
server's message (cleaned, shortened and redacted), and advice.
"""

import codecs

# Otherwise imported when the first error is decoded.
import encodings.utf_8_sig  # noqa: F401  # pyright: ignore[reportUnusedImport]
import html
import json
import math
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, NoReturn, TypeGuard, cast
from urllib.parse import urlsplit

from lemcal_async._auth import Secret
from lemcal_async._headers import Quota
from lemcal_async._retry import REPEATABLE, is_refusal
from lemcal_async.errors import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    CallInfo,
    ConflictError,
    DuplicateHookError,
    HookNotFoundError,
    MeetingTypeNotFoundError,
    MethodNotAllowedError,
    NotFoundError,
    PermissionDeniedError,
    PlanRequiredError,
    RateLimitError,
    ResponseDecodeError,
    ServerError,
)

_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    402: PlanRequiredError,
    403: PermissionDeniedError,
    404: NotFoundError,
    405: MethodNotAllowedError,
    409: ConflictError,
    429: RateLimitError,
    **dict.fromkeys(range(500, 600), ServerError),
}

_ADVICE: dict[type[APIStatusError], str] = {
    APIStatusError: "Check the path and the base URL.",
    BadRequestError: "Correct the request; retrying it unchanged fails again.",
    AuthenticationError: "Check the user id and the API key: the service does not accept them.",
    PlanRequiredError: "The account's plan does not include this: upgrade the plan, or skip the call.",
    PermissionDeniedError: "The account is not allowed to do this: ask its owner.",
    NotFoundError: "Check the path and the base URL.",
    MeetingTypeNotFoundError: "Check the id of the meeting type, and that it belongs to this account.",
    HookNotFoundError: (
        "Check the id of the hook, and that it belongs to this account; it may already be deleted."
    ),
    MethodNotAllowedError: "Check the method, the path and the base URL.",
    ConflictError: "It already exists.",
    DuplicateHookError: (
        "The target already has a hook; pass exist_ok=True if that is fine. Its id cannot be looked up."
    ),
}

_CHECK_FIRST = "The request may have been processed anyway: check before you send it again."
_CHECK_URL = "Check the base URL and the path."
_TRY_AGAIN = "Try again later; if it happens again, check the base URL and the path."
_HTML_PAGE = "the body is an HTML page, not JSON."
_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_MAX_ERROR_BODY = 65_536  # bytes of an error's body to read
_MAX_MESSAGE_LENGTH = 300  # characters of the server's message to keep
_MAX_HOST_LENGTH = 100

# The patterns are strings, so that re compiles each on first use; many programs never need them.
# "No API key provided", "User linked to this API key is blocked", "No user found for this API key"
# (observed on the sibling product). Only whole words match: "?apikey=1" in a quoted URL does not.
_API_KEY = r"(?i)(?<![^\s\"'(])api[ _-]?keys?(?![^\s.,;:!?\"')])"
_PAGE = r"(?i)<(?:!doctype\s+html|html|head|title|body|center|h1)\b"
_TITLE = r"(?i)<title[^>]{0,200}>([^<]{1,400})<"
# A hook's target URL often contains the webhook token in its query, and an error may quote the URL.
_URL_QUERY = r"(?<!\S)((?>\S*?://)[^\s?#]*+)[?#]\S*"


def error_from_response(
    status_code: int,
    headers: Mapping[str, str],
    body: bytes,
    call: CallInfo,
    *,
    redact: Callable[[str], str],
    quota: Quota,
) -> APIStatusError:
    """Return the error for a response that is not a success.

    ``headers`` has lowercase names (or is case-insensitive), and ``call.method`` is in upper case.
    ``redact`` is applied to all text from the server.
    """
    text, is_page = _error_text(body)
    # An HTML page comes from a proxy in front of the API: neither its text nor its 404 concerns the account.
    kind = _BY_STATUS.get(status_code, APIStatusError) if is_page else _error_class(status_code, text, call)
    if HTTPStatus.MULTIPLE_CHOICES <= status_code < HTTPStatus.BAD_REQUEST:
        host = _shortened(redact(_host_of(headers.get("location", ""))), _MAX_HOST_LENGTH)
        advice = f"Redirects are never followed ({host or 'no host given'}): check the base URL."
    else:
        advice = _advice(kind, status_code, call, quota, is_page=is_page)
    text = _presentable(text, redact)
    details = ["an HTML page"] * is_page + [f'"{text}"'] * bool(text)
    error = kind(
        _message(status_code, call, details, f". {advice}"),
        call=call,
        status_code=status_code,
        server_message=text or None,
        retry_after=quota.retry_after,
    )
    if isinstance(error, RateLimitError):
        error.limit, error.remaining = quota.limit, quota.remaining
    return error


def server_text(body: bytes, redact: Callable[[str], str]) -> str:
    """Return the server's message in the body of an error response, shortened and redacted."""
    return _presentable(_error_text(body)[0], redact)


def is_missing_hook(body: bytes) -> bool:
    """Whether the body of a 404 is the service's response to deleting a hook that no longer exists.

    An HTML page, or a message about something else (``API key not found``), does not concern the hook.
    """
    text, is_page = _error_text(body)
    return not is_page and (not text or "hook not found" in text.lower())


def read_json(status_code: int, body: Secret[bytes], call: CallInfo) -> Any:
    """Return the data in the body of a successful response, None for a 204; raises ``ResponseDecodeError``.

    The result contains no NaN or infinity, so that it can be written as JSON again. A wrong path or base URL
    can return 200 with an HTML page, and 200 with an empty body or ``""`` occurs (observed): both are errors.
    """
    if status_code == HTTPStatus.NO_CONTENT:
        return None
    data, problem = _parsed(body.reveal())
    if problem:
        # Not in an except block: the JSON error, which contains the whole body, would be the context.
        raise _decode_error(status_code, call, problem, _CHECK_URL if problem == _HTML_PAGE else _TRY_AGAIN)
    return data


def rows_of(
    data: Secret[Any], names: tuple[str, ...], call: CallInfo, *, status_code: int = 200
) -> list[Any]:
    """Return the rows of a list: ``data`` itself if it is an array, or its array under one of ``names``.

    A plain array is documented; other integrations also accept such envelopes. Raises
    ``ResponseDecodeError`` for anything else.
    """
    rows = _rows_in(data.reveal(), names)
    if rows is None:
        found = _type_of(data.reveal())
        raise _decode_error(status_code, call, f"the body is {found}, where a list was expected.")
    return rows


def _rows_in(data: Any, names: tuple[str, ...]) -> list[Any] | None:
    candidates = [data.get(name) for name in names] if _is_object(data) else [data]
    return next(filter(_is_array, candidates), None)


def object_of(data: Secret[Any], call: CallInfo, *, status_code: int = 200) -> dict[str, Any]:
    """Return ``data`` if it is a JSON object; raises ``ResponseDecodeError`` for anything else."""
    if not _is_object(data.reveal()):
        found = _type_of(data.reveal())
        raise _decode_error(status_code, call, f"the body is {found}, where an object was expected.")
    return cast("dict[str, Any]", data.reveal())


def _error_class(status_code: int, text: str, call: CallInfo) -> type[APIStatusError]:
    lowered, route = text.lower(), call.route or ""
    if status_code in {400, 403, 404} and re.search(_API_KEY, text):
        return AuthenticationError
    if status_code == HTTPStatus.NOT_FOUND:
        # The message has priority: POST /hooks and GET /meetings return it for an unknown meeting type.
        if "meeting type not found" in lowered:
            return MeetingTypeNotFoundError
        if "hook not found" in lowered or route.startswith("/hooks/"):
            return HookNotFoundError
        if route.startswith("/meetingTypes/"):
            return MeetingTypeNotFoundError
    if status_code == HTTPStatus.CONFLICT and (call.method, route) == ("POST", "/hooks"):
        return DuplicateHookError
    return _BY_STATUS.get(status_code, APIStatusError)


def _advice(
    kind: type[APIStatusError], status_code: int, call: CallInfo, quota: Quota, *, is_page: bool
) -> str:
    if kind is RateLimitError:
        when = "later" if quota.retry_after is None else f"in {quota.retry_after:.1f} s"
        return f"Over the rate limit: try again {when}. Processes that use one key must share a limiter."
    if kind is ServerError:
        if not _is_repeatable(call) and not is_refusal(status_code, quota):
            return _CHECK_FIRST
        problem = "service is temporarily unavailable" if status_code == 503 else "server failed"
        return f"The {problem}: try again later."
    if is_page:
        return "The API never returns HTML: check the base URL, the path, and any proxy in between."
    if kind is DuplicateHookError and call.attempts > 1:
        return "An earlier attempt of this call may have created the hook; its id cannot be looked up."
    return _ADVICE.get(kind, "")


def _message(status_code: int, call: CallInfo, details: list[str], rest: str) -> str:
    status = f"{status_code} {_PHRASES.get(status_code, '')}".rstrip()
    if call.attempts > 1:
        details = [*details, f"{call.attempts} attempts, {call.waited:.1f} s waited"]
    if details:
        status += f" ({', '.join(details)})"
    return _one_line(f"{call}: {status}{rest}")


def _is_repeatable(call: CallInfo) -> bool:
    return call.method is None or call.method in REPEATABLE


def _decode_error(
    status_code: int, call: CallInfo, problem: str, advice: str = _CHECK_URL
) -> ResponseDecodeError:
    if problem != _HTML_PAGE and not _is_repeatable(call):
        advice = _CHECK_FIRST
    return ResponseDecodeError(
        _message(status_code, call, [], f", but {problem} {advice}"), call=call, status_code=status_code
    )


def _error_text(body: bytes) -> tuple[str, bool]:
    """Return the message in an error's body, on one line, and whether the body is an HTML page.

    The message is not shortened yet, because a key must be masked before it could be cut in two.
    """
    text = body[:_MAX_ERROR_BODY].decode("utf-8-sig", "replace").strip()
    if _is_page(text):
        title = re.search(_TITLE, text)
        return (_one_line(html.unescape(title[1])) if title else ""), True
    message = _one_line(_json_message(text))
    # The last word of a partly read body may be half of a key.
    return (message if len(body) <= _MAX_ERROR_BODY else message.rpartition(" ")[0]), False


def _presentable(text: str, redact: Callable[[str], str]) -> str:
    return _shortened(redact(re.sub(_URL_QUERY, r"\1?***", text)), _MAX_MESSAGE_LENGTH)


def _json_message(text: str) -> str:
    """Return the message in any of the platform's JSON error formats, or the whole text."""
    if text[:1] not in {"{", "[", '"'}:
        return text
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(data, str):
        return data
    # {error}, {error, code}, {success, error}, {success, error: {code, message}}, {ok, message}
    parts = data if _is_object(data) else {}
    if _is_object(parts.get("error")):
        parts = parts["error"]
    for name in ("message", "error", "code"):
        if isinstance(part := parts.get(name), str) and part:
            return part
    return text if data else ""


def _is_page(text: str) -> bool:
    # Content sniffing, because the platform also labels plain text as text/html.
    return text.startswith("<") and re.search(_PAGE, text[:2048]) is not None


def _one_line(text: str) -> str:
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _shortened(text: str, max_length: int) -> str:
    return text if len(text) <= max_length else text[: max_length - 3] + "..."


def _host_of(location: str) -> str:
    try:
        host = urlsplit(location).hostname
    except ValueError:
        return ""
    return _one_line(host or "")


def _reject_constant(_literal: str) -> NoReturn:
    raise ValueError


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise ValueError
    return value


# Strict, so that the result can be written as JSON again.
DECODER = json.JSONDecoder(parse_constant=_reject_constant, parse_float=_finite)


def _parsed(body: bytes) -> tuple[Any, str]:
    """Return the data, and the problem or an empty string. The problem does not quote the body."""
    data: Any = None
    text = problem = ""
    try:
        text = body.removeprefix(codecs.BOM_UTF8).decode().strip()
        data = DECODER.decode(text) if text else ""
    except UnicodeDecodeError:
        problem = "the body is not UTF-8 text."
    except json.JSONDecodeError as error:
        if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
            problem = f"the body is JSON that is cut off after {len(body)} bytes."
        else:
            problem = f"the body is not JSON: {error.msg}, at character {error.pos}."
    except ValueError:
        problem = "the body contains a number that JSON does not allow (NaN, infinity, or far too long)."
    except RecursionError:
        problem = "the body is JSON that is nested too deeply."
    if data == "":
        problem = "the body is an empty string." if text else "the body is empty."
    if problem and _is_page(body[:_MAX_ERROR_BODY].decode("utf-8-sig", "replace").strip()):
        problem = _HTML_PAGE
    return data, problem


def _is_array(data: object) -> TypeGuard[list[Any]]:
    return isinstance(data, list)


def _is_object(data: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(data, dict)


def _type_of(data: object) -> str:
    types: dict[type, str] = {list: "an array", dict: "an object", str: "a string", bool: "a boolean"}
    return "null" if data is None else types.get(type(data), "a number")
