"""Pictures of images, label maps and predictions.

VOC's colours are not all told apart by colour-blind readers, so every region also carries its
class's name. Figures belong to their caller and not to pyplot: a notebook shows them once, a
script saves them, and nothing keeps them in memory.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import cv2
import matplotlib.figure
import matplotlib.patheffects
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from deconvnet.inference import Prediction, check_image, label_map
from deconvnet.voc import CLASS_NAMES, VOID, colourise

BOX_COLOUR = "#E69F00"  # orange and white are told apart by everybody, on dark and on light
PANEL = 2.6  # inches, width of one picture in a row


class Figure(matplotlib.figure.Figure):
    """A Matplotlib figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png", dpi=120)
        return png.getvalue()


def overlay(
    image: Tensor, labels: Tensor, alpha: float = 0.6, colours: Tensor | None = None
) -> Tensor:
    """Lays the classes' colours over an image; the background stays as it is.

    Args:
        image: ``uint8 [3, H, W]``.
        labels: ``uint8 [H, W]``; 0 and void stay uncoloured, void fades to white.
        alpha: Strength of the colours, from 0 (only the image) to 1 (only colours).
        colours: ``uint8 [n, 3]`` RGB by label; VOC's by default.

    Returns:
        ``uint8 [3, H, W]``.

    Raises:
        ValueError: The sizes differ, or ``alpha`` is not from 0 to 1.
    """
    image, labels = check_image(image).cpu(), labels.cpu()
    if labels.shape != image.shape[1:]:
        raise ValueError(
            f"labels must have the image's size {list(image.shape[1:])}, got {list(labels.shape)}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    painted = colourise(labels, colours).float()
    painted[:, labels == VOID] = 255
    blended = torch.lerp(image.float(), painted, alpha).round().byte()
    return torch.where(labels > 0, blended, image)


def show_labels(
    image: Tensor, labels: Tensor, class_names: Sequence[str] | None = None, alpha: float = 0.6
) -> Figure:
    """Shows a label map over its image, each region with its class's name.

    Args:
        image: ``uint8 [3, H, W]``.
        labels: ``uint8 [H, W]``.
        class_names: Names by label, the background first; VOC's by default.
        alpha: Strength of the colours, from 0 to 1.
    """
    figure, (axes,) = _row(1, image, scale=1.6)
    _draw_labels(axes, image, labels, class_names, alpha)
    return figure


def show_boxes(image: Tensor, boxes: Tensor, count: int = 10) -> Figure:
    """Shows the first boxes, the best one thickest and in colour, on their image.

    Args:
        image: ``uint8 [3, H, W]``.
        boxes: ``[N, 4]``, xyxy pixels, half open; may run outside the image.
        count: How many to draw.
    """
    figure, (axes,) = _row(1, image, scale=1.6)
    _draw_boxes(axes, image, boxes, count)
    return figure


def show_probabilities(
    probabilities: Tensor, class_names: Sequence[str] | None = None, count: int = 4
) -> Figure:
    """Shows where the strongest classes are probable, one picture a class.

    Args:
        probabilities: ``float [C, H, W]``, from 0 to 1.
        class_names: Names by label, the background first; VOC's by default.
        count: How many classes, those first that reach the highest mean.
    """
    strongest = probabilities.mean((1, 2)).topk(min(count, len(probabilities))).indices.tolist()
    figure, panels = _row(len(strongest), probabilities)
    for axes, label in zip(panels, strongest):
        values = probabilities[label].float().cpu().numpy()
        shown = axes.imshow(values, cmap="cividis", vmin=0, vmax=1)
        axes.set_title(class_name(label, class_names))
    figure.colorbar(shown, ax=panels, label="probability", shrink=0.8)
    return figure


def show_activation(
    crop: Tensor, activation: Tensor, labels: Tensor, brightest: float | None = None
) -> Figure:
    """Shows one map of a network between the crop that it saw and its answer.

    Args:
        crop: ``uint8 [3, S, S]``.
        activation: ``[h, w]``, drawn at the crop's size, from 0 (dark) up (bright).
        labels: ``uint8 [S, S]``.
        brightest: The value drawn brightest; by default the map's largest.
    """
    figure, (left, middle, right) = _row(3, crop)
    _draw_image(left, crop, "crop")
    limit = float(activation.max()) if brightest is None else brightest
    values = activation.float().cpu().numpy()
    # With nothing above 0 all is dark, and no scale is undefined.
    shown = middle.imshow(values, cmap="cividis", vmin=0, vmax=limit if limit > 0 else 1)
    figure.colorbar(shown, ax=middle, shrink=0.8)
    middle.set_title(f"{values.shape[0]} × {values.shape[1]}")
    _draw_image(right, overlay(crop, labels), "answer")
    return figure


def show_prediction(
    prediction: Prediction, class_names: Sequence[str] | None = None, boxes: int = 10
) -> Figure:
    """Shows the way from an image to its labels, one picture for each stage that ran.

    Args:
        prediction: What a :class:`~deconvnet.inference.Predictor` returned.
        class_names: Names by label; by default the prediction's own, or else VOC's.
        boxes: How many of the segmented boxes to draw.
    """
    class_names = class_names or prediction.class_names
    image = prediction.image
    stages = {
        "DeconvNet": prediction.deconvnet_probabilities,
        "FCN": prediction.fcn_probabilities,
        "ensemble": prediction.ensemble_probabilities,
        "ensemble and CRF"
        if prediction.ensemble_probabilities is not None
        else "with CRF": prediction.crf_probabilities,
    }
    size = tuple(image.shape[1:])  # that of the maps may be smaller
    stages = {title: label_map(p, size) for title, p in stages.items() if p is not None}
    has_boxes = prediction.boxes is not None
    figure, panels = _row(1 + has_boxes + len(stages), image)
    panels = iter(panels)
    _draw_image(next(panels), image, "image")
    if has_boxes:
        axes = next(panels)
        _draw_boxes(axes, image, prediction.boxes, boxes)
        axes.set_title(f"{min(boxes, len(prediction.boxes))} of {len(prediction.boxes)} boxes")
    for axes, (title, labels) in zip(panels, stages.items()):
        _draw_labels(axes, image, labels, class_names, 0.6, prediction.class_colours)
        axes.set_title(title)
    return figure


def name_places(
    labels: Tensor, class_names: Sequence[str] | None = None, room: float = 1 / 400
) -> list[tuple[str, float, float, bool]]:
    """Finds where to write the classes' names on a label map.

    Args:
        labels: ``uint8 [H, W]``; the background and void get no name.
        class_names: Names by label, the background first; VOC's by default.
        room: Share of the map that a region must cover to carry a name. The largest region of
            each class gets one in any case.

    Returns:
        ``(name, x, y, above)`` for each name: the innermost pixel of its region, or, where there
        is no room, a place above the region, for the name to stand on.
    """
    places = []
    for label in labels.unique().tolist():
        if label in (0, VOID):
            continue
        least = room * labels.numel()
        for x, y, pixels in _regions((labels == label).cpu().numpy(), least):
            if pixels >= least:
                places.append((class_name(label, class_names), x, y, False))
            else:
                # The only trace of its class: name it from above, so that it stays visible.
                places.append((class_name(label, class_names), x, y - pixels**0.5, True))
    return places


def _row(count: int, image: Tensor, scale: float = 1.0) -> tuple[Figure, list[Axes]]:
    height, width = image.shape[-2:]
    size = (PANEL * scale * count, PANEL * scale * height / width + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes in panels:
        axes.set_axis_off()
    return figure, list(panels)


def _draw_image(axes: Axes, image: Tensor, title: str = "") -> None:
    axes.imshow(check_image(image).permute(1, 2, 0).cpu().numpy())
    axes.set_title(title)


def _draw_boxes(axes: Axes, image: Tensor, boxes: Tensor, count: int) -> None:
    _draw_image(axes, image)
    # Worst first, so that the best box lies on top.
    for rank, (x0, y0, x1, y1) in reversed(list(enumerate(boxes[:count].tolist()))):
        style = {"color": BOX_COLOUR, "lw": 2.5} if rank == 0 else {"color": "white", "lw": 1}
        box = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, **style)
        box.set_path_effects(_outline(style["lw"] + 1.5))
        axes.add_patch(box)


def _draw_labels(
    axes: Axes,
    image: Tensor,
    labels: Tensor,
    class_names: Sequence[str] | None,
    alpha: float,
    colours: Tensor | None = None,
) -> None:
    _draw_image(axes, overlay(image, labels, alpha, colours))
    for name, x, y, above in name_places(labels, class_names):
        _draw_name(axes, x, y, name, "bottom" if above else "center")


def _draw_name(axes: Axes, x: float, y: float, name: str, vertical: str) -> None:
    text = axes.text(x, y, name, color="white", fontsize=8, ha="center", va=vertical)
    text.set(clip_on=True, path_effects=_outline(2))


def _regions(mask: np.ndarray, least: float) -> list[tuple[float, float, int]]:
    """The innermost pixel and the size of the connected regions of a mask, largest first.

    Those of fewer pixels than ``least`` are left out, but for the largest of all.
    """
    _, regions, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    pixels = stats[1:, cv2.CC_STAT_AREA]  # 0 is all that lies outside
    order = (-pixels).argsort(kind="stable")
    found = []
    for i in order[: max(1, int((pixels >= least).sum()))].tolist():
        x0, y0, width, height = stats[i + 1, :4].tolist()
        inside = regions[y0 : y0 + height, x0 : x0 + width] == i + 1
        # A frame, so that the image's border also counts as an edge of the region.
        depth = cv2.distanceTransform(np.pad(inside.astype(np.uint8), 1), cv2.DIST_L2, 3)
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        found.append((float(x0 + x) - 1, float(y0 + y) - 1, int(pixels[i])))
    return found


def _outline(width: float) -> list[matplotlib.patheffects.AbstractPathEffect]:
    return [matplotlib.patheffects.withStroke(linewidth=width, foreground="black")]


def class_name(label: int, class_names: Sequence[str] | None = None) -> str:
    """What figures, and their texts, call a label.

    Args:
        label: 0 is the background.
        class_names: Names by label; VOC's by default.
    """
    names = CLASS_NAMES if class_names is None else class_names
    return names[label] if label < len(names) else f"class {label}"
