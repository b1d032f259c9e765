from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deconvnet import permutohedral
from deconvnet.permutohedral import (
    PermutohedralLattice,
    ThinnedLattice,
    _round_as_the_original,
    embedding,
    enclosing_simplex,
    lattice_filter,
)


def random_points(count: int, dimensions: int, scale: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, dimensions, generator=generator, dtype=torch.float64)


def exact_kernel(features: torch.Tensor) -> torch.Tensor:
    return (-0.5 * (features[:, None] - features).square().sum(dim=2)).exp()


def as_matrix(lattice: PermutohedralLattice, count: int) -> torch.Tensor:
    return lattice(torch.eye(count, dtype=torch.float64))


def directions(dimensions: int) -> np.ndarray:
    return np.ones(dimensions + 1, int) - (dimensions + 1) * np.eye(dimensions + 1, dtype=int)


def reference_corners(point: np.ndarray) -> dict[tuple[int, ...], float]:
    """The paper's own route: the nearest remainder-0 point, then a canonical simplex."""
    side = len(point)
    nearest = np.round(point / side).astype(int) * side
    excess = nearest.sum() // side
    rank = np.argsort(np.argsort(-(point - nearest), kind="stable"), kind="stable")
    if excess > 0:  # too much in total: the coordinates that were rounded up furthest give back
        nearest[rank >= side - excess] -= side
    elif excess < 0:
        nearest[rank < -excess] += side
    rank = np.argsort(np.argsort(-(point - nearest), kind="stable"), kind="stable")
    offset = np.sort((point - nearest) / side)[::-1]
    corners = {}
    for remainder in range(side):
        canonical = np.where(rank < side - remainder, remainder, remainder - side)
        if remainder == 0:
            weight = 1 + offset[-1] - offset[0]
        else:
            weight = offset[side - remainder - 1] - offset[side - remainder]
        corners[tuple(nearest + canonical)] = weight
    return corners


def reference_blur(
    vertices: dict[tuple[int, ...], float], dimensions: int, grow: bool
) -> dict[tuple[int, ...], float]:
    for direction in directions(dimensions):
        blurred = defaultdict(float)
        for vertex, value in vertices.items():
            blurred[vertex] += value
            for sign in (-1, 1):
                neighbour = tuple(np.add(vertex, sign * direction))
                if grow or neighbour in vertices:
                    blurred[neighbour] += value / 2
        vertices = blurred
    return vertices


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5, 8])
def test_embedding_is_a_scaled_isometry_onto_sum_zero(dimensions):
    matrix = embedding(dimensions)
    gram = matrix.T @ matrix
    expected = (dimensions + 1) ** 2 * 2 / 3 * torch.eye(dimensions, dtype=torch.float64)
    torch.testing.assert_close(gram, expected)
    assert matrix.sum(dim=0).abs().max() < 1e-9


@settings(max_examples=50)
@given(
    dimensions=st.integers(1, 6),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_points_are_convex_combinations_of_their_corners(dimensions, scale, seed):
    features = random_points(20, dimensions, scale, seed)
    points = features @ embedding(dimensions).T
    corner, order, weights = enclosing_simplex(points)
    assert weights.min() > -1e-9
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(20, dtype=torch.float64))
    recovered = torch.zeros_like(points)
    steps = torch.tensor(directions(dimensions))
    for k in range(dimensions + 1):
        assert (corner.sum(dim=1) == 0).all()
        assert (corner % (dimensions + 1) == corner[:, :1] % (dimensions + 1)).all()
        recovered += weights[:, k, None] * corner
        corner = corner + steps[order[:, k]]
    torch.testing.assert_close(recovered, points, rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
def test_simplex_is_the_one_that_rounding_to_remainder_zero_finds(dimensions):
    features = random_points(40, dimensions, 2.0)
    lattice = PermutohedralLattice(features)
    points = (features @ embedding(dimensions).T).numpy()
    *_, weights = enclosing_simplex(torch.tensor(points))
    for point, corners, row in zip(points, lattice.corners, weights):
        found = {
            tuple(vertex): weight
            for vertex, weight in zip(lattice.vertices[corners.long()].tolist(), row.tolist())
        }
        assert found == pytest.approx(reference_corners(point))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_filter_equals_dictionary_lattice(dimensions):
    count = 25
    features = random_points(count, dimensions, 0.8)
    splats = [reference_corners(p) for p in (features @ embedding(dimensions).T).numpy()]
    everywhere = dict.fromkeys(itertools.chain(*splats), 0.0)
    plain = np.zeros((count, count))
    own = np.zeros(count)
    for j, splat in enumerate(splats):
        blurred = reference_blur(everywhere | splat, dimensions, grow=False)
        for i, corners in enumerate(splats):
            plain[i, j] = sum(weight * blurred[vertex] for vertex, weight in corners.items())
        complete = reference_blur(splat, dimensions, grow=True)
        own[j] = sum(weight * complete[vertex] for vertex, weight in splat.items())
    expected = plain / np.sqrt(own[:, None] * own)
    np.testing.assert_allclose(as_matrix(PermutohedralLattice(features), count), expected, 1e-9)


@pytest.mark.parametrize("keys", [torch.int32, torch.int64])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("dimensions", "far"), [(1, 1e12), (2, 1e9), (5, 1e5)])
def test_neighbours_lie_one_step_away(dimensions, far, compiled, keys, monkeypatch):
    if compiled:
        pytest.importorskip("numba")
        monkeypatch.setattr(permutohedral, "COMPILED_FROM", 0)
    else:
        monkeypatch.setattr(permutohedral, "compiled_kernels", lambda module: None)
    points = random_points(60, dimensions, 0.7).float()
    if keys == torch.int64:  # two groups, so far apart that keys are long
        points[:, 0] += far * (points[:, 0] > 0)
    lattice = PermutohedralLattice(points)
    assert lattice._keys.dtype == keys
    assert_neighbours(lattice)


