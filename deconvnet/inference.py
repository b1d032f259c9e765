"""From an image to a label map: proposals, crops, score maps, and their pixel-wise maximum.

Every proposal is segmented by itself and its score map pasted back where it came from. The
map of the whole image grows in place, one maximum after the other, so that memory does not
depend on the number of proposals. Softmax, the mean with FCN's probabilities and a dense CRF
follow. Each step is a function of its own; :class:`Predictor` runs them in order and keeps
what each of them gave.

Source: Noh, Hong, Han, ICCV 2015, section 4.3; the release's way of doing it,
``inference/generate_EDeconvNet_CRF_results.m``.
"""

from __future__ import annotations

import math
import os
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deconvnet.aggregation import Box, ScoreCanvas, cut_crops
from deconvnet.crf import CRFConfig, dense_crf
from deconvnet.deployment import prepare_for_inference
from deconvnet.ensemble import mean_of_probabilities, product_of_scores
from deconvnet.fcn import FCN8s
from deconvnet.hardware import PRECISIONS, autocast, choose_precision, default_device
from deconvnet.instances import expand_box, pixel_box, square_box
from deconvnet.model import DeconvNet, PixelNormalisation
from deconvnet.proposals import EdgeBoxesConfig, Proposals, edge_boxes
from deconvnet.voc import read_image, shrink
from deconvnet.weights import load_model, pretrained

OnProposal = Callable[[int, Box, Tensor], None]


@dataclass(frozen=True)
class InferenceConfig:
    """How proposals become one map of scores; the defaults are the paper's way.

    Raises:
        ValueError: If a field is out of range.
    """

    num_proposals: int = 50  # of the highest objectness, an image (paper, section 4.3)
    context: float = 1.2  # box side after / before enlarging, as in training (section 4.2)
    convention: str = "paper"  # "release": square boxes, no scores below 0, product ensemble
    combine: str = "max"  # "sum": the alternative that the paper found worse
    min_side: int = 0  # px; smaller boxes are skipped before counting (release: 112)
    include_whole_image: bool = False  # one more box, so that every pixel is seen; ours
    max_side: int | None = None  # px; Predictor segments larger images at this size; ours
    batch_size: int = 16  # crops that go through the network at once; ours
    precision: str = "portable"  # see deconvnet.hardware.choose_precision; ours

    def __post_init__(self) -> None:
        if self.convention not in ("paper", "release"):
            raise ValueError(f'convention must be "paper" or "release", got {self.convention!r}')
        if self.combine not in ("max", "sum"):
            raise ValueError(f'combine must be "max" or "sum", got {self.combine!r}')
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
        if not (math.isfinite(self.context) and self.context > 0):
            raise ValueError(f"context must be a positive factor, got {self.context}")
        limits = {"num_proposals": 0, "min_side": 0, "batch_size": 1}
        if self.max_side is not None:
            limits["max_side"] = 1
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @classmethod
    def release(cls, input_size: int = 224) -> InferenceConfig:
        """The authors' released code: squares of at least half the network's input."""
        return cls(convention="release", min_side=input_size // 2)


def select_boxes(
    boxes: Tensor, image_size: tuple[int, int], config: InferenceConfig = InferenceConfig()
) -> list[Box]:
    """Turns sorted proposals into the boxes that the network looks at.

    Args:
        boxes: Proposals ``[N, 4]``, xyxy pixels, half open, the best one first.
        image_size: Height and width in pixels.
        config: How many boxes, how much context, which convention.

    Returns:
        At most ``num_proposals`` boxes ``(x0, y0, x1, y1)`` in whole pixels, enlarged and
        possibly running outside the image; then the whole image, if the configuration says so.

    Raises:
        ValueError: The boxes are not ``[N, 4]``, not finite or empty.
    """
    boxes = torch.as_tensor(boxes, dtype=torch.float32).cpu()
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4] (x0, y0, x1, y1), got {list(boxes.shape)}")
    enlarged = expand_box(boxes, config.context)
    if config.convention == "release":
        enlarged = square_box(enlarged)
    selected = []
    for x0, y0, x1, y1 in map(pixel_box, enlarged.tolist()):
        if len(selected) == config.num_proposals:
            break
        if min(x1 - x0, y1 - y0) >= config.min_side:
            selected.append((x0, y0, x1, y1))
    if config.include_whole_image:
        height, width = image_size
        selected.append((0, 0, width, height))
    return selected


