"""The command line: ``deconvnet data|train|segment|evaluate|proposals|demo``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from deconvnet import recipes
from deconvnet.files import atomic_write

ERROR, DIVERGED, INTERRUPTED = 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: In place of ``sys.argv[1:]``.

    Returns:
        The exit code: 0 all went well, 2 wrong input, 3 training diverged, 130 interrupted.
    """
    options = parser().parse_args(arguments)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    from deconvnet.training import TrainingDiverged

    try:
        options.run(options)
    except TrainingDiverged as error:
        print(f"deconvnet: {error}", file=sys.stderr)
        return DIVERGED
    except (OSError, ValueError, TypeError) as error:
        print(f"deconvnet: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print("deconvnet: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


def parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="deconvnet",
        description="Semantic segmentation with a deconvolution network (Noh et al., ICCV 2015).",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run, summary: str, *examples: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="examples:\n" + "\n".join(f"  deconvnet {name} {e}" for e in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--seed", type=int, default=0, help="of everything random (0)")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        return sub

    sub = command(
        "data", run_data, "Make the embedded data set, or download VOC 2012.",
        "shapes data/shapes --train 2500 --val 200", "voc2012 data --sbd",
    )
    sub.add_argument("kind", choices=["shapes", "voc2012"])
    sub.add_argument("root", type=Path, help="folder to write to")
    sub.add_argument("--train", type=int, default=2500, help="training scenes (2500)")
    sub.add_argument("--val", type=int, default=200, help="validation scenes (200)")
    sub.add_argument("--sbd", action="store_true", help="with SBD's annotations: train_aug")

    sub = command(
        "train", run_train, "Train FCN-8s, or DeconvNet on whole images or in two stages.",
        "--data data/shapes --recipe tiny --stage 1 --out runs/stage1",
        "--data data/shapes --recipe tiny --stage 2 --init runs/stage1/weights.safetensors "
        "--out runs/stage2",
        "--data VOCdevkit/VOC2012 --recipe voc2012 --stage 1 --vgg16 vgg16 --out runs/voc-stage1",
    )
    _add_data(sub, split="train")
    sub.add_argument("--val-split", default="val", help="split whose crop loss is logged (val)")
    sub.add_argument("--recipe", choices=list(recipes.RECIPES), default="tiny")
    sub.add_argument("--stage", choices=recipes.STAGES, default="1")
    sub.add_argument("--out", type=Path, required=True, help="folder of checkpoint, log, weights")
    sub.add_argument("--init", type=Path, help="weights to start from, such as stage 1's")
    sub.add_argument("--vgg16", help="ImageNet weights: vgg16, vgg16_bn (downloads) or a file")
    sub.add_argument("--minutes", type=float, help="stop after so much training time")
    sub.add_argument("--iterations", type=int, help="in place of the recipe's")
    sub.add_argument("--workers", type=int, default=0, help="processes that prepare crops")
    sub.add_argument("--proposals", type=Path, help="cache folder of proposals (stage 2)")
    sub.add_argument("--limit", type=int, help="only the first so many images")
    sub.add_argument("--restart", action="store_true", help="forget the checkpoint in --out")
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")

    sub = command(
        "segment", run_segment, "Segment photographs: a label map and an overlay for each.",
        "photo.jpg -o labels.png",
        "photo.jpg -o labels.png --deconvnet runs/stage2/weights.safetensors --no-crf",
    )
    sub.add_argument("image", type=Path)
    sub.add_argument("-o", "--out", type=Path, required=True, help="palette PNG of labels")
    sub.add_argument("--overlay", type=Path, help="picture (default: OUT with -overlay)")
    _add_method(sub)

    sub = command(
        "evaluate", run_evaluate, "Mean IoU of every stage of the method on a data set.",
        "--data data/shapes --out results/shapes.json",
        "--data VOCdevkit/VOC2012 --fcn runs/fcn/weights.safetensors --deconvnet none",
    )
    _add_data(sub, split="val")
    sub.add_argument("--out", type=Path, help="results as JSON")
    sub.add_argument("--dataset-name", help="how results call the data (folder name)")
    sub.add_argument("--limit", type=int, help="only the first so many images")
    sub.add_argument("--cache", type=Path, help="cache folder of proposals")
    _add_method(sub)

    sub = command(
        "proposals", run_proposals, "Edge Boxes of an image (as JSON) or of a whole data set.",
        "photo.jpg -o boxes.json", "--data data/shapes --split train --cache cache/shapes",
    )
    sub.add_argument("image", type=Path, nargs="?")
    sub.add_argument("-o", "--out", type=Path, help="JSON of boxes and scores")
    sub.add_argument("--data", type=Path, help="data set in VOC's layout")
    sub.add_argument("--split", default="train")
    sub.add_argument("--limit", type=int, help="only the first so many images")
    sub.add_argument("--cache", type=Path, help="cache folder (with --data)")
    sub.add_argument("--workers", type=int, help="processes (all cores)")
    sub.add_argument("--recipe", choices=list(recipes.RECIPES), default="tiny")
    sub.add_argument("--edge-model", type=Path, help="OpenCV's model.yml.gz")

    sub = command(
        "demo", run_demo, "The whole pipeline on a made-up scene, as one picture.",
        "-o pipeline.png", "-o pipeline.png --scene 7",
    )
    sub.add_argument("-o", "--out", type=Path, required=True, help="PNG to write")
    sub.add_argument("--scene", type=int, default=3, help="which scene (3)")
    sub.add_argument("--device")
    return top


def _add_data(sub: argparse.ArgumentParser, split: str) -> None:
    sub.add_argument("--data", type=Path, required=True, help="data set in VOC's layout")
    sub.add_argument("--split", default=split, help=f"({split})")


def _add_method(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--deconvnet", default="shapes-deconvnet", help="weights: a file, a shipped name, or none"
    )
    sub.add_argument("--fcn", default="shapes-fcn", help="weights: a file, a shipped name, or none")
    sub.add_argument("--recipe", choices=list(recipes.RECIPES), help="settings (by the weights)")
    sub.add_argument("--convention", choices=["paper", "release"], default="paper")
    sub.add_argument("--num-proposals", type=int, help="crops an image (50)")
    sub.add_argument("--whole", action="store_true", help="one crop, the whole image")
    sub.add_argument("--no-crf", action="store_true", help="leave the dense CRF out")
    sub.add_argument("--edge-model", type=Path, help="OpenCV's model.yml.gz")
    sub.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")


# --- the commands -----------------------------------------------------------------------------


def run_data(options: argparse.Namespace) -> None:
    """``deconvnet data``."""
    if options.kind == "shapes":
        from deconvnet.shapes import write_shapes

        write_shapes(
            options.root, train=options.train, val=options.val, seed=options.seed,
            progress=not options.quiet,
        )
        root = options.root
    else:
        from deconvnet.voc import convert_sbd, download_sbd, download_voc2012

        root = download_voc2012(options.root)
        if options.sbd:
            convert_sbd(download_sbd(options.root), root)
    print(root)


def run_train(options: argparse.Namespace) -> None:
    """``deconvnet train``."""
    from deconvnet.training import distributed_position
    from deconvnet.weights import load_model, save_model

    recipe = recipes.RECIPES[options.recipe]()
    dataset = _dataset(options.data, options.split, options.limit, cache=True)
    validation = _dataset(options.data, options.val_split, 128, cache=True)
    crops, checks = (
        recipes.stage_crops(
            recipe, options.stage, data,
            _proposals(data, recipe, options) if options.stage == "2" else None,
            training, options.seed,
        )
        for data, training in ((dataset, True), (validation, False))
    )
    if options.init is not None:
        model = load_model(options.init)
        if model.config.num_classes != dataset.num_classes:
            raise ValueError(
                f"{options.init} knows {model.config.num_classes} classes, "
                f"{options.data} has {dataset.num_classes}"
            )
    else:
        torch.manual_seed(options.seed)
        model = recipes.make_network(
            recipe, options.stage, dataset.num_classes, options.vgg16,
            recipes.calibration_crops(crops) if recipe.calibrate else None,
        )
    settings = replace(
        recipes.default_settings(recipe, options.stage),
        seed=options.seed, minutes=options.minutes, workers=options.workers,
    )
    if options.iterations is not None:
        settings = replace(settings, iterations=options.iterations)
    recipes.train_stage(
        recipe, options.stage, model, crops, options.out, checks, settings,
        device=options.device, resume=not options.restart, progress=not options.quiet,
    )
    if distributed_position()[0] == 0:
        facts = {
            "class_names": list(dataset.class_names),
            "recipe": options.recipe,
            "stage": options.stage,
            "seed": options.seed,
        }
        path = options.out / "weights.safetensors"
        save_model(model, path, facts)
        print(path)


def run_segment(options: argparse.Namespace) -> None:
    """``deconvnet segment``."""
    from deconvnet.plotting import overlay
    from deconvnet.voc import write_image, write_label_map

    predictor = _predictor(options)
    prediction = predictor(options.image)
    picture = options.overlay or options.out.with_name(f"{options.out.stem}-overlay.png")
    write_label_map(options.out, prediction.labels)
    write_image(picture, overlay(prediction.image, prediction.labels))
    names = predictor.class_names
    found = {
        names[c] if names else str(c): f"{(prediction.labels == c).float().mean():.1%}"
        for c in prediction.labels.unique().tolist()
    }
    print(f"{options.out} {picture}")
    print(", ".join(f"{name} {share}" for name, share in found.items()))


def run_evaluate(options: argparse.Namespace) -> None:
    """``deconvnet evaluate``."""
    from deconvnet.evaluation import evaluate, record, stage_labels

    predictor = _predictor(options)
    dataset = _dataset(options.data, options.split, options.limit)
    boxes = None
    if predictor.deconvnet is not None and predictor.edge_boxes is not None:
        boxes = _proposals(dataset, _recipe(options, predictor), options)
    scores = evaluate(
        lambda i, sample: stage_labels(predictor(sample.image, boxes[i] if boxes else None)),
        dataset,
        progress=not options.quiet,
    )
    summaries = {method: s.summary(dataset.class_names) for method, s in scores.items()}
    for method, summary in summaries.items():
        print(f"{method:10s} mIoU {summary['miou']:5.2f}   pixels {summary['pixel_accuracy']:5.2f}")
    if options.out is not None:
        record(
            options.out,
            dataset=options.dataset_name or options.data.name,
            split=options.split,
            images=len(dataset),
            seed=options.seed,
            weights={
                kind: getattr(network, "metadata", None)
                for kind, network in (("deconvnet", predictor.deconvnet), ("fcn", predictor.fcn))
            },
            inference=asdict(predictor.config),
            crf=predictor.crf and asdict(predictor.crf),
            methods=summaries,
        )


def run_proposals(options: argparse.Namespace) -> None:
    """``deconvnet proposals``."""
    from deconvnet.proposals import edge_boxes
    from deconvnet.voc import read_image

    recipe = recipes.RECIPES[options.recipe]()
    if (options.image is None) == (options.data is None):
        raise ValueError("give either an image or --data, not both and not neither")
    if options.image is not None:
        found = edge_boxes(read_image(options.image), recipe.edge_boxes, options.edge_model)
        text = json.dumps({"boxes": found.boxes.tolist(), "scores": found.scores.tolist()})
        if options.out is None:
            print(text)
        else:
            with atomic_write(options.out) as temporary:
                temporary.write_text(text)
        return
    if options.cache is None:
        raise ValueError("--data needs --cache, the folder that receives the boxes")
    dataset = _dataset(options.data, options.split, options.limit)
    found = _proposals(dataset, recipe, options)
    print(f"{sum(len(p.boxes) for p in found)} boxes of {len(found)} images in {options.cache}")


def run_demo(options: argparse.Namespace) -> None:
    """``deconvnet demo``."""
    from deconvnet.inference import Predictor
    from deconvnet.plotting import show_prediction
    from deconvnet.shapes import make_scene

    recipe = recipes.tiny()
    predictor = Predictor.from_pretrained(
        config=recipe.inference, edge_boxes=recipe.edge_boxes, crf=recipe.crf,
        device=options.device,
    )
    prediction = predictor(make_scene(seed=options.scene).image)
    figure = show_prediction(prediction, predictor.class_names)
    with atomic_write(options.out) as temporary:
        figure.savefig(temporary, dpi=150, format="png", bbox_inches="tight")
    print(options.out)


# --- what several commands need ---------------------------------------------------------------


def _dataset(root: Path, split: str, limit: int | None = None, cache: bool = False):
    from deconvnet.voc import VOCDataset

    return VOCDataset(root, split, decode_cache=cache, limit=limit)


def _proposals(dataset, recipe: recipes.Recipe, options: argparse.Namespace):
    from deconvnet.proposals import compute_proposals

    cache = getattr(options, "cache", None) or getattr(options, "proposals", None)
    return compute_proposals(
        dataset, cache, recipe.edge_boxes, model_path=getattr(options, "edge_model", None),
        workers=getattr(options, "workers", None) or None, progress=not options.quiet,
    )


def _network(name: str):
    from deconvnet.weights import load_model, pretrained

    if name == "none":
        return None
    return load_model(name if Path(name).suffix or Path(name).exists() else pretrained(name))


def _recipe(options: argparse.Namespace, predictor=None) -> recipes.Recipe:
    network = predictor and (predictor.deconvnet or predictor.fcn)
    name = options.recipe or getattr(network, "metadata", {}).get("recipe", "voc2012")
    return recipes.RECIPES[name]()


def _predictor(options: argparse.Namespace):
    from deconvnet.inference import InferenceConfig, Predictor

    predictor = Predictor(_network(options.deconvnet), _network(options.fcn), device=options.device)
    recipe = _recipe(options, predictor)
    config = recipe.inference
    if options.convention == "release":
        size = predictor.deconvnet.config.input_size if predictor.deconvnet else 224
        config = replace(InferenceConfig.release(size), batch_size=config.batch_size)
    if options.num_proposals is not None:
        config = replace(config, num_proposals=options.num_proposals)
    predictor.config = config
    predictor.edge_boxes = None if options.whole else recipe.edge_boxes
    predictor.crf = None if options.no_crf else recipe.crf
    predictor.edge_model = options.edge_model
    return predictor
