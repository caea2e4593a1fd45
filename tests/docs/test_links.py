"""Links and images have valid targets, and the site's navigation contains every page.

The site's build checks links between pages and their anchors; these tests check the rest.
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import PAGES, ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OUTSIDE = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """A relative link points to a file or folder in this repository, and its anchor to a heading."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {link}"
        if anchor and file.suffix == ".md" and "reference" not in file.parts:
            assert anchor in headings(file), f"{page.name}: {link}"


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles}


def test_site_links_stay_in_docs() -> None:
    """The site's pages do not link to files outside ``docs/``, which the site does not contain."""
    for page in PAGES[1:]:
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            if "://" not in link and link.partition("#")[0]:
                assert (page.parent / link.partition("#")[0]).resolve().is_relative_to(ROOT / "docs"), link


def test_navigation() -> None:
    """The navigation contains every page exactly once, and nothing else."""
    site: dict[str, Any] = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    listed = list(leaves(site["project"]["nav"]))
    assert sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]) == sorted(listed)


def leaves(item: Any) -> Iterator[str]:
    """Yield the pages of a navigation tree."""
    if isinstance(item, str):
        yield item
        return
    for part in item.values() if isinstance(item, dict) else item:
        yield from leaves(part)


def test_examples() -> None:
    """The examples page includes every example, and every included file exists."""
    shown = re.findall(r'^--8<-- "(.+)"$', (ROOT / "docs" / "examples.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(f"examples/{file.name}" for file in (ROOT / "examples").glob("*.py")) == sorted(shown)


def test_hosts() -> None:
    """Pages name only the vendor's hosts, this machine, and hosts reserved for documentation."""
    reserved = r"example(?:\.com|\.org|\.net)?|localhost|internal"
    known = re.compile(rf"(?:[\w-]+\.)*(?:lemcal\.com|{reserved})|host|127\.0\.0\.1")
    for page in [*PAGES, *OUTSIDE]:
        for host in re.findall(r"\w+://(?:[^\s/@]*@)?([\w.-]+)", page.read_text(encoding="utf-8")):
            assert known.fullmatch(host) or page in OUTSIDE, f"{page.name}: {host}"
