"""Sums with a Gaussian kernel: over all pairs of points, and fast on the pixel grid.

All filters return ``sum_j exp(-0.5 * ||f_i - f_j||^2) * values_j``. In more dimensions, or off the
grid, :mod:`deconvnet.permutohedral` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Filter = Callable[[Tensor], Tensor]  # values [N, C] to sums over all points [N, C]
# Weights and beliefs below this make no difference to a sum, but many processors take a hundred
# times as long for numbers near the end of float32's range.
NEGLIGIBLE = 1e-30
# Where a processor cannot use its registers of 8 numbers in part, 5 labels take longer than 8.
LABELS_AT_ONCE = 8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1
MAX_EXACT_PIXELS = 64 * 64  # up to here exact inference takes a fraction of a second on a CPU


class LinearFilter(torch.autograd.Function):
    """A linear filter that knows its transpose, so that its gradient is as fast as itself."""

    @staticmethod
    def forward(ctx, values: Tensor, filter: Filter, transpose: Filter) -> Tensor:
        """Apply ``filter`` to the values."""
        ctx.filter, ctx.transpose = filter, transpose
        return filter(values.contiguous())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Apply ``transpose`` to the gradient."""
        return LinearFilter.apply(gradient, ctx.transpose, ctx.filter), None, None


