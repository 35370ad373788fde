"""The documentation site is built from the pages without a warning, and its links work without a network."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT) for path in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])


def build(root: Path, destination: Path) -> subprocess.CompletedProcess[str]:
    """Build as configured in docs/conf.py. A missing page, a missing heading or bad Markdown makes Sphinx fail."""
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "--keep-going", "-c", "docs", ".", str(destination)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """The links of a page, the files that it loads, and its link targets."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.names: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.names |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("img", "script", "iframe", "source") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") != "canonical":
            self.loads.append(found["href"])


def test_every_page_of_the_repository_is_a_page_of_the_site(site: Path) -> None:
    assert [str(page) for page in PAGES if not (site / page.with_suffix(".html")).is_file()] == []
    assert 'url=docs/index.html"' in (site / "index.html").read_text()


def test_every_link_on_the_site_leads_to_a_file_and_a_heading_of_the_site(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    links = 0
    for path, page in pages.items():
        for target in page.links:
            parts = urlsplit(target)
            if parts.scheme:
                assert parts.scheme == "https", f"{path.name}: {target}"
                continue
            links += 1
            found = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            found = found / "index.html" if found.is_dir() else found
            assert found.is_file() and found.is_relative_to(site), f"{path.name}: {target}"
            if parts.fragment and found in pages:
                assert parts.fragment in pages[found].names, f"{path.name}: {target}"
    assert links > 1000


def test_the_site_loads_nothing_from_another_machine(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert [target for target in Page(path).loads if urlsplit(target).netloc] == [], path.name


def test_every_page_is_in_the_side_bar_of_the_index(site: Path) -> None:
    index = Page(site / "docs" / "index.html")
    links = [link.partition("#")[0] for link in index.links if not urlsplit(link).scheme]
    linked = {(site / "docs" / (link or "index.html")).resolve() for link in links}
    assert [str(page) for page in PAGES if (site / page.with_suffix(".html")).resolve() not in linked] == []


def test_a_link_to_a_missing_page_or_heading_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Index\n\n[a](other.md) [b](nowhere.md) [c](other.md#nothing)\n")
    (tmp_path / "docs" / "other.md").write_text("# Other\n\n## Something\n")
    settings = (ROOT / "docs" / "conf.py").read_text().replace('["site"]', "[]")
    (tmp_path / "docs" / "conf.py").write_text(settings)
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr and "nothing" in done.stderr, done.stderr
