"""What a screen reader or a keyboard would stumble over in the theme's and Sphinx's HTML.

*Scrolling.* ``scroll.js`` makes the boxes that scroll sideways reachable by keyboard.

*Lists.* Sphinx writes the parameters of a long signature as a definition list that defines nothing,
and a bibliography as a list whose items do not say that they are items.

*Source code.* The index of listings has a link also for a module without a listing: ``builtins``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

MENDED = (
    (re.compile(r'<dl>(?=\s*<dd><em class="sig-param">)'), '<dl role="presentation">'),
    (re.compile(r'role="doc-biblioentry"'), 'role="listitem"'),
)


def mend(html: str) -> str:
    """Return a page with its lists mended; a mended page stays as it is."""
    for wrong, right in MENDED:
        html = wrong.sub(right, html)
    return html


def mend_pages(app: Sphinx, error: Exception | None) -> None:
    """Mend every page of the built book."""
    if error is not None or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        if (mended := mend(html)) != html:
            page.write_text(mended, encoding="utf-8")


def forget_modules_without_listing(app: Sphinx) -> list[tuple[str, dict[str, Any], str]]:
    """Take modules that have no page from the index of listings, and add no page."""
    modules = getattr(app.env, "_viewcode_modules", {})
    for name in [name for name, listing in modules.items() if not listing]:
        del modules[name]
    return []


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the script and the two steps."""
    app.add_js_file("scroll.js", loading_method="defer")
    app.connect("html-collect-pages", forget_modules_without_listing, priority=100)
    app.connect("build-finished", mend_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
