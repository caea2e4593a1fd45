"""What the environment says about connecting: the certificates to trust, and the proxies to use."""

import os
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

MakeContext: TypeAlias = "Callable[[bool], ssl.SSLContext]"  # takes whether to trust the environment

_contexts: "dict[tuple[MakeContext, bool], ssl.SSLContext]" = {}  # shared by the whole process
_making = threading.Lock()


async def tls_context(make: MakeContext, *, trust_env: bool) -> "ssl.SSLContext":
    """Return the process's context of that kind, made in a thread: reading the certificates takes 20 ms.

    Raises ConfigurationError if a variable of the environment names a file that cannot be used.
    """
    if (make, trust_env) not in _contexts:
        problem = await anyio.to_thread.run_sync(_make_once, make, trust_env)
        if problem:
            raise ConfigurationError(problem)
    return _contexts[make, trust_env]


def _make_once(make: MakeContext, trust_env: bool) -> str:  # noqa: FBT001 - called by position
    """Make a context unless another thread has; return what is wrong with the environment, if anything."""
    with _making:
        if (make, trust_env) in _contexts:
            return ""
        problem = _unusable_directory() if trust_env else ""
        if problem:
            return problem
        try:
            _contexts[make, trust_env] = make(trust_env)
        except OSError:  # which those of TLS are
            problem = _unusable_file()
            if not problem:
                raise
        return problem


def _unusable_directory() -> str:
    """Look at the directory of certificates: one that is missing would be ignored, and all refused."""
    path = os.environ.get("SSL_CERT_DIR")
    if path and not os.environ.get("SSL_CERT_FILE") and not any(map(os.path.isdir, path.split(os.pathsep))):
        return (
            f"SSL_CERT_DIR={path} cannot be used: it is not a directory of certificates; correct or unset it"
        )
    return ""


def _unusable_file() -> str:
    """Find the variable that an error is due to; the error itself often names no file."""
    import ssl  # noqa: PLC0415 - there is one already

    def load(path: str) -> None:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)

    def log(path: str) -> None:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).keylog_filename = path

    for name, use in (("SSL_CERT_FILE", load), ("SSLKEYLOGFILE", log)):
        path = os.environ.get(name)
        if path:
            try:
                use(path)
            except OSError as problem:
                reason = problem.strerror or str(problem)
                return f"{name}={path} cannot be used: {reason}; correct or unset it"
    return ""


class Proxies:
    """The proxies that the environment set when this was made; their URLs may hold passwords."""

    def __init__(self, *, trust_env: bool) -> None:
        self._by_scheme = Secret(urllib.request.getproxies() if trust_env else {})

    def get(self, scheme: str, host: str, port: int | None) -> Secret[str] | None:
        """Return the URL of the proxy for a host, None if it is to be reached directly."""
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