class ExactFilter:
    """Sums over all pairs of points, in quadratic time: the reference.

    Args:
        features: float ``[N, d]``, each feature divided by its standard deviation.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features.contiguous()
        # A large kernel matrix would not fit into memory, so its rows are computed anew each time.
        small = len(features) <= MAX_EXACT_PIXELS
        self._kept_rows = [torch.cat(list(self._rows()))] if small else None

    def __call__(self, values: Tensor) -> Tensor:
        """Return ``sum_j exp(-0.5 * ||f_i - f_j||^2) * values_j`` for values ``[N, C]``."""
        return torch.cat([rows @ values for rows in self._kept_rows or self._rows()])

    def _rows(self) -> Iterator[Tensor]:
        for block in self.features.split(max(1, 2**20 // len(self.features))):
            yield _kernel_matrix(block, self.features)


class ExactGrid:
    """The Gaussian kernel on a pixel grid, over all pairs of pixels all the same.

    There it is a product of one kernel along columns and one along rows, so that a sum over all
    pixels is a sum over a column's, and then over a row's. It keeps both as matrices.

    Args:
        height: image height in pixels.
        width: image width in pixels.
        sigma: standard deviation in pixels.
        dtype: of the values to filter.
        device: where they are.
    """

    def __init__(
        self, height: int, width: int, sigma: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        lines = (torch.arange(n, dtype=dtype, device=device) for n in (height, width))
        self._along_y, self._along_x = (
            _kernel_matrix(line[:, None] / sigma, line[:, None] / sigma) for line in lines
        )

    def __call__(self, values: Tensor) -> Tensor:
        """Return the sums, ``[H * W, C]`` as the values."""
        grid = values.reshape(len(self._along_y), len(self._along_x), -1)
        by_columns = (self._along_y @ grid.flatten(1)).view_as(grid)
        return (self._along_x @ by_columns).flatten(0, 1)


def _kernel_matrix(listeners: Tensor, speakers: Tensor) -> Tensor:
    """``exp(-0.5 * ||f_i - f_j||^2)`` for features ``[M, d]`` and ``[N, d]``: ``[M, N]``."""
    # Distances by way of a matrix product would lose digits to cancellation.
    precise = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(listeners, speakers, compute_mode=precise)
    exponent = distance.square_().mul_(-0.5)
    # Not by way of minus infinity, whose exponential takes ten times as long.
    weights = exponent.clamp_(min=math.log(NEGLIGIBLE)).exp_()
    return F.threshold_(weights, 1.01 * NEGLIGIBLE, 0.0)


class GridGaussian:
    """The Gaussian kernel on a pixel grid, along columns and along rows one after the other.

    On a grid the kernel is a product of two one-dimensional ones, so it needs no lattice. And a
    Gaussian is a narrower one applied twice: down to a coarse grid whose nodes are up to one
    standard deviation apart, and up again. That is a matrix's square root with few rows, and
    costs a third of a convolution. A single pixel's own weight is right to 3 %, sums over a surface
    to 0.1 %. Under two pixels a coarse grid saves nothing, and a convolution is as exact as
    float32.

    Args:
        height: image height in pixels.
        width: image width in pixels.
        sigma: standard deviation in pixels.
    """

    def __init__(self, height: int, width: int, sigma: float) -> None:
        self.size = height, width
        self.sigma = sigma

    def __call__(self, values: Tensor) -> Tensor:
        """Filter values ``[H * W, C]`` to the same shape."""
        if self.sigma < 2:
            return self._convolve(values)
        return LinearFilter.apply(values, self._filter, self._filter)

    def scaled(self, scale_in: Tensor, scale_out: Tensor) -> Filter:
        """The filter between two multiplications, for the price of the filter alone.

        Args:
            scale_in: ``[H * W, 1]``, for the values before they are filtered: a product of one
                factor for every row of the image and one for every column, as this filter's own
                sum over all pixels is.
            scale_out: ``[H * W, 1]``, likewise, for the sums.

        Returns:
            A filter that is not differentiable.
        """
        if self.sigma < 2:
            return lambda values: self._convolve(values * scale_in) * scale_out

        def factors(scale: Tensor) -> tuple[Tensor, Tensor]:
            scale = scale.view(self.size)
            return scale[:, 0], scale[0] / scale[0, 0]

        down_y, down_x, up_x, up_y = self._matrices(scale_in)
        (in_y, in_x), (out_y, out_x) = factors(scale_in), factors(scale_out)
        rows = down_y.rows
        matrices = [
            down_y.times_columns(in_y),
            down_x.times_columns(in_x.repeat(rows)),
            up_x.times_rows(out_x.repeat(rows)),
            up_y.times_rows(out_y),
        ]
        return lambda values: self._down_and_up(values.contiguous(), matrices)

    def _filter(self, values: Tensor) -> Tensor:
        return self._down_and_up(values, self._matrices(values))

    def _down_and_up(self, values: Tensor, matrices: Sequence[SparseMatrix]) -> Tensor:
        down_y, down_x, up_x, up_y = matrices
        shape, (height, _) = values.shape, self.size
        coarse = down_y(values.view(height, -1))  # whole rows of the image at a time
        fine = up_x(down_x(coarse.view(-1, shape[1])))
        return up_y(fine.view(len(coarse), -1)).view(shape)

    def _matrices(self, values: Tensor) -> tuple[SparseMatrix, ...]:
        return _down_and_up_again(*self.size, self.sigma, values.device, values.dtype)

    def _convolve(self, values: Tensor) -> Tensor:
        height, width = self.size
        channels = values.shape[1]
        # Seen as [1, C, H, W] in channels-last order, the values need not be moved.
        grid = values.reshape(1, height, width, channels).permute(0, 3, 1, 2)
        along_y, along_x = (self._taps(length).to(values) for length in self.size)
        columns = along_y.repeat(channels).view(channels, 1, -1, 1)
        rows = along_x.repeat(channels).view(channels, 1, 1, -1)
        grid = F.conv2d(grid, columns, padding=(len(along_y) // 2, 0), groups=channels)
        grid = F.conv2d(grid, rows, padding=(0, len(along_x) // 2), groups=channels)
        return grid.permute(0, 2, 3, 1).reshape(height * width, channels)

    def _taps(self, length: int) -> Tensor:
        radius = min(math.ceil(5 * self.sigma), length - 1)
        offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
        return (-0.5 * (offsets / self.sigma) ** 2).exp()


@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """A sparse matrix of ``R`` rows and ``E`` entries, row after row.

    PyTorch's ``embedding_bag`` multiplies by such a matrix, fast on every device.
    """

    columns: Tensor  # int32 [E], of the entries
    weights: Tensor  # float [E], the entries
    starts: Tensor  # int32 [R + 1], the first entry of each row, then E

    @classmethod
    def from_rows(cls, columns: Tensor, weights: Tensor) -> SparseMatrix:
        """The matrix with the same number ``k`` of entries in every row, both ``[R, k]``."""
        rows, entries = columns.shape
        # Kept, since embedding_bag would otherwise count them out for every product.
        starts = torch.arange(rows + 1, dtype=torch.int32, device=columns.device) * entries
        return cls(columns.flatten(), weights.flatten(), starts)

    @property
    def rows(self) -> int:
        """Their number ``R``."""
        return len(self.starts) - 1

    def __call__(self, values: Tensor) -> Tensor:
        """The product with ``values``, which has a row for every column of the matrix."""
        return F.embedding_bag(
            self.columns,
            values,
            self.starts,
            mode="sum",
            per_sample_weights=self.weights,
            include_last_offset=True,
        )

    def times_columns(self, factors: Tensor) -> SparseMatrix:
        """The matrix with every column multiplied by its factor."""
        return replace(self, weights=self.weights * factors.index_select(0, self.columns))

    def times_rows(self, factors: Tensor) -> SparseMatrix:
        """The matrix with every row, all of the same length, multiplied by its factor."""
        weights = self.weights.view(self.rows, -1) * factors[:, None]
        return replace(self, weights=weights.flatten())

    def to(self, device: torch.device, dtype: torch.dtype) -> SparseMatrix:
        """A copy for values of this kind."""
        return SparseMatrix(
            self.columns.to(device), self.weights.to(device, dtype), self.starts.to(device)
        )

    def in_pieces(self, longest: int) -> MatrixInPieces:
        """The same matrix for GPUs, where a single thread adds up a row, however long it is.

        Args:
            longest: entries in a piece of a row, at most.
        """
        entries = self.starts.diff()
        pieces = (entries + longest - 1) // longest  # of each row
        starts = F.pad(pieces.cumsum(0, dtype=torch.int32), (1, 0))
        number = torch.arange(int(starts[-1]), dtype=torch.int32, device=starts.device)
        row = torch.arange(self.rows, device=starts.device).repeat_interleave(pieces)
        begin = self.starts[row] + (number - starts[row]) * longest
        ones = torch.ones_like(number, dtype=self.weights.dtype)
        return MatrixInPieces(
            replace(self, starts=torch.cat([begin, self.starts[-1:]])),
            SparseMatrix(number, ones, starts),
        )

    def for_every_row(self, rows: int, length: int) -> SparseMatrix:
        """The same matrix for each of an image's rows, which have ``length`` values."""
        first = length * torch.arange(rows, dtype=torch.int32)[:, None]
        columns = (first + self.columns).view(rows * self.rows, -1)
        return SparseMatrix.from_rows(columns, self.weights.repeat(rows).view_as(columns))


