"""Data and still pictures of the explorables whose maps grow: the decoder, proposals, the CRF.

Part of :mod:`deconvnet.explorables`. Maps of one kind lie below each other in one PNG, a *strip*:
neighbours are nearly equal, and PNG stores what repeats only once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from deconvnet import shapes
from deconvnet.activations import decoder_activations, strongest_channels
from deconvnet.aggregation import cut_crops
from deconvnet.crf import CRFConfig, dense_crf
from deconvnet.data_uri import jpeg_uri, png_uri, read_uri
from deconvnet.inference import Predictor, aggregate_proposals, select_boxes
from deconvnet.instances import expand_box, pixel_box
from deconvnet.metrics import ConfusionMatrix
from deconvnet.model import DeconvNet
from deconvnet.plotting import BOX_COLOUR, Figure, name_places
from deconvnet.proposals import edge_boxes
from deconvnet.voc import VOID, Sample, palette
from deconvnet.weights import load_model, pretrained

LEVELS = 24  # shades of an activation map
CHANNELS = 4  # of each layer, besides their mean
DECODER_CROPS = ((2, 2), (25, 0), (5, 3))  # scene of the validation split, object in it
PROPOSAL_SCENES = (25, 0, 3)  # of the validation split; the first is the one of chapter 7
CRF_SCENES = (0, 3)
GAUSSIAN_WEIGHTS = (0.0, 3.0, 10.0)
BILATERAL_SIGMAS_RGB = (None, 3.0, 10.0, 30.0)  # grey levels; None turns the kernel off
ROOM = 1 / 200  # share of a map that a region must cover to carry its name


def _scene(index: int) -> Sample:
    return shapes.make_scene(seed=shapes.scene_seed(0, "val", index))


def _classes(class_names: Sequence[str]) -> list[dict[str, str]]:
    colours = palette(len(class_names)).tolist()
    return [
        {"name": name, "colour": "#{:02x}{:02x}{:02x}".format(*colour)}
        for name, colour in zip(class_names, colours)
    ]


# ------------------------------------------------------------------------------------- decoder


def decoder_crops() -> dict[str, Tensor]:
    """The crops that the explorable shows, ``uint8 [3, 64, 64]``, by the class of their object."""
    found = {}
    for index, k in DECODER_CROPS:
        sample = _scene(index)
        annotation = sample.annotations[k]
        box = pixel_box(expand_box(torch.tensor([annotation.box]), 1.2)[0].tolist())
        found[shapes.CLASS_NAMES[annotation.label]] = cut_crops(sample.image, [box], 64)[0]
    return found


def decoder_data(
    model: DeconvNet | None = None,
    crops: Mapping[str, Tensor] | None = None,
    class_names: Sequence[str] = shapes.CLASS_NAMES,
) -> dict[str, Any]:
    """Every map of the decoder for a few crops, with the encoder's switches and without.

    Args:
        model: A DeconvNet in evaluation mode; the small one that comes with the package by
            default.
        crops: ``uint8 [3, S, S]`` by name; three objects of made-up scenes by default.
        class_names: Names by label, the background first.

    Returns:
        The ``layers``, and for each crop, for ``on`` and ``off``, a strip a layer: the mean of
        its channels, then its strongest ones, all from 0 (dark) to the largest value that the
        map has with switches (bright). The last layer's are the probabilities of the classes.

    Raises:
        ValueError: If there is no crop, or the model does not fit the crops or the names.
    """
    model = load_model(pretrained("shapes-deconvnet")) if model is None else model
    crops = decoder_crops() if crops is None else crops
    if not crops:
        raise ValueError("crops must hold at least one crop, got none")
    if len(class_names) != model.config.num_classes:
        raise ValueError(
            f"got {len(class_names)} class_names for {model.config.num_classes} classes"
        )
    layers, shown = [], []
    for name, crop in crops.items():
        ways = {
            way: decoder_activations(model, crop[None], use_switches)
            for way, use_switches in (("on", True), ("off", False))
        }
        layers = [
            {"name": layer, "size": maps.shape[-1], "channels": maps.shape[1]}
            for layer, maps in ways["on"].items()
        ]
        channels = {
            layer: strongest_channels(maps[0], CHANNELS)
            for layer, maps in ways["on"].items()
            if layer != "score"
        }
        scale = {
            layer: _mean_and(ways["on"][layer][0], chosen).amax((1, 2), keepdim=True)
            for layer, chosen in channels.items()
        }
        entry: dict[str, Any] = {
            "name": name,
            "image": png_uri(crop),
            "channels": [*channels.values(), []],
        }
        for way, maps in ways.items():
            shares = [
                _mean_and(maps[layer][0], chosen) / scale[layer].clamp(min=1e-6)
                for layer, chosen in channels.items()
            ]
            shares.append(maps["score"][0].softmax(0))
            labels = maps["score"][0].argmax(0).byte()
            entry[way] = {
                "strips": [_shades_uri(share) for share in shares],
                # In words, what a picture shows at a glance.
                "bright": [_percent((share > 0.5).float().mean((1, 2))) for share in shares],
                "labels": png_uri(labels),
                "found": _percent(torch.bincount(labels.flatten(), minlength=len(class_names))
                                  / labels.numel()),
            }  # fmt: skip
        shown.append(entry)
    return {
        "size": model.config.input_size,
        "layers": layers,
        "classes": _classes(class_names),
        "shades": ["#{:02x}{:02x}{:02x}".format(*colour) for colour in _shades().tolist()],
        "crops": shown,
    }


def _mean_and(maps: Tensor, channels: Sequence[int]) -> Tensor:
    return torch.cat([maps.mean(0, keepdim=True), maps[list(channels)]])


def _percent(shares: Tensor) -> list[float]:
    return [round(100 * share) for share in shares.tolist()]


def _shades_uri(shares: Tensor) -> str:
    """Maps ``[N, h, w]`` of values from 0 to 1 below each other, dark to bright."""
    shades = (shares.clamp(0, 1) * (LEVELS - 1)).round().byte()
    return png_uri(shades.flatten(0, 1), _shades())


def _shades() -> Tensor:
    """``uint8 [LEVELS, 3]``: cividis, even steps for colour-blind readers too."""
    colours = matplotlib.colormaps["cividis"](torch.linspace(0, 1, LEVELS).numpy())
    return torch.from_numpy(255 * colours[:, :3]).round().byte()


def decoder_still(data: dict[str, Any]) -> Figure:
    """The first crop's mean activation at the end of each block, with switches and without."""
    crop = data["crops"][0]
    ends = [i for i, layer in enumerate(data["layers"]) if layer["name"][:6] != "unpool"]
    figure = Figure(figsize=(8.2, 2.3), layout="constrained")
    panels = figure.subplots(2, 1 + len(ends))
    for line, way, title in zip(panels, ("on", "off"), ("switches", "no switches")):
        line[0].imshow(read_uri(crop["image"]))
        line[0].set_title(title, fontsize=7)
        for axes, i in zip(line[1:], ends):
            layer = data["layers"][i]
            side, last = layer["size"], layer["name"] == "score"
            uri = crop[way]["labels"] if last else crop[way]["strips"][i]
            axes.imshow(read_uri(uri).convert("RGB").crop((0, 0, side, side)))
            axes.set_title("labels" if last else f"{side}×{side}", fontsize=7)
    for axes in panels.flat:
        axes.set_axis_off()
    return figure


