"""The paper's ladder on the embedded data set: every step of the method, trained and measured.

    python benchmarks/ladder.py --seeds 0 1 2

One classifier gives all networks their encoder, as ImageNet's does in the paper. Then, for each
seed, FCN-8s, DeconvNet on whole images, stage 1 and stage 2 are trained by the recipe and judged on
the same validation scenes with the same proposals. One file a seed is written to results/, with
the settings by which every stage was trained; a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch

from deconvnet import recipes
from deconvnet.evaluation import evaluate, read_log, record, stage_labels
from deconvnet.inference import Predictor
from deconvnet.proposals import compute_proposals
from deconvnet.shapes import write_shapes
from deconvnet.voc import VOCDataset
from deconvnet.weights import SHIPPED, load_model, save_model

ORDER = ("classify", "1", "2", "fcn", "whole")

METHODS = {
    "fcn": "FCN-8s",
    "whole": "DeconvNet trained and run on whole images",
    "stage1": "DeconvNet after stage 1, with proposals",
    "stage2-whole": "DeconvNet after stage 2, on whole images",
    "stage2": "DeconvNet after stage 2, with proposals",
    "ensemble": "EDeconvNet: mean with FCN-8s",
    "crf": "EDeconvNet + dense CRF",
}


def main() -> None:
    """Runs the ladder for the seeds given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=Path("data/shapes"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--train", type=int, default=2500, help="training scenes")
    parser.add_argument("--val", type=int, default=200, help="validation scenes")
    parser.add_argument("--iterations", type=int, help="updates a stage (the recipe's)")
    parser.add_argument("--ship", action="store_true", help="put seed 0 into the package")
    options = parser.parse_args()

    recipe = recipes.tiny()
    write_shapes(options.data, train=options.train, val=options.val)
    train = VOCDataset(options.data, "train", decode_cache=True)
    val = VOCDataset(options.data, "val", decode_cache=True)
    boxes = {
        data.split: compute_proposals(data, options.runs / "proposals", recipe.edge_boxes)
        for data in (train, val)
    }
    for seed in options.seeds:
        runs = options.runs / f"shapes-seed{seed}"
        networks = train_networks(recipe, train, val, boxes, runs, seed, options.iterations)
        scores = evaluate(ladder(recipe, networks, boxes["val"]), val)
        record(
            options.results / f"shapes-seed{seed}.json",
            dataset="shapes",
            images=len(val),
            train_images=len(train),
            seed=seed,
            recipe="tiny",
            stages={stage: network.metadata.get("solver") for stage, network in networks.items()},
            inference=asdict(recipe.inference),
            crf=asdict(recipe.crf),
            methods={
                name: {"description": METHODS[name], **score.summary(val.class_names)}
                for name, score in scores.items()
            },
            curves={stage: read_log(runs / stage / "log.csv") for stage in ORDER[1:]},
        )
        if options.ship and seed == 0:
            for stage, name in (("2", "deconvnet"), ("fcn", "fcn")):
                facts = recipes.facts("tiny", stage, train, seed)
                path = SHIPPED / f"shapes-{name}.safetensors"
                save_model(networks[stage], path, facts, torch.float16)


def train_networks(recipe, train, val, boxes, runs, seed, iterations=None):
    """Trains the networks, or loads those that were trained before.

    The metadata of each have its settings under ``solver``: those of now may be others.
    """
    networks = {}
    for stage in ORDER:
        seed_here, folder = (0, runs.parent) if stage == "classify" else (seed, runs)
        path = folder / stage / "weights.safetensors"
        if not path.exists():
            torch.manual_seed(seed_here)
            start = networks.get({"classify": None, "2": "1"}.get(stage, "classify"))
            model = recipes.make_network(recipe, stage, train.num_classes, start=start)
            settings = replace(recipes.default_settings(recipe, stage), seed=seed_here)
            if iterations is not None:
                settings = replace(settings, iterations=iterations)
            crops, checks = (
                recipes.stage_crops(recipe, stage, data, boxes[data.split], training, seed_here)
                for data, training in ((train, True), (val, False))
            )
            recipes.train_stage(recipe, stage, model, crops, folder / stage, checks, settings)
            facts = recipes.facts("tiny", stage, train, seed_here)
            save_model(model, path, {**facts, "solver": asdict(settings)})
        networks[stage] = load_model(path)
    return networks


def ladder(recipe, networks, boxes):
    """Returns the function that segments one scene with every method of :data:`METHODS`."""

    def predictor(stage, fcn=None, edge_boxes=recipe.edge_boxes, crf=None):
        return Predictor(networks[stage], fcn, recipe.inference, edge_boxes, crf)

    whole = predictor("whole", edge_boxes=None)
    stage1 = predictor("1")
    stage2_whole = predictor("2", edge_boxes=None)
    full = predictor("2", networks["fcn"], crf=recipe.crf)

    def predict(i, sample):
        image = sample.image
        steps = stage_labels(full(image, boxes[i]))
        return {
            "fcn": steps["fcn"],
            "whole": whole(image).labels,
            "stage1": stage1(image, boxes[i]).labels,
            "stage2-whole": stage2_whole(image).labels,
            "stage2": steps["deconvnet"],
            "ensemble": steps["ensemble"],
            "crf": steps["crf"],
        }

    return predict


if __name__ == "__main__":
    main()
