"""The same network, faster: what can be rearranged once nothing is learned any more.

The network that the book teaches stays plain. Before it is used, :func:`prepare_for_inference`
rewrites a copy of it by six rules, none of which changes what it computes but for rounding:

1. *Batch norm is folded.* With fixed statistics it scales and shifts each channel, and so do the
   convolution's own weights and bias.
2. *A stride-1 deconvolution is a convolution* with the kernel turned by 180 degrees and the
   channels exchanged, for which processors have faster code.
3. *A convolution over all of its input is a matrix product*: ``fc6`` sees the whole 7 x 7 map at
   once, and its mirror image draws the whole of it.
4. *Maps stay in the cache.* Each block takes only as many crops at once as its maps fit there,
   and the library's own pooling and unpooling, with eight bytes a place, work on such a part.
5. *Neighbouring outputs share multiplications*: :class:`WinogradConvolution` needs a quarter of
   them where a map has many channels.
6. *Sixteen bits are enough* for weights and activations where the hardware multiplies them.

The last trades exactness for speed; the others are safe. Rules 4 and 5 are for CPUs only: a GPU's
libraries do the like on their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from deconvnet.model import Decoder, DeconvNet, Encoder
from deconvnet.unpooling import unpool2d

CACHE_BYTES = 2**24
"""A map of this size stays in a processor's last cache, and its memory is used again: far larger
ones go back to the operating system each time, which has to clear them before the next."""


def prepare_for_inference(
    model: nn.Module, dtype: torch.dtype = torch.float32, rules: int = 5
) -> nn.Module:
    """Returns a faster copy of a network, for inference only, on the network's device.

    Args:
        model: A :class:`~deconvnet.model.DeconvNet` or :class:`~deconvnet.fcn.FCN8s`.
        dtype: What the copy computes in: ``float32``, or ``bfloat16`` or ``float16`` where the
            hardware has it. Its scores come back in this type.
        rules: 3 to leave out rules 4 and 5, 4 to leave out rule 5: to see what each is worth.

    Returns:
        A network that is called as ``model`` is, in evaluation mode, channels-last, without
        gradients. In float32 its scores are ``model``'s but for rounding.

    Raises:
        TypeError: ``dtype`` is not floating.
        ValueError: ``model`` has been prepared already.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating, got {dtype}")
    if getattr(model, "prepared", False):
        raise ValueError("the network is prepared already; prepare the one that was trained")
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    fast.prepared = True
    on_cpu = next(fast.parameters()).device.type == "cpu"
    fold_batch_norm(fast)
    if isinstance(fast, DeconvNet):
        fast.fc6[0], fast.fc7[0] = ConvolutionOfAll(fast.fc6[0]), ConvolutionOfAll(fast.fc7[0])
        fast.fc6_deconv[0] = DeconvolutionToAll(fast.fc6_deconv[0])
    _replace(fast, nn.ConvTranspose2d, lambda d: as_convolution(d) if d.stride == (1, 1) else d)
    if on_cpu and rules >= 5:
        _replace(fast, nn.Conv2d, lambda c: winograd(c, dtype))
    normalise = fast.normalise  # computes in float32: 255 - 123.675 has more than 8 bits
    fast = fast.to(dtype, memory_format=torch.channels_last)
    fast.normalise = nn.Sequential(normalise.float(), CastTo(dtype))
    if on_cpu and rules >= 4 and isinstance(fast, DeconvNet):
        at_once = crops_at_once(fast.config.widths, fast.config.input_size, dtype)
        fast.encoder = EncoderInParts(fast.encoder, at_once)
        fast.decoder = DecoderInParts(fast.decoder, fast.score, at_once)
        fast.score = nn.Identity()  # the decoder's last block does it, part by part
    return fast


class CastTo(nn.Module):
    """Changes the dtype of what passes through.

    Args:
        dtype: Of the output.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` in the other dtype."""
        return x.to(self.dtype)


class ConvolutionOfAll(nn.Module):
    """A convolution whose kernel is as large as its input, as a matrix product.

    Args:
        convolution: ``[C, k, k]`` to ``[D, 1, 1]``, without padding.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        # channels last in memory, on both sides of the product: then flattening copies nothing
        weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[N, D, 1, 1]`` for ``x`` of ``[N, C, k, k]``."""
        flat = x.permute(0, 2, 3, 1).flatten(1)
        return nn.functional.linear(flat, self.weight, self.bias)[:, :, None, None]


