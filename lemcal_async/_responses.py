"""What an answer means: the error it stands for, or the JSON in it.

Pure: status, headers and body come in; an exception or plain data comes out. Rate-limit headers are read
in ``_headers`` and come in as numbers; models are the business of ``_codec``. A message is one line: the
call, the status, the server's own words (cleaned, shortened and redacted), and what to do.
"""

import codecs

# Else loaded by the first error that is read.
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
    BadRequestError: "Correct the request; sent again as it is, it fails again.",
    AuthenticationError: "Check the user id and the API key: the service does not accept them.",
    PlanRequiredError: "The account's plan does not include this: upgrade it, or leave the call out.",
    PermissionDeniedError: "The account is not allowed to do this.",
    NotFoundError: "Check the path and base_url.",
    MeetingTypeNotFoundError: "Check the id of the meeting type, and that it belongs to this account.",
    HookNotFoundError: (
        "Check the id of the hook, and that it belongs to this account; it may be deleted already."
    ),
    MethodNotAllowedError: "Check the method, the path and base_url.",
    ConflictError: "There is one already.",
    DuplicateHookError: (
        "That target has a hook already; pass exist_ok if that is fine. Its id cannot be looked up."
    ),
}

_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_READ_OF_ERRORS = 65_536  # bytes of a failure's body to look at
_LONGEST_TEXT = 300  # characters of it to keep
_LONGEST_HOST = 100

# Patterns are strings: re compiles each when it is first needed, and many programs never need them.
# "No API key provided", "User linked to this API key is blocked", "No user found for this API key"
# (seen on the sibling product). The words stand alone: "?apikey=1" in a quoted URL does not count.
_API_KEY = r"(?i)(?<![^\s\"'(])api[ _-]?keys?(?![^\s.,;:!?\"')])"
_PAGE = r"(?i)<(?:!doctype\s+html|html|head|title|body|center|h1)\b"
_TITLE = r"(?i)<title[^>]{0,200}>([^<]{1,400})<"
# A hook's target URL often has the webhook token in its query, and an error may quote it.
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
    """Return the error that an answer other than a success stands for.

    ``headers`` has lower-case names (or finds them in any case), and ``call.method`` is in upper case.
    ``redact`` is applied to everything the server said.
    """
    words, is_page = _text_of(body)
    # A page comes from something in front of the API: its words and its 404 say nothing about the account.
    kind = _BY_STATUS.get(status_code, APIStatusError) if is_page else _class_of(status_code, words, call)
    if HTTPStatus.MULTIPLE_CHOICES <= status_code < HTTPStatus.BAD_REQUEST:
        host = _shortened(redact(_host_of(headers.get("location", ""))), _LONGEST_HOST)
        advice = f"Redirects are never followed ({host or 'no host given'}): check base_url."
    else:
        advice = _advice(kind, status_code, call, quota, is_page=is_page)
    words = _presentable(words, redact)
    said = ", ".join(["an HTML page"] * is_page + [f'"{words}"'] * bool(words))
    error = kind(
        _message(status_code, call, f" ({said})." if said else ".", advice),
        call=call,
        status_code=status_code,
        server_message=words or None,
        retry_after=quota.retry_after,
    )
    if isinstance(error, RateLimitError):
        error.limit, error.remaining = quota.limit, quota.remaining
    return error


def server_text(body: bytes, redact: Callable[[str], str]) -> str:
    """Return what the server says in the body of a failure, as an error may show it."""
    return _presentable(_text_of(body)[0], redact)


def is_missing_hook(body: bytes) -> bool:
    """Whether the body of a 404 is the service's own answer to deleting a hook that is gone.

    A page, or words about anything else (``API key not found``), say nothing about the hook.
    """
    words, is_page = _text_of(body)
    return not is_page and (not words or "hook not found" in words.lower())


def read_json(status_code: int, body: Secret[bytes], call: CallInfo) -> Any:
    """Return the data in the body of a success, None for a 204; raises ``ResponseDecodeError``.

    The result can be written as JSON again: no NaN, no infinity. A wrong path or base URL can answer
    200 with an HTML page, and 200 with nothing or ``""`` happens (observed): neither is data.
    """
    if status_code == HTTPStatus.NO_CONTENT:
        return None
    data, problem = _parsed(body.reveal())
    if problem:
        # Not within an `except`: the JSON error would come along, and it holds the whole body.
        raise _unusable(status_code, call, problem)
    return data


def rows_of(
    data: Secret[Any], names: tuple[str, ...], call: CallInfo, *, status_code: int = 200
) -> list[Any]:
    """Return the rows of a list: a JSON array, or one in an object under one of ``names``.

    The array is documented; other integrations accept the envelopes too. Raises
    ``ResponseDecodeError`` for anything else.
    """
    rows = _rows_in(data.reveal(), names)
    if rows is None:
        found = _type_of(data.reveal())
        raise _unusable(status_code, call, f"the body is {found}, where a list was expected.")
    return rows


