"""Write ``scene.json``: the twelve shapes as the playground draws them, names and colours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from deconvnet.files import atomic_write
from deconvnet.shapes import CLASS_NAMES, OUTLINES
from deconvnet.voc import palette


class Middle:
    """Stands in for a random generator: each proportion is the middle of its range."""

    def uniform(self, low: float, high: float) -> float:
        return (low + high) / 2


def scene() -> dict:
    """Polygons in units of half the shape's size, rounded to a thousandth; colours as RGB."""

    def rounded(polygons) -> list:
        return [[[round(float(v), 3) for v in point] for point in p] for p in polygons]

    outlines = {name: make(Middle()) for name, make in OUTLINES.items()}
    return {
        "classNames": list(CLASS_NAMES),
        "colours": palette(len(CLASS_NAMES)).tolist(),
        "outlines": [
            {"name": name, "solids": rounded(shape.solids), "holes": rounded(shape.holes)}
            for name, shape in outlines.items()
        ],
    }


def main() -> None:
    """Write the file beside this one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("scene.json"))
    options = parser.parse_args()
    with atomic_write(options.output) as temporary:
        temporary.write_text(json.dumps(scene(), separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
