"""Installs a built wheel in clean environments and uses it; run by ``nox -s package``.

It checks the wheel without extras, each extra alone, and the wheel without extras against a sandbox in
another environment. Programs in the environments import the wheel, not this source tree.
"""

import contextlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
HERE: Final = Path(__file__).parent
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})

# The module and a name of each extra; ``cli`` is checked as a command.
EXTRAS: Final = {
    "aiohttp": "lemcal_async.transport.aiohttp:AiohttpTransport",
    "fleet": "lemcal_async.fleet:Fleet",
    "fastapi": "lemcal_async.fastapi:lifespan",
    "httpx2": "lemcal_async.transport.httpx2:HTTPX2Transport",
    "otel": "lemcal_async.otel:instrument",
    "redis": "lemcal_async.ratelimit:RedisRateLimiter",
    "sandbox": "lemcal_async.sandbox:Sandbox",
    "sql": "lemcal_async.sync:SQLStore",
}


class Environment:
    """A virtual environment with the wheel and some of its extras."""

    def __init__(self, folder: Path, wheel: Path, *extras: str) -> None:
        self._folder = folder / ("-".join(extras) or "alone")
        uv("venv", "--python", sys.executable, str(self._folder))
        wanted = f"lemcal-async[{','.join(extras)}] @ {wheel.as_uri()}"
        uv("pip", "install", "--python", self.program("python"), wanted)

    def program(self, name: str) -> str:
        """Return the path of a program in the environment."""
        bin_ = self._folder / ("Scripts" if os.name == "nt" else "bin")
        return str(bin_ / name)

    def start(self, *command: str, environ: Mapping[str, str] = NOTHING) -> "subprocess.Popen[str]":
        """Start a program of the environment, outside this source tree."""
        return subprocess.Popen(
            [self.program(command[0]), *command[1:]],
            cwd=self._folder,
            env={"PATH": os.environ["PATH"], "PYTHONWARNINGS": "error", **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, status: int = 0, environ: Mapping[str, str] = NOTHING) -> tuple[str, str]:
        """Run a program, check its exit status, and return its standard output and standard error."""
        with self.start(*command, environ=environ) as process:
            output, errors = process.communicate(timeout=120)
        if process.returncode != status:
            raise SystemExit(f"{command} exited with {process.returncode}, not {status}:\n{output}{errors}")
        return output, errors


def uv(*command: str) -> None:
    """Run uv."""
    subprocess.run([sys.executable, "-m", "uv", "--quiet", *command], check=True)


def check(name: str, *, holds: bool) -> None:
    """Print the result of a check, and exit if it failed."""
    sys.stdout.write(f"{'ok' if holds else 'FAILED'}: {name}\n")
    sys.stdout.flush()
    if not holds:
        raise SystemExit(1)


def is_one_line(errors: str, extra: str) -> bool:
    """Whether the output is one line that names the extra."""
    return errors.count("\n") == 1 and f"pip install 'lemcal-async[{extra}]'" in errors


@contextlib.contextmanager
def sandbox(environment: Environment) -> Iterator[dict[str, str]]:
    """Serve a sandbox from an environment, and yield the environment variables for its clients."""
    code = (
        "import time; from lemcal_async.sandbox import Sandbox\n"
        "with Sandbox().serve() as s: print(s.base_url, s.user_id, s.api_key, flush=True); time.sleep(300)"
    )
    process = environment.start("python", "-c", code)
    with process:
        assert process.stdout is not None
        base_url, user_id, api_key = process.stdout.readline().split()
        try:
            yield {"BASE_URL": base_url, "LEMCAL_USER_ID": user_id, "LEMCAL_API_KEY": api_key}
        finally:
            process.kill()


def main(wheel: Path, folder: Path) -> None:
    """Run all checks."""
    alone = Environment(folder, wheel)
    version: dict[str, Any] = {}
    exec((ROOT / "lemcal_async" / "_version.py").read_text(encoding="utf-8"), version)

    output, _ = alone.run("python", "-c", "import lemcal_async as l; print(l.__version__, l.__file__)")
    check("the wheel has the version of the source", holds=output.startswith(f"{version['__version__']} "))
    check("the wheel is imported, not the source", holds=str(folder) in output)

    code = "from importlib.metadata import distributions as d; print(*sorted(x.name.lower() for x in d()))"
    installed = alone.run("python", "-c", code)[0].split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    check(f"without extras it installs {', '.join(installed)}", holds=len(installed) <= 13)

    for extra, place in EXTRAS.items():
        module, _, name = place.partition(":")
        output, errors = alone.run("python", "-c", f"from {module} import {name}", status=1)
        last = errors.strip().splitlines()[-1]
        check(f"without the extra: {last}", holds=f"pip install 'lemcal-async[{extra}]'" in last)
    _, errors = alone.run("lemcal", "--version", status=2)
    check(f"without the extra: {errors.strip()}", holds=is_one_line(errors, "cli"))

    for extra, place in EXTRAS.items():
        module, _, name = place.partition(":")
        environment = Environment(folder, wheel, extra)
        environment.run("python", "-c", f"from {module} import {name}; import lemcal_async._client")
        check(f"extra {extra} alone", holds=True)
        if extra == "sandbox":
            with sandbox(environment) as variables:
                output, _ = alone.run("python", str(HERE / "user.py"), environ=variables)
                check(f"without extras, at a sandbox: {output.strip()}", holds="12 meetings" in output)

    command = Environment(folder, wheel, "cli")
    output, _ = command.run("lemcal", "--version")
    check("extra cli alone", holds=output == f"lemcal-async {version['__version__']}\n")
    key = {"LEMCAL_USER_ID": "usr_1", "LEMCAL_API_KEY": "key"}
    for line, extra in (("me --sandbox", "sandbox"), ("sync --db sqlite:///x.db", "sql")):
        _, errors = command.run("lemcal", *line.split(), status=2, environ=key)
        check(f"lemcal {line}: {errors.strip()}", holds=is_one_line(errors, extra))

    check("all extras were checked", holds={*EXTRAS, "cli", "all"} == set(project["optional-dependencies"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