# ----------------------------------------------------------------------------------- proposals


def proposals_data(
    predictor: Predictor | None = None, samples: Sequence[Sample] | None = None
) -> dict[str, Any]:
    """The aggregate of a few scenes as it grows, proposal by proposal, by maximum and by sum.

    Args:
        predictor: Whose DeconvNet, settings and class names are used; by default the one that
            comes with the package.
        samples: Scenes; three of the embedded data set's validation split by default.

    Returns:
        For each of the ``scenes`` its image, truth and boxes, the share of pixels that the boxes
        have reached, and for ``max`` and ``sum`` a strip of label maps and their mean IoU in
        percent.

    Raises:
        ValueError: If there is no sample, the predictor has no DeconvNet, or no box is found.
    """
    predictor, samples = _defaults(predictor, samples, PROPOSAL_SCENES)
    if predictor.deconvnet is None or predictor.edge_boxes is None:
        raise ValueError("predictor must have a deconvnet and edge_boxes")
    return {
        "classes": _classes(predictor.class_names),
        "scenes": [_growth(predictor, sample) for sample in samples],
    }


def _growth(predictor: Predictor, sample: Sample) -> dict[str, Any]:
    size = tuple(sample.labels.shape)
    proposals = edge_boxes(sample.image, predictor.edge_boxes, predictor.edge_model)
    selected = select_boxes(proposals.boxes, size, predictor.config)
    if not selected:
        raise ValueError(f"no proposal was found in {sample.name}")
    entry = _scene_entry(sample, predictor.class_names)
    reached = torch.zeros(size, dtype=torch.bool)
    entry["boxes"], entry["reached"] = [list(box) for box in selected], []
    for x0, y0, x1, y1 in selected:
        reached[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
        entry["reached"].append(round(100 * float(reached.float().mean())))
    for combine in ("max", "sum"):
        maps: list[Tensor] = []
        aggregate_proposals(
            predictor.deconvnet,
            sample.image,
            proposals.boxes,
            replace(predictor.config, combine=combine),
            lambda _, box, scores, maps=maps: maps.append(scores.argmax(0).byte().cpu()),
        )
        entry[combine] = _strip(maps, sample, predictor.class_names)
    return entry


def proposals_still(data: dict[str, Any]) -> Figure:
    """The first scene's aggregate after a few numbers of proposals."""
    scene = data["scenes"][0]
    counts = [n for n in (1, 5, 20, 50) if n <= len(scene["boxes"])]
    figure = Figure(figsize=(8.2, 2.1), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts):
        title = f"{count} proposal{'s' * (count > 1)}: {scene['max']['miou'][count - 1]:.0f} %"
        _draw_frame(axes, scene, scene["max"], count - 1, data["classes"], title)
        x0, y0, x1, y1 = scene["boxes"][count - 1]
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=BOX_COLOUR, lw=1.5))
        axes.set(xlim=(-0.5, scene["width"] - 0.5), ylim=(scene["height"] - 0.5, -0.5))
    return figure


