"""The pytest plugin, in a pytest run of its own."""

import subprocess
import sys

import pytest

pytest_plugins = "pytester"

LIMITER = """
    import contextlib, sys, types
    entered = []

    @contextlib.contextmanager
    def fresh_default():
        entered.append("in")
        yield
        entered.append("out")

    def imported():
        module = types.ModuleType("lemcal_async.ratelimit")
        module.fresh_default = fresh_default
        sys.modules["lemcal_async.ratelimit"] = module
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Prepare a run that has the plugin, whether the package is installed or not."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delitem(sys.modules, "lemcal_async.ratelimit", raising=False)
    pytester.makepyfile(limiter=LIMITER)
    pytester.makeini("[pytest]\naddopts = -p lemcal_async.pytest_plugin\nfilterwarnings = error\n")
    return pytester


def test_every_test_has_a_fresh_limiter_once_it_is_used(run: pytest.Pytester) -> None:
    """Before the limiter is imported nothing happens; afterward each test gets a fresh one."""
    run.makepyfile("""
        from limiter import entered, imported

        def test_1_unrelated():
            assert [] == entered
            imported()

        def test_2_fresh():
            assert ["in"] == entered

        def test_3_fresh_again():
            assert ["in", "out", "in"] == entered
    """)
    run.runpytest_inprocess().assert_outcomes(passed=3)


def test_the_fixture_serves_a_sandbox_with_a_fresh_limiter(run: pytest.Pytester) -> None:
    """It needs no account, and every test gets a sandbox of its own."""
    run.makepyfile("""
        import httpx, pytest
        from limiter import entered, imported

        imported()

        @pytest.mark.parametrize("turn", range(2))
        def test_sandbox(lemcal_sandbox, turn):
            auth = (lemcal_sandbox.user_id, lemcal_sandbox.api_key)
            answer = httpx.get(lemcal_sandbox.base_url + "/me", auth=auth, trust_env=False)
            assert 200 == answer.status_code
            assert 1 == len(lemcal_sandbox.requests)
            assert ["in", "in"] == entered[-2:]
    """)
    run.runpytest_inprocess().assert_outcomes(passed=2)


def test_the_fixture_is_documented(run: pytest.Pytester) -> None:
    """``pytest --fixtures`` shows it."""
    run.runpytest_inprocess("--fixtures").stdout.fnmatch_lines(["lemcal_sandbox*", "*Serve a sandbox*"])


def test_the_plugin_imports_nothing_heavy() -> None:
    """Pytest imports it in every run, even in projects that do not use it."""
    program = "import sys, lemcal_async.pytest_plugin; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    heavy = {
        "anyio",
        "attrs",
        "cattrs",
        "httpx",
        "starlette",
        "tenacity",
        "uvicorn",
        "lemcal_async.ratelimit",
    }
    assert set() == heavy & set(done.stdout.split())
