"""A local server that behaves like the lemcal API, for tests and experiments.

Requires the extra ``sandbox`` (Starlette and uvicorn). The sandbox follows the service's documented behavior,
then its observed behavior, then a best guess.

>>> from lemcal_async.sandbox import Sandbox, faults
>>> with Sandbox().serve() as sandbox:
...     sandbox.inject(faults.too_many_requests(retry_after="0.039"))
...     response = httpx.get(f"{sandbox.base_url}/me", auth=(sandbox.user_id, sandbox.api_key))
"""

try:
    from lemcal_async.sandbox import faults
    from lemcal_async.sandbox._sandbox import Sandbox, run
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in {"starlette", "uvicorn"}:
        raise
    raise ImportError("the sandbox requires the extra sandbox: pip install 'lemcal-async[sandbox]'") from None
from lemcal_async.sandbox._demo import SandboxAccount
from lemcal_async.sandbox._hooks import Delivery
from lemcal_async.sandbox._log import SeenRequest

__all__ = ["Delivery", "Sandbox", "SandboxAccount", "SeenRequest", "faults", "run"]
