"""Data and still pictures of the book's explorables, its interactive figures.

Each explorable is fed by one function here, which returns what JSON can hold: numbers and small
pictures, made by this package from real scenes. ``python -m deconvnet.explorables`` writes all of
them to ``book/explorables``; the pages carry the JSON inside and so open without a network.
The twins in :mod:`deconvnet.widgets` compute the same in a running notebook.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from deconvnet import shapes
from deconvnet.data_uri import jpeg_uri, png_uri
from deconvnet.explorables_maps import (
    crf_data,
    crf_still,
    decoder_data,
    decoder_still,
    proposals_data,
    proposals_still,
)
from deconvnet.files import atomic_write
from deconvnet.instances import (
    InstanceConfig,
    crop_and_resize,
    expand_box,
    isolate_object,
    object_mask,
    pixel_box,
    square_box,
)
from deconvnet.plotting import BOX_COLOUR, Figure, name_places
from deconvnet.proposals import EdgeBoxesConfig, box_iou, edge_boxes
from deconvnet.unpooling import max_pool2d_with_switches, unpool2d
from deconvnet.voc import VOID, Sample, colourise, palette

MAX_BYTES = 300_000  # of one explorable's data and script together


# ------------------------------------------------------------------------------------ switches

FIRST_VALUES = ((1, 3, 2, 0), (8, 4, 1, 5), (0, 2, 6, 3), (7, 1, 2, 9))
MAP_TITLES = {
    "values": "input",
    "maxima": "maxima",
    "switches": "switches",
    "unpooled": "unpooled with switches",
    "corner": "without switches",
    "bilinear": "bilinear",
}
"""Of the maps of :func:`unpooled_in_three_ways`."""


def switches_data(values: Tensor | None = None) -> dict[str, Any]:
    """A map to pool, and inputs with PyTorch's answers that the page's arithmetic is tested on.

    Args:
        values: ``[4, 4]``, the numbers to start from; other ones by default.

    Returns:
        ``values`` and ``cases``; see :func:`unpooled_in_three_ways` for what a case holds.

    Raises:
        ValueError: If ``values`` has another shape or is not of whole numbers from -9 to 9.
    """
    values = torch.tensor(FIRST_VALUES) if values is None else values
    if values.shape != (4, 4):
        raise ValueError(f"values must be [4, 4], got {list(values.shape)}")
    if not torch.equal(values, values.round().clamp(-9, 9)):
        raise ValueError("values must be whole numbers from -9 to 9")
    random = torch.Generator().manual_seed(0)
    cases = {
        "the figure's own numbers": values,
        "ties": torch.tensor([[2, 2, 0, 0], [2, 2, 0, 0], [1, 3, -4, -4], [3, 3, -5, -4]]),
        "signed numbers": torch.randint(-9, 10, (4, 4), generator=random),
    }
    return {
        "values": values.tolist(),
        "cases": {name: unpooled_in_three_ways(case) for name, case in cases.items()},
    }


def unpooled_in_three_ways(values: Tensor) -> dict[str, Any]:
    """Pools a map with 2 x 2 windows, and goes back to its size in three ways.

    Args:
        values: ``[H, W]``, of even height and width.

    Returns:
        Nested lists by name: ``values``, ``maxima``, ``switches``, and the maps unpooled with
        switches (``unpooled``), into each window's first place (``corner``), and ``bilinear``.
    """
    x = values.float()[None]
    maxima, switches = max_pool2d_with_switches(x)
    maps = {
        "values": x,
        "maxima": maxima,
        "switches": switches,
        "unpooled": unpool2d(maxima, switches),
        "corner": unpool2d(maxima, torch.zeros_like(switches)),
        "bilinear": F.interpolate(maxima[None], scale_factor=2, mode="bilinear")[0],
    }
    return {name: values[0].tolist() for name, values in maps.items()}


def _switches_still(data: dict[str, Any]) -> Figure:
    maps = unpooled_in_three_ways(torch.tensor(data["values"]))
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, MAP_TITLES.items()):
        values = torch.tensor(maps[name])
        side = len(values)
        window = 1 if side == 2 else 2
        lit = values.abs() > (1e9 if name in ("switches", "bilinear") else 0)
        if name == "values":
            lit = (values == torch.tensor(maps["unpooled"])) & (values != 0)
        for row, column in torch.cartesian_prod(torch.arange(side), torch.arange(side)).tolist():
            colour = "#F8D48A" if lit[row, column] else "white"
            axes.add_patch(Rectangle((column, row), 1, 1, fc=colour, ec="#999999", lw=0.6))
            text = f"{values[row, column]:.2f}".rstrip("0").rstrip(".")
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9)
        for row, column in torch.cartesian_prod(*2 * [torch.arange(0, side, window)]).tolist():
            axes.add_patch(Rectangle((column, row), window, window, fill=False, lw=1.6))
        # The 2 x 2 maps have cells of the same size as the others.
        around = (4 - side) / 2
        axes.set(xlim=(-around - 0.1, side + around + 0.1), aspect="equal")
        axes.set(ylim=(side + around + 0.1, -around - 0.1))
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    return figure


# ----------------------------------------------------------------------------------- instances

CHAPTER_SCENE = shapes.scene_seed(0, "train", 21)  # the one that chapter 5 looks at


def stage_crops(
    sample: Sample, box: Tensor, k: int, config: InstanceConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One box, cut out and labelled as either stage of training would, before random cropping.

    Args:
        sample: A sample with annotations.
        box: ``[4]``, xyxy pixels, half open, not yet enlarged.
        k: The object that stage 1 asks for, a position in ``sample.annotations``.
        config: How boxes become crops.

    Returns:
        The box that is cut, ``float32 [4]``; the crop ``uint8 [3, r, r]`` with
        ``r = config.resize``; and its labels in stage 1 and in stage 2, ``uint8 [r, r]``.
    """
    cut = expand_box(box, config.context)
    cut = square_box(cut) if config.square else cut
    crop, stage1 = crop_and_resize(sample.image, isolate_object(sample, k), cut, config.resize)
    _, stage2 = crop_and_resize(sample.image, sample.labels, cut, config.resize)
    return cut, crop, stage1, stage2


