"""The accounts file: its format, the messages for an invalid one, and that no key is shown."""

import base64
import os
import pickle
import tomllib
import traceback
from pathlib import Path

import pytest

from lemcal_async._auth import Secret
from lemcal_async.cli import _accounts
from lemcal_async.cli._accounts import Account, read_accounts
from lemcal_async.errors import ConfigurationError

posix_only = pytest.mark.skipif(os.name != "posix", reason="only POSIX has mode bits")

SECRET = "hush-3f8Kq"
ENVIRON = {"SALES_KEY": SECRET, "BLANK": " "}
COMBINED = base64.b64encode(f"usr_b:{SECRET}".encode()).decode()

SALES = '[[account]]\nname = "sales"\nuser_id = "usr_a"\napi_key_env = "SALES_KEY"\n'


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment variables that the files name."""
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)


def written(folder: Path, content: str | bytes, mode: int = 0o600) -> Path:
    """Write an accounts file."""
    file = folder / "accounts.toml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    file.chmod(mode)
    return file


def problem_of(path: Path) -> str:
    """Return the error message for a file, after checking that the error does not contain the key."""
    with pytest.raises(ConfigurationError) as caught:
        read_accounts(path)
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    package = str(Path(_accounts.__file__).parent)
    for frame in frames.stack:
        if frame.filename.startswith(package):
            assert SECRET not in str(frame.locals)
    assert (None, None) == (caught.value.__cause__, caught.value.__context__)
    message = str(caught.value)
    assert SECRET not in message
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_accounts_file(tmp_path: Path) -> None:
    """Accounts are returned in file order, with keys from the file or from the environment."""
    path = written(
        tmp_path,
        f'{SALES}[[account]]\nname = "support"\napi_key = " {COMBINED}\\n"\n'
        f'[[account]]\nname = "ops"\nuser_id = "usr_c"\napi_key = "{SECRET}"\n',
    )
    expected = [
        Account("sales", "usr_a", Secret(SECRET)),
        Account("support", "usr_b", Secret(COMBINED)),
        Account("ops", "usr_c", Secret(SECRET)),
    ]
    assert expected == read_accounts(path)


def test_file_written_on_windows(tmp_path: Path) -> None:
    """A byte order mark and CRLF, as Windows editors write them, are accepted."""
    path = written(tmp_path, b"\xef\xbb\xbf" + SALES.replace("\n", "\r\n").encode())
    assert [Account("sales", "usr_a", Secret(SECRET))] == read_accounts(path)


ACCOUNT_1 = "account 1 ('sales'): "


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "the file contains no accounts; add an [[account]] table with name, user_id and api_key_env"),
        ("account = []", "the file contains no accounts; add an [[account]] table with name, user_id and"),
        ("accounts = 1", "unknown key 'accounts'; the file may contain only [[account]] tables"),
        ("account = 1", "'account' must be written as [[account]] tables, with double brackets"),
        ("account = [1]", "'account' must be written as [[account]] tables, with double brackets"),
        (
            SALES.replace("[[", "[").replace("]]", "]"),
            "'account' must be written as [[account]] tables, with",
        ),
        (
            SALES + "color = 1",
            ACCOUNT_1 + "unknown key 'color'; the keys are name, user_id, api_key, api_key",
        ),
        (SALES.replace('"usr_a"', "5"), ACCOUNT_1 + "user_id must be a string in quotes, not int"),
        (SALES.replace('"sales"', "5"), "account 1: name must be a string in quotes, not int"),
        (SALES.replace('name = "sales"', ""), "account 1: name is missing; add it"),
        (SALES.replace('"sales"', '" "'), "account 1 (' '): name is missing; add it"),
        (SALES.replace("api_key_env", "#"), ACCOUNT_1 + "the key is missing; add api_key_env, the name"),
        (
            SALES + f'api_key = "{SECRET}"',
            ACCOUNT_1 + "api_key and api_key_env are both present; remove one of them",
        ),
        (
            SALES.replace("SALES_KEY", SECRET),
            ACCOUNT_1 + "the environment variable named by api_key_env is unset",
        ),
        (
            SALES.replace("SALES_KEY", "BLANK"),
            ACCOUNT_1 + "the environment variable named by api_key_env is",
        ),
        (SALES.replace('user_id = "usr_a"', ""), ACCOUNT_1 + "no user id: pass user_id=, or pass the key as"),
        (
            SALES.replace("usr_a", SECRET),
            ACCOUNT_1 + "user_id: a user id starts with 'usr_'; this value does not",
        ),
        (
            SALES.replace("api_key_env", "api_key").replace("SALES_KEY", " "),
            ACCOUNT_1 + "api_key: the value is empty",
        ),
        (
            SALES + SALES.replace("usr_a", "usr_b"),
            "account 2 ('sales') has the same name as account 1 ('sales'); give",
        ),
        (
            SALES + SALES.replace("sales", "ops"),
            "account 2 ('ops') has the same user id as account 1 ('sales'); remove",
        ),
        (f"[[account]]\nname = {SECRET}", "the accounts file is not valid TOML; check line 2, column "),
        (f'[[account]]\nname = "{SECRET}', "the accounts file is not valid TOML; check end of document"),
        (b"name = '\xff'", "the accounts file is not valid UTF-8; save it as UTF-8"),
    ],
)
def test_invalid_file(tmp_path: Path, content: str | bytes, problem: str) -> None:
    """The message says in one line what is wrong, in which table, and what to do, without a secret."""
    assert problem == problem_of(written(tmp_path, content))[: len(problem)]


def test_parser_error_without_a_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the parser's message contains no position, none of it is shown."""

    def broken(text: str) -> None:
        error = tomllib.TOMLDecodeError("", text, 0)
        error.args = (f"cannot read {text}",)  # newer Python versions add the position
        raise error

    monkeypatch.setattr(tomllib, "loads", broken)
    problem = problem_of(written(tmp_path, SECRET))
    assert "the accounts file is not valid TOML; check its quotes and brackets" == problem


def test_unreadable_file(tmp_path: Path) -> None:
    """A missing or unreadable file has its own message."""
    missing = problem_of(tmp_path / "missing.toml")
    assert "the accounts file cannot be read: No such file or directory" == missing
    assert problem_of(tmp_path).startswith("the accounts file cannot be read: ")


@posix_only
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_file_readable_by_other_users(tmp_path: Path, mode: int) -> None:
    """A file that other users can read may name variables, but not contain keys."""
    path = written(tmp_path, SALES, mode)
    assert [Account("sales", "usr_a", Secret(SECRET))] == read_accounts(path)

    path = written(tmp_path, SALES.replace("api_key_env", "api_key"), mode)
    expected = f"other users can read the API keys in this file; run: chmod 600 {path}"
    assert expected == problem_of(path)


def test_system_without_mode_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode bits are ignored on systems where they have no meaning."""
    monkeypatch.setattr(_accounts, "_HAS_MODES", False)
    path = written(tmp_path, SALES.replace("_env", "").replace("SALES_KEY", SECRET), 0o666)
    assert [Account("sales", "usr_a", Secret(SECRET))] == read_accounts(path)


def test_account_hides_its_key() -> None:
    """An account's repr masks the key, and an account cannot be pickled."""
    account = Account("sales", "usr_a", Secret(SECRET))
    assert "Account(name='sales', user_id='usr_a', api_key=Secret(***))" == repr(account)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(account)
