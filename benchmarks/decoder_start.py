"""What makes so deep a decoder learn fast: where it starts, and what it is asked on the way.

    python benchmarks/decoder_start.py --data data/VOCdevkit/VOC2012 \
        --vgg16 data/weights/vgg16_features_fp16.npz --fcn runs/fcn/weights.safetensors

Stage 1 of the recipe ``compact``, four times for the same number of updates on the same crops: from
ImageNet's encoder or from FCN-8s, with and without losses at the decoder's inner sizes.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from deconvnet import recipes
from deconvnet.evaluation import read_log, record
from deconvnet.folders import open_dataset
from deconvnet.training import pixel_loss
from deconvnet.voc import VOID
from deconvnet.weights import load_model


def main() -> None:
    """Trains the four variants and records their curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset-name", help="how the record calls the data (the folder's name)")
    parser.add_argument("--vgg16", help="ImageNet weights: a file, or vgg16; else from nothing")
    parser.add_argument("--fcn", type=Path, required=True, help="weights of a trained FCN-8s")
    parser.add_argument("--recipe", choices=recipes.RECIPES, default="compact")
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--crops", type=int, default=256, help="validation crops (256)")
    parser.add_argument("--out", type=Path, default=Path("results/decoder-start.json"))
    options = parser.parse_args()

    recipe = recipes.RECIPES[options.recipe]()
    train = open_dataset(options.data, "train", decode_cache=True)
    val = open_dataset(options.data, "val", decode_cache=True)
    crops = recipes.stage_crops(recipe, "1", train)
    checks = recipes.stage_crops(recipe, "1", val, training=False)
    # Spread over the validation images, since neighbours are alike.
    every = max(len(checks) // options.crops, 1)
    checks = Subset(checks, range(0, len(checks), every)[: options.crops])
    calibration = recipes.calibration_crops(crops) if recipe.calibrate else None
    settings = replace(
        recipe.stage1, iterations=options.updates, log_every=10, validate_every=options.updates
    )
    runs = []
    starts = {
        "imagenet" if options.vgg16 else "nothing": (options.vgg16, calibration, None),
        "fcn": (None, None, load_model(options.fcn)),
    }
    for (start, given), weight in itertools.product(starts.items(), (0.0, 0.3)):
        torch.manual_seed(0)
        model = recipes.make_network(recipe, "1", train.num_classes, *given)
        with tempfile.TemporaryDirectory() as folder:
            recipes.train_stage(
                recipe, "1", model, crops, folder,
                settings=replace(settings, deep_supervision=weight),
            )  # fmt: skip
            curve = read_log(Path(folder) / "log.csv")
        runs.append({"start": start, "deep_supervision": weight, **judge(model, checks)})
        runs[-1]["seconds"] = curve[-1]["seconds"]
        runs[-1]["curve"] = [{k: row[k] for k in ("iteration", "loss")} for row in curve]
        print({k: v for k, v in runs[-1].items() if k != "curve"}, flush=True)
    record(
        options.out,
        dataset=options.dataset_name or options.data.resolve().name,
        recipe=options.recipe,
        stage="1",
        updates=options.updates,
        batch_size=settings.batch_size,
        validation_crops=len(checks),
        seed=settings.seed,
        runs=runs,
    )


@torch.no_grad()
def judge(model: nn.Module, crops: Subset) -> dict[str, float]:
    """Loss a pixel; share of object pixels called anything but background, and called right."""
    model.eval()
    loss = valid = objects = found = named = 0.0
    for images, labels in DataLoader(crops, batch_size=32):
        scores, labels = model(images).float(), labels.long()
        answer, inside = scores.argmax(1), (labels > 0) & (labels != VOID)
        loss += pixel_loss(scores, labels).item()
        valid += (labels != VOID).sum().item()
        objects += inside.sum().item()
        found += ((answer > 0) & inside).sum().item()
        named += ((answer == labels) & inside).sum().item()
    return {
        "validation_loss": round(loss / valid, 4),
        "object_pixels_found": round(100 * found / objects, 1),
        "object_pixels_named": round(100 * named / objects, 1),
    }


if __name__ == "__main__":
    main()
