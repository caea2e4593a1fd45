"""A server on this machine that behaves as the lemcal API does, for tests and for trying things out.

It needs the extra ``sandbox`` (starlette and uvicorn), and nothing of the client imports it. What it
imitates is what is known of the service: documented, observed, or the best guess where neither.

>>> from lemcal_async.sandbox import Sandbox, faults
>>> with Sandbox().serve() as sandbox:
...     sandbox.inject(faults.too_many_requests(retry_after="0.039"))
...     answer = httpx.get(f"{sandbox.base_url}/me", auth=(sandbox.user_id, sandbox.api_key))
"""

try:
    from lemcal_async.sandbox import faults
    from lemcal_async.sandbox._sandbox import Sandbox, run
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in {"starlette", "uvicorn"}:
        raise
    raise ImportError("the sandbox needs its extra: pip install 'lemcal-async[sandbox]'") from None
from lemcal_async.sandbox._demo import SandboxAccount
from lemcal_async.sandbox._hooks import Delivery
from lemcal_async.sandbox._log import SeenRequest

__all__ = ["Delivery", "Sandbox", "SandboxAccount", "SeenRequest", "faults", "run"]
