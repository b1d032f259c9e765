"""The ``explorable`` directive: an interactive figure that opens from disk.

::

    ```{explorable} decoder
    :name: fig-decoder
    :alt: what the static picture shows
    The caption.
    ```

``python -m deconvnet.explorables`` wrote ``decoder.json`` and ``decoder.png``. The JSON is put into
the page, because a page from disk may not fetch a file; the scripts ``core.js`` and ``decoder.js``
are loaded on pages that need them and on no other. Where no script runs, and in a PDF, the picture
stands in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

STATIC = "explorables"  # folder of the scripts within _static


class explorable(nodes.figure):  # noqa: N801 (docutils names nodes like elements)
    """A figure with a static picture, a caption, and the data of its script."""


class ExplorableDirective(SphinxDirective):
    """Makes the figure from the files in ``explorables_path``."""

    required_arguments = 1
    has_content = True
    option_spec = {"alt": directives.unchanged_required, "name": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Return the figure, or an error that names what is missing."""
        name = self.arguments[0]
        if "alt" not in self.options or not self.content:
            raise self.error(f"explorable {name!r} needs an :alt: text and a caption")
        folder = self.config.explorables_path
        scripts = Path(self.env.srcdir, self.config.html_static_path[0], STATIC)
        data, picture = (
            Path(self.env.srcdir, folder, f"{name}.{kind}") for kind in ("json", "png")
        )
        for path in (data, picture, scripts / f"{name}.js"):
            if not path.is_file():
                raise self.error(f"explorable {name!r} has no {path}")
        self.env.note_dependency(str(data))
        try:
            content = json.loads(data.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise self.error(f"{data} is not JSON: {error}") from error

        image = nodes.image(uri=f"/{folder}/{name}.png", alt=self.options["alt"])
        caption = nodes.caption()
        text, messages = self.state.inline_text(" ".join(self.content), self.content_offset)
        caption += text
        figure = explorable("", image, caption, explorable=name, data=content)
        self.set_source_info(figure)
        self.add_name(figure)
        return [figure, *messages]


def script_safe(data: Any) -> str:
    """JSON that may stand in a script element: nothing in it can close the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def visit_html(self: Any, node: explorable) -> None:
    """Open the figure, with its data."""
    attributes = {"CLASS": "explorable", "data-explorable": node["explorable"]}
    self.body.append(self.starttag(node, "figure", **attributes))
    data = script_safe(node["data"])
    self.body.append(f'<script type="application/json">{data}</script>\n')


def depart_html(self: Any, node: explorable) -> None:
    """Close the caption, as docutils leaves it open, and the figure."""
    self.body.append("</figcaption>\n</figure>\n")


def visit_figure(self: Any, node: explorable) -> None:
    """Elsewhere it is a figure like any other."""
    self.visit_figure(node)


def depart_figure(self: Any, node: explorable) -> None:
    """The end of it."""
    self.depart_figure(node)


def add_scripts(app: Sphinx, page: str, template: str, context: dict, tree: Any) -> None:
    """Load on this page what its explorables need."""
    if tree is None or not (found := list(tree.findall(explorable))):
        return
    app.add_css_file(f"{STATIC}/explorable.css")
    for name in ["core", *dict.fromkeys(node["explorable"] for node in found)]:
        app.add_js_file(f"{STATIC}/{name}.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive, the node and the scripts."""
    app.add_config_value("explorables_path", "book/explorables", "env")
    app.add_enumerable_node(
        explorable,
        "figure",
        html=(visit_html, depart_html),
        **dict.fromkeys(("latex", "text", "man", "texinfo"), (visit_figure, depart_figure)),
    )
    app.add_directive("explorable", ExplorableDirective)
    app.connect("html-page-context", add_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