def assert_neighbours(lattice: PermutohedralLattice) -> None:
    missing, side = lattice.vertices.shape
    vertices = [tuple(v) for v in lattice.vertices.tolist()]
    index = {vertex: i for i, vertex in enumerate(vertices)}
    assert len(index) == missing == lattice.num_vertices
    for direction, neighbours in zip(directions(side - 1), lattice.neighbours, strict=True):
        expected = [
            [index.get(tuple(np.subtract(v, direction)), missing), i,
             index.get(tuple(np.add(v, direction)), missing)]
            for i, v in enumerate(vertices)
        ]  # fmt: skip
        assert neighbours.tolist() == [*expected, [missing] * 3]


@settings(max_examples=200)
@given(
    count=st.integers(1, 5),
    dimensions=st.sampled_from([1, 2, 3, 5]),
    scale=st.floats(0.05, 20),
    away=st.sampled_from([0, -1e3, 1e7]),
    seed=st.integers(0, 2**31),
)
def test_no_key_is_taken_for_another(count, dimensions, scale, away, seed):
    """Few points fill the range of their keys: what steps over its border would be met there."""
    lattice = PermutohedralLattice(random_points(count, dimensions, scale, seed) + away)
    assert_neighbours(lattice)


@pytest.mark.parametrize(("cells", "keys"), [(2e9, torch.int32), (2.3e9, torch.int64)])
def test_keys_are_as_wide_as_they_need_to_be(cells, keys):
    """A number for each cell between two points on a line, of which 2 ** 31 fit 32 bits."""
    cell = math.sqrt(3) / 2
    lattice = PermutohedralLattice(torch.tensor([[0.3], [cells * cell]], dtype=torch.float64))
    assert lattice._keys.dtype == keys
    assert_neighbours(lattice)


@pytest.mark.parametrize(("cells", "fits"), [(9e18, True), (1e19, False)])
def test_more_cells_than_keys_are_refused(cells, fits):
    features = torch.tensor([[0.3], [cells * math.sqrt(3) / 2]], dtype=torch.float64)
    if fits:
        assert PermutohedralLattice(features)._keys.dtype == torch.int64
    else:
        with pytest.raises(ValueError, match="64-bit keys"):
            PermutohedralLattice(features)


def test_vertices_map_back_among_the_features():
    features = random_points(50, 3, 1.0)
    lattice = PermutohedralLattice(features)
    positions = lattice.vertices.double() @ torch.linalg.pinv(embedding(3)).T
    *_, barycentric = enclosing_simplex(features @ embedding(3).T)
    recovered = (positions[lattice.corners.long()] * barycentric[..., None]).sum(dim=1)
    torch.testing.assert_close(recovered, features)


@pytest.mark.parametrize(("dimensions", "tolerance"), [(1, 0.04), (2, 0.1), (3, 0.16)])
def test_close_to_exact_sums_where_points_are_dense(dimensions, tolerance):
    axis = torch.linspace(0, 3, {1: 400, 2: 40, 3: 12}[dimensions], dtype=torch.float64)
    features = torch.cartesian_prod(*[axis] * dimensions).view(-1, dimensions)
    values = random_points(len(features), 4, 1.0).abs()
    exact = exact_kernel(features) @ values
    approximate = PermutohedralLattice(features)(values)
    assert (approximate - exact).norm() / exact.norm() < tolerance


