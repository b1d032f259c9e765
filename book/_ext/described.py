"""What a search engine or a chat shows of a link: each page's title, first sentence and picture.

The description is the page's first paragraph that is long enough to say something; not an item of
a list, such as a chapter's aims, which make no sentence alone.
"""

from __future__ import annotations

from html import escape
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

LANDING = "Semantic segmentation with a deconvolution network"
PICTURE = "_images/pipeline.png"  # the landing page's
SHORTEST, LONGEST = 60, 200  # characters


def description(tree: nodes.document) -> str:
    """Return the first paragraph that is a text, cut off between two words; or nothing."""
    for paragraph in tree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split()).removeprefix("Why it matters. ")
        if len(text) >= SHORTEST and not isinstance(paragraph.parent, nodes.list_item):
            return text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} …"
    return ""


def describe(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Add the page's description; give the landing page a title beside the book's."""
    if page == app.config.root_doc:
        context["title"] = LANDING
    if tree is None:
        return
    base = app.config.html_baseurl.rstrip("/")
    facts = {
        "description": description(tree),
        "og:title": context.get("title", ""),
        "og:description": description(tree),
        "og:image": f"{base}/{PICTURE}",
        "og:url": f"{base}/{page}.html",
        "og:type": "article",
    }
    tags = [
        f'<meta {"property" if ":" in key else "name"}="{key}" content="{escape(value)}" />'
        for key, value in facts.items()
        if value
    ]
    context["metatags"] = "\n".join([context.get("metatags", ""), *tags])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the step."""
    app.connect("html-page-context", describe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
