"""A small network that draws the outlines of objects, for Edge Boxes.

Gradients find every edge: of a cat as well as of the pattern of the sofa beneath it. Edge Boxes
counts contours, so texture drowns the objects. The paper uses structured forests, which have
learned from people's drawings which edges are outlines. Here a convolutional network a hundredth
the size of DeconvNet learns the same from segmentation masks, whose borders are outlines.

In place of: Dollár, Zitnick, *Structured Forests for Fast Edge Detection*, ICCV 2013. The side
outputs of all scales follow Xie, Tu, *Holistically-Nested Edge Detection*, ICCV 2015.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deconvnet.model import PixelNormalisation, initialise, layer_factory


@dataclass(frozen=True)
class EdgeConfig:
    """The sizes of an :class:`EdgeNet`."""

    widths: tuple[int, ...] = (16, 32, 64, 64)  # channels at 1, 1/2, 1/4, ... of the image's size
    input_size: int = 160  # side of a training window in pixels; any size works at inference
    num_classes: int = 2  # inside or outside, and outline
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # as the other networks
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be at least 1, got {self.widths}")
        if self.num_classes != 2:
            raise ValueError(f"an edge network knows 2 classes, got {self.num_classes}")


class EdgeNet(nn.Module):
    """Convolutions at halving sizes; each size says what it sees, and the finest hears them all.

    Args:
        config: Sizes of the network.
    """

    def __init__(self, config: EdgeConfig = EdgeConfig()) -> None:
        super().__init__()
        self.config = config
        layer = layer_factory(batch_norm=True)
        self.normalise = PixelNormalisation(config.pixel_mean, config.pixel_std)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels = 3
        for level, width in enumerate(config.widths):
            stride = 1 if level == 0 else 2
            self.down.append(
                nn.Sequential(
                    layer(nn.Conv2d(channels, width, 3, stride, padding=1), width),
                    layer(nn.Conv2d(width, width, 3, padding=1), width),
                )
            )
            channels = width
        for coarse, fine in zip(config.widths[:0:-1], config.widths[-2::-1]):
            self.up.append(layer(nn.Conv2d(coarse + fine, fine, 3, padding=1), fine))
        self.score = nn.Conv2d(config.widths[0], 2, 1)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the scores of "no outline" and "outline" for every pixel, before softmax.

        Args:
            images: ``uint8`` (or floating, 0 to 255) RGB images ``[N, 3, H, W]`` of any size.

        Returns:
            Scores ``[N, 2, H, W]``.

        Raises:
            TypeError: ``images`` is no tensor, or neither ``uint8`` nor floating.
            ValueError: ``images`` has another shape.
        """
        x = self.normalise(images)
        maps = []
        for block in self.down:
            x = block(x)
            maps.append(x)
        x = maps.pop()
        for block in self.up:
            fine = maps.pop()
            x = F.interpolate(x, fine.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, fine], dim=1))
        return self.score(x)
