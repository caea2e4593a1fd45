"""Links and pictures lead somewhere, and the site's navigation has every page.

Links between pages, and their anchors, fail the build of the site; here is what that does not look at.
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
    """A relative link leads to a file or folder of this repository, to a heading if it names one."""
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


def test_the_site_links_to_pages_only() -> None:
    """A page of the site has no links out of ``docs/``: nothing would be there."""
    for page in PAGES[1:]:
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            if "://" not in link and link.partition("#")[0]:
                assert (page.parent / link.partition("#")[0]).resolve().is_relative_to(ROOT / "docs"), link


def test_navigation() -> None:
    """Every page is in the navigation, once, and nothing else is."""
    site: dict[str, Any] = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    listed = list(leaves(site["project"]["nav"]))
    assert sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]) == sorted(listed)


def leaves(item: Any) -> Iterator[str]:
    """Yield the pages of a navigation."""
    if isinstance(item, str):
        yield item
        return
    for part in item.values() if isinstance(item, dict) else item:
        yield from leaves(part)


def test_examples() -> None:
    """Every example is on its page, and what the page includes exists."""
    shown = re.findall(r'^--8<-- "(.+)"$', (ROOT / "docs" / "examples.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(f"examples/{file.name}" for file in (ROOT / "examples").glob("*.py")) == sorted(shown)


def test_hosts() -> None:
    """No page names a host that is not the vendor's, this machine, or reserved for documentation."""
    reserved = r"example(?:\.com|\.org|\.net)?|localhost|internal"
    known = re.compile(rf"(?:[\w-]+\.)*(?:lemcal\.com|{reserved})|host|127\.0\.0\.1")
    for page in [*PAGES, *OUTSIDE]:
        for host in re.findall(r"\w+://(?:[^\s/@]*@)?([\w.-]+)", page.read_text(encoding="utf-8")):
            assert known.fullmatch(host) or page in OUTSIDE, f"{page.name}: {host}"