@dataclass(frozen=True, eq=False)
class MatrixInPieces:
    """A sparse matrix as two: one adds up pieces of rows, the other pieces to rows."""

    pieces: SparseMatrix
    joined: SparseMatrix

    def __call__(self, values: Tensor) -> Tensor:
        """The product with ``values``, as :meth:`SparseMatrix.__call__`."""
        return self.joined(self.pieces(values))

    def times_columns(self, factors: Tensor) -> MatrixInPieces:
        """The matrix with every column multiplied by its factor."""
        return replace(self, pieces=self.pieces.times_columns(factors))


@lru_cache(maxsize=1)  # pictures of one size come one after the other
def _down_and_up_again(
    height: int, width: int, sigma: float, device: torch.device, dtype: torch.dtype
) -> tuple[SparseMatrix, ...]:
    """A grid's matrices: down along columns and rows, then up along rows and columns."""
    with torch.inference_mode(False):  # of use in that mode and out of it
        down_y, up_y = _square_root(height, sigma)
        down_x, up_x = _square_root(width, sigma)
        rows = down_y.rows
        along_rows = down_x.for_every_row(rows, width), up_x.for_every_row(rows, down_x.rows)
        return tuple(matrix.to(device, dtype) for matrix in (down_y, *along_rows, up_y))


def _square_root(length: int, sigma: float) -> tuple[SparseMatrix, SparseMatrix]:
    """Matrices down to a coarse grid and up again, whose product is a Gaussian.

    ``exp(-(x - u)^2 / sigma^2)`` times the same at ``y``, summed over nodes ``u`` at a distance of
    ``stride``, is ``sigma / stride * sqrt(pi / 2) * exp(-(x - y)^2 / (2 * sigma^2))``, up to what
    aliases. Each is cut off at four of its standard deviations.
    """
    stride = int(sigma)
    reach = 4 * sigma / math.sqrt(2)
    outside = math.floor(reach / stride)  # nodes beyond the border that still reach a pixel
    pixels = torch.arange(length)
    nodes = stride * torch.arange(-outside, (length - 1) // stride + outside + 1)

    def matrix(here: Tensor, there: Tensor, nearest: Tensor, span: int) -> SparseMatrix:
        index = nearest[:, None] + torch.arange(-span, span + 1)
        exists = (index >= 0) & (index < len(there))
        index = index.clamp(0, len(there) - 1)
        apart = here[:, None] - there[index]
        weight = (-((apart.double() / sigma) ** 2)).exp() * (exists & (apart.abs() <= reach))
        weight *= math.sqrt(stride / sigma / math.sqrt(math.pi / 2))
        return SparseMatrix.from_rows(index.int(), weight)

    down = matrix(nodes, pixels, nodes, math.floor(reach))
    up = matrix(pixels, nodes, pixels // stride + outside, math.ceil(reach / stride))
    return down, up
