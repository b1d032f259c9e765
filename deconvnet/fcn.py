"""FCN-8s, the method's foil and its partner in the ensemble.

A fully convolutional network classifies at stride 32, then adds the finer opinions of pool4
and pool3 on the way up. It sees the whole image at one scale: good context, a fixed receptive
field. DeconvNet is the opposite, which is why the mean of both beats either.

Source: Long, Shelhamer, Darrell, *Fully Convolutional Networks for Semantic Segmentation*,
CVPR 2015, section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deconvnet.model import STRIDE, Encoder, PixelNormalisation, initialise, layer_factory


@dataclass(frozen=True)
class FCNConfig:
    """The sizes of an :class:`FCN8s`; the defaults are the published network's."""

    num_classes: int = 21  # 20 VOC classes and background
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)  # channels of the five encoder blocks
    encoder_depths: tuple[int, ...] = (2, 2, 3, 3, 3)  # convolutions per block (VGG-16)
    fc_width: int = 4096  # channels of fc6 and fc7
    fc_kernel: int = 7  # side of fc6's window, odd so that "same" padding is centred
    input_size: int = 224  # side of a training window in pixels; any size works at inference
    dropout: float = 0.5  # after fc6 and fc7; of whole channels, the published net's of values
    batch_norm: bool = True  # False: as published; True: the same encoder as our DeconvNet
    batch_norm_eps: float = 1e-5
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # RGB, torchvision's VGG
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        if {len(self.widths), len(self.encoder_depths)} != {5}:
            raise ValueError("widths and encoder_depths need five entries each, one per block")
        if min(*self.widths, *self.encoder_depths, self.fc_width) < 1:
            raise ValueError(f"widths and depths must be at least 1, got {self}")
        if self.fc_kernel % 2 == 0:
            raise ValueError(f"fc_kernel must be odd, got {self.fc_kernel}")
        if self.num_classes < 2:
            raise ValueError(
                f"num_classes counts the background, so at least 2; got {self.num_classes}"
            )

    @classmethod
    def tiny(cls, num_classes: int = 13) -> FCNConfig:
        """The partner of :meth:`deconvnet.model.ModelConfig.tiny`."""
        return cls(
            num_classes=num_classes,
            widths=(32, 48, 64, 96, 128),
            encoder_depths=(1, 1, 2, 2, 2),
            fc_width=256,
            fc_kernel=3,
            input_size=96,
            dropout=0.1,
        )

    @classmethod
    def compact(cls, num_classes: int = 21, input_size: int = 160) -> FCNConfig:
        """The partner of :meth:`deconvnet.model.ModelConfig.compact`."""
        return cls(
            num_classes=num_classes, fc_width=512, fc_kernel=3, input_size=input_size, dropout=0.1
        )


class FCN8s(nn.Module):
    """FCN-8s on the encoder that :class:`deconvnet.model.DeconvNet` uses.

    Args:
        config: Sizes of the network.
    """

    def __init__(self, config: FCNConfig = FCNConfig()) -> None:
        super().__init__()
        self.config = config
        layer = layer_factory(config.batch_norm, config.batch_norm_eps)
        classes, fc, kernel = config.num_classes, config.fc_width, config.fc_kernel

        self.normalise = PixelNormalisation(config.pixel_mean, config.pixel_std)
        self.encoder = Encoder(config.widths, config.encoder_depths, layer)
        self.fc6 = layer(nn.Conv2d(config.widths[4], fc, kernel, padding=kernel // 2), fc)
        self.fc7 = layer(nn.Conv2d(fc, fc, 1), fc)
        self.dropout = nn.Dropout2d(config.dropout)
        self.score32 = nn.Conv2d(fc, classes, 1)
        self.score16 = nn.Conv2d(config.widths[3], classes, 1)
        self.score8 = nn.Conv2d(config.widths[2], classes, 1)
        self.up32 = nn.ConvTranspose2d(classes, classes, 4, stride=2, padding=1, bias=False)
        self.up16 = nn.ConvTranspose2d(classes, classes, 4, stride=2, padding=1, bias=False)
        self.initialise()

    def initialise(self) -> None:
        """Starts as the published network: scores at zero, upsampling at bilinear."""
        for module in (self.encoder, self.fc6, self.fc7):
            module.apply(initialise)
        for score in (self.score32, self.score16, self.score8):
            nn.init.zeros_(score.weight)
            nn.init.zeros_(score.bias)
        for up in (self.up32, self.up16):
            up.weight.data.copy_(bilinear_kernel(self.config.num_classes, 4))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the class scores of every pixel, before softmax.

        Args:
            images: ``uint8`` (or floating, 0 to 255) RGB images ``[N, 3, H, W]`` of any size.

        Returns:
            Scores ``[N, num_classes, H, W]``.

        Raises:
            TypeError: ``images`` is no tensor, or neither ``uint8`` nor floating.
            ValueError: ``images`` has another shape.
        """
        pixels = self.normalise(images)
        height, width = pixels.shape[-2:]
        # Grow to whole strides at the right and bottom, so that the maps of all scales align.
        pixels = F.pad(pixels, (0, -width % STRIDE, 0, -height % STRIDE))
        pooled, _ = self.encoder(pixels)
        fc7 = self.dropout(self.fc7(self.dropout(self.fc6(pooled[4]))))
        scores = self.up32(self.score32(fc7)) + self.score16(pooled[3])
        scores = self.up16(scores) + self.score8(pooled[2])
        scores = F.interpolate(scores, scale_factor=8, mode="bilinear", align_corners=False)
        return scores[..., :height, :width]


def bilinear_kernel(channels: int, size: int) -> Tensor:
    """The transposed-convolution kernel that upsamples each channel bilinearly.

    Args:
        channels: Number of channels, each upsampled by itself.
        size: Side of the kernel, twice the upsampling factor.

    Returns:
        ``float32 [channels, channels, size, size]``.
    """
    centre = (size - 1) / 2
    ramp = 1 - (torch.arange(size) - centre).abs() / (size / 2)
    kernel = torch.zeros(channels, channels, size, size)
    diagonal = torch.arange(channels)
    kernel[diagonal, diagonal] = ramp[:, None] * ramp[None, :]
    return kernel
