"""The book opens from disk, without a network and without an error in the browser's console.

*Formulas.* Sphinx would link MathJax from a content delivery network. The Python package
``sphinx-mathjax-offline`` carries MathJax 3 (Apache 2.0); of its files the book needs one, which
draws SVG and so needs no fonts either.

*Scripts.* Jupyter Book adds the loader of Thebe, which runs cells on somebody else's machine, to
every page, twice: the second declaration of the same constant is an error.

*Fonts.* The theme preloads icon fonts that its own script replaces by SVG; a page from disk may not
preload fonts, and the browser reports each as an error.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

MATHJAX = "tex-svg-full.js"
FONT_PRELOAD = re.compile(r'<link rel="preload" as="font"[^>]*>\s*')


def use_packaged_mathjax(app: Sphinx, config: Config) -> None:
    """Place MathJax in ``_static``, and let every page with a formula load it from there."""
    folder = files("sphinx-mathjax-offline") / "static" / "mathjax"
    config.html_static_path.append(str(folder / MATHJAX))
    config.mathjax_path = MATHJAX


def drop_thebe(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Take Thebe's scripts and style from a page."""
    for kind in ("script_files", "css_files"):
        context[kind] = [
            asset
            for asset in context.get(kind, [])
            if "thebe" not in f"{asset}{getattr(asset, 'attributes', '')}".lower()
        ]


def drop_font_preloads(app: Sphinx, error: Exception | None) -> None:
    """Take the theme's font preloads from all pages."""
    if error is not None or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        if 'as="font"' in text:
            page.write_text(FONT_PRELOAD.sub("", text), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the three steps; the first before Sphinx's MathJax extension reads its settings."""
    app.connect("config-inited", use_packaged_mathjax, priority=100)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", drop_font_preloads)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
