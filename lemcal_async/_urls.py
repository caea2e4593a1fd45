"""Validation of base URLs, of paths below them, and of hook targets. Pure.

Every request carries credentials, so no id, path or parameter from the caller may lead to another host, or to
a route other than the intended one.
"""

import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import quote, unquote, urlencode, urlsplit

from lemcal_async._auth import Secret
from lemcal_async.errors import ConfigurationError

DEFAULT_BASE_URL = "https://api.lemcal.com/api/lemcal"
BASE_URL_VARIABLE = "LEMCAL_BASE_URL"


def check_base_url(url: Secret[str], name: str = "base_url", *, allow_insecure_http: bool = False) -> str:
    """Return ``url`` without a trailing slash, or raise ConfigurationError, which refers to it as ``name``.

    Plain http would send the API key unencrypted. It is allowed only on loopback, or if enabled explicitly.
    """
    if problem := _problem_of_base_url(url.reveal(), allow_insecure_http=allow_insecure_http):
        raise ConfigurationError(f"{name} {problem}")
    return url.reveal().rstrip("/")


def _problem_of_base_url(url: str, *, allow_insecure_http: bool) -> str:
    """Return the problem, without quoting the URL, which may contain a password. Does not raise."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading .port validates it
        (host or "").encode("idna")  # as when connecting
    except (ValueError, TypeError, AttributeError):
        host = parts = None
    if not parts or not host or parts.scheme not in {"http", "https"} or _has_invalid_characters(url):
        return f"must be an absolute http(s) URL such as {DEFAULT_BASE_URL}"
    if parts.username is not None or parts.password is not None:
        return "must not contain credentials; pass them separately"
    if parts.query or parts.fragment or "?" in url or "#" in url:
        return "must not have a query or a fragment"
    if parts.scheme == "http" and not allow_insecure_http and not is_loopback(host):
        return (
            f"is plain http to {host}, which would send the API key unencrypted; "
            "use https, or pass allow_insecure_http=True"
        )
    return ""


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a loopback address or localhost."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def quote_id(value: object, what: str) -> str:
    """Return an id as a single path segment; ``what`` names the argument in errors.

    ``"/meetingTypes/" + "../me"`` would be normalized to ``/me``. Characters that could change the route are
    rejected rather than escaped, because no such id exists.
    """
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{what} must be a non-empty string, got {_abbreviated(value)}")
    if value in {".", ".."} or "/" in value or "\\" in value or _has_invalid_characters(value):
        problem = "'.', '..', or with slashes or whitespace"
        raise ConfigurationError(f"{what} is not an id: {_abbreviated(value)} ({problem})")
    return quote(value, safe="")


def check_path(path: str) -> str:
    """Return the percent-encoded path for ``request()``, or raise ConfigurationError."""
    if not path.startswith("/") or path.startswith("//"):
        reason = "start it with one '/': absolute and '//' URLs would send the API key elsewhere"
    elif "\\" in path or _has_invalid_characters(path):
        reason = "percent-encode backslashes, whitespace and control characters"
    elif "?" in path or "#" in path:
        reason = "pass the query as params="
    elif {".", ".."}.intersection(unquote(path).replace("\\", "/").split("/")):
        reason = "dot segments would lead to another route"
    else:
        return quote(path, safe="/%:@!$&'()*+,;=~")
    raise ConfigurationError(f"request() takes a path below the base URL; {reason}")


def with_query(path: str, params: Mapping[str, object] | None) -> str:
    """Return ``path`` with ``params`` as its query. Parameters that are None are omitted.

    Raises ConfigurationError for other types than text, numbers, bools and lists of these, and for text that
    cannot be encoded.
    """
    if not params:
        return path
    pairs: list[tuple[str, str]] = []
    for name, value in params.items():
        items: list[object] = [*value] if isinstance(value, (list, tuple)) else [value]  # pyright: ignore[reportUnknownVariableType]
        for item in items:
            _check_parameter(name, item)
        pairs += [(name, _text(item)) for item in items if item is not None]
    try:
        return f"{path}?{urlencode(pairs)}" if pairs else path
    except UnicodeEncodeError:  # a lone surrogate; raise below, so that the error's text is not the context
        pass
    raise ConfigurationError(f"the parameters of {path} contain text that is not valid Unicode")


def _check_parameter(name: object, value: object) -> None:
    if value is None or isinstance(value, str | int | float):
        return
    raise ConfigurationError(
        f"params={{{_abbreviated(name)}: ...}}: it must be text, a number, a bool, None or a list of these, "
        f"not {type(value).__name__}"
    )


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_target_url(url: Secret[str], name: str = "target_url") -> Secret[str]:
    """Return the target URL of a hook, or raise ConfigurationError. The URL may contain a token.

    The service accepts only http and https, and otherwise returns 400 ``Invalid targetUrl`` (documented).
    """
    if not _is_web_url(url.reveal()):
        raise ConfigurationError(f"{name} must be an absolute http:// or https:// URL")
    if "#" in url.reveal():
        # Probably from a token that was not percent-encoded: a fragment is never sent.
        raise ConfigurationError(
            f"{name} contains a '#', and nothing after it would be sent: percent-encode the token, as "
            "lemcal_async.webhooks.hook_url(url, token) does"
        )
    return url


def _is_web_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and not _has_invalid_characters(url)
    except (ValueError, TypeError, AttributeError):
        return False


# A hook's target URL usually has a token in its query, and messages may quote arguments.
_QUERY = re.compile(r"(://[^\s?#]*)[?#]\S*")
# A password may contain slashes, so after a colon the match extends to the last @.
_USER_INFO = re.compile(r"://(?:[^\s/?#:]*:[^\s?#]*|[^\s/?#]*)@")


def without_secrets(text: str) -> str:
    """Return ``text`` without the potentially secret parts of URLs: queries, fragments and user info."""
    return _QUERY.sub(r"\1?...", _USER_INFO.sub("://", text))


def _has_invalid_characters(text: str) -> bool:
    # Control characters must not be sent, and lone surrogates cannot be encoded.
    return any(
        character <= " " or character == "\x7f" or "\ud800" <= character <= "\udfff" for character in text
    )


def _abbreviated(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