class DeconvolutionToAll(nn.Module):
    """A deconvolution of a single vector, as a matrix product.

    Args:
        deconvolution: ``[C, 1, 1]`` to ``[D, k, k]``, without padding.
    """

    def __init__(self, deconvolution: nn.ConvTranspose2d) -> None:
        super().__init__()
        weight = deconvolution.weight.permute(2, 3, 1, 0)  # [k, k, D, C]
        self.size = weight.shape[:3]
        self.weight = nn.Parameter(weight.flatten(0, 2).contiguous(), requires_grad=False)
        self.bias = deconvolution.bias

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[N, D, k, k]``, channels-last, for ``x`` of ``[N, C, 1, 1]``."""
        map_ = nn.functional.linear(x.flatten(1), self.weight).unflatten(1, self.size)
        return (map_ + self.bias).permute(0, 3, 1, 2)


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Rule 1, in place: removes every batch norm that follows a convolution in a ``Sequential``.

    Args:
        module: In evaluation mode.

    Returns:
        The same module, which computes what it did, but for rounding.
    """
    for child in module.children():
        fold_batch_norm(child)
    if isinstance(module, nn.Sequential):
        for i in reversed(range(1, len(module))):  # from the end, since folding removes layers
            layer, norm = module[i - 1], module[i]
            if isinstance(norm, nn.BatchNorm2d):
                transposed = isinstance(layer, nn.ConvTranspose2d)
                module[i - 1] = fuse_conv_bn_eval(layer, norm, transposed)
                del module[i]
    return module


def _replace(module: nn.Module, kind: type, other: Callable[[nn.Module], nn.Module]) -> None:
    """Puts ``other(layer)`` in the place of every layer of a kind below ``module``."""
    for name, child in module.named_children():
        if isinstance(child, kind):
            setattr(module, name, other(child))
        else:
            _replace(child, kind, other)


def as_convolution(deconvolution: nn.ConvTranspose2d) -> nn.Conv2d:
    """The convolution that computes what a stride-1 deconvolution does.

    A deconvolution paints its kernel around every input pixel. Seen from an output pixel, that
    gathers the surrounding input through the kernel turned by 180 degrees.

    Args:
        deconvolution: With stride 1, in one group, undilated.

    Returns:
        A convolution with the kernel turned, the channels exchanged, and a padding of
        ``kernel - 1 - padding``.

    Raises:
        ValueError: The deconvolution has another stride, groups or dilation.
    """
    d = deconvolution
    if (d.stride, d.groups, d.dilation) != ((1, 1), 1, (1, 1)):
        raise ValueError(
            f"only a deconvolution of stride 1, one group and no dilation is a convolution, got {d}"
        )
    padding = tuple(k - 1 - p for k, p in zip(d.kernel_size, d.padding))
    convolution = nn.Conv2d(
        d.in_channels,
        d.out_channels,
        d.kernel_size,
        padding=padding,
        bias=d.bias is not None,
        device="meta",  # its own random weights are never made
    )
    turned = d.weight.detach().transpose(0, 1).flip(2, 3)
    convolution.weight = nn.Parameter(turned.contiguous(), requires_grad=False)
    convolution.bias = d.bias
    return convolution


# --- rule 4: maps that stay in the cache ------------------------------------------------------


