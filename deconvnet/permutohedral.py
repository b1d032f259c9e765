"""Gaussian filtering in many dimensions on the permutohedral lattice.

Summing ``exp(-0.5 * ||f_i - f_j||^2) * value_j`` over all pairs of points takes quadratic time.
The lattice answers approximately, in linear time and three steps: *splat* spreads each value over
the corners of the simplex around its point, *blur* runs ``[1/2, 1, 1/2]`` along every lattice
direction, *slice* reads the result back with the splat's weights. Each step is a sparse matrix
product with a few terms a row, which ``embedding_bag`` computes fast on every device. Blurring
reaches only vertices that touch some point, so the sums are approximate.

Source: Adams, Baek, Davis, *Fast High-Dimensional Filtering Using the Permutohedral Lattice*,
Eurographics 2010. Where they look vertices up in a hash table, this module sorts integer keys:
tensor operations only, in a fixed order. On a CPU, compiled loops can stand in for many of them
(:mod:`deconvnet.crf_kernels`).
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.gaussian import LABELS_AT_ONCE, Filter, LinearFilter, SparseMatrix
from deconvnet.hardware import compiled_kernels

MIN_ALONE = 0.25  # share of isolated points from which leaving them out saves time

COMPILED_FROM = 2**13  # points; fewer are not worth loading compiled code

GPU_ROW = 64  # points at a vertex that one of a GPU's threads adds up; there may be thousands

# glibc returns larger blocks to the system at once, and fresh pages cost more than the arithmetic.
MAX_BUFFER_BYTES = 2**25 - 2**16


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
    coordinates and takes ``d + 1`` from one of them, each in its turn, smallest remainder first.
    The gaps between the sorted remainders are the weights.

    Args:
        points: float ``[N, d + 1]``, embedded features.

    Returns:
        ``corner`` int64 ``[N, d + 1]``, coordinates of the first corner; ``order`` int64
        ``[N, d + 1]``, the coordinate that each step reduces; ``weights`` float ``[N, d + 1]``,
        one per corner, non-negative and summing to 1 up to rounding.
    """
    multiples, order, weights = _round_down(points.T)
    multiples = multiples.long()
    corner = (multiples * len(multiples) - multiples.sum(dim=0)).T
    return corner.contiguous(), order.T.long().contiguous(), weights.T.contiguous()


