"""Cutting proposals out of an image, and pasting their score maps back into one.

Source: Noh, Hong, Han, ICCV 2015, section 4.3 (the pixel-wise maximum); release,
``inference/generate_EDeconvNet_CRF_results.m``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Box = tuple[int, int, int, int]
"""``(x0, y0, x1, y1)`` in whole pixels, half open; may run outside the image."""


def cut_crops(image: Tensor, boxes: Sequence[Box], size: int) -> Tensor:
    """Cuts boxes out of an image and warps each to a square, on the image's device.

    The counterpart of :func:`deconvnet.instances.crop_and_resize` in training, which works on
    the CPU: the same pixels, up to rounding. Outside the image pixels are 0.

    Args:
        image: ``uint8 [3, H, W]``.
        boxes: Boxes in whole pixels.
        size: Side of the crops in pixels.

    Returns:
        ``uint8 [N, 3, size, size]``.
    """
    crops = image.new_zeros(len(boxes), 3, size, size)
    for crop, box in zip(crops, boxes):
        x0, y0, x1, y1 = box
        left, top, right, bottom = _visible(box, *image.shape[1:])
        if left < right and top < bottom:
            patch = image[:, top:bottom, left:right].float()
            patch = F.pad(patch, (left - x0, x1 - right, top - y0, y1 - bottom))
            crop.copy_(_warp(patch, size).round_())
    return crops


def _warp(patch: Tensor, size: int) -> Tensor:
    height, width = patch.shape[-2:]
    if height > 2 * size:  # two taps would skip pixels; training does the same
        patch = _area_weights(height, size, patch.device) @ patch
    if width > 2 * size:
        patch = patch @ _area_weights(width, size, patch.device).T
    return F.interpolate(patch[None], (size, size), mode="bilinear", align_corners=False)[0]


def _area_weights(length: int, size: int, device: torch.device) -> Tensor:
    """Share that each of ``length`` pixels has in each of ``size`` equal cells over them."""
    pixels = torch.arange(length, device=device)
    edges = torch.arange(size + 1, device=device)[:, None] * (length / size)
    overlap = torch.minimum(edges[1:], pixels + 1) - torch.maximum(edges[:-1], pixels)
    return overlap.clamp_(min=0) * (size / length)


def _visible(box: Box, height: int, width: int) -> Box:
    x0, y0, x1, y1 = box
    left, right = (min(max(x, 0), width) for x in (x0, x1))
    top, bottom = (min(max(y, 0), height) for y in (y0, y1))
    return left, top, right, bottom


class ScoreCanvas:
    """The whole image's scores, to which one box after the other is added in place.

    After every :meth:`paste` the scores are the finished aggregate of the boxes so far.

    In the paper each score map has zeros around it, so a pixel outside a box gets that box's
    0: a maximum below 0 survives only where *all* boxes overlap. Boxes being rectangles, that
    place is one too, and remembering it replaces the stack of all maps. The release starts
    from a map of zeros instead, so nothing below 0 survives anywhere.

    Args:
        num_classes: Number of classes, the background included.
        image_size: Height and width in pixels.
        convention: ``"paper"`` or ``"release"``.
        combine: ``"max"`` or ``"sum"``.
        device: Where the scores are kept.

    Attributes:
        scores: ``float32 [C, H, W]``; zeros before the first box.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: tuple[int, int],
        convention: str = "paper",
        combine: str = "max",
        device: torch.device | str = "cpu",
    ) -> None:
        height, width = image_size
        self.scores = torch.zeros(num_classes, height, width, device=device)
        self.combine = combine
        self.common = (0, 0, width, height) if convention == "paper" else (0, 0, 0, 0)
        self.empty = True

    def paste(self, box: Box, scores: Tensor) -> None:
        """Warps one crop's scores back to its box and takes them into the map.

        Args:
            box: ``(x0, y0, x1, y1)`` in whole pixels; what lies outside the image is dropped.
            scores: ``[C, s, s]``, before softmax.
        """
        x0, y0, x1, y1 = box
        left, top, right, bottom = visible = _visible(box, *self.scores.shape[1:])
        if self.combine == "max":
            self._restrict_common(visible)
        if left >= right or top >= bottom:
            return
        warped = _warp_back(scores, y1 - y0, x1 - x0)
        warped = warped[:, top - y0 : bottom - y0, left - x0 : right - x0]
        place = self.scores[:, top:bottom, left:right]
        if self.combine == "sum":
            place += warped
        else:
            torch.maximum(place, warped, out=place)

    def _restrict_common(self, visible: tuple[int, int, int, int]) -> None:
        before = self._region(self.common)
        left, top, right, bottom = (
            edge(a, b) for edge, a, b in zip((max, max, min, min), self.common, visible)
        )
        self.common = (left, top, max(left, right), max(top, bottom))
        shared = self._region(self.common)
        # No box has spoken yet: any score at all beats minus infinity.
        kept = torch.full_like(shared, -math.inf) if self.empty else shared.clone()
        before.clamp_(min=0)
        shared.copy_(kept)
        self.empty = False

    def _region(self, box: Box) -> Tensor:
        left, top, right, bottom = box
        return self.scores[:, top:bottom, left:right]


def _warp_back(scores: Tensor, height: int, width: int) -> Tensor:
    """Scores ``[C, s, s]`` at another size; antialiased, which matters where that is smaller."""
    # What a GPU shares among threads has no room for the many values under a box of few pixels.
    tiny = scores.is_cuda and scores.shape[-1] > 32 * min(height, width)
    source = scores.cpu() if tiny else scores
    warped = F.interpolate(source[None].float(), (height, width), mode="bilinear", antialias=True)
    return warped[0].to(scores.device)
