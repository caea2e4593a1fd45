"""The reference documents every parameter, field and error.

Its tables are built from Google-style docstrings: ``Args:``, ``Attributes:`` and ``Raises:``.
"""

import builtins
import inspect
import re
from collections.abc import Iterator
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import pytest

from lemcal_async import errors, ratelimit

from .conftest import ROOT

PAGES = {page.name: page for page in (ROOT / "docs" / "reference").glob("*.md")}
ENTRY = re.compile(r"^::: (\S+)\n((?: .*\n|\n(?= ))*)", re.MULTILINE)
SECTION = re.compile(r"^(Args|Attributes|Raises):\n((?:    .*\n|\n(?= ))+)", re.MULTILINE)
ROW = re.compile(r"^    \*{0,2}(\w+)(?: \(.+\))?: \S", re.MULTILINE)


def shown(page: str) -> Iterator[tuple[str, Any]]:
    """Yield the functions, classes and methods on a page, with their names."""
    for path, options in ENTRY.findall(PAGES[page].read_text(encoding="utf-8")):
        owner = resolve_name(path)
        listed = re.search(r"members: \[(.*)\]", options)
        chosen = listed[1].split(", ") if listed else None
        if isinstance(owner, ModuleType):
            for name in chosen or getattr(owner, "__all__", vars(owner)):
                if getattr(getattr(owner, name), "__module__", "") == path:
                    yield from with_methods(f"{path}.{name}", getattr(owner, name))
        elif getattr(owner, "__module__", "").startswith("lemcal_async"):
            found = list(with_methods(path, owner, chosen))
            yield from found["merge_init_into_class: false" in options :]


def with_methods(path: str, value: Any, chosen: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield a function or a class, and the public methods of a class."""
    if not inspect.isroutine(value) and not isinstance(value, type):
        return
    yield path, value
    for name in vars(value) if isinstance(value, type) else ():
        is_shown = not name.startswith("_") if chosen is None else name in chosen
        if is_shown and inspect.isroutine(getattr(value, name)):
            yield f"{path}.{name}", getattr(value, name)


def sections(value: Any) -> dict[str, list[str]]:
    """Return the names listed in each section of a docstring."""
    return {title: ROW.findall(text) for title, text in SECTION.findall(f"{inspect.getdoc(value)}\n")}


def parameters(value: Any) -> list[str]:
    """Return the names of the parameters that a user passes."""
    if getattr(value, "__init__", None) is object.__init__ or getattr(value, "_is_protocol", False):
        return []
    names = inspect.signature(value).parameters
    return [name for name in names if name != "self" and not name.startswith("_")]


def documented(kind: type) -> list[str]:
    """Return the fields documented by a class."""
    properties = [name for name, value in vars(kind).items() if isinstance(value, property) and value.__doc__]
    return sections(kind).get("Attributes", []) + properties


@pytest.mark.parametrize(
    "module",
    [
        "lemcal_async",
        "lemcal_async.errors",
        "lemcal_async.events",
        "lemcal_async.fastapi",
        "lemcal_async.fleet",
        "lemcal_async.models",
        "lemcal_async.ratelimit",
        "lemcal_async.sandbox",
        "lemcal_async.sandbox.faults",
        "lemcal_async.sync",
        "lemcal_async.transport",
        "lemcal_async.webhooks",
    ],
)
def test_public_names_are_documented(module: str) -> None:
    """Every function and class of a public module is on a page of the reference."""
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES.values())
    names = {path for path, _ in ENTRY.findall(pages)} | {name for page in PAGES for name, _ in shown(page)}
    found = {name.rpartition(".")[2] for name in names}
    owner = resolve_name(module)
    for name in owner.__all__:
        value = getattr(owner, name)
        assert name in found or not (inspect.isroutine(value) or isinstance(value, type))


@pytest.mark.parametrize("page", PAGES)
def test_parameters_and_fields(page: str) -> None:
    """Every parameter and field has a row, in order, and there are no other rows."""
    for name, value in shown(page):
        described = sections(value)
        rows = described.get("Args", []) + described.get("Attributes", [])
        if isinstance(value, type) and issubclass(value, Exception):
            known = {"message", *(field for base in value.__mro__ for field in documented(base))}
            assert set(rows) <= set(parameters(value)) <= known, name
        else:
            assert parameters(value) == rows, name


@pytest.mark.parametrize("page", PAGES)
def test_errors(page: str) -> None:
    """Every error that a docstring mentions has a row, and every row names an existing exception."""
    for name, value in shown(page):
        for error in sections(value).get("Raises", []):
            assert any(hasattr(home, error) for home in (errors, ratelimit, builtins)), name
        assert not re.search(r"\b[Rr]aises \w*Error", SECTION.sub("", f"{inspect.getdoc(value)}\n")), name
