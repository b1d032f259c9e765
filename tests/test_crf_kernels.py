"""The CRF's compiled loops against tensors: the same values, on any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import torch_threads
from torch import Tensor

from deconvnet import crf, permutohedral
from deconvnet.crf import CRFConfig, mean_field, pairwise_kernels, unary_from_probabilities
from deconvnet.permutohedral import PermutohedralLattice

kernels = pytest.importorskip("deconvnet.crf_kernels", reason="needs Numba")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the smallest pictures are for compiled loops."""
    monkeypatch.setattr(permutohedral, "COMPILED_FROM", 0)


def without(monkeypatch: pytest.MonkeyPatch, call: Callable) -> object:
    """What tensors give."""
    with monkeypatch.context() as patch:
        patch.setattr(permutohedral, "compiled_kernels", lambda module: None)
        return call()


# --- softmax -----------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [1, 2, 5, 8, 21, 24, 100])
@pytest.mark.parametrize("pixels", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("scale", [1, 10, 50])
def test_it_is_the_softmax_of_the_sum(labels: int, pixels: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    votes = scale * torch.rand(pixels, labels, generator=generator)
    logits = -scale * torch.rand(pixels, labels, generator=generator)
    expected = (votes.double() + logits.double()).softmax(dim=1)
    found = kernels.add_and_softmax(votes.clone(), logits)
    # as exact as float32's sums are: half a unit in the last place of the larger one
    torch.testing.assert_close(found.double(), expected, rtol=1e-6 + scale * 1e-7, atol=1e-30)


def test_the_votes_memory_is_used() -> None:
    votes = torch.zeros(3, 2)
    assert kernels.add_and_softmax(votes, torch.zeros(3, 2)) is votes
    assert (votes == 0.5).all()


@pytest.mark.parametrize(
    "row",
    [
        [200.0, 100.0, -300.0],  # powers beyond float32 on either side
        [-100.0, -200.0, -101.0],
        [88.0, 88.0, 88.0],
        [-1e30, 0.0, 1e30],
        [-torch.inf, 0.0, 1.0],  # a label that is there only to fill up a register
        [torch.nan, 0.0, 0.0],
        [torch.inf, 0.0, 0.0],
        [-torch.inf, -torch.inf, -torch.inf],
    ],
)
def test_rows_out_of_range_are_done_with_more_care(row: list[float]) -> None:
    """Among rows that are not."""
    logits = torch.zeros(130, 3)
    logits[[5, 64, 129]] = torch.tensor(row)
    found = kernels.add_and_softmax(torch.zeros(130, 3), logits)
    torch.testing.assert_close(found, logits.softmax(dim=1), rtol=1e-6, atol=1e-30, equal_nan=True)


def test_what_is_far_below_the_sum_is_nothing() -> None:
    """Not one of the numbers near the end of float32's range, which are slow to compute with."""
    logits = -torch.arange(0.0, 120.0).repeat(4, 1)
    logits[1:] += torch.tensor([[5.0], [30.0], [60.0]])  # the sum is anything up to 1e30
    found = kernels.add_and_softmax(torch.zeros_like(logits), logits)
    assert ((found == 0) | (found > torch.finfo(torch.float32).tiny)).all()
    assert (found == 0).any()


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        kernels.add_and_softmax(torch.zeros(3, 2), torch.zeros(2, 2))


def test_powers() -> None:
    x = np.linspace(-80, 80, 10001, dtype=np.float32)
    found = np.array([kernels._power(value) for value in x])
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=3e-7)


def test_beliefs_are_those_of_tensors(everywhere, monkeypatch: pytest.MonkeyPatch) -> None:
    image, unary = a_picture()
    used = []
    compiled = kernels.add_and_softmax
    monkeypatch.setattr(kernels, "add_and_softmax", lambda *a: used.append(1) or compiled(*a))
    fields = pairwise_kernels(image, CRFConfig(), "lattice")
    found = mean_field(unary, fields, 5)
    assert len(used) == 5
    expected = without(monkeypatch, lambda: mean_field(unary, fields, 5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_what_is_learned_or_of_another_type_is_for_tensors(
    everywhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, unary = a_picture()
    monkeypatch.setattr(kernels, "add_and_softmax", lambda *maps: pytest.fail("compiled"))
    fields = pairwise_kernels(image, CRFConfig(), "lattice")
    learned = unary.clone().requires_grad_()
    mean_field(learned, fields, 2).square().sum().backward()
    assert learned.grad.abs().sum() > 0
    weights = torch.ones(2, requires_grad=True)
    fields = pairwise_kernels(image, CRFConfig(), "lattice", weights=weights)
    mean_field(unary, fields, 2).square().sum().backward()
    assert weights.grad.abs().sum() > 0
    mean_field(unary.double(), pairwise_kernels(image, CRFConfig(), "lattice", torch.float64), 1)
    answers = torch.zeros(unary[0].numel(), unary.shape[0] + -unary.shape[0] % crf.LABELS_AT_ONCE)

    class OfAnotherType:
        def message(self, beliefs: Tensor) -> Tensor:
            return answers.clone()

    mean_field(unary.double(), [OfAnotherType()], 1)


# --- the lattice -------------------------------------------------------------------------------


def a_picture(height: int = 19, width: int = 23) -> tuple[Tensor, Tensor]:
    """uint8 ``[3, H, W]``, smooth with some noise, and unaries for five labels."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    smooth = torch.stack([x * 9.0, y * 11.0, (x + y) * 5.0])
    noise = torch.randint(0, 20, smooth.shape, generator=generator)
    probabilities = torch.randn(5, height, width, generator=generator).mul(2).softmax(dim=0)
    return (smooth + noise).clamp(0, 255).byte(), unary_from_probabilities(probabilities)


def facts(lattice: PermutohedralLattice) -> dict[str, Tensor]:
    matrix = lattice._to_vertices
    return {
        "keys": lattice._keys,
        "vertices": lattice.vertices,
        "corners": lattice.corners,
        "weights": lattice.weights,
        "neighbours": torch.stack(lattice.neighbours),
        "points": matrix.columns,
        "touching": matrix.weights,
        "starts": matrix.starts,
    }


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("points", [1, 2, 64, 301])
def test_the_lattice_is_the_one_that_tensors_build(
    points: int,
    dimensions: int,
    original: bool,
    everywhere,
    three_threads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "threads_for", lambda values: 3)
    generator = torch.Generator().manual_seed(0)
    features = 2 * torch.randn(points, dimensions, generator=generator)
    found = facts(PermutohedralLattice(features, original))
    expected = without(monkeypatch, lambda: facts(PermutohedralLattice(features, original)))
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6, msg=name)


def test_colours_of_an_image_too(everywhere, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers: many points on the border of two simplices, many with the same features."""
    image, _ = a_picture(40, 50)
    features = crf.bilateral_features(image // 8 * 8, 4.0, 8.0)
    found = facts(PermutohedralLattice(features))
    expected = without(monkeypatch, lambda: facts(PermutohedralLattice(features)))
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6, msg=name)


def test_the_number_of_threads_changes_nothing(everywhere, monkeypatch) -> None:
    image, unary = a_picture(60, 70)

    def refine() -> list[Tensor]:
        fields = pairwise_kernels(image, CRFConfig(), "lattice")
        return [mean_field(unary, fields, 3), *facts(fields[1].filter).values()]

    monkeypatch.setattr(kernels, "threads_for", lambda values: torch.get_num_threads())
    answers = []
    for threads in (1, 3):
        with torch_threads(threads):
            answers.append(refine())
    for one, three in zip(*answers, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("keys", [torch.int32, torch.int64])
def test_one_walk_finds_all_vertices_one_step_away(keys: torch.dtype) -> None:
    """Against a look-up of every key."""
    values, steps = [0, 1, 2, 5, 7, 8, 11, 47, 51], [1, 2, 3, 40, -3]
    place = {value: i for i, value in enumerate(values)}
    none = len(values)
    expected = [
        [[place.get(v - step, none), i, place.get(v + step, none)] for v, i in place.items()]
        + [[none, none, none]]
        for step in steps
    ]
    found = kernels.one_step_away(torch.tensor(values, dtype=keys), torch.tensor(steps, dtype=keys))
    assert found.tolist() == expected


def test_features_that_are_learned_are_for_tensors(everywhere) -> None:
    """Which cannot be asked for their memory; the lattice itself passes no gradient on to them."""
    features = torch.randn(200, 3)
    for original in (False, True):
        found = facts(PermutohedralLattice(features.clone().requires_grad_(), original))
        expected = facts(PermutohedralLattice(features, original))
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-6, msg=name)


def test_the_default_type_changes_nothing(everywhere) -> None:
    features = torch.randn(200, 3)
    torch.set_default_dtype(torch.float64)
    try:
        sums = PermutohedralLattice(features)(torch.ones(200, 1, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, PermutohedralLattice(features)(torch.ones(200, 1)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(value: float, everywhere) -> None:
    features = torch.zeros(200, 3)
    features[77, 1] = value
    with pytest.raises(ValueError, match="finite"):
        PermutohedralLattice(features)


def test_few_points_are_left_to_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So are those where loops would run on a single thread."""
    asked = []
    monkeypatch.setattr(
        permutohedral, "compiled_kernels", lambda name: asked.append(name) or kernels
    )
    monkeypatch.setattr(kernels, "SHARES_WORK", False)
    monkeypatch.setattr(kernels, "place_points", lambda *features: pytest.fail("compiled"))
    for points, dtype in ((2**13 - 1, torch.float32), (2**13, torch.float64)):
        PermutohedralLattice(torch.zeros(points, 2, dtype=dtype))
    assert not asked
    PermutohedralLattice(torch.zeros(2**13, 2))
    assert asked == ["deconvnet.crf_kernels"]


# --- what a reader, and the coverage, sees of them ---------------------------------------------


def test_the_loops_as_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the rows, as threads get them."""
    generator = torch.Generator().manual_seed(0)
    features = 2 * torch.randn(70, 2, generator=generator)
    matrix, paths = permutohedral.embedding(2), permutohedral._paths(3).float()
    multiples, order, weights = kernels.place_points(features, matrix, paths)
    arrays = [np.zeros_like(x.numpy()) for x in (multiples, order, weights)]
    inputs = [features.T.contiguous().numpy(), matrix.numpy(), paths.numpy()]
    for start, stop in ((0, 30), (30, 70)):
        kernels._place_some.py_func(start, stop, *inputs, *arrays)
    for found, expected in zip(arrays, (multiples, order, weights)):
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)

    least, places, steps = (
        torch.tensor([-9.0, -9.0]),
        torch.tensor([1, 20]),
        torch.tensor([1, 5, 7]),
    )
    keys = kernels.corner_keys(multiples, order, least, places, steps, 3)
    found = np.zeros_like(keys.numpy())
    inputs = [x.numpy() for x in (multiples, order, least, places, steps)]
    kernels._key_some.py_func(0, 70, *inputs, 3, found)
    np.testing.assert_array_equal(found, keys.numpy())

    keys, origin = keys.flatten().sort(stable=True)
    lists = kernels.vertices_of_runs(keys, origin, weights)
    counts = np.zeros(2, int)
    kernels._count_some.py_func(0, 2, keys.numpy(), counts)
    assert counts.sum() == len(lists[0])
    vertices = np.concatenate([[0], counts.cumsum()])
    arrays = [np.zeros_like(x.numpy()) for x in lists]
    inputs = [x.numpy() for x in (keys, origin, weights)]
    kernels._list_some.py_func(0, 2, vertices, *inputs, *arrays)
    for found, expected in zip(arrays, lists):
        np.testing.assert_array_equal(found, expected.numpy())

    keys = keys.unique()
    neighbours = kernels.one_step_away(keys, steps)
    found = np.zeros_like(neighbours.numpy())
    kernels._walk_some.py_func(0, 3, keys.numpy(), steps.numpy(), found)
    np.testing.assert_array_equal(found, neighbours.numpy())

    votes = torch.randn(70, 3, generator=generator)
    logits = torch.randn(70, 3, generator=generator)
    logits[50] = 100
    expected = kernels.add_and_softmax(votes.clone(), logits)
    for name in ("_power", "_softmax_block", "_softmax_row"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name).py_func)
    kernels._softmax_rows.py_func(0, 70, votes.numpy(), logits.numpy())
    torch.testing.assert_close(votes, expected)
