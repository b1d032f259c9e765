"""The command line: ``deconvnet data``, ``train``, ``segment``, ``evaluate`` and more."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
import tarfile
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from deconvnet import recipes
from deconvnet.crf import CRFConfig
from deconvnet.evaluation import evaluate, provenance, read_log, record, stage_labels
from deconvnet.fcn import FCN8s
from deconvnet.files import atomic_write, check_writable, file_digest, sole_use
from deconvnet.folders import open_dataset
from deconvnet.hardware import default_device, join_processes, keep_memory
from deconvnet.inference import InferenceConfig, Predictor
from deconvnet.instances import CropDataset, NoExamples
from deconvnet.plotting import overlay, show_prediction
from deconvnet.pretraining import ClassifiedCrops
from deconvnet.proposals import EdgeBoxesConfig, Proposals, compute_proposals, edge_boxes
from deconvnet.shapes import TRAIN_SCENES, VAL_SCENES, make_scene, write_shapes
from deconvnet.training import StageConfig, TrainingDiverged, trained_so_far
from deconvnet.voc import (
    VOCDataset,
    download_sbd,
    download_voc2012,
    read_image,
    write_image,
    write_label_map,
)
from deconvnet.weights import load_model, pretrained, save_model

ERROR, DIVERGED, INTERRUPTED = 2, 3, 130
LEARNING_RECIPE = "tiny"  # of `train`, and of `proposals`, which finds the boxes to learn from


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: In place of ``sys.argv[1:]``.

    Returns:
        The exit code: 0 all went well, 2 wrong input (or a library is missing), 3 training
        diverged, 130 interrupted.
    """
    options = parser().parse_args(arguments)
    options.owns_process = arguments is None  # it was started for this command
    was_in_group = dist.is_available() and dist.is_initialized()  # the caller's, then
    try:
        torch.manual_seed(options.seed)
        options.run(options)
    except TrainingDiverged as error:
        print(f"deconvnet: {error}", file=sys.stderr)
        return DIVERGED
    except (ImportError, OSError, ValueError) as error:
        print(f"deconvnet: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        # What else was interrupted begins anew, and must not be taken for work that is kept.
        kept = options.command in ("data", "train", "submit") or (
            options.command == "proposals" and options.cache is not None
        )
        restarts = getattr(options, "restart", False)
        same = "the same command without --restart" if restarts else "the same command"
        hint = f"; {same} goes on from here" if kept else ""
        if options.command == "train":
            with suppress(Exception):  # there is no checkpoint yet, or none that can be read
                done, _ = trained_so_far(options.out)
                hint = f" after {done} iterations{hint}, or ends as it is with --iterations {done}"
        print(f"deconvnet: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    finally:
        if dist.is_available() and dist.is_initialized() and not was_in_group:
            dist.destroy_process_group()
    return 0


def parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="deconvnet",
        description="Semantic segmentation with a deconvolution network (Noh et al., ICCV 2015).",
        epilog="exit codes: 0 all went well, 2 wrong input, 3 training diverged, 130 interrupted; "
        "examples: deconvnet COMMAND --help",
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
        "data",
        run_data,
        "Make the embedded data set, or download VOC 2012.",
        "shapes data/shapes --train 2500 --val 200",
        "voc2012 data --sbd",
    )
    sub.add_argument("kind", choices=["shapes", "voc2012"])
    sub.add_argument("root", type=Path, help="folder to write to")
    for name, count in (("train", TRAIN_SCENES), ("val", VAL_SCENES)):
        sub.add_argument(f"--{name}", type=int, default=count, help=f"scenes of {name} ({count})")
    sub.add_argument("--sbd", action="store_true", help="with SBD's annotations: train_aug")

    sub = command(
        "train",
        run_train,
        "Train FCN-8s, or DeconvNet on whole images or in two stages.",
        "--data data/shapes --stage classify --out runs/classify",
        "--data data/shapes --stage 1 --init runs/classify/weights.safetensors --out runs/stage1",
        "--data data/shapes --recipe tiny --stage 2 --init runs/stage1/weights.safetensors "
        "--out runs/stage2",
        "--data VOCdevkit/VOC2012 --recipe voc2012 --stage 1 --vgg16 vgg16 --out runs/voc-stage1",
        "--data data/mine --stage 2 --init shapes-deconvnet --new-classes --out runs/mine",
    )
    _add_data(sub, split="train")
    sub.add_argument(
        "--val-split",
        default="val",
        help="split whose crop loss is logged, if it has objects (val)",
    )
    _add_recipe(sub, f"sizes and settings ({LEARNING_RECIPE})")
    sub.add_argument("--stage", choices=recipes.STAGES, default="1", help="what to train (1)")
    sub.add_argument("--out", type=Path, required=True, help="folder of checkpoint, log, weights")
    start = sub.add_mutually_exclusive_group()
    start.add_argument("--init", help="weights to start from: a file, or a shipped name")
    start.add_argument("--vgg16", help="ImageNet weights: vgg16, vgg16_bn (downloads) or a file")
    sub.add_argument(
        "--new-classes", action="store_true", help="--init knows other classes: learn these anew"
    )
    sub.add_argument("--minutes", type=float, help="stop after so much training time")
    sub.add_argument("--iterations", type=int, help="in place of the recipe's")
    sub.add_argument("--learning-rate", type=float, help="in place of the recipe's")
    sub.add_argument("--micro-batch", type=int, help="crops at once, where memory is short")
    sub.add_argument("--recompute", action="store_true", help="less memory still, for more time")
    sub.add_argument("--workers", type=int, default=0, help="processes that prepare crops (0)")
    sub.add_argument("--proposals", type=Path, help="cache folder of proposals (stage 2)")
    sub.add_argument("--edge-model", type=Path, help="OpenCV's model.yml.gz (stage 2)")
    sub.add_argument("--limit", type=int, help="only the first so many images")
    sub.add_argument(
        "--no-cache", action="store_true", help="decode images each time, not once into memory"
    )
    sub.add_argument("--half", action="store_true", help="store the weights in 16 bits")
    sub.add_argument("--restart", action="store_true", help="forget the checkpoint in --out")
    _add_device(sub)

    sub = command(
        "compress",
        run_compress,
        "The same weights in a smaller file.",
        "runs/voc-fcn/weights.safetensors -o mine/fcn.safetensors",
        "runs/voc2/weights.safetensors -o mine/net.safetensors --encoder-of mine/fcn.safetensors",
    )
    sub.add_argument("weights", help="weights: a file, or a shipped name")
    sub.add_argument("-o", "--out", type=_file, required=True, help=".safetensors to write")
    sub.add_argument("--dtype", choices=["int8", "float16"], default="int8", help="(int8)")
    sub.add_argument(
        "--encoder-of", type=Path, help="file in the same folder that has the same encoder"
    )

    sub = command(
        "segment",
        run_segment,
        "Segment a photograph: a label map, and an overlay to look at.",
        "photo.jpg -o labels.png",
        "photo.jpg -o labels.png --deconvnet runs/stage2/weights.safetensors --no-crf",
    )
    sub.add_argument("image", type=Path)
    sub.add_argument("-o", "--out", type=_png, required=True, help="palette PNG of labels")
    sub.add_argument("--overlay", type=_png, help="PNG (default: OUT with -overlay)")
    _add_method(sub)

    sub = command(
        "evaluate",
        run_evaluate,
        "Mean IoU of every stage of the method on a data set.",
        "--data VOCdevkit/VOC2012 --out results/voc.json",
        "--data data/shapes --deconvnet shapes-deconvnet --fcn shapes-fcn",
    )
    _add_data(sub, split="val")
    sub.add_argument("--out", type=_file, help="results as JSON")
    sub.add_argument("--limit", type=int, help="only the first so many images")
    sub.add_argument("--cache", type=Path, help="cache folder of proposals")
    _add_method(sub)

    sub = command(
        "submit",
        run_submit,
        "Label maps of a whole split, packed as the PASCAL VOC server takes them.",
        "--data VOCdevkit/VOC2012 --split test --out submission",
    )
    _add_data(sub, split="test", named=False)
    sub.add_argument("--out", type=Path, required=True, help="folder of the maps and the archive")
    sub.add_argument("--limit", type=int, help="only the first so many images")
    _add_method(sub)

    sub = command(
        "proposals",
        run_proposals,
        "Edge Boxes of an image (as JSON) or of a whole data set.",
        "photo.jpg -o boxes.json",
        "--data data/shapes --split train --cache cache/shapes",
        "--data VOCdevkit/VOC2012 --split train_aug --recipe voc2012 --cache cache/voc",
    )
    sub.add_argument("image", type=Path, nargs="?")
    sub.add_argument("-o", "--out", type=_file, help="JSON of boxes and scores")
    sub.add_argument("--data", type=Path, help="data set, see deconvnet.folders")
    sub.add_argument("--split", default="train")
    sub.add_argument("--limit", type=int, help="only the first so many images")
    sub.add_argument("--cache", type=Path, help="cache folder (with --data)")
    sub.add_argument("--workers", type=int, help="threads, at least 1 (one a core)")
    _add_recipe(sub, f"the one to train with: its settings and image size ({LEARNING_RECIPE})")
    sub.add_argument("--edge-model", type=Path, help="OpenCV's model.yml.gz")

    sub = command(
        "demo",
        run_demo,
        "The whole pipeline on a made-up scene, as one picture.",
        "-o pipeline.png",
        "-o pipeline.png --scene 7",
    )
    sub.add_argument("-o", "--out", type=_png, required=True, help="PNG to write")
    sub.add_argument("--scene", type=int, default=3, help="which scene (3)")
    _add_device(sub)
    return top


def _add_data(sub: argparse.ArgumentParser, split: str, named: bool = True) -> None:
    sub.add_argument("--data", type=Path, required=True, help="data set, see deconvnet.folders")
    sub.add_argument("--split", default=split, help=f"({split})")
    if named:
        sub.add_argument("--dataset-name", help="how records call the data (the folder's name)")


def _add_recipe(sub: argparse.ArgumentParser, meaning: str) -> None:
    choices = list(recipes.RECIPES)
    sub.add_argument("--recipe", choices=choices, default=LEARNING_RECIPE, help=meaning)


def _add_method(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--deconvnet",
        help="weights: a file or a shipped name (voc-deconvnet, unless only --fcn is given)",
    )
    sub.add_argument("--fcn", help="likewise (voc-fcn, unless only --deconvnet is given)")
    sub.add_argument("--recipe", choices=list(recipes.RECIPES), help="settings (the weights' own)")
    sub.add_argument("--convention", choices=["paper", "release"], default="paper")
    sub.add_argument("--num-proposals", type=int, help="crops an image (50)")
    sub.add_argument("--whole", action="store_true", help="one crop, the whole image")
    sub.add_argument("--no-crf", action="store_true", help="leave the dense CRF out")
    sub.add_argument("--edge-model", type=Path, help="OpenCV's model.yml.gz")
    _add_device(sub)


def _add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--device", type=_device, help="cpu, cuda, cuda:1, ... (a GPU if there is one)"
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device == torch.device("cuda") and torch.cuda.is_available():
            device = default_device()  # which of them this process has under torchrun
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # unknown, or not in this machine
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used: {reason}") from None


def _file(name: str) -> Path:
    try:
        check_writable(name)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(name)


def _png(name: str) -> Path:
    if Path(name).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{name!r} must end in .png")
    return _file(name)


# --- the commands -----------------------------------------------------------------------------


def run_data(options: argparse.Namespace) -> None:
    """``deconvnet data``."""
    if options.kind == "shapes":
        root = write_shapes(
            options.root,
            train=options.train,
            val=options.val,
            seed=options.seed,
            progress=not options.quiet,
        )
    else:
        if options.sbd and importlib.util.find_spec("scipy") is None:  # said before gigabytes come
            raise ValueError(
                "SBD's annotations are read with SciPy, which is missing: pip install scipy"
            )
        root = download_voc2012(options.root)
        if options.sbd:
            root = download_sbd(options.root)
    print(root)


def run_train(options: argparse.Namespace) -> None:
    """``deconvnet train``."""
    first = join_processes()[0] == 0
    with sole_use(options.out) if first else nullcontext():
        _train(options, first)


def _train(options: argparse.Namespace, first: bool) -> None:
    recipe = recipes.RECIPES[options.recipe]()
    # Images take a minute to decode, and Edge Boxes many to find: first what may be refused.
    settings = _settings_to_train(options, recipe)
    start = None if options.init is None else load_model(_weights(options.init))
    # Train at the size at which images will be segmented.
    kept = {"decode_cache": not options.no_cache, "max_side": recipe.inference.max_side}
    dataset = open_dataset(options.data, options.split, limit=options.limit, **kept)
    dataset.check_classes()
    validation = open_dataset(options.data, options.val_split, limit=128, **kept)
    model = None if start is None else _network_from(options, recipe, start, dataset)

    def examples(data: VOCDataset, training: bool) -> CropDataset | ClassifiedCrops:
        boxes = None
        if options.stage == "2":
            boxes = _proposals(data, recipe.edge_boxes, options.proposals, options)
        return recipes.stage_crops(recipe, options.stage, data, boxes, training, options.seed)

    if first and not options.quiet:
        print(
            f"{len(dataset)} images to learn from, {len(validation)} to validate with",
            file=sys.stderr,
        )
    crops = examples(dataset, training=True)
    try:
        checks = examples(validation, training=False)
    except NoExamples as problem:
        if settings.schedule == "plateau":  # which lives by validation
            raise
        checks = None
        if first:
            print(f"deconvnet: training goes without validation: {problem}", file=sys.stderr)
    if model is None:
        calibrates = recipe.calibrate and options.vgg16 is not None
        calibration = recipes.calibration_crops(crops) if calibrates else None
        model = recipes.make_network(
            recipe, options.stage, dataset.num_classes, options.vgg16, calibration
        )
    progress = not options.quiet
    device = options.device or default_device()
    if options.owns_process and device.type == "cpu" and not options.recompute:
        keep_memory()  # faster, for up to a quarter more of it
    recipes.train_stage(
        recipe,
        options.stage,
        model,
        crops,
        options.out,
        checks,
        settings,
        device=options.device,
        resume=not options.restart,
        progress=progress,
        about=_about(options, dataset),
    )
    iterations, seconds = trained_so_far(options.out)
    # The checkpoint keeps the running averages: the command, given again, comes by here again,
    # and a run that is made longer goes on with them. Every process averages, so none waits.
    recipes.finish_stage(
        recipe,
        options.stage,
        model,
        crops,
        settings,
        seen=iterations * settings.batch_size,
        progress=progress and first,
    )
    if first:
        path, log = options.out / "weights.safetensors", options.out / "log.csv"
        training = {
            "dataset": options.dataset_name or options.data.resolve().name,
            "images": len(dataset),
            "iterations": iterations,
            "minutes": round(seconds / 60, 2),
            "curve": read_log(log) if log.exists() else [],
            **provenance(),
        }
        facts = recipes.facts(options.recipe, options.stage, dataset, options.seed)
        dtype = torch.float16 if options.half else None
        save_model(model, path, {**facts, "training": training}, dtype)
        print(path)


def _about(options: argparse.Namespace, dataset: VOCDataset) -> dict[str, object]:
    """What makes a run another one, besides its solver's settings."""
    start = options.init or options.vgg16
    path = Path(start or "")
    return {
        "stage": options.stage,
        "classes": ", ".join(dataset.class_names),
        "images": len(dataset),
        "image names": hashlib.sha256("\n".join(dataset.names).encode()).hexdigest()[:16],
        "start": file_digest(path)[:16] if path.is_file() else str(start),
        "edge model": _digest(options.edge_model) if options.stage == "2" else None,
    }


def _digest(path: Path | None) -> str | None:
    return None if path is None else file_digest(path)


def _settings_to_train(options: argparse.Namespace, recipe: recipes.Recipe) -> StageConfig:
    names = ("minutes", "iterations", "learning_rate", "micro_batch")
    given = {name: getattr(options, name) for name in names}
    given["recompute"] = options.recompute or None
    settings = replace(
        recipes.default_settings(recipe, options.stage),
        seed=options.seed,
        workers=options.workers,
        **{field: value for field, value in given.items() if value is not None},
    )
    if options.new_classes and options.init is None:
        raise ValueError("--new-classes needs --init, the weights that know other classes")
    if settings.frozen_blocks and not (options.init or options.vgg16):
        raise ValueError(
            f"recipe {options.recipe!r} keeps {settings.frozen_blocks} blocks of the encoder as "
            "they are, and so must start from learned ones: pass --init (voc-deconvnet, voc-fcn "
            "or a file) or --vgg16 vgg16"
        )
    if options.vgg16 not in (None, "vgg16", "vgg16_bn") and not Path(options.vgg16).is_file():
        raise ValueError(f"no VGG-16 weights at {options.vgg16}; vgg16 and vgg16_bn are downloaded")
    rank, processes = join_processes()
    if recipe.classify is None and not (options.init or options.vgg16) and rank == 0:
        print(
            f"deconvnet: recipe {options.recipe!r} starts from nothing, which takes far longer; "
            "the paper starts from ImageNet's weights (--vgg16 vgg16)",
            file=sys.stderr,
        )
    if settings.batch_size % processes:
        raise ValueError(
            f"{processes} processes cannot share a batch of {settings.batch_size} crops: start a "
            "number of them that divides it"
        )
    # A recipe's batch may be a single forward pass, which processes can only share in parts.
    share = settings.batch_size // processes
    return replace(settings, micro_batch=min(settings.micro_batch, share))


def _network_from(
    options: argparse.Namespace, recipe: recipes.Recipe, start: nn.Module, dataset: VOCDataset
) -> nn.Module:
    metadata = getattr(start, "metadata", {})
    known, made_by = tuple(metadata.get("class_names", ())), metadata.get("recipe")
    new_classes = "--new-classes learns other classes than it knows"
    same_kind = isinstance(start, FCN8s) == (options.stage == "fcn")  # its scores are taken over
    if same_kind and known not in ((), dataset.class_names) and not options.new_classes:
        raise ValueError(
            f"{_weights(options.init)}: knows the classes {', '.join(known)}, the data has "
            f"{', '.join(dataset.class_names)}; {new_classes}"
        )
    try:
        return recipes.make_network(
            recipe, options.stage, dataset.num_classes, start=start, new_classes=options.new_classes
        )
    except ValueError as error:
        hint = ""
        if made_by not in (None, options.recipe):
            hint = f"; it was trained with --recipe {made_by}, this is {options.recipe}"
        elif "classes" in str(error) and not options.new_classes:
            hint = f"; {new_classes}"
        raise ValueError(f"{_weights(options.init)}: {error}{hint}") from error


def run_compress(options: argparse.Namespace) -> None:
    """``deconvnet compress``."""
    path = _weights(options.weights)
    if options.out.suffix != ".safetensors" or options.out.resolve() == Path(path).resolve():
        raise ValueError(f"{options.out}: expected another file than {path}, a .safetensors")
    model = load_model(path)
    dtype = getattr(torch, options.dtype)
    save_model(model, options.out, model.metadata, dtype, options.encoder_of)
    print(f"{options.out} {options.out.stat().st_size / 1e6:.1f} MB")


def run_segment(options: argparse.Namespace) -> None:
    """``deconvnet segment``."""
    picture = options.overlay or options.out.with_name(f"{options.out.stem}-overlay.png")
    files = {"the image": options.image, "the label map": options.out, "the overlay": picture}
    taken: dict[Path, str] = {}
    for use, path in files.items():  # one would destroy the other
        other = taken.setdefault(path.resolve(), use)
        if other != use:
            raise ValueError(f"{path}: expected different files for {other} and {use}")
    predictor = _predictor(options)
    prediction = predictor(options.image)
    colours = prediction.class_colours
    write_label_map(options.out, prediction.labels, colours)
    write_image(picture, overlay(prediction.image, prediction.labels, colours=colours))
    names = predictor.class_names
    shares = {
        names[c] if names else str(c): (prediction.labels == c).float().mean().item()
        for c in prediction.labels.unique().tolist()
    }
    print(f"{options.out} {picture}")
    print(_used(predictor))
    print(", ".join(f"{name} {share:.1%}" for name, share in shares.items()))


def _used(predictor: Predictor) -> str:
    """Says with what a picture was segmented."""
    parts = []
    for kind, network in (("DeconvNet", predictor.deconvnet), ("FCN-8s", predictor.fcn)):
        if network is not None:
            data = getattr(network, "metadata", {}).get("training", {}).get("dataset")
            parts.append(kind + (f" (trained on {data})" if data else ""))
    if predictor.deconvnet is not None:
        boxes = predictor.edge_boxes is not None
        parts.append(f"{predictor.config.num_proposals} proposals" if boxes else "one crop")
    if predictor.crf is not None:
        parts.append("dense CRF")
    return "with " + ", ".join(parts)


def run_evaluate(options: argparse.Namespace) -> None:
    """``deconvnet evaluate``."""
    predictor = _predictor(options)
    dataset = open_dataset(options.data, options.split, limit=options.limit)
    _check_classes(predictor, dataset)
    boxes = None
    if predictor.deconvnet is not None and predictor.edge_boxes is not None:
        boxes = _proposals(dataset, predictor.edge_boxes, options.cache, options)
    scores = evaluate(
        lambda i, sample: stage_labels(predictor(sample.image, boxes[i] if boxes else None)),
        dataset,
        progress=not options.quiet,
    )
    if join_processes()[0] > 0:
        return
    print(_used(predictor))
    for method, score in scores.items():
        miou, pixels = 100 * score.overall.mean_iou(), 100 * score.overall.pixel_accuracy()
        print(f"{method:10s} mIoU {miou:5.2f}   pixels {pixels:5.2f}")
    if options.out is not None:
        record(
            options.out,
            dataset=options.dataset_name or options.data.resolve().name,
            split=options.split,
            images=len(dataset),
            seed=options.seed,
            weights={
                kind: getattr(network, "metadata", None)
                for kind, network in (("deconvnet", predictor.deconvnet), ("fcn", predictor.fcn))
            },
            **_settings(predictor),
            methods={m: score.summary(dataset.class_names) for m, score in scores.items()},
        )


def run_submit(options: argparse.Namespace) -> None:
    """``deconvnet submit``."""
    predictor = _predictor(options)
    dataset = open_dataset(options.data, options.split, limit=options.limit)
    _check_classes(predictor, dataset)
    _keep_settings(options, predictor)
    # The competition in which any data may be learned from, as ImageNet is here.
    folder = Path("results/VOC2012/Segmentation") / f"comp6_{options.split}_cls"
    for i, name in enumerate(tqdm(dataset.names, unit="image", disable=options.quiet)):
        path = options.out / folder / f"{name}.png"
        if not path.exists():  # a command that was stopped goes on
            write_label_map(path, predictor(dataset.image(i)).labels, dataset.colours)
    archive = options.out / "results.tar.gz"
    # By name: other maps may lie there, or what a killed process left of one.
    with atomic_write(archive) as temporary, tarfile.open(temporary, "w:gz") as packed:
        for name in dataset.names:
            inside = folder / f"{name}.png"
            packed.add(options.out / inside, arcname=inside.as_posix())
    print(archive)


def _keep_settings(options: argparse.Namespace, predictor: Predictor) -> None:
    """Writes down how the label maps are made, or refuses to add others to those that are there."""
    files = {name: _weights(getattr(options, name)) for name in ("deconvnet", "fcn")}
    settings = {
        "split": options.split,
        "weights": {name: path and file_digest(path) for name, path in files.items()},
        **_settings(predictor),
    }
    path, text = options.out / "settings.json", json.dumps(settings, indent=2) + "\n"
    if path.is_file() and path.read_text() != text:
        raise ValueError(
            f"{path}: the label maps there were made with other weights or settings; "
            "give another folder as --out"
        )
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def _settings(predictor: Predictor) -> dict[str, object]:
    """What a label map depends on, besides the image and the weights."""
    boxes = predictor.edge_boxes
    return {
        "inference": asdict(predictor.config),
        "edge_boxes": boxes and asdict(boxes),
        "edge_model": boxes and _digest(predictor.edge_model),
        "crf": predictor.crf and asdict(predictor.crf),
    }


def run_proposals(options: argparse.Namespace) -> None:
    """``deconvnet proposals``."""
    recipe = recipes.RECIPES[options.recipe]()
    settings = recipe.edge_boxes
    if (options.image is None) == (options.data is None):
        raise ValueError("give either an image or --data, not both and not neither")
    if options.image is not None:
        found = edge_boxes(read_image(options.image), settings, options.edge_model)
        text = json.dumps({"boxes": found.boxes.tolist(), "scores": found.scores.tolist()})
        if options.out is None:
            print(text)
        else:
            with atomic_write(options.out) as temporary:
                temporary.write_text(text + "\n")
            print(options.out)
        return
    if options.cache is None:
        raise ValueError("--data needs --cache, the folder that receives the boxes")
    # As `train` opens it: a box found in a larger image is another one, with another key.
    max_side = recipe.inference.max_side
    dataset = open_dataset(options.data, options.split, limit=options.limit, max_side=max_side)
    every = _proposals(dataset, settings, options.cache, options, options.workers)
    print(f"{sum(len(p.boxes) for p in every)} boxes of {len(every)} images in {options.cache}")


def run_demo(options: argparse.Namespace) -> None:
    """``deconvnet demo``."""
    predictor = Predictor.from_pretrained("shapes", device=options.device)
    figure = show_prediction(predictor(make_scene(seed=options.scene).image))
    with atomic_write(options.out) as temporary:
        figure.savefig(temporary, dpi=150, format="png", bbox_inches="tight")
    print(options.out)


# --- what several commands need ---------------------------------------------------------------


def _proposals(
    dataset: VOCDataset,
    settings: EdgeBoxesConfig,
    cache: Path | None,
    options: argparse.Namespace,
    workers: int | None = None,
) -> list[Proposals]:
    return compute_proposals(
        dataset,
        cache,
        settings,
        workers=workers,
        progress=not options.quiet,
        model_path=options.edge_model,
    )


def _predictor(options: argparse.Namespace) -> Predictor:
    deconvnet, fcn = options.deconvnet, options.fcn
    if deconvnet is None and fcn in (None, "none"):
        options.deconvnet = "voc-deconvnet"
    if fcn is None and deconvnet in (None, "none"):
        options.fcn = "voc-fcn"
    settings = {}
    if options.recipe is not None:
        recipe = recipes.RECIPES[options.recipe]()
        settings = {"config": recipe.inference, "edge_boxes": recipe.edge_boxes, "crf": recipe.crf}
    predictor = Predictor.from_files(
        _weights(options.deconvnet),
        _weights(options.fcn),
        device=options.device,
        edge_model=options.edge_model,
        **settings,
    )
    config = predictor.config
    if options.convention == "release":
        size = predictor.deconvnet.config.input_size if predictor.deconvnet else 224
        release = InferenceConfig.release(size)
        kept = {n: getattr(config, n) for n in ("batch_size", "precision", "max_side")}
        config = replace(release, **kept)
        predictor.crf = CRFConfig.release()
    if options.num_proposals is not None:
        config = replace(config, num_proposals=options.num_proposals)
    predictor.config = config
    if options.whole:
        predictor.edge_boxes = None
    if options.no_crf:
        predictor.crf = None
    return predictor


def _check_classes(predictor: Predictor, dataset: VOCDataset) -> None:
    named = predictor.class_names
    network = predictor.deconvnet or predictor.fcn
    known = named or tuple(map(str, range(network.config.num_classes)))
    if len(known) != dataset.num_classes or (named and named != dataset.class_names):
        raise ValueError(
            f"{dataset.root}: has the {dataset.num_classes} classes "
            f"{', '.join(dataset.class_names)}; the weights know {len(known)}: {', '.join(known)}"
        )


def _weights(name: str | None) -> Path | None:
    """The file that ``--deconvnet``, ``--fcn`` or ``--init`` means."""
    if name is None or name == "none":
        return None
    is_file = Path(name).suffix or Path(name).is_file()  # a folder may bear a shipped name
    return Path(name) if is_file else pretrained(name)
