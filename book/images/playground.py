"""Draw ``playground.png``: what the live model shows, for readers without a script."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image

from deconvnet.activations import LEVELS, decoder_activations
from deconvnet.aggregation import cut_crops
from deconvnet.instances import expand_box
from deconvnet.plotting import Figure, name_places, overlay
from deconvnet.shapes import CLASS_NAMES, make_scene, scene_seed
from deconvnet.weights import load_model, pretrained

STAGES = ("fc7", "fc6-deconv", *(f"deconv{level}" for level in LEVELS))


def main() -> None:
    """Segment the largest shape's box of one scene and write the picture beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--index", type=int, default=2, help="of the scene in the val split")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args()

    scene = make_scene(seed=scene_seed(0, "val", options.index))
    boxes = [annotation.box for annotation in scene.annotations]
    box = max(boxes, key=lambda b: (b[2] - b[0]) * (b[3] - b[1]))
    network = load_model(pretrained("shapes-deconvnet"))
    around = tuple(round(side) for side in expand_box(box, 1.2).tolist())
    crop = cut_crops(scene.image, [around], network.config.input_size)
    maps = decoder_activations(network, crop)
    # Of the layers deconv5_1, deconv5_2 of a block the last one stays.
    last = {name.split("_")[0]: values for name, values in maps.items()}
    labels = maps["score"][0].argmax(0).byte()

    figure = Figure(figsize=(9, 1.5), layout="constrained")
    panels = figure.subplots(1, 9)
    for axes in panels:
        axes.set_axis_off()
    panels[0].imshow(crop[0].permute(1, 2, 0))
    panels[0].set_title("64 × 64", size=8)
    for axes, name in zip(panels[1:], STAGES):
        picture = last[name][0].mean(0)
        axes.imshow(picture, cmap="cividis", vmin=0, interpolation="nearest")
        axes.set_title(f"{name}\n{len(picture)} × {len(picture)}", size=8)
    panels[8].imshow(overlay(crop[0], labels).permute(1, 2, 0), interpolation="nearest")
    panels[8].set_title("label map", size=8)
    for name, x, y, above in name_places(labels, CLASS_NAMES, room=1 / 50):
        style = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.9}
        vertical = "bottom" if above else "center"
        panels[8].text(x, y, name, size=7, ha="center", va=vertical, bbox=style)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    Image.open(png).convert("RGB").quantize(128).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
