"""3 x 3 convolutions with fewer multiplications, after Winograd.

Neighbouring outputs see almost the same inputs. Directly, ``m x m`` outputs of one channel take
``9 m^2`` multiplications for each input channel; by Winograd's way they take ``(m + 2)^2``: 36 in
place of 144 for ``m = 4``. Additions pay for it, before and after.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015,
arXiv:1509.09308, whose names the code uses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deconvnet.hardware import compiled_kernels, cpu_has_matrix_units

CACHE_BYTES = 2**24
"""A map of this size stays in a processor's last cache, and its memory is used again: far larger
ones go back to the operating system each time, which has to clear them before the next."""

STRIP_BYTES = 2**21
"""As many bytes of tiles a core takes at once where loops are compiled."""

# The transforms of F(m x m, 3 x 3) by m: of the input, of the kernel, of the output (the paper's
# sections 4.1 and 4.2).
_TRANSFORMS = {
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


def winograd(
    convolution: nn.Conv2d, dtype: torch.dtype, compiled: bool = False
) -> nn.Conv2d | WinogradConvolution:
    """The convolution by Winograd's way if that is faster on a CPU, else the convolution.

    The way there and back costs the same for each channel, what it saves grows with the number
    of channels: it pays from 128 on (from 64 on where loops are compiled), in 16 bits (where
    multiplying is cheap) from 256 on, and never where the hardware has units that multiply whole
    matrices of bfloat16. In 16 bits the larger tile would round too coarsely.
    """
    c = convolution
    shape = c.kernel_size, c.stride, c.padding, c.dilation, c.groups
    fits = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and c.padding_mode == "zeros"
    full = dtype.itemsize >= 4
    pays_from = (64 if compiled else 128) if full else 256
    if not fits or min(c.in_channels, c.out_channels) < pays_from:
        return c
    if dtype == torch.bfloat16 and cpu_has_matrix_units():
        return c
    return WinogradConvolution(c, 4, compiled) if full else WinogradConvolution(c, 2)


class WinogradConvolution(nn.Module):
    """A 3 x 3 convolution that computes ``m x m`` outputs together.

    Sums and differences of the ``(m + 2) x (m + 2)`` inputs under them are multiplied with as many
    of the kernel, which are computed once for good, and the products are combined to outputs. At
    each of the ``(m + 2)^2`` positions that is one matrix product over channels.

    Args:
        convolution: 3 x 3, stride 1, padding 1 (zeros), one group.
        tile: ``m``, 2 or 4. A larger tile saves more and rounds more coarsely.
        compiled: Whether to use :mod:`deconvnet.kernels`, which knows tiles of 4 only.
    """

    def __init__(self, convolution: nn.Conv2d, tile: int, compiled: bool = False) -> None:
        super().__init__()
        self.tile, self.compiled = tile, compiled
        self.least = -math.inf  # with compiled loops: outputs below are raised to it
        self.input_transform, kernel_transform, self.output_transform = _TRANSFORMS[tile]
        weight = convolution.weight.detach()
        g = torch.tensor(kernel_transform, dtype=torch.float64, device=weight.device)
        taps = weight.permute(2, 3, 1, 0).flatten(0, 1)  # [9, C, D]
        kernel = torch.kron(g, g) @ taps.flatten(1).double()  # rows, then columns, in one product
        kernel = kernel.to(weight.dtype).unflatten(1, taps.shape[1:])  # [(m + 2)^2, C, D]
        self.transformed_kernel = nn.Parameter(kernel, requires_grad=False)
        self.bias = convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[N, D, H, W]``, channels-last, for ``x`` of ``[N, C, H, W]``."""
        m = self.tile
        number, _, height, width = x.shape
        rows, columns = -(-height // m), -(-width // m)  # of tiles, the last ones filled up
        x = x.permute(0, 2, 3, 1).contiguous()
        if self.compiled:
            return self._compiled(x, rows, columns)
        x = F.pad(x, (0, 0, 1, m * columns + 1 - width, 1, m * rows + 1 - height))
        y = x.new_empty(number, m * rows, m * columns, self.transformed_kernel.shape[2])
        crops, strip = self._at_once(rows, columns, CACHE_BYTES)
        for xs, ys in zip(x.split(crops), y.split(crops)):
            for top in range(0, m * rows, m * strip):
                bottom = min(top + m * strip, m * rows)
                self._convolve(xs[:, top : bottom + 2], ys[:, top:bottom])
        return (
            y[:, :height, :width].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        )

    def _at_once(self, rows: int, columns: int, size: int) -> tuple[int, int]:
        """Crops, and rows of tiles of each, whose tiles have at most ``size`` bytes."""
        numbers = max(self.transformed_kernel.shape[1:]) * len(self.transformed_kernel) * columns
        count = max(1, size // (numbers * self.transformed_kernel.element_size()))
        return max(1, count // rows), min(count, rows)

    def _compiled(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """The same with compiled loops, for ``x`` of ``[N, H, W, C]``."""
        kernels = compiled_kernels()
        y = x.new_empty(*x.shape[:3], self.transformed_kernel.shape[2])
        bias = torch.zeros_like(y[0, 0, 0]) if self.bias is None else self.bias
        transforms = self.input_transform, self.output_transform
        inwards, outwards = (bias.new_tensor(matrix).numpy() for matrix in transforms)

        def convolve(crops: slice, first: int, last: int) -> None:
            xs, ys = x[crops].numpy(), y[crops].numpy()
            places = 6, 6, len(xs), last - first, columns
            tiles = kernels.scratch("tiles", (*places, x.shape[3]), x.dtype)
            kernels.transform_input(xs, inwards, 4 * first, tiles.numpy())
            products = kernels.scratch("products", (*places, y.shape[3]), x.dtype)
            torch.bmm(
                tiles.flatten(0, 1).flatten(1, 3), self.transformed_kernel,
                out=products.flatten(0, 1).flatten(1, 3),
            )  # fmt: skip
            least = ys.dtype.type(self.least)  # of another type it would widen all the sums
            kernels.transform_output(products.numpy(), outwards, bias.numpy(), least, 4 * first, ys)

        # the kernel is read again for each strip, so it wants a large one where it is large
        size = max(STRIP_BYTES, self.transformed_kernel.nbytes // 2)
        crops, strip = self._at_once(rows, columns, size)
        pieces = (
            (slice(start, start + crops), top, min(top + strip, rows))
            for start in range(0, len(x), crops)
            for top in range(0, rows, strip)
        )
        kernels.share(convolve, pieces)
        return y.permute(0, 3, 1, 2)

    def _convolve(self, x: Tensor, y: Tensor) -> None:
        """Fills ``y`` of ``[N, m r, m c, D]`` from ``x`` of ``[N, m r + 2, m c + 2, C]``."""
        m, side = self.tile, self.tile + 2
        number, height, width, channels = x.shape
        r, c = (height - 2) // m, (width - 2) // m
        # every m-th row from the i-th on holds the i-th row of all tiles; columns likewise
        halfway = x.new_empty(side, number, r, width, channels)
        lines = [x[:, i : i + m * r - m + 1 : m] for i in range(side)]
        _combine(self.input_transform, lines, halfway)
        tiles = x.new_empty(side, side, number, r, c, channels)
        columns = [halfway[:, :, :, j : j + m * c - m + 1 : m] for j in range(side)]
        _combine(self.input_transform, columns, tiles.unbind(1))
        products = torch.bmm(tiles.view(side * side, -1, channels), self.transformed_kernel)
        products = products.view(side, side, number, r, c, -1)
        halfway = x.new_empty(m, *products.shape[1:])
        _combine(self.output_transform, products, halfway)
        places = y.unflatten(1, (r, m)).unflatten(3, (c, m)).permute(4, 2, 0, 1, 3, 5)
        _combine(self.output_transform, halfway.unbind(1), places)
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
