"""The paper's ladder on photographs: every step of the method, judged in one pass over a data set.

    python benchmarks/voc.py --data data/VOCdevkit/VOC2012 --fcn runs/fcn/weights.safetensors \
        --stage1 runs/stage1/weights.safetensors --stage2 runs/stage2/weights.safetensors

The networks come from ``deconvnet train``, as README says; ``torchrun`` shares the images. Each
proposal is segmented once; the maps for 10, 25, 50 and 100 of them, by maximum and by sum, are
snapshots on the way. The CRF's settings are searched on training images, or are the recipe's with
``--search 0``. The networks have learned from these images and are surer there than elsewhere,
against which :func:`~deconvnet.crf_tuning.search_crf` warns: the settings need not be the best.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from deconvnet.aggregation import ScoreCanvas, cut_crops
from deconvnet.crf import dense_crf
from deconvnet.crf_tuning import CRFSearch, search_crf
from deconvnet.deployment import prepare_for_inference
from deconvnet.ensemble import mean_of_probabilities
from deconvnet.evaluation import evaluate, record
from deconvnet.folders import open_dataset
from deconvnet.hardware import choose_precision, default_device, join_processes
from deconvnet.inference import fcn_scores, select_boxes
from deconvnet.proposals import compute_proposals
from deconvnet.recipes import RECIPES
from deconvnet.weights import load_model

COUNTS = (0, 10, 25, 50, 100)
"""Proposals, besides the whole image, after which the map is judged."""

METHODS = {
    "fcn": "FCN-8s",
    "stage1": "DeconvNet after stage 1, 50 proposals",
    "whole": "DeconvNet after stage 2, whole image only",
    "proposals-10": "DeconvNet after stage 2, 10 proposals",
    "proposals-25": "DeconvNet after stage 2, 25 proposals",
    "deconvnet": "DeconvNet after stage 2, 50 proposals",
    "proposals-100": "DeconvNet after stage 2, 100 proposals",
    "sum": "DeconvNet after stage 2, 50 proposals, sum instead of maximum",
    "ensemble": "EDeconvNet: mean with FCN-8s",
    "crf": "EDeconvNet + dense CRF",
}

GRID = {
    "bilateral_sigma": (20.0, 40.0),
    "bilateral_sigma_rgb": (3.0, 6.0, 12.0),
    "bilateral_weight": (2.5, 5.0),
    "gaussian_weight": (0.0, 3.0),
}


def main() -> None:
    """Runs the ladder with the networks given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset-name", help="how the record calls the data (the folder's name)")
    parser.add_argument("--fcn", type=Path, required=True, help="weights")
    parser.add_argument("--stage1", type=Path, help="weights; without, this step is left out")
    parser.add_argument("--stage2", type=Path, required=True, help="weights")
    parser.add_argument("--recipe", choices=RECIPES, default="compact")
    parser.add_argument("--search", type=int, default=40, help="training images for the CRF (40)")
    parser.add_argument("--limit", type=int, help="only the first so many validation images")
    parser.add_argument("--cache", type=Path, help="cache folder of proposals")
    parser.add_argument("--out", type=Path, default=Path("results/voc.json"))
    options = parser.parse_args()

    recipe, device = RECIPES[options.recipe](), default_device()
    dtype = choose_precision(recipe.inference.precision, device)
    files = {name: getattr(options, name) for name in ("fcn", "stage1", "stage2")}
    networks = {name: load_model(path, device) for name, path in files.items() if path}
    metadata = {name: network.metadata for name, network in networks.items()}
    ready = {name: prepare_for_inference(network, dtype) for name, network in networks.items()}

    val = open_dataset(options.data, "val", limit=options.limit)
    # Spread over the training images, since a list may be sorted.
    train = open_dataset(options.data, "train")
    every = max(len(train) // max(options.search, 1), 1)
    chosen = range(0, len(train), every)[: options.search]
    boxes = compute_proposals(val, options.cache, recipe.edge_boxes)

    def examples() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        searched = [train[i] for i in chosen]
        found = compute_proposals(_Images(searched), options.cache, recipe.edge_boxes)
        for sample, proposals in zip(searched, found):
            maps = stages(ready, sample.image.to(device), proposals.boxes, recipe.inference)
            yield sample.image, maps["ensemble"].cpu(), sample.labels

    crf, search = recipe.crf, {}
    first = join_processes()[0] == 0  # under torchrun one process writes
    if chosen:
        found = search_crf(examples(), GRID, recipe.crf)
        crf, search = found.best, search_facts(found, len(chosen))

    def predict(i, sample):
        maps = stages(ready, sample.image.to(device), boxes[i].boxes, recipe.inference)
        maps["crf"] = dense_crf(sample.image.to(device), maps["ensemble"], crf)
        return {n: maps[n].argmax(0).to("cpu", torch.uint8) for n in METHODS if n in maps}

    scores = evaluate(predict, val)
    if not first:
        return
    for name, score in scores.items():
        print(f"{name:14} {100 * score.overall.mean_iou():5.2f}  {METHODS[name]}")
    record(
        options.out,
        dataset=options.dataset_name or options.data.resolve().name,
        split="val",
        images=len(val),
        seed=0,
        weights=metadata,
        inference=asdict(recipe.inference),
        edge_boxes=asdict(recipe.edge_boxes),
        crf=asdict(crf),
        crf_search=search,
        methods={
            name: {"description": METHODS[name], **score.summary(val.class_names)}
            for name, score in scores.items()
        },
    )


def search_facts(search: CRFSearch, images: int) -> dict[str, object]:
    """What the record keeps of the search for the CRF's settings."""
    return {
        "train_images": images,
        "without_crf": round(100 * search.without_crf, 2),
        "tried": [
            {**{k: asdict(c)[k] for k in GRID}, "miou": round(100 * m, 2)} for c, m in search.tried
        ],
    }


class _Images:
    """Samples as :func:`compute_proposals` wants them."""

    def __init__(self, samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, index: int) -> Tensor:
        return self.samples[index].image


@torch.no_grad()
def stages(networks, image: Tensor, boxes: Tensor, config) -> dict[str, Tensor]:
    """Scores or probabilities ``[C, H, W]`` of every method of :data:`METHODS` but the last."""
    fcn = fcn_scores(networks["fcn"], image, config.precision)
    maps = {"fcn": fcn}
    if "stage1" in networks:
        maps["stage1"] = snapshots(networks["stage1"], image, boxes, config, (50,))[50]
    found = snapshots(networks["stage2"], image, boxes, config, COUNTS)
    maps |= {f"proposals-{n}": found[n] for n in (10, 25, 100)}
    maps |= {"whole": found[0], "deconvnet": found[50], "sum": found["sum"]}
    maps["ensemble"] = mean_of_probabilities(found[50].softmax(0), fcn.softmax(0))
    return maps


def snapshots(network, image: Tensor, boxes: Tensor, config, counts) -> dict[int | str, Tensor]:
    """The aggregate after each number of proposals, and ``"sum"``, that of 50 added up."""
    config = replace(config, num_proposals=max(counts), include_whole_image=False)
    size = tuple(image.shape[1:])
    whole = (0, 0, size[1], size[0])
    selected = [whole, *select_boxes(boxes, size, config)]
    kinds = {
        kind: ScoreCanvas(network.config.num_classes, size, combine=kind, device=image.device)
        for kind in ("max", "sum")
    }
    found: dict[int | str, Tensor] = {}
    for start in range(0, len(selected), config.batch_size):
        batch = selected[start : start + config.batch_size]
        crops = cut_crops(image, batch, network.config.input_size)
        for number, (box, scores) in enumerate(zip(batch, network(crops).float()), start):
            for canvas in kinds.values():
                canvas.paste(box, scores)
            if number in counts:
                found[number] = kinds["max"].scores.clone()
            if number == 50:
                found["sum"] = kinds["sum"].scores.clone()
    for count in (*counts, "sum"):  # images with fewer boxes than that
        found.setdefault(count, kinds["sum" if count == "sum" else "max"].scores)
    return found


if __name__ == "__main__":
    main()