def boxes_to_cut(
    sample: Sample, proposals: Tensor | None = None, per_object: int = 2, first: int = 60
) -> list[tuple[Tensor, int, float, int | None]]:
    """The boxes of a sample that are worth a look: its objects', and proposals good and bad.

    Args:
        sample: A sample with annotations.
        proposals: ``[N, 4]``, the best one first; Edge Boxes' for small images by default.
        per_object: How many proposals of each object to take, those of the highest IoU; as many
            that overlap no object by half are added.
        first: How many proposals to choose from.

    Returns:
        ``(box, k, iou, rank)``: a box, the object that it overlaps most, by how much, and its
        place among the proposals, from 1, or None for an object's own box. Objects first.

    Raises:
        ValueError: If the sample has no annotated object.
    """
    if not sample.annotations:
        raise ValueError(f"{sample.name} has no annotated object")
    if proposals is None:
        proposals = edge_boxes(sample.image, EdgeBoxesConfig.tiny()).boxes
    objects = torch.tensor([a.box for a in sample.annotations])
    proposals = proposals[:first]
    found: list[tuple[Tensor, int, float, int | None]] = [
        (box, k, 1.0, None) for k, box in enumerate(objects)
    ]
    if not len(proposals):
        return found
    overlap = box_iou(proposals, objects)
    iou, best = overlap.max(dim=1)
    ranks = set((iou < 0.5).nonzero().flatten()[:per_object].tolist())
    for column in overlap.T:
        ranks.update(column.topk(min(per_object, len(proposals))).indices.tolist())
    return found + [(proposals[i], int(best[i]), float(iou[i]), i + 1) for i in sorted(ranks)]


def instances_data(
    sample: Sample | None = None,
    proposals: Tensor | None = None,
    config: InstanceConfig | None = None,
    class_names: Sequence[str] = shapes.CLASS_NAMES,
) -> dict[str, Any]:
    """Boxes of a scene with the crops and labels that either stage would make of them.

    Args:
        sample: A sample with annotations; the scene of chapter 5 by default.
        proposals: ``[N, 4]``, the best one first; Edge Boxes' by default.
        config: How boxes become crops; the small network's by default. Each box is cut twice,
            as it is and as a square.
        class_names: Names by label, the background first.

    Returns:
        The scene and, for each box of :func:`boxes_to_cut`, its ``cuts``.

    Raises:
        ValueError: If the sample has no annotated object.
    """
    sample = shapes.make_scene(seed=CHAPTER_SCENE) if sample is None else sample
    config = config or InstanceConfig.tiny()
    height, width = sample.labels.shape

    def cut(box: Tensor, k: int, square: bool) -> dict[str, Any]:
        cut, crop, stage1, stage2 = stage_crops(sample, box, k, replace(config, square=square))
        return {
            "box": list(pixel_box(cut)),
            "crop": jpeg_uri(crop),
            "stages": [_labelled(labels, class_names) for labels in (stage1, stage2)],
            "share": round(_share(sample, k, pixel_box(cut)), 3),
        }

    labels = sample.labels.unique().tolist()
    return {
        "width": width,
        "height": height,
        "image": jpeg_uri(sample.image),
        "context": config.context,
        "resize": config.resize,
        "min_overlap": config.min_overlap,
        "legend": [
            {
                "label": "void, counts nowhere" if c == VOID else class_names[c],
                "colour": "#{:02x}{:02x}{:02x}".format(*palette()[c].tolist()),
            }
            for c in labels
        ],  # fmt: skip
        "boxes": [
            {
                "box": list(pixel_box(box)),
                "object": class_names[sample.annotations[k].label],
                "iou": round(iou, 2),
                "rank": rank,
                "difficult": sample.annotations[k].difficult,
                "cuts": {"warped": cut(box, k, False), "square": cut(box, k, True)},
            }
            for box, k, iou, rank in boxes_to_cut(sample, proposals)
        ],
        "shares": [
            round(float(object_mask(sample, k).float().mean()), 3)
            for k in range(len(sample.annotations))
        ],
    }


