"""Every page of the built book in a real browser: wide and light, narrow and dark, on paper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from conftest import DESKTOP, PHONE, PageOpener, book_folder

PAGES = sorted(
    page.relative_to(book_folder()).as_posix()
    for page in book_folder().rglob("*.html")
    if "_static" not in page.parts and page != book_folder() / "index.html"  # which redirects
)
VIEWS = {"desktop": (DESKTOP, False), "phone": (PHONE, True)}  # name: (width, dark)
PAPER = 718  # width of A4 between usual margins, in CSS pixels


def views_of(path: str) -> list[str]:
    """Both; but the listings of source code are alike, and narrow and dark is the harder one."""
    return ["phone"] if path.startswith("_modules/deconvnet/") else list(VIEWS)


@dataclass(frozen=True)
class View:
    """A page as opened, and what went wrong by then."""

    path: str
    page: object
    problems: list[str]
    dark: bool


# One loading serves all tests of a page: pytest runs the tests of a module's parameter together.
@pytest.fixture(
    scope="module",
    params=[(path, view) for path in PAGES or ["book/index.html"] for view in views_of(path)],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def view(request: pytest.FixtureRequest, browser, built_book) -> Iterator[View]:
    path, name = request.param
    width, dark = VIEWS[name]
    opener = PageOpener(browser, built_book)
    yield View(path, opener(path, width, dark), opener.problems, dark)
    opener.close()


def test_nothing_goes_wrong_and_nothing_leaves_the_machine(view: View) -> None:
    assert view.problems == []


def test_pictures_are_there_and_described(view: View) -> None:
    bad = view.page.evaluate(
        """async () => {
            const pictures = [...document.images];
            pictures.forEach(p => { p.loading = 'eager'; });
            await Promise.all(pictures.map(p => p.decode().catch(() => null)));
            return pictures.filter(p => !p.naturalWidth || !p.alt.trim())
                .map(p => `${p.getAttribute('src')}: alt "${p.alt}", ${p.naturalWidth} px`);
        }"""
    )
    assert bad == []


def test_the_page_does_not_scroll_sideways(view: View) -> None:
    wide = view.page.evaluate(
        """() => {
            const room = document.documentElement.clientWidth;
            if (document.documentElement.scrollWidth <= room) return [];
            return [...document.querySelectorAll('body *')]
                .filter(e => e.checkVisibility() && e.getBoundingClientRect().right > room + 1)
                .map(e => `${e.tagName}.${e.className}: ${e.getBoundingClientRect().right}`);
        }"""
    )
    assert wide[:8] == []


def test_formulas_are_drawn(view: View) -> None:
    sources, drawn, broken, raw = view.page.evaluate(
        r"""() => {
            const article = document.querySelector('article, main') ?? document.body;
            const prose = article.cloneNode(true);
            prose.querySelectorAll('pre, code, mjx-container, script, style')
                .forEach(e => e.remove());
            return [
                article.querySelectorAll('.math').length,
                article.querySelectorAll('.math mjx-container').length,
                article.querySelectorAll('mjx-merror, [data-mjx-error]').length,
                prose.textContent.match(/\$\$|\\\(|\\\[|\\(begin|frac|sum|mathbf)\b/g) ?? [],
            ];
        }"""
    )
    assert drawn >= sources
    assert (broken, raw) == (0, [])


def test_label_maps_keep_their_colours(view: View) -> None:
    """No filter on a picture or around it; in the dark, a figure lies on white."""
    if view.dark:
        assert view.page.evaluate("document.documentElement.dataset.theme") == "dark"
    changed = view.page.evaluate(
        """dark => {
            const pictures = document.querySelectorAll(
                'article img, article canvas, article svg:not(mjx-container svg)');
            const bad = [];
            for (const picture of pictures) {
                for (let e = picture; e; e = e.parentElement) {
                    const style = getComputedStyle(e);
                    if (style.filter !== 'none' || style.mixBlendMode !== 'normal')
                        bad.push(`${picture.outerHTML.slice(0, 80)}: ${style.filter}`);
                }
                const ground = getComputedStyle(picture).backgroundColor;
                if (dark && picture.matches('figure img, .cell_output img')
                        && ground !== 'rgb(255, 255, 255)')
                    bad.push(`${picture.getAttribute('src')}: on ${ground}`);
            }
            return bad;
        }""",
        view.dark,
    )
    assert changed == []


def test_axe_finds_no_serious_violation(view: View) -> None:
    """Of tokens of code in one colour on one ground, axe looks at one: each costs it a while."""
    axe = pytest.importorskip("axe_playwright_python.base")
    # Back from paper, colours fade into those of the screen; look at them when they are there.
    view.page.add_style_tag(content="* { transition: none !important; }")
    view.page.evaluate(
        """() => {
            const seen = new Set();
            for (const block of document.querySelectorAll('pre, dt.sig')) {
                const ground = getComputedStyle(block).backgroundColor;
                for (const token of block.querySelectorAll('span, em, a:not(.headerlink)')) {
                    const kind = `${token.tagName} ${token.className} on ${ground}`;
                    if (seen.has(kind)) token.replaceWith(token.textContent);
                    seen.add(kind);
                }
            }
            document.querySelectorAll('mjx-container > svg > *').forEach(e => e.remove());
        }"""
    )
    view.page.evaluate(axe.AXE_SCRIPT)
    serious = view.page.evaluate(
        """async () => {
            const found = await axe.run(document, {resultTypes: ['violations']});
            return found.violations
                .filter(v => ['serious', 'critical'].includes(v.impact))
                .flatMap(v => v.nodes.map(n => `${v.id}: ${n.html.slice(0, 150)}; ` +
                    n.failureSummary.split('\\n').slice(1, 2).join()));
        }"""
    )
    assert serious[:8] == []


def test_on_paper_nothing_is_cut_off_or_pale(view: View) -> None:
    view.page.set_viewport_size({"width": PAPER, "height": 1000})
    view.page.emulate_media(media="print")
    cut, shown, pale, dark = view.page.evaluate(
        """() => [
            [...document.querySelectorAll('article *:not(mjx-assistive-mml, mjx-assistive-mml *)')]
                .filter(e => e.checkVisibility() && getComputedStyle(e).position !== 'absolute')
                .filter(e => e.getBoundingClientRect().right > innerWidth + 1
                    || e.matches('pre') && e.scrollWidth > e.clientWidth + 1)
                .map(e => `${e.outerHTML.slice(0, 90)}: to ${e.getBoundingClientRect().right} px`),
            [...document.querySelectorAll('.bd-sidebar, .bd-header, .bd-header-article')]
                .filter(e => e.checkVisibility()).map(e => e.className),
            [...document.querySelectorAll('article :is(h1, h2, p, li, td, th, pre, pre span)')]
                .filter(e => e.checkVisibility() && e.textContent.trim())
                .map(e => [e, getComputedStyle(e).color.match(/[\\d.]+/g).slice(0, 3).map(Number)])
                .filter(([, [r, g, b]]) => 0.299 * r + 0.587 * g + 0.114 * b > 160)
                .map(([e, colour]) => `${e.outerHTML.slice(0, 90)}: ${colour}`),
            [...document.querySelectorAll('article, article :is(div, pre, td, code)')]
                .filter(e => e.checkVisibility())
                .map(e => [e, getComputedStyle(e).backgroundColor.match(/[\\d.]+/g).map(Number)])
                .filter(([, [r, g, b, a]]) => !(a < 0.5) && 0.299 * r + 0.587 * g + 0.114 * b < 160)
                .map(([e, colour]) => `${e.outerHTML.slice(0, 90)}: on ${colour}`),
        ]"""
    )
    width = PHONE if view.dark else DESKTOP
    view.page.emulate_media(media="screen")
    view.page.set_viewport_size({"width": width, "height": 900})
    assert (cut[:8], shown, pale[:8], dark[:8]) == ([], [], [], [])


def test_search_finds_a_page_from_disk(open_page: PageOpener) -> None:
    page = open_page("search.html?q=unpooling")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(a => a.href)")
    assert any("book/02-unpooling.html" in address for address in found)


def test_the_first_page_leads_to_the_book(open_page: PageOpener) -> None:
    context = open_page.browser.new_context(offline=True)
    open_page.contexts.append(context)
    page = context.new_page()
    page.goto(f"{open_page.book.as_uri()}/index.html")
    page.wait_for_url("**/book/index.html")
    assert page.locator("article h1").count() == 1