def _round_down(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`enclosing_simplex`, coordinates first; instead of the corner its multiples, floats."""
    side = len(points)
    scaled = points / side
    multiples = scaled.floor()
    # Integers with the coordinate's number in their last bits: sorted, they still tell which
    # coordinate each remainder belongs to.
    integers = torch.int64 if points.dtype == torch.float64 else torch.int32
    bits = side.bit_length()
    one = 2 ** (torch.iinfo(integers).bits - 1 - bits)
    remainder = ((scaled - multiples) * one).to(integers).clamp_(max=one - 1)
    number = torch.arange(side, dtype=integers, device=points.device)[:, None]
    rows = list((remainder << bits | number).unbind())
    for start in [0, 1] * (side // 2) + [0] * (side % 2):  # odd-even transposition sort
        for i in range(start, side - 1, 2):
            rows[i : i + 2] = torch.minimum(*rows[i : i + 2]), torch.maximum(*rows[i : i + 2])
    ordered = torch.stack(rows)
    sorted_remainder = (ordered >> bits).to(points.dtype) / one
    first = 1 + sorted_remainder[:1] - sorted_remainder[-1:]
    weights = torch.cat([first, sorted_remainder.diff(dim=0)])
    return multiples, ordered & 2**bits - 1, weights


def _round_as_the_original(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_round_down`, from features, as the code of Krähenbühl and Koltun does it.

    A point on the border of two simplices may go to either: its weights are the same. But vertices
    exist only where a point touches them, and what a missing one would have passed on is lost to
    the sums. Pixels are a grid, with many such points; so for the original's sums to the last
    digits this computes in its precision and order, and settles ties as it does.
    """
    side = features.shape[1] + 1
    number = torch.arange(1, side, dtype=torch.float64)
    length = torch.tensor(side * math.sqrt(2 / 3), dtype=torch.float32).double()
    scale = (length / (number * (number + 1)).sqrt()).to(features.device, torch.float32)
    scaled = features.float().T * scale[:, None]
    total, points = torch.zeros_like(scaled[0]), []
    for i in range(side - 1, 0, -1):  # the rows of `embedding`, the last one first
        points.append(total - i * scaled[i - 1])
        total = total + scaled[i - 1]
    points = torch.stack([total, *reversed(points)])

    inverse = torch.tensor(1 / side, dtype=torch.float32).to(points)
    multiples = (points * inverse).round()  # the nearest ones, whose sum may not be zero
    excess = multiples.sum(dim=0).long()
    falling = (points - side * multiples).argsort(dim=0, descending=True, stable=True)
    rank = falling.argsort(dim=0) + excess
    multiples -= rank.div(side, rounding_mode="floor")  # ranks outside 0...d wrap around
    turn = torch.arange(side, device=points.device)[:, None]
    order = falling.gather(0, (side - 1 - turn - excess) % side)
    rising = ((points - side * multiples) * inverse).gather(0, order)
    weights = torch.cat([1 + rising[:1] - rising[-1:], rising.diff(dim=0)])
    return multiples, order, weights.to(features.dtype)


class PermutohedralLattice:
    """Approximate Gaussian filter over fixed points, built once and applied to many values.

    The original leaves the filter's scale open, and a plain implementation returns about half the
    sum for five features. Here it is fixed by what an exact kernel does: every point weighs
    ``exp(0) = 1`` in its own sum (up to vertices that are missing).

    Args:
        features: float ``[N, d]``, each feature divided by its standard deviation. (In float32,
            from some millions on, they have no digits left to place them.)
        original: Whether to give the very sums of Krähenbühl and Koltun's code: with its scale,
            ``1 / (1 + 2^-d)`` for every point, and its rounding.

    Attributes:
        num_vertices: number ``M`` of lattice vertices that touch a point.
        corners: int32 ``[N, d + 1]``, the vertices of the simplex around each point.
        weights: ``[N, d + 1]``, what a point gives to its corners and takes from them: its
            barycentric weights times its own scale.
        neighbours: ``d + 1`` times int32 ``[M + 1, 3]``: the vertex before, the vertex itself and
            the vertex after along one lattice direction. Vertex ``M`` stands for those that touch
            no point; its value stays 0.

    Raises:
        ValueError: if the features are not a non-empty float ``[N, d]``, not finite, or spread so
            widely that vertices do not fit into 64-bit keys.
    """

    def __init__(self, features: Tensor, original: bool = False) -> None:
        if features.ndim != 2 or not features.is_floating_point() or features.numel() == 0:
            raise ValueError(
                "features must be a non-empty float tensor [N, d], "
                f"got {features.dtype} {tuple(features.shape)}"
            )
        side = features.shape[1] + 1
        compiled = compiled_for(features)
        if original:
            multiples, order, barycentric = _round_as_the_original(features)
            own = 1 + 2.0 ** (1 - side)
            self.weights = (barycentric / own**0.5).T.contiguous()
        elif compiled:
            matrix, paths = embedding(side - 1).to(features.device), _paths(side).to(features)
            multiples, order, self.weights = compiled.place_points(features, matrix, paths)
        else:
            multiples, order, self.weights = _place_points(features)

        # A step along direction k takes 1 from multiple k. Two vertices differ in the multiples
        # only up to a common number, so their differences tell the vertices apart; and each, by
        # the shape of `embedding`, depends on two features only, which keeps their range small.
        differences = multiples.diff(dim=0)
        least = differences.amin(dim=1).double()
        # One for the end, and room on either side: 1 for the corners, 1 for their neighbours.
        spans = (differences.amax(dim=1) - least + 5).tolist()
        cells = math.prod(spans)
        if not cells < 2**63 - 2**20:  # too many, give or take rounding, or NaN
            if not features.isfinite().all():
                raise ValueError("features must be finite, got NaN or infinity")
            raise ValueError(
                "features spread over more lattice cells than 64-bit keys can tell apart; use "
                "larger standard deviations"
            )
        spans = [int(span) for span in spans]
        integers = torch.int32 if cells < 2**31 else torch.int64  # half the bytes to sort
        places = [math.prod(spans[:i]) for i in range(side - 1)]
        self._low = least.long() - 2
        self._span, self._place = self._low.new_tensor(spans), self._low.new_tensor(places)
        steps = (F.pad(self._place, (0, 1)) - F.pad(self._place, (1, 0))).to(integers)
        first = 2 * sum(places)
        if compiled:
            keys = compiled.corner_keys(multiples, order.int(), least, self._place, steps, first)
        else:
            keys = _corner_keys(differences, order, least, places, steps, first)

        # Sorted, equal keys stand together: each run is a vertex and the points that touch it.
        keys, origin = keys.flatten().sort(stable=True)
        runs = compiled.vertices_of_runs if compiled else _vertices_of_runs
        starts, self.corners, points, touching = runs(keys, origin, self.weights)
        self._keys = keys[starts]
        self.num_vertices = len(starts)
        one_step_away = compiled.one_step_away if compiled else _one_step_away
        self.neighbours = list(one_step_away(self._keys, steps))

        # The last vertex stands for all that are missing: no point touches it.
        starts = F.pad(starts, (0, 2), value=len(origin)).int()
        self._starts = starts
        self._to_vertices = SparseMatrix(points, touching, starts)
        if features.is_cuda:
            self._to_vertices = self._to_vertices.in_pieces(GPU_ROW)
        self._to_points = SparseMatrix.from_rows(self.corners, self.weights)
        halves = features.new_tensor([0.5, 1, 0.5]).repeat(self.num_vertices + 1, 1)
        step = SparseMatrix.from_rows(self.neighbours[0], halves)
        self._steps = [replace(step, columns=found.flatten()) for found in self.neighbours]

    @property
    def vertices(self) -> Tensor:
        """Coordinates of the vertices, int64 ``[M, d + 1]``.

        Where they lie among the features is ``vertices.double() @ pinv(embedding(d)).T``.
        """
        differences = self._keys.long()[:, None] // self._place % self._span + self._low
        multiples = F.pad(differences.cumsum(dim=1), (1, 0))
        return multiples * multiples.shape[1] - multiples.sum(dim=1, keepdim=True)

    def points_at_vertices(self) -> Tensor:
        """How many points touch each vertex: int32 ``[M]``."""
        return self._starts[:-1].diff()

    def alone(self) -> Tensor:
        """Points that exchange no weight with any other point: bool ``[N]``.

        No other point touches their simplex, nor a vertex next to it.
        """
        touching = self.points_at_vertices()
        neighbours = torch.zeros_like(touching)
        for before, _, after in (n[:-1].unbind(dim=1) for n in self.neighbours):
            neighbours += before < self.num_vertices
            neighbours += after < self.num_vertices
        # The corners of a simplex form a ring: two neighbours of each are corners too.
        isolated = (touching == 1) & (neighbours == 2)
        return isolated.index_select(0, self.corners.flatten()).view_as(self.corners).all(dim=1)

    def splat(self, values: Tensor) -> Tensor:
        """Spread the points' values ``[N, C]`` over the vertices, ``[M + 1, C]``."""
        return self._to_vertices(values)

    def blur(self, values: Tensor, backwards: bool = False) -> Tensor:
        """Add to every vertex half of its two neighbours, one lattice direction after another."""
        for step in reversed(self._steps) if backwards else self._steps:
            values = step(values)
        return values

    def slice(self, values: Tensor) -> Tensor:
        """Read the vertices' values ``[M + 1, C]`` at the points, ``[N, C]``."""
        return self._to_points(values)

    def __call__(self, values: Tensor) -> Tensor:
        """Filter values ``[N, C]``, of the features' dtype, to the same shape."""
        return LinearFilter.apply(values, self._filter, self._transpose)

    def scaled(self, scale_in: Tensor, scale_out: Tensor) -> Filter:
        """The filter between two multiplications, for the price of the filter alone.

        Args:
            scale_in: ``[N, 1]``, for the values before they are filtered.
            scale_out: ``[N, 1]``, for the sums.

        Returns:
            A filter that is not differentiable.
        """
        lattice = copy.copy(self)
        lattice._to_vertices = self._to_vertices.times_columns(scale_in.flatten())
        lattice._to_points = self._to_points.times_rows(scale_out.flatten())
        return lambda values: lattice._filter(values.contiguous())

    def _transpose(self, values: Tensor) -> Tensor:
        # Slice transposes splat, and each blur itself: only their order changes.
        return self._filter(values, backwards=True)

    def _filter(self, values: Tensor, backwards: bool = False) -> Tensor:
        bytes_a_label = (self.num_vertices + 1) * values.element_size()
        labels = values.shape[1]
        if not values.is_cuda:
            parts = math.ceil(labels / max(1, MAX_BUFFER_BYTES // bytes_a_label))
            labels = math.ceil(labels / parts / LABELS_AT_ONCE) * LABELS_AT_ONCE
        sums = [
            self.slice(self.blur(self.splat(part.contiguous()), backwards))
            for part in values.split(labels, dim=1)
        ]
        return sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)


class ThinnedLattice:
    """The lattice without the points that exchange no weight with any other point.

    In a noisy image, or with narrow kernels, most pixels may have no lookalike. Each of them
    occupies ``d + 1`` vertices of its own only to get its value back, times a number. Without
    them the lattice is the same for all others, and smaller.

    Args:
        lattice: the complete lattice.
        features: those of its points, ``[N, d]``.

    Attributes:
        num_vertices: number of vertices that are left.
    """

    def __init__(self, lattice: PermutohedralLattice, features: Tensor) -> None:
        alone = lattice.alone()
        own = lattice(torch.ones_like(features[:, :1]))
        points = torch.arange(len(alone), dtype=torch.int32, device=alone.device)[:, None]
        # A diagonal matrix, the factor of each isolated point: faster than a product of tensors.
        self._own = SparseMatrix.from_rows(points, torch.where(alone[:, None], own, 0))
        self._crowd = (~alone).nonzero().flatten()
        self._lattice = PermutohedralLattice(features[self._crowd]) if len(self._crowd) else None
        self.num_vertices = self._lattice.num_vertices if self._lattice else 0

    def __call__(self, values: Tensor) -> Tensor:
        """Filter values ``[N, C]``, of the features' dtype, to the same shape."""
        return LinearFilter.apply(values, self._filter, self._transpose)

    def scaled(self, scale_in: Tensor, scale_out: Tensor) -> Filter:
        """The filter between two multiplications, see :meth:`PermutohedralLattice.scaled`."""
        thinned = copy.copy(self)
        thinned._own = self._own.times_rows((scale_in * scale_out).flatten())
        if self._lattice is None:
            return thinned._filter
        filter = self._lattice.scaled(scale_in[self._crowd], scale_out[self._crowd])
        return lambda values: thinned._join(values, filter)

    def _filter(self, values: Tensor) -> Tensor:
        return self._join(values, self._lattice and self._lattice._filter)

    def _transpose(self, values: Tensor) -> Tensor:
        return self._join(values, self._lattice and self._lattice._transpose)

    def _join(self, values: Tensor, filter: Filter | None) -> Tensor:
        sums = self._own(values.contiguous())
        if filter is None:
            return sums
        return sums.index_copy_(0, self._crowd, filter(values.index_select(0, self._crowd)))


def lattice_filter(features: Tensor) -> PermutohedralLattice | ThinnedLattice:
    """The permutohedral lattice of these points, thinned where that pays.

    Args:
        features: float ``[N, d]``, each feature divided by its standard deviation.

    Raises:
        ValueError: as :class:`PermutohedralLattice`.
    """
    lattice = PermutohedralLattice(features)
    # An isolated point owns all its vertices; counting those is a cheap first test.
    own_vertices = (lattice.points_at_vertices() == 1).sum()
    if own_vertices < MIN_ALONE * lattice.corners.numel():
        return lattice
    if lattice.alone().double().mean() < MIN_ALONE:
        return lattice
    return ThinnedLattice(lattice, features)


def compiled_for(*values: Tensor) -> ModuleType | None:
    """:mod:`deconvnet.crf_kernels`, if it is of use for these values of points.

    Args:
        values: ``[N, ...]`` each.
    """
    if torch.compiler.is_compiling() or len(values[0]) < COMPILED_FROM:
        return None
    if not all(type(x) is Tensor and x.dtype == torch.float32 for x in values):
        return None
    if any(x.device.type != "cpu" or x.requires_grad for x in values):
        return None
    kernels = compiled_kernels("deconvnet.crf_kernels")
    return kernels if kernels and kernels.SHARES_WORK else None


def _place_points(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multiples and order of each point's simplex, and its weights at the corners.

    Compiled, :func:`deconvnet.crf_kernels.place_points`; likewise the three that follow.
    """
    side = features.shape[1] + 1
    # In double precision: a reduced one, which PyTorch can be set to for products of matrices,
    # would move points to other simplices.
    matrix = embedding(side - 1).to(features.device)
    points = (matrix @ features.T.double()).to(features.dtype)
    multiples, order, barycentric = _round_down(points)
    own = (_paths(side).to(barycentric) @ barycentric * barycentric).sum(dim=0)
    return multiples, order, (barycentric / own**0.5).T.contiguous()


def _paths(side: int) -> Tensor:
    """What blurring carries from one corner of a simplex to another: ``[d + 1, d + 1]``.

    It does so along the directions between them, or backwards along all the others, and halves it
    at every step. Once around the ring of corners, either way, it also returns to its own.
    """
    index = torch.arange(side)
    apart = (index - index[:, None]) % side
    return 0.5**apart + 0.5 ** (side - apart) + (apart == 0) * 0.5**side


def _corner_keys(
    differences: Tensor, order: Tensor, least: Tensor, places: list[int], steps: Tensor, first: int
) -> Tensor:
    """A number for every corner of every point's simplex, ``[N, d + 1]``."""
    key = torch.full_like(differences[0], first, dtype=steps.dtype)
    for numbers, lowest, place in zip(differences, least, places):
        key.add_((numbers.double() - lowest).to(steps.dtype), alpha=place)
    keys = [key]
    for reduced in order[:-1]:
        keys.append(keys[-1] + steps.index_select(0, reduced))
    return torch.stack(keys, dim=1)


def _vertices_of_runs(
    keys: Tensor, origin: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where each run of equal keys starts, the vertices at each point, and the runs' points."""
    is_new = torch.ones_like(keys, dtype=torch.bool)
    is_new[1:] = keys[1:] != keys[:-1]
    run = is_new.cumsum(dim=0, dtype=torch.int32) - 1
    corners = torch.empty_like(run).scatter_(0, origin, run).view(weights.shape)
    points = (origin.double() / weights.shape[1]).int()  # few processors divide many integers
    return is_new.nonzero().flatten(), corners, points, weights.flatten().index_select(0, origin)


def _one_step_away(keys: Tensor, steps: Tensor) -> Tensor:
    """The vertices before and after each one, along every direction: ``[d + 1, M + 1, 3]``."""
    missing = len(keys)
    wanted = keys + steps[:, None]
    found = torch.searchsorted(keys, wanted, out_int32=True).clamp_(max=missing - 1)
    exists = keys[found] == wanted
    here = torch.arange(missing + 1, dtype=torch.int32, device=keys.device).expand(len(steps), -1)
    after = F.pad(torch.where(exists, found, missing), (0, 1), value=missing)
    before = torch.full_like(after, missing).scatter_(1, after.long(), here)
    before[:, missing] = missing  # every missing neighbour was scattered to this place
    return torch.stack([before, here, after], dim=2)
