"""The built book's files, as a parser reads them: links, anchors, pictures, size."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

MEGABYTE = 1_000_000
VOID = {"img", "link", "script", "source", "iframe"}  # elements that load what they name


@dataclass
class Page(HTMLParser):
    """What a page names, loads and links to."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    undescribed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        relations = set(values.get("rel", "").split())
        if tag in VOID and not relations & {"canonical", "prev", "next", "search", "index"}:
            self.loaded += [values[name] for name in ("src", "href") if name in values]
        if tag == "img" and not values.get("alt", "").strip():
            self.undescribed.append(values.get("src", ""))


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.fixture(scope="module")
def pages(built_book: Path) -> dict[Path, Page]:
    files = (p for p in built_book.rglob("*.html") if "_static" not in p.parts)
    return {path.resolve(): read(path) for path in files}


def test_a_parsed_page_has_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text('<h1 id="b">B</h1><a href="#b">b</a><img src="c.png"><img src="d.png" alt="D">')
    page = read(path)
    assert (page.anchors, page.links) == ({"b"}, ["#b"])
    assert (page.loaded, page.undescribed) == (["c.png", "d.png"], ["c.png"])


def test_links_and_anchors_resolve(pages: dict[Path, Page], built_book: Path) -> None:
    lost = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link in ("", "#"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file() or (
                anchor and target in pages and anchor not in pages[target].anchors
            ):
                lost.append(f"{path.relative_to(built_book)}: {link}")
    assert lost == []


def test_what_a_page_loads_is_in_the_folder(pages: dict[Path, Page], built_book: Path) -> None:
    lost = []
    for path, page in pages.items():
        for address in page.loaded:
            parts = urlsplit(address)
            local = not parts.scheme and not parts.netloc
            if parts.scheme != "data" and not (
                local and (path.parent / unquote(parts.path)).is_file()
            ):
                lost.append(f"{path.relative_to(built_book)}: {address}")
    assert lost == []


def test_every_picture_says_what_it_shows(pages: dict[Path, Page]) -> None:
    assert {path.name: p.undescribed for path, p in pages.items() if p.undescribed} == {}


def test_the_book_is_small(built_book: Path) -> None:
    size = sum(path.stat().st_size for path in built_book.rglob("*") if path.is_file())
    assert size < 40 * MEGABYTE


def test_every_page_says_what_it_is_about(built_book: Path) -> None:
    said = {}
    for page in sorted((built_book / "book").glob("*.html")):
        html = page.read_text(encoding="utf-8")
        (text,) = re.findall(r'<meta name="description" content="([^"]+)"', html)
        assert 50 < len(text) < 300, page.name
        said[page.name] = text
        (picture,) = re.findall(r'property="og:image" content="[^"]*/(_images/[^"]+)"', html)
        assert (built_book / picture).is_file()
    assert len(set(said.values())) == len(said) >= 15
    assert said["09-crf.html"].startswith("A network sees windows")
