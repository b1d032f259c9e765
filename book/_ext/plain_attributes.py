"""A constant's docstring is a sentence, also where it has a colon.

Napoleon reads the docstring of a constant or property up to its first colon as the name of a type.
An empty comment in front keeps it from doing so.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


def shield(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put an empty comment in front of the docstring of a constant or property."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the step before Napoleon's, which has the default priority of 500."""
    app.connect("autodoc-process-docstring", shield, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