def _labelled(labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    found = [c for c in labels.unique().tolist() if c not in (0, VOID)]
    return {
        "labels": png_uri(labels),
        "classes": [class_names[c] for c in found],
        "names": names_on(labels, class_names, room=1 / 60),
    }


def names_on(
    labels: Tensor, class_names: Sequence[str], room: float = 1 / 400
) -> list[dict[str, Any]]:
    """The names to write on a label map, for ``picture.names`` of the page's script.

    Args:
        labels: ``uint8 [H, W]``.
        class_names: Names by label, the background first.
        room: Share of the map that a region must cover to carry a name.
    """
    return [
        {"text": name, "x": round(x + 0.5, 1), "y": round(max(y, 0) + 0.5, 1)}
        for name, x, y, _ in name_places(labels, class_names, room)
    ]


def _share(sample: Sample, k: int, box: tuple[int, int, int, int]) -> float:
    """The share of a box that an object's pixels cover."""
    x0, y0, x1, y1 = box
    inside = object_mask(sample, k)[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
    return float(inside.sum()) / ((x1 - x0) * (y1 - y0))


def show_stages(
    sample: Sample,
    box: Tensor,
    k: int,
    config: InstanceConfig,
    class_names: Sequence[str] = shapes.CLASS_NAMES,
) -> Figure:
    """Draws what :func:`stage_crops` returns, beside the scene with the box and what is cut.

    Args:
        sample: A sample with annotations.
        box: ``[4]``, xyxy pixels, half open, not yet enlarged.
        k: The object that stage 1 asks for, a position in ``sample.annotations``.
        config: How boxes become crops.
        class_names: Names by label, the background first.
    """
    cut, crop, *stages = stage_crops(sample, box, k, config)
    figure = Figure(figsize=(8.2, 2.7), layout="constrained")
    panels = figure.subplots(1, 4)
    pictures = {
        f"the box, and the box × {config.context:g}": sample.image,
        "crop": crop,
        **{f"labels in stage {i}": colourise(labels) for i, labels in enumerate(stages, start=1)},
    }
    for axes, (title, picture) in zip(panels, pictures.items()):
        axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    for corners, line in ((box, "-"), (cut, "--")):
        x0, y0, x1, y1 = (v - 0.5 for v in corners.tolist())
        outline = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=BOX_COLOUR, lw=2, ls=line)
        panels[0].add_patch(outline)
    for axes, labels in zip(panels[2:], stages):
        for name, x, y, _ in name_places(labels, class_names, 1 / 60):
            axes.text(x, y, name, ha="center", va="center", fontsize=8, bbox={"fc": "w", "pad": 1})
    return figure


def _instances_still(data: dict[str, Any]) -> Figure:
    sample = shapes.make_scene(seed=CHAPTER_SCENE)
    box, k, _, _ = boxes_to_cut(sample)[0]
    return show_stages(sample, box, k, InstanceConfig.tiny())


# ------------------------------------------------------------------------------------- writing

EXPLORABLES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], Figure]]] = {
    "switches": (switches_data, _switches_still),
    "decoder": (decoder_data, decoder_still),
    "instances": (instances_data, _instances_still),
    "proposals": (proposals_data, proposals_still),
    "crf": (crf_data, crf_still),
}
"""By name: the function that makes the data, and the one that draws a still picture of it."""


def write_explorables(folder: str | Path, names: Sequence[str] | None = None) -> list[Path]:
    """Writes each explorable's data as JSON, and its still picture as PNG.

    Args:
        folder: Where to; it is made if it is missing.
        names: Which of :data:`EXPLORABLES`; all by default.

    Returns:
        The files written.

    Raises:
        ValueError: If there is no explorable of such a name.
    """
    names = list(EXPLORABLES) if names is None else names
    if unknown := set(names) - set(EXPLORABLES):
        raise ValueError(f"names must be among {list(EXPLORABLES)}, got {sorted(unknown)}")
    written = []
    for name in names:
        make, draw = EXPLORABLES[name]
        data = make()
        with atomic_write(Path(folder, f"{name}.json")) as path:
            text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            path.write_text(text + "\n", encoding="utf-8")
        with atomic_write(Path(folder, f"{name}.png")) as path:
            draw(data).savefig(path, dpi=110, metadata={"Software": None})
        written += [Path(folder, f"{name}.{kind}") for kind in ("json", "png")]
    return written


if __name__ == "__main__":
    write_explorables(*sys.argv[1:2] or ["book/explorables"], sys.argv[2:] or None)
