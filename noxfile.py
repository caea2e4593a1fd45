"""The project's tasks: tests, checks, docs and benchmarks, each in its own environment."""

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
    """Whether an interpreter starts: the command may be only a version manager's shim."""
    try:
        return (
            subprocess.run([command, "-c", ""], capture_output=True, check=False, timeout=60).returncode == 0
        )
    except OSError:
        return False


def interpreters() -> list[str]:
    """Return the supported Python versions that are installed, including those of pyenv."""
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
    """Install the package with all extras, and some dependency groups."""
    session.install("-e", ".[all]", *nox.project.dependency_groups(PROJECT, *groups))


tested: set[str] = set()  # the Python versions on which the tests have passed in this run of nox


def run_tests(session: nox.Session) -> None:
    """Install the test dependencies and run the tests in three processes, which often wait for servers."""
    install(session, "test")
    session.run("pytest", *(session.posargs or ["--numprocesses=3", "--dist=worksteal"]))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on the Python that runs nox; arguments after ``--`` are passed to pytest."""
    run_tests(session)
    tested.add(f"{sys.version_info.major}.{sys.version_info.minor}")


@nox.session(python=interpreters())
def tests_all(session: nox.Session) -> None:
    """Run the tests on every supported Python that is installed."""
    if session.python in tested:
        session.skip("the tests have already passed on this Python")
    run_tests(session)


@nox.session
def storms(session: nox.Session) -> None:
    """Run the stress and kill tests, which take minutes; ``-- soak`` selects tests by name."""
    install(session, "test")
    chosen = ["-k", session.posargs[0]] if session.posargs else []
    session.run("pytest", "-m", "storm", "--timeout=900", "-rA", *chosen, *session.posargs[1:])


@nox.session
def matrix(session: nox.Session) -> None:
    """Test third-party transports; ``-- --write`` updates the table in docs/transports.md."""
    install(session, "matrix")
    session.run("python", "-m", "tests.matrix", *session.posargs)


@nox.session(python=interpreters()[-1:])
def coverage(session: nox.Session) -> None:
    """Run the tests in one process and report the branches of the package that they miss."""
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
    """Build and check the package, and test it in clean environments, one extra at a time."""
    session.install(*nox.project.dependency_groups(PROJECT, "package"))
    built = Path(session.create_tmp()).resolve()
    shutil.rmtree(built)
    session.run("python", "-m", "build", "--outdir", str(built), silent=True)  # the wheel from the sdist
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
    # Current versions of pandas require a newer SQLAlchemy than the package does.
    options = ["--deselect=tests/docs/test_pages.py::test_data_analysis"]
    # Raised by the test client of old versions of starlette.
    options += ["-Wignore:The anyio.abc.BlockingPortal alias is deprecated:DeprecationWarning"]
    session.run("pytest", "--numprocesses=2", "--dist=worksteal", *options, *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; broken links and anchors are errors."""
    session.install("-e", ".[all]", *nox.project.dependency_groups(PROJECT, "docs"))
    session.run("zensical", "build", "--strict", "--clean", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Run the client against the sandbox, with real HTTP on loopback and without an account."""
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
    """Run the benchmarks, which include peers; ``-- NAME ARGUMENTS`` runs one of them (``run --out DIR``)."""
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
        session.error(f"there is no benchmark {chosen!r}; the benchmarks are: {', '.join(default)}")
    install(session, "bench")
    failed: list[str] = []
    for name in [chosen] if chosen else default:
        try:
            session.run("python", "-m", f"benchmarks.{name}", *(arguments if chosen else default[name]))
        except CommandFailed:  # run the other benchmarks anyway
            failed.append(name)
    if failed:
        session.error(f"benchmarks that failed or exceeded their bounds: {', '.join(failed)}")