# ----------------------------------------------------------------------------------------- CRF


def crf_data(
    predictor: Predictor | None = None,
    samples: Sequence[Sample] | None = None,
    gaussian_weights: Sequence[float] = GAUSSIAN_WEIGHTS,
    sigmas_rgb: Sequence[float | None] = BILATERAL_SIGMAS_RGB,
) -> dict[str, Any]:
    """The dense CRF on a few scenes, iteration by iteration, for a grid of settings.

    Args:
        predictor: Whose networks make the probabilities and whose CRF is varied; by default the
            one that comes with the package.
        samples: Scenes; two of the embedded data set's validation split by default.
        gaussian_weights: Weights of the Gaussian kernel.
        sigmas_rgb: Widths of the bilateral kernel in grey levels; None turns it off.

    Returns:
        For each of the ``scenes`` its image and truth, and for each pair of settings a strip of
        label maps, from the networks' own to the last iteration's, their mean IoU in percent and
        how many percent of the pixels each iteration changed.

    Raises:
        ValueError: If there is no sample, or a setting is out of range.
    """
    predictor, samples = _defaults(predictor, samples, CRF_SCENES)
    config = predictor.crf or CRFConfig()
    before = Predictor(
        predictor.deconvnet, predictor.fcn, predictor.config, predictor.edge_boxes, None, "cpu",
        predictor.edge_model, predictor.class_names,
    )  # fmt: skip
    scenes = []
    for sample in samples:
        probabilities = before(sample.image).probabilities
        settings = [
            _iterations(sample, probabilities, weight, sigma, config, predictor.class_names)
            for weight in gaussian_weights
            for sigma in sigmas_rgb
        ]
        scenes.append(_scene_entry(sample, predictor.class_names) | {"settings": settings})
    return {
        "classes": _classes(predictor.class_names),
        "iterations": config.iterations,
        "default": [config.gaussian_weight, config.bilateral_sigma_rgb],
        "gaussian_weights": list(gaussian_weights),
        "sigmas_rgb": list(sigmas_rgb),
        "scenes": scenes,
    }


