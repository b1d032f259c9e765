"""The deconvolution network: a VGG-16 encoder and its mirror image.

The encoder shrinks a 224 x 224 crop to a single 4096-vector and remembers, in one byte per
pooled value, where each maximum came from (the *switches*). The decoder walks the same road
back: *unpooling* puts every activation where its maximum was, and *deconvolution* (a
transposed convolution) fills in the pixels between.

Source: Noh, Hong, Han, ICCV 2015, section 3; layer table from the authors' release,
``training/001_stage_1/stage_1_train.prototxt``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deconvnet.unpooling import MaxPool2dWithSwitches, Unpool2d

STRIDE = 32
"""Five 2 x 2 poolings: one step of the deepest feature map is 32 pixels of the image."""


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a :class:`DeconvNet`; the defaults are the paper's network."""

    num_classes: int = 21  # 20 VOC classes and background
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)  # channels of the five encoder blocks
    encoder_depths: tuple[int, ...] = (2, 2, 3, 3, 3)  # convolutions per block (VGG-16)
    decoder_depths: tuple[int, ...] = (2, 2, 3, 3, 3)  # deconvolutions per block, from image down
    fc_width: int = 4096  # channels of fc6 and fc7
    input_size: int = 224  # side of the square crop in pixels, a multiple of 32
    use_switches: bool = True  # False: unpool into a fixed corner (the ablation)
    batch_norm: bool = True  # False: the ablation that the paper says gets stuck
    batch_norm_eps: float = 1e-5  # the release uses 1e-9, too small for half precision
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # RGB, torchvision's VGG
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)  # (1, 1, 1) for Caffe's VGG

    def __post_init__(self) -> None:
        if self.input_size < STRIDE or self.input_size % STRIDE:
            raise ValueError(
                f"input_size must be a positive multiple of {STRIDE}, got {self.input_size}; "
                f"the nearest is {max(STRIDE, round(self.input_size / STRIDE) * STRIDE)}"
            )
        lengths = {len(self.widths), len(self.encoder_depths), len(self.decoder_depths)}
        if lengths != {5}:
            raise ValueError(
                "widths, encoder_depths and decoder_depths need five entries each, one per block"
            )
        if min(*self.widths, *self.encoder_depths, *self.decoder_depths, self.fc_width) < 1:
            raise ValueError(f"widths and depths must be at least 1, got {self}")
        if self.num_classes < 2:
            raise ValueError(
                f"num_classes counts the background, so at least 2; got {self.num_classes}"
            )

    @property
    def fc_kernel(self) -> int:
        """Side of the deepest feature map (7 at 224 pixels), all of which fc6 sees at once."""
        return self.input_size // STRIDE

    @classmethod
    def tiny(cls, num_classes: int = 13) -> ModelConfig:
        """A network for 64 x 64 crops that trains in minutes on a CPU."""
        return cls(
            num_classes=num_classes,
            widths=(32, 48, 64, 96, 128),
            encoder_depths=(1, 1, 2, 2, 2),
            decoder_depths=(1, 1, 2, 2, 2),
            fc_width=256,
            input_size=64,
        )

    @classmethod
    def compact(cls, num_classes: int = 21, input_size: int = 96) -> ModelConfig:
        """The full VGG-16 encoder with a narrow fc and a small decoder, for small machines.

        It is a decoder of eight 3 x 3 layers in place of thirteen.
        """
        return cls(
            num_classes=num_classes,
            decoder_depths=(1, 1, 2, 2, 2),
            fc_width=512,
            input_size=input_size,
        )


class PixelNormalisation(nn.Module):
    """Turns ``uint8`` RGB pixels into the numbers that the first convolution expects.

    Part of every network, so that images are normalised exactly once.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns ``(images - mean) / std`` in channels-last layout.

        Args:
            images: ``uint8`` or floating, ``[N, 3, H, W]``, RGB in the range 0 to 255.

        Raises:
            TypeError: ``images`` is no tensor, or of another dtype.
            ValueError: ``images`` has another shape.
        """
        _check_pixels(images)
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [N, 3, H, W] (RGB), got {tuple(images.shape)}")
        pixels = images.to(self.mean.dtype, memory_format=torch.channels_last)
        return (pixels - self.mean) / self.std


