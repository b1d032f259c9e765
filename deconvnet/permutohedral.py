"""Gaussian filtering in many dimensions on the permutohedral lattice.

Summing ``exp(-0.5 * ||f_i - f_j||^2) * value_j`` over all pairs of points takes quadratic time.
The lattice answers approximately, in linear time and three steps: *splat* spreads each value over
the corners of the simplex around its point, *blur* runs ``[1/2, 1, 1/2]`` along every lattice
direction, *slice* reads the result back with the splat's weights. Each step is a sparse matrix
product with a few terms a row, which ``embedding_bag`` computes fast on every device.

Source: Adams, Baek, Davis, *Fast High-Dimensional Filtering Using the Permutohedral Lattice*,
Eurographics 2010. Where they look vertices up in a hash table, this module sorts integer keys:
tensor operations only, in a fixed order.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(dimensions: int) -> Tensor:
    """Matrix that takes features into the space of the lattice.

    The lattice is the set of integer points in ``R^(d+1)`` whose coordinates sum to zero and leave
    one common remainder modulo ``d + 1``. The matrix is a scaled isometry onto the hyperplane of
    sum zero; its scale makes splat, blur and slice together a Gaussian of unit variance.

    Args:
        dimensions: number of features ``d``, at least 1.

    Returns:
        float64 ``[d + 1, d]``, orthogonal columns of length ``(d + 1) * sqrt(2 / 3)``.
    """
    column = torch.arange(1, dimensions + 1, dtype=torch.float64)
    basis = torch.ones(dimensions + 1, dimensions, dtype=torch.float64).triu()
    basis[1:] -= column.diag()
    return basis / (column * (column + 1)).sqrt() * (dimensions + 1) * math.sqrt(2 / 3)


def enclosing_simplex(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the lattice simplex around each point and the point's barycentric weights.

    Round the coordinates down to multiples of ``d + 1``, then give each the same share of what is
    missing to sum zero: that is one corner. Every step to the next corner adds 1 to all
    coordinates and takes ``d + 1`` from one of them; they pay in turn, smallest remainder first.
    The gaps between the sorted remainders are the weights.

    Args:
        points: float ``[N, d + 1]``, embedded features.

    Returns:
        ``corner`` int64 ``[N, d + 1]``, coordinates of the first corner; ``order`` int64
        ``[N, d + 1]``, the coordinate that pays for each step; ``weights`` float ``[N, d + 1]``,
        one per corner, non-negative and summing to 1 up to rounding.
    """
    side = points.shape[1]
    multiples = (points / side).floor()
    remainder, order = (points / side - multiples).sort(dim=1)
    corner = multiples.long() * side
    corner = corner - multiples.long().sum(dim=1, keepdim=True)
    first = 1 + remainder[:, :1] - remainder[:, -1:]
    return corner, order, torch.cat([first, remainder.diff(dim=1)], dim=1)


