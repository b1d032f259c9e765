"""Draw ``pipeline.png``: one scene of the embedded data set through the whole method."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

from deconvnet.aggregation import cut_crops
from deconvnet.inference import Predictor
from deconvnet.plotting import Figure, name_places, overlay, show_boxes
from deconvnet.recipes import tiny
from deconvnet.shapes import make_scene, scene_seed

COLUMNS = 4
WIDTH = 210  # of a panel in pixels; the book shows 840 at 672
DPI = 100
TEXT = 11.0  # points, 9 as the book shows them
NO_BOXES = torch.empty(0, 4)


def labelled(image: Tensor, labels: Tensor, names: tuple[str, ...]) -> Figure:
    """The labels over the image in grey; each region of 1 % or more carries its name."""
    grey = image.float().mean(0, keepdim=True).expand(3, -1, -1).byte()
    figure = show_boxes(overlay(grey, labels, 0.75), NO_BOXES)
    height, width = labels.shape
    written: list[tuple[float, float, float]] = []
    for name, x, y, small in name_places(labels, names, room=1 / 100):
        half = 0.024 * len(name) * width  # of the name's own width
        x = min(max(x, half), width - half)
        y = min(max(y, 0.05 * height), 0.95 * height)
        overlaps = any(abs(x - u) < half + h and abs(y - v) < 0.09 * height for u, v, h in written)
        if small or overlaps:
            continue
        written.append((x, y, half))
        text = figure.axes[0].text(x, y, name, color="white", size=TEXT, ha="center", va="center")
        text.set_path_effects([withStroke(linewidth=2.5, foreground="black")])
    return figure


def rendered(title: str, figure: Figure) -> Image.Image:
    """The figure as a picture, with a title."""
    figure.axes[0].set_title(title, size=TEXT)
    width, height = figure.get_size_inches()
    figure.set_size_inches(WIDTH / DPI, height * WIDTH / DPI / width)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    return Image.open(png).convert("RGB")


def tiled(panels: list[Image.Image]) -> Image.Image:
    """The panels in rows of four, all as high as the first and as wide as the widest."""
    height = panels[0].height
    panels = [p.resize((round(p.width * height / p.height), height)) for p in panels]
    width = max(p.width for p in panels)
    picture = Image.new("RGB", (COLUMNS * width, -(-len(panels) // COLUMNS) * height), "white")
    for i, panel in enumerate(panels):
        left = i % COLUMNS * width + (width - panel.width) // 2
        picture.paste(panel, (left, i // COLUMNS * height))
    return picture


def main() -> None:
    """Segment the scene and write the picture beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the data set")
    parser.add_argument("--index", type=int, default=2, help="of the scene in the val split")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args()

    scene = make_scene(seed=scene_seed(options.seed, "val", options.index))
    recipe = tiny()
    predictor = Predictor.from_pretrained(
        "shapes", config=recipe.inference, edge_boxes=recipe.edge_boxes, crf=recipe.crf,
        device="cpu",
    )
    found = predictor(scene.image)
    names = predictor.class_names

    best = tuple(round(side) for side in found.boxes[0].tolist())
    crop = cut_crops(scene.image, [best], predictor.deconvnet.config.input_size)
    with torch.inference_mode():
        crop_labels = predictor.deconvnet(crop)[0].argmax(0).byte()
    deconvnet = found.deconvnet_probabilities.argmax(0).byte()
    fcn = found.fcn_probabilities.argmax(0).byte()

    panels = {  # numbered as the stages in chapter 1
        "image": show_boxes(scene.image, NO_BOXES),
        "1  object proposals": show_boxes(scene.image, found.boxes, count=8),
        "2  crop of the best": show_boxes(crop[0], NO_BOXES),
        "3  DeconvNet's labels": labelled(crop[0], crop_labels, names),
        "4  all crops, maximum": labelled(scene.image, deconvnet, names),
        "FCN-8s, whole image": labelled(scene.image, fcn, names),
        "5  mean, 6  dense CRF": labelled(scene.image, found.labels, names),
        "the truth": labelled(scene.image, scene.labels, names),
    }
    picture = tiled([rendered(title, figure) for title, figure in panels.items()])
    picture.save(options.output, optimize=True)


if __name__ == "__main__":
    main()