def _iterations(
    sample: Sample,
    probabilities: Tensor,
    weight: float,
    sigma_rgb: float | None,
    config: CRFConfig,
    class_names: Sequence[str],
) -> dict[str, Any]:
    config = replace(
        config,
        gaussian_weight=weight,
        bilateral_weight=0.0 if sigma_rgb is None else config.bilateral_weight,
        bilateral_sigma_rgb=sigma_rgb or config.bilateral_sigma_rgb,
    )
    maps: list[Tensor] = []
    if weight or sigma_rgb:
        keep = lambda _, beliefs: maps.append(beliefs.argmax(0).byte())  # noqa: E731
        dense_crf(sample.image, probabilities, config, on_iteration=keep)
    else:  # without a kernel every iteration returns the networks' own map
        maps = [probabilities.argmax(0).byte()] * (config.iterations + 1)
    changed = [0.0] + [
        round(100 * float((now != then).float().mean()), 1) for then, now in zip(maps, maps[1:])
    ]
    return _strip(maps, sample, class_names) | {"changed": changed}


def crf_still(data: dict[str, Any]) -> Figure:
    """The first scene before the CRF and after it, with the default's and two other widths."""
    scene = data["scenes"][0]
    grid = [(g, s) for g in data["gaussian_weights"] for s in data["sigmas_rgb"]]
    shown = [("networks alone", scene["settings"][0], 0)]
    for (weight, sigma), setting in zip(grid, scene["settings"]):
        if weight == data["default"][0] and sigma is not None:
            shown.append((f"CRF, {sigma:g} grey levels", setting, data["iterations"]))
    figure = Figure(figsize=(8.2, 2.3), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (title, setting, number) in zip(panels, shown):
        title = f"{title}: {setting['miou'][number]:.0f} %"
        _draw_frame(axes, scene, setting, number, data["classes"], title)
    return figure


# -------------------------------------------------------------------------------------- common


def _defaults(
    predictor: Predictor | None, samples: Sequence[Sample] | None, indices: Sequence[int]
) -> tuple[Predictor, Sequence[Sample]]:
    predictor = predictor or Predictor.from_pretrained("shapes", device="cpu")
    samples = [_scene(i) for i in indices] if samples is None else samples
    if not samples:
        raise ValueError("samples must hold at least one scene, got none")
    if predictor.class_names is None:
        raise ValueError("predictor must know its class_names")
    return predictor, samples


def _scene_entry(sample: Sample, class_names: Sequence[str]) -> dict[str, Any]:
    height, width = sample.labels.shape
    present = [i for i in sample.labels.unique().tolist() if i not in (0, VOID)]
    return {
        "name": ", ".join(class_names[i] for i in present),
        "width": width,
        "height": height,
        "image": jpeg_uri(sample.image),
        "truth": png_uri(sample.labels),
        "names": _names(sample.labels, class_names, every_class=True),
    }


def _strip(maps: Sequence[Tensor], sample: Sample, class_names: Sequence[str]) -> dict[str, Any]:
    miou = []
    for labels in maps:
        confusion = ConfusionMatrix(len(class_names))
        confusion.update(labels, sample.labels)
        miou.append(round(100 * confusion.mean_iou(), 1))
    return {
        "strip": png_uri(torch.cat(list(maps))),
        "miou": miou,
        "found": [[i for i in labels.unique().tolist() if i] for labels in maps],
        "names": [_names(labels, class_names) for labels in maps],
    }


def _names(
    labels: Tensor, class_names: Sequence[str], every_class: bool = False
) -> list[list[int]]:
    """``[label, x, y]`` for each region that has room for its name."""
    return [
        [class_names.index(name), round(x), round(y)]
        for name, x, y, above in name_places(labels, class_names, ROOM)
        if every_class or not above
    ]


def _draw_frame(
    axes: Any,
    scene: dict[str, Any],
    strip: dict[str, Any],
    number: int,
    classes: Sequence[dict[str, str]],
    title: str,
) -> None:
    """One map of a strip over its scene, with the names of its regions."""
    top = number * scene["height"]
    colours = read_uri(strip["strip"]).convert("RGB")
    colours = colours.crop((0, top, scene["width"], top + scene["height"]))
    axes.imshow(read_uri(scene["image"]))
    rgb = np.asarray(colours)
    alpha = np.where(rgb.any(axis=2), np.uint8(153), np.uint8(0))  # the background is clear
    axes.imshow(np.dstack([rgb, alpha]))
    for label, x, y in strip["names"][number]:
        name = classes[label]["name"]
        axes.text(x, y, name, ha="center", va="center", fontsize=7, bbox={"fc": "w", "pad": 0.8})
    axes.set_title(title, fontsize=8)
    axes.set_axis_off()
