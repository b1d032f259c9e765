"""Is the cat in scikit-image's ``chelsea`` found? Compares the label map with a box drawn by hand.

python benchmarks/photograph.py --out results/chelsea.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from skimage.data import chelsea

from deconvnet.evaluation import record, stage_labels
from deconvnet.inference import Predictor
from deconvnet.plotting import show_prediction

CAT = 8  # VOC's label
BOX = (0, 0, 372, 300)  # xyxy pixels: the cat's face and body, drawn by hand on the photograph


def main() -> None:
    """Segments the photograph and reports the overlap of each stage's cat with the box."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deconvnet", type=Path, help="weights (the package's own)")
    parser.add_argument("--fcn", type=Path, help="weights (the package's own)")
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--picture", type=Path, help="every stage as a picture")
    options = parser.parse_args()

    if options.deconvnet is None:
        predictor = Predictor.from_pretrained()
    else:
        predictor = Predictor.from_files(options.deconvnet, options.fcn)
    image = torch.from_numpy(chelsea()).permute(2, 0, 1).contiguous()
    prediction = predictor(image)
    inside = torch.zeros(image.shape[1:], dtype=torch.bool)
    x0, y0, x1, y1 = BOX
    inside[y0:y1, x0:x1] = True

    stages = {}
    for stage, labels in stage_labels(prediction).items():
        cat = labels == CAT
        stages[stage] = {
            "cat_inside_box": round((cat & inside).sum().item() / inside.sum().item(), 3),
            "cat_outside_box": round((cat & ~inside).sum().item() / (~inside).sum().item(), 3),
            "iou_with_box": round((cat & inside).sum().item() / (cat | inside).sum().item(), 3),
        }
        print(stage, stages[stage])
    if options.picture is not None:
        show_prediction(prediction).savefig(options.picture, dpi=100)
    if options.out is not None:
        record(options.out, dataset="scikit-image chelsea", box=BOX, stages=stages, seed=0)


if __name__ == "__main__":
    main()