def _rows_in(data: Any, names: tuple[str, ...]) -> list[Any] | None:
    candidates = [data.get(name) for name in names] if _is_object(data) else [data]
    return next(filter(_is_array, candidates), None)


def object_of(data: Secret[Any], call: CallInfo, *, status_code: int = 200) -> dict[str, Any]:
    """Return the JSON object that ``data`` is; raises ``ResponseDecodeError`` for anything else."""
    if not _is_object(data.reveal()):
        found = _type_of(data.reveal())
        raise _unusable(status_code, call, f"the body is {found}, where an object was expected.")
    return cast("dict[str, Any]", data.reveal())


def _class_of(status_code: int, words: str, call: CallInfo) -> type[APIStatusError]:
    lowered, route = words.lower(), call.route or ""
    if status_code in {400, 403, 404} and re.search(_API_KEY, words):
        return AuthenticationError
    if status_code == HTTPStatus.NOT_FOUND:
        # The words first: POST /hooks and GET /meetings answer so to an unknown meeting type.
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
        repeatable = call.method is None or call.method in REPEATABLE
        if not repeatable and not is_refusal(status_code, quota):
            return "The request may have been processed all the same: look before sending it again."
        what = "service is not available now" if status_code == 503 else "server failed"
        return f"The {what}: try again later."
    if is_page:
        return "The API sends no pages: check base_url, the path, and any proxy in between."
    if kind is DuplicateHookError and call.attempts > 1:
        return "An earlier attempt of this call may have created it; its id cannot be looked up."
    return _ADVICE.get(kind, "")


def _message(status_code: int, call: CallInfo, rest: str, advice: str) -> str:
    answer = f"{status_code} {_PHRASES.get(status_code, '')}".rstrip()
    tried = f"Tried {call.attempts} times, waited {call.waited:.1f} s." if call.attempts > 1 else ""
    return _one_line(f"{call}: {answer}{rest} {advice} {tried}")


def _unusable(status_code: int, call: CallInfo, problem: str) -> ResponseDecodeError:
    return ResponseDecodeError(
        _message(status_code, call, f", but {problem}", ""), call=call, status_code=status_code
    )


def _text_of(body: bytes) -> tuple[str, bool]:
    """Return what the server says in a failure's body, on one line, and whether that is an HTML page.

    It is not shortened yet: a key must be masked before it can be cut in two.
    """
    text = body[:_READ_OF_ERRORS].decode("utf-8-sig", "replace").strip()
    if _is_page(text):
        title = re.search(_TITLE, text)
        return (_one_line(html.unescape(title[1])) if title else ""), True
    words = _one_line(_text_in_json(text))
    # The last word of a body that is not read to its end may be half a key.
    return (words if len(body) <= _READ_OF_ERRORS else words.rpartition(" ")[0]), False


def _presentable(words: str, redact: Callable[[str], str]) -> str:
    return _shortened(redact(re.sub(_URL_QUERY, r"\1?***", words)), _LONGEST_TEXT)


def _text_in_json(text: str) -> str:
    """Return the text in any of the JSON forms that this platform uses for errors, else all of it."""
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
    # By its looks: the platform labels plain words text/html as well.
    return text.startswith("<") and re.search(_PAGE, text[:2048]) is not None


def _one_line(text: str) -> str:
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _host_of(location: str) -> str:
    try:
        host = urlsplit(location).hostname
    except ValueError:
        return ""
    return _one_line(host or "")


def _refuse(_literal: str) -> NoReturn:
    raise ValueError


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise ValueError
    return value


# Strict: what comes out can be written as JSON again.
DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def _parsed(body: bytes) -> tuple[Any, str]:
    """Return the data, and what is wrong with it or the empty string; nothing of the body is quoted."""
    data: Any = None
    text = problem = ""
    try:
        text = body.removeprefix(codecs.BOM_UTF8).decode().strip()
        data = DECODER.decode(text) if text else ""
    except UnicodeDecodeError:
        problem = "the body is not UTF-8 text."
    except json.JSONDecodeError as error:
        if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
            problem = f"the body is JSON that breaks off after {len(body)} bytes."
        else:
            problem = f"the body is not JSON: {error.msg}, at character {error.pos}."
    except ValueError:
        problem = "the body holds a number that is none in JSON (NaN, infinity, or far too long)."
    except RecursionError:
        problem = "the body is JSON that is nested too deeply."
    if data == "":
        problem = "the body is empty."
    if problem and _is_page(body[:_READ_OF_ERRORS].decode("utf-8-sig", "replace").strip()):
        problem = "the body is an HTML page, not JSON. Check base_url and the path."
    return data, problem


def _is_array(data: object) -> TypeGuard[list[Any]]:
    return isinstance(data, list)


def _is_object(data: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(data, dict)


def _type_of(data: object) -> str:
    types: dict[type, str] = {list: "an array", dict: "an object", str: "a string", bool: "a boolean"}
    return "null" if data is None else types.get(type(data), "a number")
