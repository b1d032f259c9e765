"""Draws photographs.jpg: what the weights that come with the package see in free photographs.

    python book/images/photographs.py

The photographs are scikit-image's, all free to use and to show.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from skimage import data

from deconvnet.inference import Predictor, shrink
from deconvnet.plotting import overlay

PHOTOGRAPHS = ("chelsea", "astronaut", "camera", "coffee", "rocket")


def main() -> None:
    """Segments each photograph and draws it beside its label map."""
    predictor = Predictor.from_pretrained(device="cpu")
    predictor.config = replace(predictor.config, precision="float32")  # the same on every CPU
    figure, panels = plt.subplots(2, len(PHOTOGRAPHS), figsize=(11, 4.6), layout="constrained")
    for (above, below), name in zip(panels.T, PHOTOGRAPHS):
        pixels = getattr(data, name)()
        pixels = np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels
        image = shrink(torch.from_numpy(pixels.copy()).permute(2, 0, 1), 500)
        labels = predictor(image).labels
        drawn = overlay(image, labels, colours=predictor.class_colours)
        shares = labels.flatten().bincount(minlength=21) / labels.numel()
        said = [c for c in shares.argsort(descending=True).tolist() if c and shares[c] > 0.005]
        for axes, picture in ((above, image), (below, drawn)):
            axes.imshow(picture.permute(1, 2, 0))
            axes.set_axis_off()
        title = ", ".join(f"{predictor.class_names[c]} {shares[c]:.0%}" for c in said)
        below.set_title(title or "background", fontsize=9)
        print(name, title)
    figure.savefig(
        Path(__file__).with_name("photographs.jpg"), dpi=100, pil_kwargs={"quality": 82}
    )


if __name__ == "__main__":
    main()