@torch.no_grad()
def aggregate_proposals(
    model: nn.Module,
    image: Tensor,
    boxes: Tensor,
    config: InferenceConfig = InferenceConfig(),
    on_proposal: OnProposal | None = None,
) -> Tensor:
    """Segments every proposal by itself and combines the score maps pixel by pixel.

    Args:
        model: A DeconvNet in evaluation mode.
        image: ``uint8 [3, H, W]``, RGB.
        boxes: Proposals ``[N, 4]``, xyxy pixels, half open, the best one first.
        config: How many of them, and how they are combined.
        on_proposal: Called after each box as ``on_proposal(index, box, scores)`` with the
            aggregate so far, ``[C, H, W]``. The next box changes it in place: clone to keep.

    Returns:
        Scores before softmax, ``float32 [C, H, W]`` on the model's device; all 0 (which means
        background) without boxes.

    Raises:
        TypeError: The image is not a ``uint8`` tensor.
        ValueError: Image, boxes or the network's scores are malformed or not finite, or the
            model is in training mode.
    """
    image = check_image(image).to(_device(model))
    size, height_width = model.config.input_size, tuple(image.shape[1:])
    selected = select_boxes(boxes, height_width, config)
    canvas = ScoreCanvas(
        model.config.num_classes, height_width, config.convention, config.combine, image.device
    )
    finite = []
    for start in range(0, len(selected), config.batch_size):
        batch = selected[start : start + config.batch_size]
        scores = _run(model, cut_crops(image, batch, size), config.precision).contiguous()
        finite.append(scores.isfinite().all())
        if on_proposal is not None or not scores.is_cuda:
            _check_finite(finite)  # else at the end, since the look waits for the GPU
        for i, (box, crop_scores) in enumerate(zip(batch, scores), start):
            canvas.paste(box, crop_scores)
            if on_proposal is not None:
                on_proposal(i, box, canvas.scores)
    _check_finite(finite)
    return canvas.scores


@torch.no_grad()
def whole_image_scores(model: nn.Module, image: Tensor, precision: str = "portable") -> Tensor:
    """Segments the image as one crop: DeconvNet without its instance-wise idea.

    Args:
        model: A DeconvNet in evaluation mode.
        image: ``uint8 [3, H, W]``, RGB; it is warped to the network's square input.
        precision: See :func:`deconvnet.hardware.choose_precision`.

    Returns:
        Scores before softmax, ``float32 [C, H, W]`` on the model's device.
    """
    image = check_image(image).to(_device(model))
    _, height, width = image.shape
    box = (0, 0, width, height)
    scores = _run(model, cut_crops(image, [box], model.config.input_size), precision)
    _check_finite([scores.isfinite().all()])
    canvas = ScoreCanvas(model.config.num_classes, (height, width), device=image.device)
    canvas.paste(box, scores[0])
    return canvas.scores


@torch.no_grad()
def fcn_scores(fcn: nn.Module, image: Tensor, precision: str = "portable") -> Tensor:
    """Segments the image at its own size with a fully convolutional network.

    Args:
        fcn: :class:`deconvnet.fcn.FCN8s`, :class:`TorchvisionFCN` or the like, in evaluation
            mode.
        image: ``uint8 [3, H, W]``, RGB.
        precision: See :func:`deconvnet.hardware.choose_precision`.

    Returns:
        Scores before softmax, ``float32 [C, H, W]`` on the network's device.
    """
    image = check_image(image).to(_device(fcn))
    scores = _run(fcn, image[None], precision)[0].float()
    _check_finite([scores.isfinite().all()])
    if scores.shape[1:] != image.shape[1:]:
        raise ValueError(
            f"the FCN must score every pixel of the image {list(image.shape[1:])}, "
            f"got a map of {list(scores.shape[1:])}"
        )
    return scores


