"""What each part of the method is worth: one thing changed at a time, all at equal cost.

    python benchmarks/ablations.py --data data/VOCdevkit/VOC2012 \
        --vgg16 data/weights/vgg16_features_fp16.npz

Every variant trains a DeconvNet of the recipe for the same number of updates with the same batch,
then segments all validation images, whole and with ten proposals. Short as they are, these runs
tell variants apart, not how good any of them gets. A stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from voc import snapshots

from deconvnet import recipes
from deconvnet.deployment import fold_batch_norm, prepare_for_inference
from deconvnet.evaluation import evaluate, provenance, read_log, record
from deconvnet.files import atomic_write
from deconvnet.folders import open_dataset
from deconvnet.hardware import choose_precision
from deconvnet.proposals import compute_proposals
from deconvnet.training import StageConfig
from deconvnet.weights import load_model, pretrained, save_model

PROPOSALS = 10
KEPT = ("miou", "pixel_accuracy", "per_class_iou", "by_size")  # of each variant's figures


@dataclass(frozen=True)
class Variant:
    """One thing that is done otherwise than in ``base``."""

    description: str
    model: Callable = lambda config: config  # changes the network's sizes
    settings: Callable = lambda config: config  # changes the solver's
    stages: tuple[str, ...] = ("1",)  # the last has twice the updates of the one before
    from_fcn: bool = True  # or from ImageNet's encoder
    begin: Callable = lambda model: model  # changes the weights that it starts with


def by_hes_rule(model: nn.Module) -> nn.Module:
    """Starts the deconvolutions so large that signals keep their size, in place."""
    for module in model.modules():
        if isinstance(module, nn.ConvTranspose2d):
            # Unpadded it paints a single vector: each output comes from one tap of the kernel.
            taps = math.prod(module.kernel_size) if module.padding != (0, 0) else 1
            nn.init.normal_(module.weight, std=(2 / (taps * module.in_channels)) ** 0.5)
    return model


VARIANTS = {
    "base": Variant("stage 1 on the recipe's terms"),
    "whole-images": Variant("whole images instead of objects", stages=("whole",)),
    "two-stages": Variant("a third on stage 1, the rest on proposals", stages=("1", "2")),
    "no-switches": Variant(
        "unpooling into a fixed corner", model=lambda config: replace(config, use_switches=False)
    ),
    "no-batch-norm": Variant(
        "no batch norm", model=lambda config: replace(config, batch_norm=False)
    ),
    "no-batch-norm-he": Variant(
        "no batch norm, deconvolutions by He's rule",
        model=lambda config: replace(config, batch_norm=False),
        begin=by_hes_rule,
    ),
    "no-deep-supervision": Variant(
        "a loss at the output only", settings=lambda config: replace(config, deep_supervision=0.0)
    ),
    "from-imagenet": Variant("fc6 and fc7 from nothing, ImageNet's encoder", from_fcn=False),
    "sgd": Variant(
        "the paper's solver: SGD at 0.01",
        settings=lambda config: replace(
            config, optimizer="sgd", learning_rate=0.01, bias_rate=2.0, weight_decay=0.0005
        ),
    ),
}


def main() -> None:
    """Trains and judges the variants given on the command line, and records all that are done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset-name", help="how the record calls the data (the folder's name)")
    parser.add_argument("--vgg16", help="ImageNet weights: a file, or vgg16; else from nothing")
    parser.add_argument("--fcn", default="voc-fcn", help="weights of a trained FCN-8s (voc-fcn)")
    parser.add_argument("--recipe", choices=recipes.RECIPES, default="compact")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--updates", type=int, default=240)
    parser.add_argument("--limit", type=int, help="only the first so many validation images")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--cache", type=Path, default=Path("runs/proposals"))
    parser.add_argument("--out", type=Path, default=Path("results/ablations.json"))
    options = parser.parse_args()
    for name in options.variants:
        if not VARIANTS[name].from_fcn and options.vgg16 is None:
            parser.error(f"{name} needs --vgg16, or leave it out of --variants")

    recipe = recipes.RECIPES[options.recipe]()
    fcn = load_model(options.fcn if Path(options.fcn).exists() else pretrained(options.fcn))
    for name in options.variants:
        if scores(options, name) is None:
            train(recipe, name, fcn, options)
            judge(recipe, name, options)
    found = {name: scores(options, name) for name in VARIANTS}
    record(
        options.out,
        dataset=options.dataset_name or options.data.resolve().name,
        split="val",
        seed=0,
        recipe=options.recipe,
        updates=options.updates,
        proposals=PROPOSALS,
        stage1=asdict(recipe.stage1),
        variants={name: facts for name, facts in found.items() if facts is not None},
    )


def scores_file(runs: Path, name: str) -> Path:
    """Where a variant's results wait until all are there."""
    return runs / name / "scores.json"


def scores(options: argparse.Namespace, name: str) -> dict | None:
    """A variant's results, if they are there and of as many updates as are asked for."""
    path = scores_file(options.runs, name)
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("updates") == options.updates else None


def train(recipe: recipes.Recipe, name: str, fcn: nn.Module, options) -> None:
    """Trains one variant, stage after stage."""
    variant = VARIANTS[name]
    recipe = replace(recipe, model=variant.model(recipe.model))
    data = open_dataset(options.data, "train", decode_cache=True)
    model = None
    for stage, updates in zip(variant.stages, shares(len(variant.stages), options.updates)):
        boxes = compute_proposals(data, options.cache, recipe.edge_boxes) if stage == "2" else None
        crops = recipes.stage_crops(recipe, stage, data, boxes)
        torch.manual_seed(0)
        if model is None:
            model = start(recipe, variant, data.num_classes, fcn, crops, options.vgg16)
            model = variant.begin(model)
        recipes.train_stage(
            recipe, stage, model, crops, options.runs / name / stage,
            settings=settings(recipe, variant, updates),
        )  # fmt: skip
    save_model(model, options.runs / name / "weights.safetensors")


def shares(stages: int, updates: int) -> list[int]:
    """Divides updates over stages, twice as many for each as for the one before."""
    weights = [2**i for i in range(stages)]
    return [updates * weight // sum(weights) for weight in weights]


def settings(recipe: recipes.Recipe, variant: Variant, updates: int) -> StageConfig:
    """The solver's settings: the recipe's for stage 1, for every stage, but for the variant's."""
    common = replace(recipe.stage1, iterations=updates, log_every=10, validate_every=updates)
    return variant.settings(common)


def start(recipe, variant: Variant, classes: int, fcn, crops, vgg16) -> nn.Module:
    """A network as the variant begins."""
    if not variant.from_fcn:
        calibration = recipes.calibration_crops(crops) if recipe.calibrate else None
        return recipes.make_network(recipe, "1", classes, vgg16, calibration)
    if not recipe.model.batch_norm:  # the same encoder, fc6 and fc7, written without it
        fcn = fold_batch_norm(copy.deepcopy(fcn).eval())
    return recipes.make_network(recipe, "1", classes, start=fcn)


def judge(recipe: recipes.Recipe, name: str, options) -> None:
    """Segments all validation images with one variant."""
    val = open_dataset(options.data, "val", limit=options.limit)
    model = load_model(options.runs / name / "weights.safetensors")
    network = prepare_for_inference(
        model, choose_precision(recipe.inference.precision, torch.device("cpu"))
    )
    boxes = compute_proposals(val, options.cache, recipe.edge_boxes)

    @torch.no_grad()
    def predict(i: int, sample) -> dict[str, Tensor]:
        maps = snapshots(network, sample.image, boxes[i].boxes, recipe.inference, (0, PROPOSALS))
        return {
            kind: maps[count].argmax(0).to(torch.uint8)
            for kind, count in (("whole", 0), ("proposals", PROPOSALS))
        }

    judged = evaluate(predict, val)
    logs = [read_log(options.runs / name / s / "log.csv") for s in VARIANTS[name].stages]
    facts = {
        "description": VARIANTS[name].description,
        "updates": options.updates,
        "images": len(val),
        "commit": provenance()["commit"],
        "seconds": [log[-1]["seconds"] for log in logs],
        "curves": [[{k: row[k] for k in ("iteration", "loss")} for row in log] for log in logs],
        **{
            kind: {k: score.summary(val.class_names)[k] for k in KEPT}
            for kind, score in judged.items()
        },
    }
    with atomic_write(scores_file(options.runs, name)) as temporary:
        temporary.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
