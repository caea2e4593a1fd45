"""The pytest plugin, in a separate pytest run."""

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

    def import_limiter():
        module = types.ModuleType("lemcal_async.ratelimit")
        module.fresh_default = fresh_default
        sys.modules["lemcal_async.ratelimit"] = module
"""


@pytest.fixture
def plugin_run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Prepare a pytest run with the plugin, whether or not the package is installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delitem(sys.modules, "lemcal_async.ratelimit", raising=False)
    pytester.makepyfile(limiter=LIMITER)
    pytester.makeini("[pytest]\naddopts = -p lemcal_async.pytest_plugin\nfilterwarnings = error\n")
    return pytester


def test_each_test_gets_a_fresh_limiter(plugin_run: pytest.Pytester) -> None:
    """Once the limiter has been imported, each test gets a fresh one; before that, nothing happens."""
    plugin_run.makepyfile("""
        from limiter import entered, import_limiter

        def test_1_unrelated():
            assert [] == entered
            import_limiter()

        def test_2_fresh():
            assert ["in"] == entered

        def test_3_fresh_again():
            assert ["in", "out", "in"] == entered
    """)
    plugin_run.runpytest_inprocess().assert_outcomes(passed=3)


def test_fixture_serves_a_sandbox_with_a_fresh_limiter(plugin_run: pytest.Pytester) -> None:
    """The fixture needs no account, and each test gets its own sandbox."""
    plugin_run.makepyfile("""
        import httpx, pytest
        from limiter import entered, import_limiter

        import_limiter()

        @pytest.mark.parametrize("turn", range(2))
        def test_sandbox(lemcal_sandbox, turn):
            auth = (lemcal_sandbox.user_id, lemcal_sandbox.api_key)
            response = httpx.get(lemcal_sandbox.base_url + "/me", auth=auth, trust_env=False)
            assert 200 == response.status_code
            assert 1 == len(lemcal_sandbox.requests)
            assert ["in", "in"] == entered[-2:]
    """)
    plugin_run.runpytest_inprocess().assert_outcomes(passed=2)


def test_fixture_is_documented(plugin_run: pytest.Pytester) -> None:
    """``pytest --fixtures`` lists the fixture."""
    plugin_run.runpytest_inprocess("--fixtures").stdout.fnmatch_lines(
        ["lemcal_sandbox*", "*Serve a sandbox*"]
    )


def test_plugin_imports_nothing_heavy() -> None:
    """Pytest imports the plugin in every run, even in projects that do not use it."""
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
