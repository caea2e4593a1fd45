"""Everything there is to run, each in an environment of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_external_run = True

PROJECT = nox.project.load_toml("pyproject.toml")
SUPPORTED = nox.project.python_versions(PROJECT)


def works(command: str) -> bool:
    """Whether an interpreter really starts: a version manager's stand-in may be all there is."""
    try:
        return (
            subprocess.run([command, "-c", ""], capture_output=True, check=False, timeout=60).returncode == 0
        )
    except OSError:
        return False


def interpreters() -> list[str]:
    """Return the supported versions that exist here, those of pyenv included."""
    found = []
    for version in SUPPORTED:
        if not works(f"python{version}") and shutil.which("pyenv"):
            prefix = subprocess.run(["pyenv", "prefix", version], capture_output=True, text=True, check=False)
            if prefix.returncode == 0:
                os.environ["PATH"] = os.pathsep.join([f"{prefix.stdout.strip()}/bin", os.environ["PATH"]])
        if works(f"python{version}"):
            found.append(version)
    return found


def install(session: nox.Session, *groups: str) -> None:
    """Install the package with the extras in use, and the tools of some dependency groups."""
    session.install("-e", ".[all]", *nox.project.dependency_groups(PROJECT, *groups))


tested: set[str] = set()  # the Pythons on which the tests have passed in this call of nox


def run_tests(session: nox.Session) -> None:
    """Install what the tests need, and run them in two processes: half of the time they wait for servers."""
    install(session, "test")
    session.run("pytest", *(session.posargs or ["--numprocesses=2", "--dist=worksteal"]))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on the Python that nox runs on; arguments after ``--`` go to pytest."""
    run_tests(session)
    tested.add(f"{sys.version_info.major}.{sys.version_info.minor}")


@nox.session(python=interpreters())
def tests_all(session: nox.Session) -> None:
    """Run the tests on every supported Python that exists here."""
    if session.python in tested:
        session.skip("the session tests has just run them on this Python")
    run_tests(session)


@nox.session
def storms(session: nox.Session) -> None:
    """Run the storms and kill runs: minutes of load and failure, on loopback; ``-- soak`` for one by name."""
    install(session, "test")
    chosen = ["-k", session.posargs[0]] if session.posargs else []
    session.run("pytest", "-m", "storm", "--timeout=900", "-rA", *chosen, *session.posargs[1:])


@nox.session
def matrix(session: nox.Session) -> None:
    """Try the transports that people plug in; ``-- --write`` puts the table into docs/transports.md."""
    install(session, "matrix")
    session.run("python", "-m", "tests.matrix", *session.posargs)


@nox.session(python=interpreters()[-1:])
def coverage(session: nox.Session) -> None:
    """Run the tests in one process, and report which branches of the package they leave out."""
    install(session, "test")
    session.env["COVERAGE_FILE"] = str(Path(session.create_tmp()).resolve() / "coverage")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "report")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package and of typical user code, with mypy and pyright."""
    install(session, "types")
    session.run("mypy")
    session.run("pyright")


@nox.session
def package(session: nox.Session) -> None:
    """Build what is to be published, inspect it, and use it in clean environments, extra by extra."""
    session.install(*nox.project.dependency_groups(PROJECT, "package"))
    built = Path(session.create_tmp()).resolve()
    shutil.rmtree(built)
    session.run("python", "-m", "build", "--outdir", str(built), silent=True)  # the wheel out of the sdist
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(sdist))
    session.run("check-wheel-contents", str(wheel))
    session.run("python", "tests/packaging/clean_environments.py", str(wheel), str(built))


@nox.session(python=interpreters()[:1])
def lowest(session: nox.Session) -> None:
    """Run the tests with the lowest versions of the direct dependencies, on the oldest Python."""
    session.install(*nox.project.dependency_groups(PROJECT, "package"))
    pins = str(Path(session.create_tmp()).resolve() / "lowest.txt")
    resolve = ["uv", "pip", "compile", "--quiet", "--upgrade", "--all-extras", "--resolution=lowest-direct"]
    session.run(*resolve, "pyproject.toml", "--output-file", pins)
    session.install("-e", ".[all]", "-c", pins, *nox.project.dependency_groups(PROJECT, "test"))
    # A pandas of today wants a newer SQLAlchemy than the package does.
    left_out = ["--deselect=tests/docs/test_pages.py::test_data_analysis"]
    # Of an old starlette's test client.
    left_out += ["-Wignore:The anyio.abc.BlockingPortal alias is deprecated:DeprecationWarning"]
    session.run("pytest", "--numprocesses=2", "--dist=worksteal", *left_out, *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; a broken link or anchor fails it."""
    session.install("-e", ".[all]", *nox.project.dependency_groups(PROJECT, "docs"))
    session.run("zensical", "build", "--strict", "--clean", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Show the client at work on the sandbox: real HTTP on loopback, no account needed."""
    session.install("-e", ".[cli,sandbox,sql]")
    session.run("lemcal", "me", "--sandbox")
    session.run("lemcal", "meetings", "--sandbox")
    database = Path(session.create_tmp()) / "lemcal-sandbox.db"
    for file in database.parent.glob(f"{database.name}*"):
        file.unlink()
    session.env["LEMCAL_DB"] = f"sqlite:///{database}"
    session.run("lemcal", "sync", "--sandbox")
    session.run("python", "examples/sync_again.py")
    session.run("python", "examples/tour.py")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure against peers in the same run; ``-- NAME ARGUMENTS`` for one of them (``run --out DIR``)."""
    default = {
        "run": [],
        "limiter": ["--quick"],
        "limiter_redis": [],
        "webhooks": [],
        "sync": [],
        "fleet": [],
    }
    chosen, *arguments = session.posargs or [""]
    if chosen and not Path(f"benchmarks/{chosen}.py").exists():
        session.error(f"there is no benchmark {chosen!r}: {', '.join(default)}")
    install(session, "bench")
    missed: list[str] = []
    for name in [chosen] if chosen else default:
        try:
            session.run("python", "-m", f"benchmarks.{name}", *(arguments if chosen else default[name]))
        except CommandFailed:  # the others are worth knowing all the same
            missed.append(name)
    if missed:
        session.error(f"figures out of their bounds, or no figures: {', '.join(missed)}")