class TorchvisionFCN(nn.Module):
    """Lets a segmentation network of torchvision take FCN-8s's place.

    Args:
        network: For example ``torchvision.models.segmentation.fcn_resnet50(weights="DEFAULT")``,
            which knows the 21 VOC classes.
        num_classes: Number of classes that it scores.
    """

    def __init__(self, network: nn.Module, num_classes: int = 21) -> None:
        super().__init__()
        self.network = network
        self.config = SimpleNamespace(num_classes=num_classes)
        self.normalise = PixelNormalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))

    def forward(self, images: Tensor) -> Tensor:
        """Returns scores ``[N, C, H, W]`` for ``uint8`` RGB images ``[N, 3, H, W]``."""
        return self.network(self.normalise(images))["out"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What :class:`Predictor` found, with every stage on the way; absent stages are None.

    ``image`` and ``labels`` are on the CPU, the maps on the predictor's device. Scores and
    probabilities are ``float32 [C, H, W]``; of an image larger than ``config.max_side`` they have
    the size at which it was segmented, and only ``labels`` has the image's own.
    """

    image: Tensor  # uint8 [3, H, W]
    labels: Tensor  # uint8 [H, W]
    probabilities: Tensor  # of the last stage that ran
    class_names: tuple[str, ...] | None = None
    class_colours: Tensor | None = None  # uint8 [C, 3], RGB
    proposals: Proposals | None = None  # all that were found, the best one first
    boxes: Tensor | None = None  # float32 [M, 4], those that were segmented, enlarged
    deconvnet_scores: Tensor | None = None
    deconvnet_probabilities: Tensor | None = None
    fcn_scores: Tensor | None = None
    fcn_probabilities: Tensor | None = None
    ensemble_probabilities: Tensor | None = None
    crf_probabilities: Tensor | None = None


class Predictor:
    """The whole method as one object: image in, label map and all intermediate results out.

    The networks come to its device, into channels-last memory and evaluation mode: whoever trains
    one of them calls ``train()`` again afterwards.

    Args:
        deconvnet: The network that segments proposals; None to use the FCN alone.
        fcn: Its partner in the ensemble; None to do without.
        config: How proposals are aggregated.
        edge_boxes: How proposals are found; None to segment the image as one crop.
        crf: The last step; None to do without.
        device: Where to compute; by default a GPU if there is one.
        edge_model: File of OpenCV's structured-forest edges; None for gradient edges.
        class_names: Names of the classes, the background first; by default those that were
            saved with the weights.
        prepare: Whether copies that :func:`deconvnet.deployment.prepare_for_inference` made
            compute in the networks' place: the same scores but for rounding, sooner. Hooks on the
            networks need False.

    Raises:
        ValueError: No network is given, the two disagree about the number of classes, or one was
            prepared for another kind of device.

    Example:
        ::

            from deconvnet import Predictor, write_label_map

            predictor = Predictor.from_pretrained()
            prediction = predictor("photo.jpg")
            write_label_map("labels.png", prediction.labels)
    """

    def __init__(
        self,
        deconvnet: nn.Module | None,
        fcn: nn.Module | None = None,
        config: InferenceConfig = InferenceConfig(),
        edge_boxes: EdgeBoxesConfig | None = EdgeBoxesConfig(),
        crf: CRFConfig | None = CRFConfig(),
        device: torch.device | str | None = None,
        edge_model: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        prepare: bool = True,
    ) -> None:
        networks = [n for n in (deconvnet, fcn) if n is not None]
        if not networks:
            raise ValueError("a Predictor needs a deconvnet, an fcn, or both; got neither")
        counts = [n.config.num_classes for n in networks]
        if len(set(counts)) > 1:
            raise ValueError(
                f"deconvnet and fcn must know the same classes, got {counts[0]} and {counts[1]}"
            )
        if counts[0] > 255:
            raise ValueError(f"label maps hold at most 255 classes, got {counts[0]}")
        saved = _saved_with(networks)
        names = class_names or saved.get("class_names")
        if names is not None and len(names) != counts[0]:
            raise ValueError(f"got {len(names)} class_names for {counts[0]} classes")

        self.device = default_device() if device is None else torch.device(device)
        for network in networks:
            prepared_on = next(network.parameters(), torch.empty(0)).device.type
            if getattr(network, "prepared", False) and prepared_on != self.device.type:
                raise ValueError(
                    f"the network was prepared for a {prepared_on}; prepare the one that was "
                    f"trained on the {self.device.type} where it is to compute"
                )
            network.to(self.device, memory_format=torch.channels_last).eval()
        self.deconvnet, self.fcn = deconvnet, fcn
        self.config, self.edge_boxes, self.crf = config, edge_boxes, crf
        self.edge_model = edge_model
        self.prepare, self._prepared = prepare, {}
        self.class_names = None if names is None else tuple(names)
        colours = saved.get("class_colours")
        self.class_colours = None if colours is None else torch.tensor(colours, dtype=torch.uint8)

    @classmethod
    def from_pretrained(cls, name: str = "voc", **options: Any) -> Predictor:
        """Builds a predictor from the weights that come with the package.

        Args:
            name: ``"voc"``, PASCAL VOC's twenty classes in photographs, or ``"shapes"``, the
                embedded data set's.
            **options: Any argument of :class:`Predictor` except the networks.
        """
        return cls.from_files(pretrained(f"{name}-deconvnet"), pretrained(f"{name}-fcn"), **options)

    @classmethod
    def from_files(
        cls, deconvnet: str | Path | None, fcn: str | Path | None = None, **options
    ) -> Predictor:
        """Builds a predictor from files that :func:`deconvnet.weights.save_model` wrote.

        The files say how they are meant to be used (crops, proposals, CRF), the first one that
        does so for both; ``options`` overrule them.

        Args:
            deconvnet: Weights of a DeconvNet, or None.
            fcn: Weights of its partner, or None.
            **options: Any argument of :class:`Predictor` except the networks.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A file holds no weights, another kind of network or settings that this
                version doesn't know, or the two know different classes.
        """
        networks = [None if path is None else load_model(path) for path in (deconvnet, fcn)]
        for path, network, other in zip((deconvnet, fcn), networks, (FCN8s, DeconvNet)):
            if isinstance(network, other):
                wanted = "a DeconvNet" if other is FCN8s else "an FCN-8s"
                raise ValueError(f"{path}: expected {wanted}, but it is the ensemble's other half")
        known = [getattr(n, "metadata", {}).get("class_names") for n in networks if n is not None]
        if len(known) == 2 and all(known) and known[0] != known[1]:
            raise ValueError(
                f"{deconvnet} and {fcn} must know the same classes to work together, but one "
                f"knows {', '.join(known[0])}, and the other {', '.join(known[1])}"
            )
        kinds = {"config": InferenceConfig, "edge_boxes": EdgeBoxesConfig, "crf": CRFConfig}
        saved = _saved_with(networks).get("settings", {})
        try:
            settings = {name: kinds[name](**fields) for name, fields in saved.items()}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{deconvnet or fcn}: its settings are not those of this version ({error}); load "
                'it with deconvnet.load_model, delete model.metadata["settings"], and give '
                "Predictor the settings that you want"
            ) from error
        return cls(*networks, **(settings | options))

    def __call__(
        self, image: Tensor | str | Path, proposals: Proposals | Tensor | None = None
    ) -> Prediction:
        """Segments one image.

        Args:
            image: ``uint8 [3, H, W]``, RGB, or the path of an image file.
            proposals: Boxes that are known already, such as from a cache, the best one first;
                by default they are found in the image.

        Returns:
            The label map at the image's size, and what led to it.

        Raises:
            FileNotFoundError: There is no such image file.
            TypeError: The image is neither a path nor a ``uint8`` tensor.
            ValueError: The image or the boxes are malformed, there are boxes but no network for
                them, or a network gives scores that are not finite.
        """
        if proposals is not None and self.deconvnet is None:
            raise ValueError("proposals are for a deconvnet, and this Predictor has none")
        if isinstance(image, (str, os.PathLike)):
            image = read_image(image)
        original = check_image(image).cpu()
        image = shrink(original, self.config.max_side)
        found = {}
        if self.deconvnet is not None:
            found = self._deconvnet(original, image, proposals)
        if self.fcn is not None:
            scores = fcn_scores(self._ready(self.fcn), image, self.config.precision)
            found |= {"fcn_scores": scores, "fcn_probabilities": scores.softmax(0)}
        if self.deconvnet is not None and self.fcn is not None:
            found["ensemble_probabilities"] = probabilities = self._ensemble(found)
        else:
            kind = "fcn" if self.deconvnet is None else "deconvnet"
            probabilities = found[f"{kind}_probabilities"]
        if self.crf is not None:
            probabilities = dense_crf(image.to(self.device), probabilities, self.crf)
            found["crf_probabilities"] = probabilities
        labels = label_map(probabilities, tuple(original.shape[1:]))
        known = self.class_names, self.class_colours
        return Prediction(original, labels, probabilities, *known, **found)

    def _deconvnet(
        self, original: Tensor, image: Tensor, proposals: Proposals | Tensor | None
    ) -> dict[str, object]:
        if proposals is None and self.edge_boxes is not None:
            proposals = edge_boxes(original, self.edge_boxes, self.edge_model)
        if isinstance(proposals, Tensor):
            proposals = Proposals(proposals, torch.zeros(len(proposals)))
        # Boxes are told in the original's pixels, and cut out of what is segmented.
        (height, width), (rows, columns) = image.shape[1:], original.shape[1:]
        scale = torch.tensor([width / columns, height / rows] * 2)
        network = self._ready(self.deconvnet)
        if proposals is None:
            boxes = None
            scores = whole_image_scores(network, image, self.config.precision)
        else:
            inside = proposals.boxes if image is original else proposals.boxes.cpu() * scale
            selected = select_boxes(inside, (height, width), self.config)
            boxes = torch.tensor(selected, dtype=torch.float32).view(-1, 4) / scale
            scores = aggregate_proposals(network, image, inside, self.config)
        return {
            "proposals": proposals,
            "boxes": boxes,
            "deconvnet_scores": scores,
            "deconvnet_probabilities": scores.softmax(0),
        }

    def _ready(self, network: nn.Module) -> nn.Module:
        """The network's prepared copy: made for the first image, and anew when weights change."""
        if not self.prepare or network.training or not isinstance(network, (DeconvNet, FCN8s)):
            return network
        if getattr(network, "prepared", False):
            return network
        dtype = choose_precision(self.config.precision, self.device)
        # "auto" is whatever is fastest; else switches and labels are worth some time
        encoder_dtype = dtype if self.config.precision == "auto" else None
        state = dtype, encoder_dtype, *_signs_of_change(network)
        if self._prepared.get(network, (None, None))[0] != state:
            self._prepared[network] = state, prepare_for_inference(network, dtype, encoder_dtype)
        return self._prepared[network][1]

    def _ensemble(self, found: dict[str, Tensor]) -> Tensor:
        if self.config.convention == "release":
            return product_of_scores(found["deconvnet_scores"], found["fcn_scores"])
        return mean_of_probabilities(found["deconvnet_probabilities"], found["fcn_probabilities"])


def _saved_with(networks: Iterable[nn.Module | None]) -> Mapping[str, Any]:
    """What the networks' files say; where several speak, the first one counts."""
    return ChainMap(*(getattr(n, "metadata", {}) for n in networks))


def _signs_of_change(network: nn.Module) -> Iterator[object]:
    """What is another when weights have changed, without reading them all.

    PyTorch counts the changes of a tensor, but a fused optimiser's go uncounted, and so do those
    of inference tensors. Hence also the first and the last value of each.
    """
    tensors = [t for t in chain(network.parameters(), network.buffers()) if t.numel()]
    for tensor in tensors:
        yield tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
    corners = (t.detach()[(place,) * t.ndim].float() for t in tensors for place in (0, -1))
    yield torch.stack(list(corners)).cpu().numpy().tobytes()


def label_map(probabilities: Tensor, size: tuple[int, int]) -> Tensor:
    """The most probable class of each pixel of an image that was segmented at another size.

    Args:
        probabilities: ``[C, h, w]``.
        size: Height and width of the image.

    Returns:
        ``uint8 [H, W]`` on the CPU. Between the pixels of the map probabilities are interpolated.
    """
    if tuple(probabilities.shape[1:]) == size:
        return probabilities.argmax(0).to("cpu", torch.uint8)
    height, width = size
    labels = torch.empty(size, dtype=torch.uint8)
    # Whole maps at a photograph's full size would take gigabytes: a band of rows at a time.
    centres = (torch.arange(height) + 0.5) * probabilities.shape[1] / height - 0.5
    wide = F.interpolate(
        probabilities[None], (probabilities.shape[1], width), mode="bilinear", align_corners=False
    )[0]
    for start in range(0, height, 256):
        at = centres[start : start + 256].clamp(0, probabilities.shape[1] - 1).to(wide.device)
        below = at.floor().long()
        above = (below + 1).clamp(max=probabilities.shape[1] - 1)
        rows = torch.lerp(wide[:, below], wide[:, above], (at - below)[None, :, None])
        labels[start : start + 256] = rows.argmax(0).to("cpu", torch.uint8)
    return labels


def check_image(image: Tensor) -> Tensor:
    """Returns ``image`` if it is ``uint8 [3, H, W]``, and says what to do otherwise."""
    if not isinstance(image, Tensor):
        raise TypeError(
            f"image must be a path or a uint8 tensor [3, H, W], got {type(image).__name__}"
        )
    if image.dtype != torch.uint8:
        raise TypeError(
            f"image must be uint8 with values 0 to 255, got {image.dtype}; the networks "
            "normalise pixels themselves"
        )
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        hint = "; use image.permute(2, 0, 1)" if image.ndim == 3 and image.shape[2] == 3 else ""
        raise ValueError(f"image must be [3, H, W] (RGB), got {list(image.shape)}{hint}")
    return image


def _run(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    if model.training:
        raise ValueError(
            "the network is in training mode, where batch norm depends on the other crops of the "
            "batch; call model.eval() first"
        )
    prepared = getattr(model, "prepared", False)  # then its layers have their precision already
    dtype = torch.float32 if prepared else choose_precision(precision, images.device)
    with autocast(images.device, dtype):
        scores = model(images)
    if scores.ndim != 4 or scores.shape[1] != model.config.num_classes:
        raise ValueError(
            f"the network must give scores [N, {model.config.num_classes}, h, w], "
            f"got {list(scores.shape)}"
        )
    return scores


def _check_finite(answers: list[Tensor]) -> None:
    """Refuses scores of which one ``isfinite().all()`` was false."""
    if answers and not torch.stack(answers).all():
        raise ValueError(
            "the network gave scores that are not finite: its weights are damaged, or overflow in "
            '16 bits (then set precision="float32")'
        )


def _device(model: nn.Module) -> torch.device:
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device