class PermutohedralLattice:
    """Approximate Gaussian filter over fixed points, built once and applied to many values.

    Blurring only reaches vertices that touch some point, so that sums come out too small where
    points are sparse; normalising by the filter's own response to ones makes up for most of it.

    Args:
        features: float ``[N, d]``, each feature divided by its standard deviation.

    Attributes:
        num_vertices: number ``M`` of lattice vertices that touch a point.
        vertices: int64 ``[M, d + 1]``, their coordinates, sorted.
        corners: int32 ``[N, d + 1]``, the vertices of each point's simplex.
        weights: float ``[N, d + 1]``, the point's barycentric weights in it.
        neighbours: ``d + 1`` times int32 ``[M + 1, 3]``: the vertex before, the vertex itself and
            the one after along each lattice direction. Vertex ``M`` stands for one that does not
            exist; its value is always 0.

    Raises:
        ValueError: if the features are not a non-empty ``[N, d]`` float tensor, are not finite, or
            are spread so widely that a vertex has no 64-bit key.
    """

    def __init__(self, features: Tensor) -> None:
        if features.ndim != 2 or not features.is_floating_point() or features.numel() == 0:
            raise ValueError(
                f"features must be a non-empty float tensor [N, d], "
                f"got {features.dtype} {tuple(features.shape)}"
            )
        if not features.isfinite().all():
            raise ValueError("features must be finite, got NaN or infinity")
        points = features @ embedding(features.shape[1]).to(features).T
        side = points.shape[1]
        first_corner, order, self.weights = enclosing_simplex(points)

        # One integer per vertex, linear in its coordinates: a step along a lattice direction adds
        # the same number to every key. The last coordinate follows from the others.
        low = first_corner[:, :-1].amin(dim=0) - 2 * side
        spans = (first_corner[:, :-1].amax(dim=0) + 2 * side - low + 1).tolist()
        place_values = [math.prod(spans[:i]) for i in range(side)]
        if place_values[-1] >= 2**63:
            raise ValueError(
                f"features are spread too widely for the lattice: {math.prod(spans):.1e} possible "
                "vertices; use larger standard deviations"
            )
        place = low.new_tensor(place_values[:-1] + [0])
        steps = place.sum() - side * place
        first_key = ((first_corner[:, :-1] - low) * place[:-1]).sum(dim=1, keepdim=True)
        keys = torch.cat([first_key, first_key + steps[order[:, :-1]].cumsum(dim=1)], dim=1)

        # Equal keys stand together once sorted: each run is a vertex.
        keys, origin = keys.flatten().sort(stable=True)
        is_new = torch.ones_like(keys, dtype=torch.bool)
        is_new[1:] = keys[1:] != keys[:-1]
        vertex = is_new.cumsum(dim=0, dtype=torch.int32) - 1
        self.corners = torch.empty_like(vertex).scatter_(0, origin, vertex).view(-1, side)
        starts = is_new.nonzero().flatten()
        self.num_vertices = len(starts)
        keys = keys[starts]
        self.vertices = first_corner

        self._splat_points = (origin // side).int()
        self._splat_weights = self.weights.flatten()[origin]
        self._splat_starts = F.pad(starts, (0, 1), value=len(origin)).int()
        self.neighbours = [_neighbours(keys, step) for step in steps]
        self._blur_weights = features.new_tensor([0.5, 1, 0.5]).repeat(self.num_vertices + 1, 1)

    @property
    def self_weights(self) -> Tensor:
        """Weight of each point's own value in its sum, ``[N, 1]``, were no vertex missing.

        Two corners of a simplex are ``s`` steps apart, forward along ``s`` of the directions or
        backward along all others; every step of a blur halves.
        """
        side = self.weights.shape[1]
        index = torch.arange(side, device=self.weights.device)
        apart = (index - index[:, None]) % side
        path = 0.5**apart + 0.5 ** (side - apart) + (apart == 0) * 0.5**side
        return self._gain * ((self.weights @ path.to(self.weights)) * self.weights).sum(1, True)

    def splat(self, values: Tensor) -> Tensor:
        """Spread values ``[N, C]`` over the vertices, ``[M + 1, C]``."""
        return F.embedding_bag(
            self._splat_points,
            values,
            self._splat_starts,
            mode="sum",
            per_sample_weights=self._splat_weights.to(values),
        )

    def blur(self, values: Tensor) -> Tensor:
        """Mix each vertex with its two neighbours, one lattice direction after the other."""
        weights = self._blur_weights
        for neighbours in self.neighbours:
            values = F.embedding_bag(neighbours, values, mode="sum", per_sample_weights=weights)
        return values

    def slice(self, values: Tensor) -> Tensor:
        """Interpolate vertex values ``[M + 1, C]`` at the points, ``[N, C]``."""
        return F.embedding_bag(
            self.corners, values, mode="sum", per_sample_weights=self.weights
        )

    @property
    def _gain(self) -> float:
        d = self.weights.shape[1] - 1
        return 1 / (1 + 2.0**-d)

    def __call__(self, values: Tensor) -> Tensor:
        """Filter values ``[N, C]`` to the same shape."""
        return self.slice(self.blur(self.splat(values))) * self._gain


def _neighbours(keys: Tensor, step: Tensor) -> Tensor:
    missing = len(keys)
    wanted = keys + step
    found = torch.searchsorted(keys, wanted, out_int32=True).clamp_(max=missing - 1)
    exists = keys[found] == wanted
    here = torch.arange(missing + 1, dtype=torch.int32, device=keys.device)
    after = F.pad(torch.where(exists, found, missing), (0, 1), value=missing)
    before = torch.full_like(here, missing)
    before[found[exists]] = here[:-1][exists]
    return torch.stack([before, here, after], dim=1)
