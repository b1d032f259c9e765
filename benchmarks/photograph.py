"""Two photographs that everyone has, with the package's own weights: what is found, and how soon.

    python benchmarks/photograph.py --out results/photographs.json

The cat in scikit-image's ``chelsea`` and the person in its ``astronaut`` are compared with boxes
drawn by hand. Times are of a warm predictor, with fifty proposals and on the whole image.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from skimage import data

from deconvnet.evaluation import record, stage_labels
from deconvnet.inference import Predictor
from deconvnet.plotting import show_prediction

# xyxy pixels, drawn by hand on the photographs
PHOTOGRAPHS = {"chelsea": ("cat", (0, 0, 372, 300)), "astronaut": ("person", (34, 0, 452, 512))}
MODES = {"proposals": {}, "whole": {"edge_boxes": None}}


def main() -> None:
    """Segments the photographs, reports overlaps with the boxes, and times both modes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deconvnet", type=Path, help="weights (the package's own)")
    parser.add_argument("--fcn", type=Path, help="weights (the package's own)")
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts (5)")
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--pictures", type=Path, help="folder for every stage as a picture")
    options = parser.parse_args()

    photographs, seconds = {}, {}
    for mode, settings in MODES.items():
        if options.deconvnet is None:
            predictor = Predictor.from_pretrained(**settings)
        else:
            predictor = Predictor.from_files(options.deconvnet, options.fcn, **settings)
        for name, (thing, box) in PHOTOGRAPHS.items():
            image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).contiguous()
            started = time.perf_counter()
            prediction = predictor(image)
            first = time.perf_counter() - started
            seconds[f"{name}, {mode}"] = {
                "first": round(first, 2),  # of all calls, the very first prepares the networks
                "median": round(median(timed(predictor, image, options.repeats)), 2),
            }
            label = predictor.class_names.index(thing)
            photographs[f"{name}, {mode}"] = {
                stage: overlap(labels == label, box)
                for stage, labels in stage_labels(prediction).items()
            }
            if options.pictures is not None:
                options.pictures.mkdir(parents=True, exist_ok=True)
                figure = show_prediction(prediction)
                figure.savefig(options.pictures / f"{name}-{mode}.png", dpi=100)
    print(json.dumps({"seconds": seconds, "photographs": photographs}, indent=2))
    if options.out is not None:
        record(
            options.out,
            dataset="scikit-image",
            boxes={name: {"class": c, "box": b} for name, (c, b) in PHOTOGRAPHS.items()},
            seed=0,
            repeats=options.repeats,
            threads=torch.get_num_threads(),
            seconds=seconds,
            photographs=photographs,
        )


def timed(predictor: Predictor, image: torch.Tensor, repeats: int) -> list[float]:
    """Seconds of each of so many calls."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        predictor(image)
        found.append(time.perf_counter() - started)
    return found


def overlap(found: torch.Tensor, box: tuple[int, int, int, int]) -> dict[str, float]:
    """How much of the box was found, how much of the rest, and their intersection over union."""
    inside = torch.zeros_like(found)
    x0, y0, x1, y1 = box
    inside[y0:y1, x0:x1] = True
    shares = {
        "inside_box": (found & inside).sum() / inside.sum(),
        "outside_box": (found & ~inside).sum() / (~inside).sum(),
        "iou_with_box": (found & inside).sum() / (found | inside).sum(),
    }
    return {name: round(share.item(), 3) for name, share in shares.items()}


if __name__ == "__main__":
    main()