def crops_at_once(widths: Sequence[int], input_size: int, dtype: torch.dtype) -> list[int]:
    """How many crops each block takes so that one of its maps has at most ``CACHE_BYTES``.

    Args:
        widths: Channels of the blocks, from the image down, each at half the size of the last.
        input_size: Side of a crop in pixels.
        dtype: Of the maps.
    """
    maps = (
        width * (input_size >> level) ** 2 * dtype.itemsize for level, width in enumerate(widths)
    )
    return [max(1, CACHE_BYTES // size) for size in maps]


class EncoderInParts(nn.Module):
    """An encoder whose blocks take a few crops at a time.

    Args:
        encoder: What it computes.
        at_once: Crops for each block, from the image down.
    """

    def __init__(self, encoder: Encoder, at_once: Sequence[int]) -> None:
        super().__init__()
        self.blocks, self.at_once = encoder.blocks, at_once

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Returns what :meth:`deconvnet.model.Encoder.forward` does."""
        pooled, switches = [], []
        for block, count in zip(self.blocks, self.at_once):
            parts = [library_pool(block(part)) for part in x.split(count)]
            x, where = map(_joined, zip(*parts))
            pooled.append(x)
            switches.append(where)
        return pooled, switches


class DecoderInParts(nn.Module):
    """A decoder whose blocks take a few crops at a time; the scores follow its last block.

    Args:
        decoder: What it computes.
        score: The layer after it.
        at_once: Crops for each block, from the image down.
    """

    def __init__(self, decoder: Decoder, score: nn.Module, at_once: Sequence[int]) -> None:
        super().__init__()
        *others, last = decoder.blocks
        self.blocks = nn.ModuleList([*others, nn.Sequential(last, score)])
        self.at_once = at_once

    def forward(self, x: Tensor, switches: list[Tensor]) -> Tensor:
        """Returns the scores of what :meth:`deconvnet.model.Decoder.forward` gives."""
        for block, where, count in zip(self.blocks, reversed(switches), reversed(self.at_once)):
            parts = zip(x.split(count), where.split(count))
            x = _joined([block(library_unpool(part, places)) for part, places in parts])
        return x


def library_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`~deconvnet.unpooling.max_pool2d_with_switches` of 2 x 2 windows by PyTorch's code.

    That finds places of eight bytes; here they are narrowed to switches before anyone keeps them.

    Args:
        x: ``[N, C, H, W]``, of an even width below 32,767 pixels.
    """
    pooled, indices = F.max_pool2d(x, 2, return_indices=True)
    # 0, 1, W or W + 1; the rest of an int64 is of no interest, so two of its bytes are enough
    offset = indices.to(torch.int16) - _corners(pooled, x.shape[-1]).to(torch.int16)
    return pooled, (offset & 1).to(torch.uint8) + 2 * (offset > 1).view(torch.uint8)


def library_unpool(x: Tensor, switches: Tensor) -> Tensor:
    """:func:`~deconvnet.unpooling.unpool2d` of 2 x 2 windows by PyTorch's code.

    Args:
        x: ``[N, C, h, w]``, fewer than 16,383 pixels wide.
        switches: ``uint8 [N, C, h, w]``, from 0 to 3.
    """
    if torch.are_deterministic_algorithms_enabled():
        return unpool2d(x, switches, check_range=False)  # PyTorch says that its own is not
    width = 2 * x.shape[-1]
    offset = (switches >> 1).to(torch.int16) * width + (switches & 1)
    return F.max_unpool2d(x, offset.long().add_(_corners(x, width)), 2)


def _corners(pooled: Tensor, width: int) -> Tensor:
    """``int64 [h, w]``: index of each window's first value in a map ``width`` wide."""
    rows, columns = (2 * torch.arange(side, device=pooled.device) for side in pooled.shape[-2:])
    return rows[:, None] * width + columns


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# --- rule 5: fewer multiplications ------------------------------------------------------------

# The matrices of F(m x m, 3 x 3): Lavin and Gray, "Fast Algorithms for Convolutional Neural
# Networks", 2015, sections 4.1 and 4.2. By tile size: of the input, of the kernel, of the output.
_WINOGRAD = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}


def winograd(convolution: nn.Conv2d, dtype: torch.dtype) -> nn.Module:
    """The convolution by Winograd's way if that is faster on a CPU, else the convolution.

    The way there and back costs the same for each channel, what it saves grows with the number
    of channels: it pays from 128 on, in 16 bits (where multiplying is cheap) from 256 on. In 16
    bits the larger tile would round too coarsely.
    """
    c = convolution
    shape = c.kernel_size, c.stride, c.padding, c.dilation, c.groups
    fits = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and c.padding_mode == "zeros"
    full = dtype.itemsize >= 4
    pays = min(c.in_channels, c.out_channels) >= (128 if full else 256)
    return WinogradConvolution(c, tile=4 if full else 2) if fits and pays else c


class WinogradConvolution(nn.Module):
    """A 3 x 3 convolution with fewer multiplications, after Winograd.

    Directly, ``m x m`` outputs of one channel take ``9 m^2`` multiplications for each input
    channel. Here sums and differences of the ``(m + 2) x (m + 2)`` inputs under them are multiplied
    with as many sums and differences of the kernel (once for good), and the products are combined
    to outputs: ``(m + 2)^2`` multiplications, 36 in place of 144 for ``m = 4``. At each of the
    ``(m + 2)^2`` positions that is one matrix product over channels.

    Source: Lavin and Gray, 2015, arXiv:1509.09308.

    Args:
        convolution: 3 x 3, stride 1, padding 1 (zeros), one group.
        tile: ``m``, 2 or 4. A larger tile saves more and rounds more coarsely.
    """

    def __init__(self, convolution: nn.Conv2d, tile: int) -> None:
        super().__init__()
        self.tile = tile
        self.inwards, kernels, self.outwards = _WINOGRAD[tile]
        weight = convolution.weight.detach()
        g = torch.tensor(kernels, dtype=torch.float64, device=weight.device)
        matrices = torch.einsum("ia,jb,ocab->ijco", g, g, weight.double()).flatten(0, 1)
        self.matrices = nn.Parameter(matrices.to(weight.dtype).contiguous(), requires_grad=False)
        self.bias = convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[N, D, H, W]``, channels-last, for ``x`` of ``[N, C, H, W]``."""
        m = self.tile
        number, _, height, width = x.shape
        rows, columns = -(-height // m), -(-width // m)  # of tiles, the last ones filled up
        padding = (0, 0, 1, m * columns + 1 - width, 1, m * rows + 1 - height)
        x = F.pad(x.permute(0, 2, 3, 1), padding)
        y = x.new_empty(number, m * rows, m * columns, self.matrices.shape[2])
        row_bytes = max(x.shape[3], y.shape[3]) * (m + 2) ** 2 * columns * x.element_size()
        at_once = max(1, CACHE_BYTES // row_bytes)  # rows of tiles, of one crop or of several
        crops, strip = max(1, at_once // rows), m * min(at_once, rows)
        for xs, ys in zip(x.split(crops), y.split(crops)):
            for top in range(0, m * rows, strip):
                bottom = min(top + strip, m * rows)
                self._convolve(xs[:, top : bottom + 2], ys[:, top:bottom])
        return (
            y[:, :height, :width].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        )

    def _convolve(self, x: Tensor, y: Tensor) -> None:
        """Fills ``y`` of ``[N, m r, m c, D]`` from ``x`` of ``[N, m r + 2, m c + 2, C]``."""
        m, side = self.tile, self.tile + 2
        number, height, width, channels = x.shape
        r, c = (height - 2) // m, (width - 2) // m
        # every m-th row from the i-th on holds the i-th row of all tiles; columns likewise
        halfway = x.new_empty(side, number, r, width, channels)
        _combine(self.inwards, [x[:, i : i + m * r - m + 1 : m] for i in range(side)], halfway)
        tiles = x.new_empty(side, side, number, r, c, channels)
        columns = [halfway[:, :, :, j : j + m * c - m + 1 : m] for j in range(side)]
        _combine(self.inwards, columns, tiles.unbind(1))
        products = torch.bmm(tiles.view(side * side, -1, channels), self.matrices)
        products = products.view(side, side, number, r, c, -1)
        halfway = x.new_empty(m, *products.shape[1:])
        _combine(self.outwards, products, halfway)
        places = y.unflatten(1, (r, m)).unflatten(3, (c, m)).permute(4, 2, 0, 1, 3, 5)
        _combine(self.outwards, halfway.unbind(1), places)
        if self.bias is not None:
            y += self.bias


def _combine(matrix: Sequence[Sequence[float]], parts: Iterable, sums: Iterable[Tensor]) -> None:
    """``sums = matrix @ parts``, for a matrix of few numbers that are mostly 0, 1 or -1."""
    parts = list(parts)
    for row, total in zip(matrix, sums):
        factors = sorted(((f, p) for f, p in zip(row, parts) if f), key=lambda fp: fp[0] != 1)
        (_, first), (factor, second), *others = factors  # each row has a 1 that starts the sum
        torch.add(first, second, alpha=factor, out=total)
        for factor, part in others:
            total.add_(part, alpha=factor)