def test_five_dimensional_sums_are_unbiased():
    # A smooth picture: what a bilateral kernel meets.
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    waves = [20 * torch.sin(x / 7 + k) + 15 * torch.cos(y / 9 - k) for k in range(3)]
    noise = random_points(1600, 3, 2.0)
    colours = torch.stack(waves, dim=-1).view(-1, 3).double() + noise
    features = torch.cat([torch.stack([x, y], -1).view(-1, 2) / 20, colours / 6], dim=1)
    values = random_points(1600, 3, 1.0).abs()
    exact = exact_kernel(features) @ values
    approximate = PermutohedralLattice(features)(values)
    slope = (approximate * exact).sum() / exact.square().sum()
    assert 0.85 < slope < 1.15
    assert (approximate - slope * exact).norm() / exact.norm() < 0.15


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_points_weigh_one_in_their_own_sum(dimensions):
    axis = torch.arange(-4, 4.01, 0.4, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * dimensions).view(-1, dimensions)
    inside = grid.abs().amax(dim=1) < 0.9  # far from where vertices are missing
    lattice = PermutohedralLattice(grid)
    for point in inside.nonzero().flatten()[:20].tolist():
        alone = torch.zeros(len(grid), 1, dtype=torch.float64)
        alone[point] = 1
        assert lattice(alone)[point].item() == pytest.approx(1)


@settings(max_examples=20)
@given(count=st.integers(1, 40), dimensions=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_linear_and_blind_to_the_order_of_points(count, dimensions, seed):
    features = random_points(count, dimensions, 1.0, seed)
    lattice = PermutohedralLattice(features)
    a, b = random_points(count, 2, 1.0, seed + 1), random_points(count, 2, 1.0, seed + 2)
    torch.testing.assert_close(lattice(2 * a - b), 2 * lattice(a) - lattice(b))
    torch.testing.assert_close(lattice(a)[:, :1], lattice(a[:, :1]))
    shuffle = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        PermutohedralLattice(features[shuffle])(a[shuffle]), lattice(a)[shuffle]
    )


def test_splat_keeps_the_mass_up_to_each_points_scale():
    lattice = PermutohedralLattice(random_points(100, 5, 1.0))
    values = random_points(100, 3, 1.0)
    splat = lattice.splat(values)
    torch.testing.assert_close(splat.sum(dim=0), (lattice.weights.sum(1, True) * values).sum(dim=0))
    assert (splat[-1] == 0).all()
    assert (lattice.blur(splat)[-1] == 0).all()


def test_two_builds_agree_bit_for_bit():
    features = random_points(2000, 5, 1.0).float()
    values = random_points(2000, 21, 1.0).float()
    assert torch.equal(
        PermutohedralLattice(features)(values), PermutohedralLattice(features)(values)
    )


def test_one_point_and_coinciding_points():
    value = torch.tensor([[2.0, -3.0]])
    one = torch.tensor([[0.3, 17.0, -4.0, 2.0, 1.5]])
    # Alone, a point lacks some of the vertices that its own blur would pass.
    alone = PermutohedralLattice(one)(value)
    assert (alone / value > 0.7).all()
    assert (alone / value <= 1 + 1e-6).all()
    many = PermutohedralLattice(one.repeat(7, 1))(value.repeat(7, 1))
    torch.testing.assert_close(many, 7 * alone.repeat(7, 1))


def test_far_points_do_not_hear_each_other():
    lattice = PermutohedralLattice(torch.tensor([[0.0, 0.0], [50.0, 50.0]]))
    heard = lattice(torch.tensor([[1.0], [0.0]]))
    assert heard[0] > 0.8
    assert heard[1] == 0


# --- points that are alone ---------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [0.5, 3.0, 6.0])
def test_points_are_alone_if_nobody_is_at_or_next_to_their_corners(dimensions, scale):
    lattice = PermutohedralLattice(random_points(50, dimensions, scale))
    corners = [
        {tuple(vertex) for vertex in simplex}
        for simplex in lattice.vertices[lattice.corners.long()].tolist()
    ]
    around = [
        simplex
        | {
            tuple(np.add(vertex, sign * direction))
            for vertex in simplex
            for direction in directions(dimensions)
            for sign in (-1, 1)
        }
        for simplex in corners
    ]
    expected = [
        all(around[i].isdisjoint(corners[j]) for j in range(50) if j != i) for i in range(50)
    ]
    assert lattice.alone().tolist() == expected