def _check_pixels(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating, got {images.dtype}")


Layer = Callable[[nn.Module, int], nn.Sequential]


def layer_factory(batch_norm: bool, eps: float = 1e-5) -> Layer:
    """Returns the function that follows a convolution with batch norm and ReLU."""

    def layer(convolution: nn.Module, channels: int) -> nn.Sequential:
        norm = [nn.BatchNorm2d(channels, eps=eps)] if batch_norm else []
        return nn.Sequential(convolution, *norm, nn.ReLU(inplace=True))

    return layer


class Encoder(nn.Module):
    """VGG-16's thirteen convolutions, with max pools that report their switches."""

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], layer: Layer) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        channels = 3
        for width, depth in zip(widths, depths):
            block = nn.Sequential()
            for _ in range(depth):
                block.append(layer(nn.Conv2d(channels, width, 3, padding=1), width))
                channels = width
            self.blocks.append(block)
        self.pool = MaxPool2dWithSwitches()

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the five pooled maps and their switches, from the image down.

        Args:
            x: Normalised pixels, ``[N, 3, H, W]``.
        """
        pooled, switches = [], []
        for block in self.blocks:
            x, where = self.pool(block(x))
            pooled.append(x)
            switches.append(where)
        return pooled, switches


class Decoder(nn.Module):
    """The encoder's mirror: five times unpool, then deconvolve."""

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...], layer: Layer) -> None:
        super().__init__()
        self.unpool = Unpool2d(check_range=False)  # the encoder's switches are right by birth
        self.blocks = nn.ModuleList()
        channels = widths[-1]
        for level in reversed(range(len(widths))):
            block = nn.Sequential()
            narrower = widths[max(level - 1, 0)]
            for i in range(depths[level]):
                # The last deconvolution of a block hands over at the next block's width.
                out = narrower if i == depths[level] - 1 else widths[level]
                block.append(layer(nn.ConvTranspose2d(channels, out, 3, padding=1), out))
                channels = out
            self.blocks.append(block)

    def forward(self, x: Tensor, switches: list[Tensor]) -> Tensor:
        """Returns features at the image's size.

        Args:
            x: The deepest feature map, ``[N, C, S/32, S/32]``.
            switches: What :class:`Encoder` reported, from the image down.
        """
        for block, where in zip(self.blocks, reversed(switches)):
            x = block(self.unpool(x, where))
        return x


class DeconvNet(nn.Module):
    """The deconvolution network of Noh, Hong and Han.

    Args:
        config: Sizes of the network; the default is the paper's (251.8 M parameters).
    """

    def __init__(self, config: ModelConfig = ModelConfig()) -> None:
        super().__init__()
        self.config = config
        layer = layer_factory(config.batch_norm, config.batch_norm_eps)
        deepest, fc, kernel = config.widths[-1], config.fc_width, config.fc_kernel

        self.normalise = PixelNormalisation(config.pixel_mean, config.pixel_std)
        self.encoder = Encoder(config.widths, config.encoder_depths, layer)
        self.fc6 = layer(nn.Conv2d(deepest, fc, kernel), fc)
        self.fc7 = layer(nn.Conv2d(fc, fc, 1), fc)
        self.fc6_deconv = layer(nn.ConvTranspose2d(fc, deepest, kernel), deepest)
        self.decoder = Decoder(config.widths, config.decoder_depths, layer)
        self.score = nn.Conv2d(config.widths[0], config.num_classes, 1)
        self.apply(initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the class scores of every pixel, before softmax.

        Args:
            images: ``uint8`` (or floating, 0 to 255) RGB crops ``[N, 3, S, S]`` with
                ``S = config.input_size``.

        Returns:
            Scores ``[N, num_classes, S, S]``.

        Raises:
            TypeError: ``images`` is no tensor, or neither ``uint8`` nor floating.
            ValueError: The crops have another size, or a training batch holds a single crop.
        """
        self._check(images)
        pooled, switches = self.encoder(self.normalise(images))
        if not self.config.use_switches:
            switches = [torch.zeros_like(where) for where in switches]
        bottleneck = self.fc7(self.fc6(pooled[-1]))
        return self.score(self.decoder(self.fc6_deconv(bottleneck), switches))

    def _check(self, images: Tensor) -> None:
        _check_pixels(images)
        size = self.config.input_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(
                f"this DeconvNet takes crops of [N, 3, {size}, {size}], got "
                f"{tuple(images.shape)}; resize the crop, or segment an image of any size with "
                "deconvnet.inference.Predictor"
            )
        if self.training and self.config.batch_norm and len(images) == 1:
            raise ValueError(
                "batch norm after fc6 sees one value per channel and crop, so a training batch "
                "needs at least 2 crops; got 1"
            )


def initialise(module: nn.Module) -> None:
    """Initialises one layer as the release does, with He's rule for convolutions.

    Deconvolutions are Gaussian with standard deviation 0.01, batch norm starts at scale 1 and
    shift 0.001 (``stage_1_train.prototxt``). The encoder's convolutions are normally replaced
    by ImageNet weights; He's initialisation lets them also start from nothing. The score layer
    follows it too, a departure: the release starts it at 0.01, which is 18 times smaller.
    """
    if isinstance(module, nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.constant_(module.bias, 0.001)


def deconvnet_vgg16(num_classes: int = 21) -> DeconvNet:
    """The paper's network for 224 x 224 crops: 251.8 M parameters at 21 classes.

    Load ImageNet weights into it with :func:`deconvnet.weights.load_vgg16`.
    """
    return DeconvNet(ModelConfig(num_classes=num_classes))


def deconvnet_tiny(num_classes: int = 13) -> DeconvNet:
    """The same network, narrow and for 64 x 64 crops; see :meth:`ModelConfig.tiny`."""
    return DeconvNet(ModelConfig.tiny(num_classes))
