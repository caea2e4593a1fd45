"""Which URLs a request may go to: checks of the base URL, and of paths below it. Pure.

Credentials travel with every request, so nothing that a caller passes as an id, a path or a parameter
may lead to another host, or to a route other than the one that was meant.
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
    """Return ``url`` without a trailing slash, or raise ConfigurationError; ``name`` is what it calls it.

    Plain http would send the API key in the clear. It is allowed on loopback, or when asked for.
    """
    if problem := _problem_of_base_url(url.reveal(), allow_insecure_http=allow_insecure_http):
        raise ConfigurationError(f"{name} {problem}")
    return url.reveal().rstrip("/")


def _problem_of_base_url(url: str, *, allow_insecure_http: bool) -> str:
    """Return what is wrong, without quoting the URL: it may carry a password. Does not raise."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading .port checks it
        (host or "").encode("idna")  # as connecting will
    except (ValueError, TypeError, AttributeError):
        host = parts = None
    if not parts or not host or parts.scheme not in {"http", "https"} or _has_blanks(url):
        return f"must be an absolute http(s) URL such as {DEFAULT_BASE_URL}"
    if parts.username is not None or parts.password is not None:
        return "must not carry credentials; pass user_id= and api_key="
    if parts.query or parts.fragment or "?" in url or "#" in url:
        return "must not have a query or a fragment"
    if parts.scheme == "http" and not allow_insecure_http and not is_loopback(host):
        return (
            f"is plain http to {host}, which would send the API key in the clear; "
            "use https, or pass allow_insecure_http=True"
        )
    return ""


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine itself."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def quote_id(value: object, what: str) -> str:
    """Return an id as one path segment; ``what`` names it in the error.

    ``"/meetingTypes/" + "../me"`` would become ``/me`` on the way. Whatever could change the route is
    refused rather than escaped, because no such id exists.
    """
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"{what} must be a non-empty string, got {_short(value)}")
    if value in {".", ".."} or "/" in value or "\\" in value or _has_blanks(value):
        raise ConfigurationError(f"{what} is not an id: {_short(value)} (slashes, dots or blanks)")
    return quote(value, safe="")


def check_path(path: str) -> str:
    """Return a path for ``request()``, quoted as it is sent, or raise ConfigurationError."""
    if not path.startswith("/") or path.startswith("//"):
        reason = "start it with one '/': absolute and '//' URLs would send the API key elsewhere"
    elif "\\" in path or _has_blanks(path):
        reason = "quote backslashes, blanks and control characters"
    elif "?" in path or "#" in path:
        reason = "pass the query as params="
    elif {".", ".."}.intersection(unquote(path).replace("\\", "/").split("/")):
        reason = "dot segments would lead to another route"
    else:
        return quote(path, safe="/%:@!$&'()*+,;=~")
    raise ConfigurationError(f"request() takes a path below the base URL; {reason}")


def with_query(path: str, params: Mapping[str, object] | None) -> str:
    """Return ``path`` with ``params`` as its query. A None is left out, not sent as an empty value.

    Raises ConfigurationError for text that cannot be encoded.
    """
    if not params:
        return path
    pairs: list[tuple[str, str]] = []
    for name, value in params.items():
        items: list[object] = [*value] if isinstance(value, (list, tuple)) else [value]  # pyright: ignore[reportUnknownVariableType]
        pairs += [(name, _text(item)) for item in items if item is not None]
    try:
        return f"{path}?{urlencode(pairs)}" if pairs else path
    except UnicodeEncodeError:  # half a surrogate pair; the error holds the text, so it must not come along
        pass
    raise ConfigurationError(f"the parameters of {path} hold text that is not Unicode")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_target_url(url: Secret[str], name: str = "target_url") -> Secret[str]:
    """Return the URL that a hook is to call, or raise ConfigurationError. It may carry a token.

    The service answers 400 ``Invalid targetUrl`` to anything but http and https (documented).
    """
    if not _is_web_url(url.reveal()):
        raise ConfigurationError(f"{name} must be an absolute http:// or https:// URL")
    if "#" in url.reveal():
        # As of a token that was put there as it is: nobody would ever be sent the rest.
        raise ConfigurationError(
            f"{name} has a '#', and nothing behind it would be sent: quote the token, as "
            "lemcal_async.webhooks.hook_url(url, token) does"
        )
    return url


def _is_web_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and not _has_blanks(url)
    except (ValueError, TypeError, AttributeError):
        return False


# A hook's target usually carries a token in its query, and a message may quote an argument.
_QUERY = re.compile(r"(://[^\s?#]*)[?#]\S*")
# After a colon it goes up to the last @: a password may hold a slash.
_USER_INFO = re.compile(r"://(?:[^\s/?#:]*:[^\s?#]*|[^\s/?#]*)@")


def without_secrets(text: str) -> str:
    """Return ``text`` with what may be secret in its URLs left out: queries, fragments, user info."""
    return _QUERY.sub(r"\1?...", _USER_INFO.sub("://", text))


def _has_blanks(text: str) -> bool:
    # Half a surrogate pair cannot be encoded; it must not be sent any more than a control character.
    return any(
        character <= " " or character == "\x7f" or "\ud800" <= character <= "\udfff" for character in text
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