@pytest.mark.parametrize("scale", [0.5, 6.0, 9.0, 60.0])  # nobody, some, most, all are alone
def test_thinned_lattice_is_the_same_filter(scale):
    features = random_points(200, 3, scale)
    lattice = PermutohedralLattice(features)
    thinned = ThinnedLattice(lattice, features)
    alone = int(lattice.alone().sum())
    assert thinned.num_vertices == lattice.num_vertices - 4 * alone
    matrix = as_matrix(lattice, 200).numpy()
    np.testing.assert_allclose(as_matrix(thinned, 200), matrix, atol=1e-12)
    scales = torch.rand(2, 200, 1, dtype=torch.float64)
    scaled = scales[1].numpy() * matrix * scales[0, :, 0].numpy()
    np.testing.assert_allclose(as_matrix(thinned.scaled(*scales), 200), scaled, atol=1e-12)
    values = random_points(200, 2, 1.0).requires_grad_()
    (gradient,) = torch.autograd.grad(thinned(values)[:, 0].square().sum(), values)
    expected = 2 * matrix.T @ (matrix @ values.detach().numpy())[:, 0]
    np.testing.assert_allclose(gradient[:, 0], expected, atol=1e-12)


def test_the_lattice_is_thinned_where_many_are_alone():
    crowd, scattered = random_points(100, 5, 0.5), random_points(100, 5, 20.0)
    assert isinstance(lattice_filter(crowd), PermutohedralLattice)
    assert isinstance(lattice_filter(scattered), ThinnedLattice)


def test_gradient_flows_to_values():
    lattice = PermutohedralLattice(random_points(12, 3, 1.0))
    values = random_points(12, 2, 1.0, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lattice, (values,))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(5), r"\[N, d\], got torch.float32 \(5,\)"),
        (torch.zeros(0, 5), "non-empty"),
        (torch.zeros(5, 0), "non-empty"),
        (torch.zeros(5, 2, dtype=torch.long), "float tensor .* got torch.int64"),
        (torch.tensor([[0.0, float("nan")]]), "finite"),
        (torch.tensor([[0.0, float("inf")]]), "finite"),
        (1e5 * torch.eye(5), "larger standard deviations"),
    ],
)
def test_bad_features_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        PermutohedralLattice(features)


# --- the original's rounding -------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
def test_the_originals_simplex_is_the_same_one(dimensions):
    """Where no coordinates are equal; in single precision."""
    features = random_points(200, dimensions, scale=5.0)
    points = features @ embedding(dimensions).T
    multiples, order, weights = _round_as_the_original(features)
    side = dimensions + 1
    corners = (multiples * side - multiples.sum(dim=0)).T.numpy()
    for point, corner, pays, shares in zip(points.numpy(), corners, order.T, weights.T):
        found = {}
        for step, share in zip(pays.tolist(), shares.tolist()):
            found[tuple(corner)] = share
            corner = corner + 1
            corner[step] -= side
        expected = reference_corners(point)
        assert found.keys() == expected.keys()
        for key, share in found.items():
            assert share == pytest.approx(expected[key], abs=1e-4)


@pytest.mark.parametrize("sigma", [1.0, 3.0, 80.0])
def test_a_grids_points_lie_in_the_originals_simplices(sigma):
    """Many lie on borders, where several simplices would do."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
    features = torch.stack([x.flatten(), y.flatten()], dim=1) / sigma
    multiples, order, weights = _round_as_the_original(features)
    assert weights.min() > -1e-5
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(2000), atol=1e-5, rtol=0)
    assert (order.sort(dim=0).values == torch.arange(3)[:, None]).all()  # each pays once
    corner = (multiples * 3 - multiples.sum(dim=0)).long()
    point = torch.zeros_like(weights)
    for pays, share in zip(order, weights):
        point += share * corner
        corner = corner + 1
        corner.scatter_add_(0, pays[None], torch.full_like(pays[None], -3))
    expected = embedding(2) @ features.T.double()
    torch.testing.assert_close(point.double(), expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(("at_once", "sizes"), [(1, [3, 3, 1]), (2, [4, 3]), (8, [7])])
def test_labels_that_are_filtered_in_parts_are_filtered_alike(
    at_once: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a lattice of many vertices has many labels."""
    lattice = PermutohedralLattice(random_points(50, 3, 1.0))
    values = torch.rand(50, 7, dtype=torch.float64)
    expected = lattice(values)
    seen = []
    splat = lattice.splat
    monkeypatch.setattr(lattice, "splat", lambda part: seen.append(part.shape[1]) or splat(part))
    monkeypatch.setattr(permutohedral, "LABELS_AT_ONCE", at_once)
    monkeypatch.setattr(permutohedral, "MAX_BUFFER_BYTES", 3 * 8 * (lattice.num_vertices + 1))
    torch.testing.assert_close(lattice(values), expected)
    assert seen == sizes
