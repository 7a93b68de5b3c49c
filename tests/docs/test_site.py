"""The site of docs/: it builds without a warning, and a page loads nothing from another address."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from blip2edge.cli.parser import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
LOADED_BY = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
"""The attribute of an element whose address a browser loads by itself."""
LINKS = ("stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "manifest", "modulepreload")
"""Kinds of <link> that a browser loads or connects to by itself."""
IN_STYLES = re.compile(r"url\(\s*['\"]?\s*((?:https?:)?//[^)'\"]+)|@import\s+['\"]((?:https?:)?//[^'\"]+)")


class Loads(HTMLParser):
    """Collects the addresses that a browser loads by itself while it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in LOADED_BY:
            self.found += [values.get(LOADED_BY[tag], ""), *values.get("srcset", "").split(",")]
        elif tag == "link" and set(values.get("rel", "").split()) & set(LINKS):
            self.found.append(values.get("href", ""))
        self.found += ["".join(found) for found in IN_STYLES.findall(values.get("style", ""))]


def loads(html: str) -> list[str]:
    """Addresses outside the site that a page loads."""
    parser = Loads()
    parser.feed(html)
    styles = "".join(re.findall(r"<style[^>]*>(.*?)</style>", html, re.DOTALL))
    found = [address.strip() for address in parser.found] + ["".join(each) for each in IN_STYLES.findall(styles)]
    return [address for address in found if re.match(r"(?:https?:)?//", address)]


def test_every_page_is_found_from_the_first_pages() -> None:
    """The tables of README.md and docs/index.md link to every page."""
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    table = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert pages - set(re.findall(r"\]\(([\w-]+\.md)\)", table)) == set()
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Documentation")[2].partition("\n## ")[0]
    assert pages - set(re.findall(r"\]\(docs/([\w-]+\.md)\)", readme)) == set()


@pytest.fixture(scope="module", name="site")
def _site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    target = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(target), strict=True))  # a warning is an error
    return target


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://unpkg.com/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.googleapis.com/css">',
        '<link rel="preconnect" href="https://fonts.gstatic.com" crossorigin>',
        '<img src="http://example.org/a.png">',
        "<style>@import 'https://example.org/a.css'</style>",
        '<p style="background: url(https://example.org/a.png)">',
    ],
)
def test_what_is_loaded_from_outside_is_found(html: str) -> None:
    assert len(loads(html)) == 1
    assert loads('<a href="https://example.org">a link is not loaded</a><link rel="canonical" href="https://x">') == []


@pytest.mark.slow
def test_the_site_has_every_page_and_loads_nothing_from_outside(site: Path) -> None:
    pages = {path.relative_to(site).with_suffix("").as_posix(): path for path in site.rglob("*.html")}
    written = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert written | {"404"} == set(pages)
    assert {f"commands/{name}" for name in COMMANDS} <= written
    outside = {name: loads(path.read_text(encoding="utf-8")) for name, path in pages.items()}
    assert {name: found for name, found in outside.items() if found} == {}
    for style in site.rglob("*.css"):
        assert IN_STYLES.findall(style.read_text(encoding="utf-8")) == [], style.name


@pytest.mark.slow
def test_scripts_load_from_outside_only_what_no_page_has(site: Path) -> None:
    """The theme's script fetches mermaid for diagrams, and figures of a repository; no page has either."""
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert 'class="mermaid"' not in text
        assert 'data-md-component="source"' not in text
