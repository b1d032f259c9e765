"""Draw ``pipeline.png``: one scene of the embedded data set through the whole method."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch
from PIL import Image

from deconvnet.aggregation import cut_crops
from deconvnet.inference import Predictor
from deconvnet.plotting import Figure, show_boxes, show_labels
from deconvnet.recipes import tiny
from deconvnet.shapes import make_scene, scene_seed

COLUMNS = 4
NO_BOXES = torch.empty(0, 4)


def rendered(title: str, figure: Figure) -> Image.Image:
    """The figure as a picture, with a title."""
    figure.axes[0].set_title(title, size=13)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
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

    panels = {
        "1  image": show_boxes(scene.image, NO_BOXES),
        "2  object proposals": show_boxes(scene.image, found.boxes, count=15),
        "3  the best one, cut out": show_boxes(crop[0], NO_BOXES),
        "4  what DeconvNet sees in it": show_labels(crop[0], crop_labels, names),
        "5  all proposals, maximum": show_labels(scene.image, deconvnet, names),
        "6  FCN-8s, whole image": show_labels(scene.image, fcn, names),
        "7  mean of both, dense CRF": show_labels(scene.image, found.labels, names),
        "the truth": show_labels(scene.image, scene.labels, names),
    }
    picture = tiled([rendered(title, figure) for title, figure in panels.items()])
    picture.save(options.output, optimize=True)


if __name__ == "__main__":
    main()
