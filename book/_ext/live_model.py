"""The ``live-model`` directive: a network that runs in the reader's browser, also from disk.

::

    ```{live-model} shapes-deconvnet
    :name: fig-playground
    :alt: what the static picture shows
    The caption.
    ```

A page that is opened from disk may not fetch a file, and may not load a module; a classic script
it may. So the build turns each binary file that the network needs (ONNX Runtime's WebAssembly and
the network itself, in ``live_path``) into a script that holds the gzipped bytes as text. They are
loaded when the reader asks for them, and by no other page. Where no script runs, ``live_picture``
stands in.
"""

from __future__ import annotations

import base64
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from explorable import depart_figure, depart_html, script_safe, visit_figure
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

STATIC = "live"  # folder within _static
RUNTIME = "onnxruntime/ort.wasm.min.js"
WASM = "onnxruntime/ort-wasm-simd.wasm.gz"
SCRIPTS = ("scene", "network", "playground")


class live_model(nodes.figure):  # noqa: N801 (docutils names nodes like elements)
    """A figure with a static picture, a caption, and what its script has to know."""


class LiveModelDirective(SphinxDirective):
    """Makes the figure from the files in ``live_path``."""

    required_arguments = 1
    has_content = True
    option_spec = {"alt": directives.unchanged_required, "name": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Return the figure, or an error that names what is missing."""
        network = f"{self.arguments[0]}.onnx"
        if "alt" not in self.options or not self.content:
            raise self.error(f"live-model {network!r} needs an :alt: text and a caption")
        source = Path(self.env.srcdir, self.config.live_path)
        scene, picture = source / "scene.json", Path(self.env.srcdir, self.config.live_picture)
        for path in (source / network, source / RUNTIME, source / WASM, scene, picture):
            if not path.is_file():
                raise self.error(f"live-model {network!r} has no {path}")
            self.env.note_dependency(str(path))
        payloads = [as_script(source / path)[1] for path in (WASM, network)]
        size = sum(map(len, payloads)) + (source / RUNTIME).stat().st_size
        data = json.loads(scene.read_text(encoding="utf-8"))
        data |= {"network": network, "megabytes": round(size / 1e6, 1)}

        image = nodes.image(uri=f"/{self.config.live_picture}", alt=self.options["alt"])
        caption = nodes.caption()
        text, messages = self.state.inline_text(" ".join(self.content), self.content_offset)
        caption += text
        figure = live_model("", image, caption, data=data)
        self.set_source_info(figure)
        self.add_name(figure)
        return [figure, *messages]


def as_script(path: Path) -> tuple[str, str]:
    """Name and text of the script that holds a file's gzipped bytes."""
    content, name = path.read_bytes(), path.name
    if path.suffix == ".gz":
        name = path.stem
    else:
        content = gzip.compress(content, mtime=0)
    text = base64.b64encode(content).decode("ascii")
    return f"{name}.js", f'LiveNetwork.files["{name}"]="{text}";\n'


def visit_html(self: Any, node: live_model) -> None:
    """Open the figure, with its data."""
    attributes = {"CLASS": "explorable live-model", "data-explorable": "playground"}
    self.body.append(self.starttag(node, "figure", **attributes))
    data = script_safe(node["data"])
    self.body.append(f'<script type="application/json">{data}</script>\n')


def add_scripts(app: Sphinx, page: str, template: str, context: dict, tree: Any) -> None:
    """Load on this page what its live model needs before the reader asks for it."""
    if tree is None or not any(tree.findall(live_model)):
        return
    app.add_css_file("explorables/explorable.css")
    app.add_css_file(f"{STATIC}/live.css")
    for name in ("explorables/core", *(f"{STATIC}/{script}" for script in SCRIPTS)):
        app.add_js_file(f"{name}.js", loading_method="defer")


def write_payloads(app: Sphinx, error: Exception | None) -> None:
    """Write the runtime, its licence, and the files as scripts."""
    if error is not None or app.builder.format != "html":
        return
    source, target = Path(app.srcdir, app.config.live_path), Path(app.outdir, "_static", STATIC)
    if not source.is_dir():
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in (source / WASM, *source.glob("*.onnx")):
        name, text = as_script(path)
        (target / name).write_text(text, encoding="ascii")
    for name in ("ort.wasm.min.js", "LICENSE", "ThirdPartyNotices.txt.gz"):
        shutil.copyfile(source / "onnxruntime" / name, target / name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive, the node, the scripts and the files."""
    app.add_config_value("live_path", "book/live", "env")
    app.add_config_value("live_picture", "book/images/playground.png", "env")
    app.add_enumerable_node(
        live_model,
        "figure",
        html=(visit_html, depart_html),
        **dict.fromkeys(("latex", "text", "man", "texinfo"), (visit_figure, depart_figure)),
    )
    app.add_directive("live-model", LiveModelDirective)
    app.connect("html-page-context", add_scripts)
    app.connect("build-finished", write_payloads)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
