"""Connection settings from the environment: trusted certificates and proxies."""

import os
import re
import threading
import urllib.request
from typing import TYPE_CHECKING, TypeAlias

import anyio.to_thread

from lemcal_async._auth import Secret
from lemcal_async.errors import ConfigurationError
from lemcal_async.transport._network import DEFAULT_PORTS

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

MakeContext: TypeAlias = "Callable[[bool], ssl.SSLContext]"  # its argument is trust_env

_contexts: "dict[tuple[MakeContext, bool], ssl.SSLContext]" = {}  # shared by the whole process
_contexts_lock = threading.Lock()


async def tls_context(make: MakeContext, *, trust_env: bool) -> "ssl.SSLContext":
    """Return the process's TLS context; create it in a thread, because reading the certificates takes 20 ms.

    Raises ConfigurationError if an environment variable names an unusable file.
    """
    if (make, trust_env) not in _contexts:
        problem = await anyio.to_thread.run_sync(_make_once, make, trust_env)
        if problem:
            raise ConfigurationError(problem)
    return _contexts[make, trust_env]


def _make_once(make: MakeContext, trust_env: bool) -> str:  # noqa: FBT001 - called by position
    """Create the context unless another thread already has; return any problem with the environment."""
    with _contexts_lock:
        if (make, trust_env) in _contexts:
            return ""
        problem = _unusable_directory() if trust_env else ""
        if problem:
            return problem
        try:
            _contexts[make, trust_env] = make(trust_env)
        except OSError:  # includes ssl.SSLError
            problem = _unusable_file()
            if not problem:
                raise
        return problem


def _unusable_directory() -> str:
    """Check the certificate directory: OpenSSL ignores a missing one, and then rejects every server."""
    path = os.environ.get("SSL_CERT_DIR")
    if path and not os.environ.get("SSL_CERT_FILE") and not any(map(os.path.isdir, path.split(os.pathsep))):
        return (
            f"SSL_CERT_DIR={path} cannot be used: it is not a directory of certificates; correct or unset it"
        )
    return ""


def _unusable_file() -> str:
    """Find the environment variable that caused an error; the error itself often names no file."""
    import ssl  # noqa: PLC0415 - already loaded

    def load_certificates(path: str) -> None:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)

    def open_key_log(path: str) -> None:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).keylog_filename = path

    for name, use in (("SSL_CERT_FILE", load_certificates), ("SSLKEYLOGFILE", open_key_log)):
        path = os.environ.get(name)
        if path:
            try:
                use(path)
            except OSError as problem:
                reason = problem.strerror or str(problem)
                return f"{name}={path} cannot be used: {reason}; correct or unset it"
    return ""


class Proxies:
    """The environment's proxies at the time of creation; their URLs may contain passwords."""

    def __init__(self, *, trust_env: bool) -> None:
        self._by_scheme = Secret(urllib.request.getproxies() if trust_env else {})

    def get(self, scheme: str, host: str, port: int | None) -> Secret[str] | None:
        """Return the URL of the proxy for a host; None for a direct connection."""
        by_scheme = self._by_scheme.reveal()
        if not (by_scheme.get(scheme) or by_scheme.get("all")):
            return None
        name = f"[{host}]" if ":" in host else host
        with_port = f"{name}:{DEFAULT_PORTS[scheme] if port is None else port}"
        if any(map(urllib.request.proxy_bypass, (host, name, with_port))):
            return None
        proxy = Secret(by_scheme.get(scheme) or by_scheme["all"])
        # HTTP_PROXY=host:port is common
        return proxy if "://" in proxy.reveal() else Secret(f"http://{proxy.reveal()}")

    def address(self, scheme: str, host: str, port: int | None) -> str:
        """Return the host and port of the proxy for a host, for messages; "" for a direct connection."""
        proxy = self.get(scheme, host, port)
        if proxy is None:
            return ""
        return re.split("[/?#]", proxy.reveal().partition("://")[2].rpartition("@")[2])[0]
