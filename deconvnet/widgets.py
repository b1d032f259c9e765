"""Live figures for a running notebook: change something, and see what follows from it.

Each function returns an ``ipywidgets`` widget; all of them can be used with the keyboard alone.
The built book has no Python behind it, so there a chapter shows a still picture in their place::

    explore_proposals(model, image, boxes) if is_live() else show_labels(image, labels)
"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape

import ipywidgets
import torch
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from deconvnet.activations import decoder_activations, strongest_channels
from deconvnet.aggregation import Box
from deconvnet.crf import NORMALIZATIONS, CRFConfig, dense_crf
from deconvnet.explorables import (
    FIRST_VALUES,
    MAP_TITLES,
    boxes_to_cut,
    show_stages,
    stage_crops,
    unpooled_in_three_ways,
)
from deconvnet.inference import InferenceConfig, aggregate_proposals, check_image, select_boxes
from deconvnet.instances import InstanceConfig, pixel_box
from deconvnet.metrics import ConfusionMatrix
from deconvnet.model import DeconvNet
from deconvnet.plotting import BOX_COLOUR, Figure, class_name, show_activation, show_labels
from deconvnet.voc import CLASS_NAMES, VOID, Sample

# One tint for each 2 x 2 window (Okabe and Ito, lightened): dark digits stay readable on them,
# in a dark notebook too.
TINTS = (("#b3d9f2", "#f7dfa8"), ("#b3e0d1", "#edcfe0"))
LAST_ITERATION = 20


def is_live() -> bool:
    """Whether somebody can move a slider: in JupyterLab, Jupyter Notebook and Colab.

    Jupyter's server names the session to the kernels that it starts; a kernel that only executes
    a notebook, to test it or to build the book, gets no such name.
    """
    return "google.colab" in sys.modules or "JPY_SESSION_NAME" in os.environ


def explore_switches(values: Tensor | None = None) -> ipywidgets.VBox:
    """Sixteen numbers to change, pooled and unpooled before your eyes.

    Args:
        values: ``[4, 4]``, the numbers to start from; other ones by default.

    Returns:
        Number fields, and tables of the pooled values, of their switches and of three ways back
        to 4 x 4: by switches, into a fixed corner, and bilinear.

    Raises:
        ValueError: ``values`` has another shape, or a value that is not finite.
    """
    values = torch.tensor(FIRST_VALUES) if values is None else values
    if values.shape != (4, 4):
        raise ValueError(f"values must be [4, 4], got {list(values.shape)}")
    if not values.isfinite().all():
        raise ValueError("values must be finite, got NaN or infinity")
    fields = [
        ipywidgets.FloatText(
            float(value),
            tooltip=f"row {i // 4 + 1}, column {i % 4 + 1}",
            layout=ipywidgets.Layout(width="5em"),
        )
        for i, value in enumerate(values.flatten().tolist())
    ]
    tables = ipywidgets.HTML()

    def update(change: object = None) -> None:
        maps = unpooled_in_three_ways(torch.tensor([field.value for field in fields]).view(4, 4))
        shown = "".join(_table(title, maps[name]) for name, title in MAP_TITLES.items())
        tables.value = f'<div style="{_ROW}">{shown}</div>'

    _on_change(fields, update)
    grid = ipywidgets.GridBox(
        fields, layout=ipywidgets.Layout(grid_template_columns="repeat(4, 5.5em)")
    )
    return ipywidgets.VBox([grid, tables])


def explore_instances(
    sample: Sample,
    proposals: Tensor | None = None,
    config: InstanceConfig = InstanceConfig(),
    class_names: Sequence[str] | None = None,
) -> ipywidgets.VBox:
    """One object or proposal at a time: its box, the crop, and the crop's labels in both stages.

    Args:
        sample: A sample with annotations.
        proposals: ``[N, 4]``, xyxy pixels, half open, the best one first; Edge Boxes' for small
            images by default.
        config: How boxes become crops.
        class_names: Names by label, the background first; VOC's by default.

    Returns:
        The choice of the box and of its shape, and the pictures.

    Raises:
        ValueError: ``sample`` has no annotated object.
    """
    names = CLASS_NAMES if class_names is None else class_names
    boxes = boxes_to_cut(sample, proposals)

    def title(number: int) -> str:
        _, k, iou, rank = boxes[number]
        name = names[sample.annotations[k].label]
        if rank is None:
            return f"object {k + 1}: {name}"
        return f"proposal {rank}: {name}, IoU {iou:.2f}"

    chosen = ipywidgets.Dropdown(
        options={title(i): i for i in range(len(boxes))}, description="cut out", style=_WIDE
    )
    square = ipywidgets.Dropdown(
        options={"kept, then warped (paper)": False, "made square first (release)": True},
        value=config.square,
        description="shape of the box",
        style=_WIDE,
    )
    picture = ipywidgets.HTML()

    def update(change: object = None) -> None:
        box, k, _, _ = boxes[chosen.value]
        settings = replace(config, square=square.value)
        cut, crop, *stages = stage_crops(sample, box, k, settings)
        found = [
            f"stage {i}: {', '.join(names[c] for c in labels.unique().tolist() if 0 < c < VOID)}"
            for i, labels in enumerate(stages, start=1)
        ]
        sizes = [f"{x1 - x0} × {y1 - y0}" for x0, y0, x1, y1 in map(pixel_box, (box, cut))]
        caption = f"{title(chosen.value)}; {sizes[0]} pixels, cut out {sizes[1]}, warped to "
        caption += f"{crop.shape[1]} × {crop.shape[2]}; labelled in {'; in '.join(found)}"
        figure = show_stages(sample, box, k, settings, names)
        picture.value = _figure(figure, f"Scene, crop and labels. {caption}.", caption)

    _on_change((chosen, square), update)
    return ipywidgets.VBox([chosen, square, picture])


def explore_decoder(
    model: DeconvNet, crop: Tensor, class_names: Sequence[str] | None = None, channels: int = 4
) -> ipywidgets.VBox:
    """The decoder, layer by layer: the maps of one crop, from a single point to its full size.

    Args:
        model: A DeconvNet in evaluation mode.
        crop: ``uint8 [3, S, S]``, RGB, with ``S = model.config.input_size``.
        class_names: Names by label, the background first; VOC's by default.
        channels: How many of the strongest channels of a layer can be chosen.

    Returns:
        A slider over the layers, the choice of the channel, of the class at the last layer and
        of switches or none, and the map between the crop and the network's answer. A map is
        drawn from 0 (dark) to the largest value that it has with switches (bright), the last
        one as probabilities.

    Raises:
        TypeError: ``crop`` is not a ``uint8`` tensor.
        ValueError: ``crop`` is malformed, or the model is in training mode.
    """
    crops = check_image(crop)[None]
    ways = {True: decoder_activations(model, crops, True)}
    ways[False] = decoder_activations(model, crops, False)
    layers = list(ways[True])
    names = CLASS_NAMES if class_names is None else class_names
    answers = {way: _labels(maps["score"][0]) for way, maps in ways.items()}
    counts = torch.bincount(answers[True].flatten(), minlength=model.config.num_classes)

    layer = _slider("layer", 1, 1, len(layers))
    ranks = {"mean of all": 0} | {f"strongest no. {i}": i for i in range(1, channels + 1)}
    channel = ipywidgets.Dropdown(options=ranks, description="channel", style=_WIDE)
    label = ipywidgets.Dropdown(
        options={names[i]: i for i in range(len(counts))},
        value=1 + int(counts[1:].argmax()),
        description="class at the end",
        style=_WIDE,
    )
    switches = ipywidgets.Checkbox(True, description="switches")
    picture = ipywidgets.HTML()

    def look(name: str, maps: dict[str, Tensor]) -> tuple[Tensor, str]:
        if name == "score":
            return maps[name][0].softmax(0)[label.value], f"probability of {names[label.value]}"
        count = maps[name].shape[1]
        if channel.value == 0:
            return maps[name][0].mean(0), f"mean of {count} channels"
        strongest = strongest_channels(ways[True][name][0], channels)
        chosen = strongest[min(channel.value, len(strongest)) - 1]
        return maps[name][0, chosen], f"channel {chosen + 1} of {count}"

    def update(change: object = None) -> None:
        name, way = layers[layer.value - 1], switches.value
        values, what = look(name, ways[way])
        brightest = 1.0 if name == "score" else float(look(name, ways[True])[0].max())
        channel.disabled, label.disabled = name == "score", name != "score"
        caption = (
            f"{name}, {values.shape[0]} × {values.shape[1]}: {what}, "
            f"{'with' if way else 'without'} switches"
        )
        found = ", ".join(names[i] for i in answers[way].unique().tolist())
        figure = show_activation(crop, values, answers[way], brightest)
        alt = f"Crop, map and answer. {caption}. In the answer: {found}."
        picture.value = _figure(figure, alt, caption)

    _on_change((layer, channel, label, switches), update)
    return ipywidgets.VBox([layer, channel, label, switches, picture])


def explore_proposals(
    model: nn.Module,
    image: Tensor,
    boxes: Tensor,
    config: InferenceConfig = InferenceConfig(),
    class_names: Sequence[str] | None = None,
    target: Tensor | None = None,
) -> ipywidgets.VBox:
    """The aggregated label map, growing proposal by proposal.

    Args:
        model: A DeconvNet in evaluation mode.
        image: ``uint8 [3, H, W]``, RGB.
        boxes: Proposals ``[N, 4]``, xyxy pixels, half open, the best one first.
        config: How many of them, and how they are combined at first.
        class_names: Names by label, the background first; VOC's by default.
        target: The true labels, ``uint8 [H, W]``, if the mean IoU is to be shown.

    Returns:
        A slider over the number of proposals, the choice between maximum and sum, and the label
        map with the box that came last.

    Raises:
        ValueError: There is no proposal to show, or an argument is malformed.
    """
    if not select_boxes(boxes, tuple(check_image(image).shape[1:]), config):
        raise ValueError("boxes holds no proposal that the configuration would select")
    grown: dict[str, list[tuple[Box, Tensor]]] = {}

    def grow(combine: str) -> list[tuple[Box, Tensor]]:
        if combine not in grown:
            grown[combine] = []
            aggregate_proposals(
                model,
                image,
                boxes,
                replace(config, combine=combine),
                lambda _, box, scores: grown[combine].append((box, _labels(scores))),
            )
        return grown[combine]

    count = len(grow(config.combine))
    number = _slider("proposals", count, 1, count)
    combine = ipywidgets.Dropdown(
        options={"pixel-wise maximum": "max", "sum": "sum"},
        value=config.combine,
        description="combined by",
    )
    picture = ipywidgets.HTML()

    def update(change: object = None) -> None:
        (x0, y0, x1, y1), labels = grow(combine.value)[number.value - 1]
        figure = show_labels(image, labels, class_names)
        figure.axes[0].add_patch(
            Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color=BOX_COLOUR, lw=2)
        )
        caption = f"{number.value} of {count} proposals; the box is the last one"
        picture.value = _captioned(figure, caption, labels, class_names, target)

    _on_change((number, combine), update)
    return ipywidgets.VBox([number, combine, picture])


def explore_crf(
    image: Tensor,
    probabilities: Tensor,
    config: CRFConfig = CRFConfig(),
    class_names: Sequence[str] | None = None,
    target: Tensor | None = None,
) -> ipywidgets.VBox:
    """The dense CRF, iteration by iteration, with all its knobs.

    Args:
        image: ``uint8 [3, H, W]``, RGB.
        probabilities: ``float32 [C, H, W]``, what the networks believe.
        config: Settings to start from.
        class_names: Names by label, the background first; VOC's by default.
        target: The true labels, ``uint8 [H, W]``, if the mean IoU is to be shown.

    Returns:
        Sliders for the iterations and for the weights and widths of both kernels, the choice of
        the normalisation, and the label map.

    Raises:
        TypeError: ``image`` or ``probabilities`` has the wrong dtype.
        ValueError: An argument is malformed.
    """
    iterations = _slider("iterations", min(config.iterations, LAST_ITERATION), 0, LAST_ITERATION)
    ranges = {
        "gaussian_weight": (0, 15),
        "gaussian_sigma": (1, 15),
        "bilateral_weight": (0, 25),
        "bilateral_sigma": (1, 80),
        "bilateral_sigma_rgb": (1, 40),
    }
    knobs: dict[str, ipywidgets.Widget] = {
        name: _slider(name.replace("_", " "), getattr(config, name), *limits, 0.5)
        for name, limits in ranges.items()
    }
    knobs["normalization"] = ipywidgets.Dropdown(
        options=NORMALIZATIONS, value=config.normalization, description="normalization", style=_WIDE
    )
    picture = ipywidgets.HTML()
    steps: list[Tensor] = []

    def solve(change: object = None) -> None:
        steps.clear()
        chosen = {name: knob.value for name, knob in knobs.items()}
        settings = replace(config, iterations=LAST_ITERATION, **chosen)
        dense_crf(
            image, probabilities, settings, on_iteration=lambda _, q: steps.append(_labels(q))
        )
        update()

    def update(change: object = None) -> None:
        labels = steps[iterations.value]
        caption = f"after {iterations.value} iterations"
        figure = show_labels(image, labels, class_names)
        picture.value = _captioned(figure, caption, labels, class_names, target)

    _on_change(knobs.values(), solve)
    iterations.observe(update, "value")
    return ipywidgets.VBox([iterations, *knobs.values(), picture])


_WIDE = {"description_width": "10em"}
_ROW = "display: flex; flex-wrap: wrap; gap: 1.5em; margin-top: 1em"
_CELL = "width: 3.2em; height: 2.2em; text-align: center; border: 1px solid #555; color: #111"


def _slider(
    name: str, value: float, low: float, high: float, step: float | None = None
) -> ipywidgets.IntSlider | ipywidgets.FloatSlider:
    """A slider that reports when it is let go, since what follows may take a second."""
    kind = ipywidgets.IntSlider if step is None else ipywidgets.FloatSlider
    return kind(
        value=value,
        min=min(low, value),
        max=max(high, value),
        step=step or 1,
        description=name,
        continuous_update=False,
        style=_WIDE,
        layout=ipywidgets.Layout(width="30em", max_width="100%"),
    )


def _on_change(controls: Sequence[ipywidgets.Widget], update: Callable[..., None]) -> None:
    update()
    for control in controls:
        control.observe(update, "value")


def _labels(scores: Tensor) -> Tensor:
    return scores.argmax(0).to("cpu", torch.uint8)


def _captioned(
    figure: Figure,
    caption: str,
    labels: Tensor,
    class_names: Sequence[str] | None,
    target: Tensor | None,
) -> str:
    """The figure as HTML, with a caption that screen readers read too."""
    if target is not None:
        classes = max(int(labels.max()), int(target[target != 255].max())) + 1
        confusion = ConfusionMatrix(max(classes, 2))
        confusion.update(labels, target)
        caption += f"; mean IoU {confusion.mean_iou():.3f}"
    found = labels.unique().tolist()
    names = [class_name(i, class_names) for i in found]
    return _figure(figure, f"Label map {caption}. In it: {', '.join(names)}.", caption)


def _figure(figure: Figure, alt: str, caption: str) -> str:
    png = base64.b64encode(figure._repr_png_()).decode()
    style = "max-width: 100%; background: #fff"
    alt = escape(alt, quote=True)
    return (
        f'<figure><img src="data:image/png;base64,{png}" alt="{alt}" style="{style}">'
        f'<figcaption role="status">{escape(caption)}</figcaption></figure>'
    )


def _table(title: str, rows: Sequence[Sequence[float]]) -> str:
    """A map as an HTML table; each pooling window has a tint of its own."""
    window = len(rows) // 2
    cells = (
        "".join(
            f'<td style="{_CELL}; background: {TINTS[r // window][c // window]}">{value:g}</td>'
            for c, value in enumerate(row)
        )
        for r, row in enumerate(rows)
    )
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><caption>{escape(title)}</caption>{body}</table>"
