from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deconvnet.crf import (
    NORMALIZATIONS,
    CRFConfig,
    PairwiseKernel,
    bilateral_features,
    dense_crf,
    gibbs_energy,
    mean_field,
    negligible_labels,
    pairwise_kernels,
    position_features,
    unary_from_probabilities,
)
from deconvnet.gaussian import ExactFilter, ExactGrid, GridGaussian, SparseMatrix

# Wide enough for the pixels of a random image to hear each other.
WIDE = CRFConfig(bilateral_sigma=3.0, bilateral_sigma_rgb=60.0, gaussian_sigma=1.0, iterations=4)


def configured(**changes) -> CRFConfig:
    return CRFConfig(**(vars(WIDE) | changes))


def random_case(labels: int, height: int, width: int, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    scores = torch.randn(labels, height, width, generator=generator, dtype=dtype)
    return image, scores.softmax(dim=0)


def picture(height: int, width: int, seed: int = 0):
    """A dark disc on a bright, shaded, noisy ground, and a network's blurred, noisy answer."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 3) ** 2
    grey = np.where(disc, 60, 180) + 20 * np.sin(x / 15) + rng.normal(0, 2, disc.shape)
    image = np.stack([grey, 0.8 * grey, 0.5 * grey + 40]).round().astype(np.uint8)
    score = np.where(disc, 1.0, -1.0)
    for shift in range(1, 5):
        score = (score + np.roll(score, shift, 0) + np.roll(score, -shift, 1)) / 3
    score = score + rng.normal(0, 0.5, disc.shape)
    probabilities = torch.tensor(np.stack([-score, score])).float().softmax(dim=0)
    return torch.tensor(image), probabilities, torch.tensor(disc)


def kernel_matrices(image: np.ndarray, config: CRFConfig) -> list[np.ndarray]:
    """Both normalised, weighted kernels, entry by entry."""
    _, height, width = image.shape
    pixels = [(y, x) for y in range(height) for x in range(width)]
    matrices = []
    for weight, bilateral in ((config.gaussian_weight, False), (config.bilateral_weight, True)):
        k = np.zeros((len(pixels), len(pixels)))
        for i, (yi, xi) in enumerate(pixels):
            for j, (yj, xj) in enumerate(pixels):
                sigma = config.bilateral_sigma if bilateral else config.gaussian_sigma
                distance = ((yi - yj) ** 2 + (xi - xj) ** 2) / sigma**2
                if bilateral:
                    for c in range(3):
                        difference = float(image[c, yi, xi]) - float(image[c, yj, xj])
                        distance += difference**2 / config.bilateral_sigma_rgb**2
                k[i, j] = math.exp(-distance / 2)
        n = 1 / k.sum(axis=1)
        k = {
            "none": k,
            "before": k * n[None, :],
            "after": n[:, None] * k,
            "symmetric": np.sqrt(n)[:, None] * k * np.sqrt(n)[None, :],
        }[config.normalization]
        if not config.self_message:
            np.fill_diagonal(k, 0)
        matrices.append(weight * k)
    return matrices


def brute_force(image: torch.Tensor, probabilities: torch.Tensor, config: CRFConfig) -> np.ndarray:
    """Mean field in loops, with the Potts penalty as the paper writes it."""
    matrices = kernel_matrices(image.numpy(), config)
    p = np.maximum(probabilities.numpy(), config.min_probability).reshape(len(probabilities), -1)
    labels, count = p.shape
    q = p / p.sum(axis=0)
    for _ in range(config.iterations):
        updated = np.zeros_like(q)
        for i in range(count):
            for label in range(labels):
                penalty = 0.0
                for k in matrices:
                    for j in range(count):
                        for other in range(labels):
                            if other != label:
                                penalty += k[i, j] * q[other, j]
                updated[label, i] = p[label, i] * math.exp(-penalty)
        q = updated / updated.sum(axis=0)
    return q.reshape(probabilities.shape)


# --- against brute force and by hand ---------------------------------------------------------


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("self_message", [True, False])
def test_exact_equals_brute_force(normalization, self_message):
    image, probabilities = random_case(3, 3, 4)
    config = configured(normalization=normalization, self_message=self_message)
    expected = brute_force(image, probabilities, config)
    refined = dense_crf(image, probabilities, config, method="exact")
    np.testing.assert_allclose(refined.numpy(), expected, rtol=1e-5, atol=1e-7)
    single = dense_crf(image, probabilities.float(), config, method="exact")
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-3, atol=1e-5)
    assert np.abs(expected - probabilities.numpy()).max() > 0.05  # the CRF did something


def test_two_pixels_by_hand():
    # Same colour, side by side: both kernels are exp(-1/2 / sigma^2).
    image = torch.full((3, 1, 2), 100, dtype=torch.uint8)
    probabilities = torch.tensor([[[0.9, 0.4]], [[0.1, 0.6]]], dtype=torch.float64)
    config = CRFConfig(
        gaussian_sigma=1, gaussian_weight=0.7, bilateral_sigma=2, bilateral_weight=0.3,
        iterations=1, normalization="none",
    )  # fmt: skip
    here = 0.7 + 0.3
    there = 0.7 * math.exp(-1 / 2) + 0.3 * math.exp(-1 / 8)
    left = [0.9 * math.exp(here * 0.9 + there * 0.4), 0.1 * math.exp(here * 0.1 + there * 0.6)]
    right = [0.4 * math.exp(here * 0.4 + there * 0.9), 0.6 * math.exp(here * 0.6 + there * 0.1)]
    expected = [left[0] / sum(left), right[0] / sum(right)]
    refined = dense_crf(image, probabilities, config)
    assert refined[0, 0].tolist() == pytest.approx(expected, abs=1e-12)


def labellings(labels: int, pixels: int):
    return itertools.product(range(labels), repeat=pixels)


def enumerated_energy(labelling, unary: np.ndarray, matrices: list[np.ndarray]) -> float:
    energy = sum(unary[label, i] for i, label in enumerate(labelling))
    for k in matrices:
        for i, j in itertools.combinations(range(len(labelling)), 2):
            energy += (labelling[i] != labelling[j]) * (k[i, j] + k[j, i]) / 2
    return energy


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_energy_of_every_labelling(normalization):
    image, probabilities = random_case(3, 1, 3)
    unary = unary_from_probabilities(probabilities)
    config = configured(normalization=normalization)
    matrices = kernel_matrices(image.numpy(), config)
    for self_message in (True, False):
        kernels = pairwise_kernels(
            image, configured(normalization=normalization, self_message=self_message),
            dtype=torch.float64,
        )  # fmt: skip
        for labelling in labellings(3, 3):
            energy = gibbs_energy(torch.tensor([labelling]), unary, kernels)
            expected = enumerated_energy(labelling, unary.flatten(1).numpy(), matrices)
            assert energy.item() == pytest.approx(expected)


def test_an_update_is_the_expected_energy_of_each_label():
    # log Q_i(l) = -E[energy | x_i = l] + const, over all labellings drawn from the old Q.
    image, q = random_case(3, 1, 3, seed=4)
    config = configured(iterations=1, self_message=False)
    matrices = kernel_matrices(image.numpy(), config)
    unary = unary_from_probabilities(q).flatten(1).numpy()
    old = q.flatten(1).numpy()
    expected = np.zeros((3, 3))
    for labelling in labellings(3, 3):
        energy = enumerated_energy(labelling, unary, matrices)
        for i, label in enumerate(labelling):
            others = math.prod(old[other, j] for j, other in enumerate(labelling) if j != i)
            expected[label, i] -= others * energy
    expected = np.exp(expected) / np.exp(expected).sum(axis=0)
    refined = dense_crf(image, q, config).flatten(1).numpy()
    np.testing.assert_allclose(refined, expected, atol=1e-12)


def test_weakly_coupled_marginals_are_those_of_the_gibbs_distribution():
    image, probabilities = random_case(2, 1, 3, seed=1)
    unary = unary_from_probabilities(probabilities).flatten(1).numpy()
    errors = []
    for weight in (0.1, 0.05):
        config = configured(
            gaussian_weight=weight, bilateral_weight=weight, normalization="none",
            self_message=False, iterations=30,
        )  # fmt: skip
        matrices = kernel_matrices(image.numpy(), config)
        marginals = np.zeros((2, 3))
        for labelling in labellings(2, 3):
            chance = math.exp(-enumerated_energy(labelling, unary, matrices))
            for i, label in enumerate(labelling):
                marginals[label, i] += chance
        marginals /= marginals.sum(axis=0)
        refined = dense_crf(image, probabilities, config).flatten(1).numpy()
        errors.append(np.abs(refined - marginals).max())
        assert np.abs(probabilities.flatten(1).numpy() - marginals).max() > 10 * errors[-1]
    assert errors[1] < errors[0] / 3  # second order in the weight


def test_the_most_probable_labelling_of_three_pixels():
    image = torch.full((3, 1, 3), 50, dtype=torch.uint8)
    probabilities = torch.tensor([[[0.9, 0.45, 0.9]], [[0.1, 0.55, 0.1]]], dtype=torch.float64)
    unary = unary_from_probabilities(probabilities)
    kernels = pairwise_kernels(image, dtype=torch.float64)
    best = min(
        labellings(2, 3), key=lambda x: gibbs_energy(torch.tensor([x]), unary, kernels).item()
    )
    assert best == (0, 0, 0)
    assert dense_crf(image, probabilities).argmax(dim=0).tolist() == [list(best)]


def test_a_colour_edge_stops_the_bilateral_kernel():
    image = torch.full((3, 1, 3), 50, dtype=torch.uint8)
    image[:, 0, 1] = 200
    probabilities = torch.tensor([[[0.9, 0.45, 0.9]], [[0.1, 0.55, 0.1]]], dtype=torch.float64)
    config = CRFConfig(gaussian_weight=0)
    assert dense_crf(image, probabilities, config).argmax(dim=0).tolist() == [[0, 1, 0]]


# --- filters -----------------------------------------------------------------------------------


def test_sparse_matrix_equals_a_dense_one():
    generator = torch.Generator().manual_seed(0)
    columns = torch.randint(0, 7, (5, 3), generator=generator, dtype=torch.int32)
    weights = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    matrix = SparseMatrix.from_rows(columns, weights)
    assert matrix.rows == 5
    dense = torch.zeros(5, 7, dtype=torch.float64).scatter_add_(1, columns.long(), weights)
    assert not torch.equal(dense.count_nonzero(dim=1), torch.full((5,), 3))  # an entry met twice
    values = torch.rand(7, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(matrix(values), dense @ values)
    by_row, by_column = values[:5, 0], values[:, 1]
    torch.testing.assert_close(matrix.times_rows(by_row)(values), by_row.diag() @ dense @ values)
    scaled = matrix.times_columns(by_column)(values)
    torch.testing.assert_close(scaled, dense @ by_column.diag() @ values)
    torch.testing.assert_close(matrix(values), dense @ values)  # itself unchanged
    rows = torch.rand(2, 7, 4, generator=generator, dtype=torch.float64)
    repeated = matrix.for_every_row(2, length=7)(rows.view(14, 4))
    torch.testing.assert_close(repeated.view(2, 5, 4), dense @ rows)
    narrow = matrix.to(torch.device("cpu"), torch.float32)(values.float())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), dense @ values, rtol=1e-5, atol=1e-5)


def test_sparse_matrix_with_rows_of_any_length():
    columns, starts = torch.tensor([2, 0, 1], dtype=torch.int32), [0, 2, 2, 3]
    starts = torch.tensor(starts, dtype=torch.int32)
    matrix = SparseMatrix(columns, torch.tensor([1.0, 2.0, 3.0]), starts)
    dense = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    assert torch.equal(matrix(torch.eye(3)), dense)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    longest=st.integers(1, 12),
)
def test_sparse_matrix_in_pieces_is_the_same_matrix(lengths, longest):
    """Rows without entries, as long as a piece, and of many pieces."""
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    columns = torch.randint(5, (sum(lengths),), dtype=torch.int32)
    matrix = SparseMatrix(columns, torch.rand(len(columns), dtype=torch.float64), starts)
    values, factors = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    pieces = matrix.in_pieces(longest)
    assert pieces.pieces.starts.diff().max() <= longest
    torch.testing.assert_close(pieces(values), matrix(values))
    scaled = matrix.times_columns(factors)
    torch.testing.assert_close(pieces.times_columns(factors)(values), scaled(values))


@pytest.mark.parametrize("kept", [True, False])
def test_exact_filter_sums_in_blocks(monkeypatch, kept):
    monkeypatch.setattr("deconvnet.gaussian.MAX_EXACT_PIXELS", 10_000 if kept else 0)
    features = position_features(40, 30, 5.0).double()
    assert len(features) ** 2 > 2**20  # so that there is more than one block
    values = torch.rand(1200, 2, dtype=torch.float64)
    expected = (-0.5 * (features[:, None] - features).square().sum(-1)).exp() @ values
    filter = ExactFilter(features)
    for _ in range(2):
        torch.testing.assert_close(filter(values), expected)


any_grid = given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    channels=st.integers(1, 5),
    sigma=st.floats(0.05, 30.0),
)


@settings(max_examples=25)
@any_grid
def test_sums_along_columns_and_rows_are_those_over_all_pairs(height, width, channels, sigma):
    values = torch.rand(height * width, channels, dtype=torch.float64)
    expected = ExactFilter(position_features(height, width, sigma).double())(values)
    grid = ExactGrid(height, width, sigma, values.dtype, values.device)
    torch.testing.assert_close(grid(values), expected, rtol=1e-5, atol=1e-9)
    apart = values.T.contiguous().T  # another order in memory
    torch.testing.assert_close(grid(apart), grid(values))


@settings(max_examples=25)
@any_grid
def test_grid_gaussian_equals_exact(height, width, channels, sigma):
    values = torch.rand(height * width, channels, dtype=torch.float64)
    expected = ExactFilter(position_features(height, width, sigma).double())(values)
    # The coarse grid's nodes are a standard deviation apart: a lone pixel on one weighs 1.03.
    tolerance = {"rtol": 0.03, "atol": 0} if sigma >= 2 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(GridGaussian(height, width, sigma)(values), expected, **tolerance)


@pytest.mark.parametrize("sigma", [2.0, 3.0, 4.5])
def test_grid_gaussian_of_a_surface_is_right_to_a_few_thousandths(sigma):
    values = torch.rand(60 * 70, 2, dtype=torch.float64)
    expected = ExactFilter(position_features(60, 70, sigma).double())(values)
    error = (GridGaussian(60, 70, sigma)(values) - expected).norm() / expected.norm()
    assert error < 2e-3


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_grid_gaussian_is_its_own_transpose_and_differentiable(sigma):
    grid = GridGaussian(4, 3, sigma)
    matrix = grid(torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.T)
    values = torch.rand(12, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(grid, (values,))
    assert torch.autograd.gradgradcheck(grid, (values,))


def test_features_are_positions_and_colours_in_standard_deviations():
    image = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    features = bilateral_features(image, 2.0, 4.0)
    assert features.dtype == torch.float32
    assert features.tolist() == [
        [0.0, 0.0, 0.0, 1.0, 2.0],
        [0.5, 0.0, 0.25, 1.25, 2.25],
        [0.0, 0.5, 0.5, 1.5, 2.5],
        [0.5, 0.5, 0.75, 1.75, 2.75],
    ]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_lattice_agrees_with_exact_on_labels(normalization):
    image, probabilities, _ = picture(30, 36)
    weights = {"gaussian_weight": 0.3, "bilateral_weight": 0.5} if normalization == "none" else {}
    config = CRFConfig(
        normalization=normalization, bilateral_sigma_rgb=8.0, iterations=5, **weights
    )
    exact = dense_crf(image, probabilities, config, method="exact")
    lattice = dense_crf(image, probabilities, config, method="lattice")
    assert (exact.argmax(0) == lattice.argmax(0)).float().mean() > 0.99
    assert (exact.argmax(0) != probabilities.argmax(0)).float().mean() > 0.03


def test_it_repairs_a_noisy_answer():
    image, probabilities, disc = picture(80, 100)  # more than MAX_EXACT_PIXELS: the lattice
    refined = dense_crf(image, probabilities, CRFConfig(bilateral_sigma_rgb=8.0))
    before = ((probabilities[1] > 0.5) == disc).float().mean()
    after = ((refined[1] > 0.5) == disc).float().mean()
    assert after > 0.98
    assert 1 - after < (1 - before) / 3


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_agrees_with_pydensecrf(normalization):
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf is not installed")
    image, probabilities, _ = picture(80, 100)
    codes = {
        "none": densecrf.NO_NORMALIZATION,
        "before": densecrf.NORMALIZE_BEFORE,
        "after": densecrf.NORMALIZE_AFTER,
        "symmetric": densecrf.NORMALIZE_SYMMETRIC,
    }
    kind = {"kernel": densecrf.DIAG_KERNEL, "normalization": codes[normalization]}
    theirs = densecrf.DenseCRF2D(100, 80, 2)
    theirs.setUnaryEnergy(unary_from_probabilities(probabilities).flatten(1).contiguous().numpy())
    theirs.addPairwiseGaussian(sxy=3, compat=0.3, **kind)
    rgb = image.permute(1, 2, 0).contiguous().numpy()
    theirs.addPairwiseBilateral(sxy=20, srgb=8, rgbim=rgb, compat=0.5, **kind)
    expected = torch.tensor(np.array(theirs.inference(10))).view(2, 80, 100)
    config = CRFConfig(
        gaussian_weight=0.3, bilateral_weight=0.5, bilateral_sigma_rgb=8.0,
        normalization=normalization,
    )  # fmt: skip
    torch.testing.assert_close(
        dense_crf(image, probabilities, config, "original"), expected, rtol=0, atol=1e-4
    )
    if normalization != "none":  # there their sums are smaller than exact ones
        ours = dense_crf(image, probabilities, config)
        assert (ours.argmax(0) == expected.argmax(0)).float().mean() > 0.995
        assert (ours - expected).abs().mean() < 0.02


def test_the_original_scale_gives_smaller_sums():
    """By how much is told in the docstring of `pairwise_kernels`, and `release()` relies on it."""
    reduced = CRFConfig.release().gaussian_weight / 3.0, CRFConfig.release().bilateral_weight / 5.0
    image, _, _ = picture(80, 100)
    config = CRFConfig(normalization="none", gaussian_weight=1.0, bilateral_weight=1.0)
    ones = torch.ones(80 * 100, 1)
    for exact, original, share, factor, close in zip(
        pairwise_kernels(image, config, "exact"),
        pairwise_kernels(image, config, "original"),
        (0.88, 0.5),
        reduced,
        (0.01, 0.06),  # the bilateral share depends on the picture
    ):
        found = (original.message(ones) / exact.message(ones)).mean().item()
        assert found == pytest.approx(share, abs=0.04)
        assert found == pytest.approx(factor, abs=close)


# --- invariances -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "lattice"])
@settings(max_examples=15)
@given(
    labels=st.integers(1, 6),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    normalization=st.sampled_from(NORMALIZATIONS),
    self_message=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_invariances(method, labels, height, width, normalization, self_message, seed):
    image, probabilities = random_case(labels, height, width, seed)
    config = configured(normalization=normalization, self_message=self_message)
    refined = dense_crf(image, probabilities, config, method)
    assert refined.shape == probabilities.shape
    torch.testing.assert_close(refined.sum(0), torch.ones(height, width, dtype=torch.float64))
    assert refined.min() >= 0

    order = torch.randperm(labels, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        dense_crf(image, probabilities[order], config, method), refined[order]
    )

    uniform = torch.full_like(probabilities, 1 / labels)
    torch.testing.assert_close(dense_crf(image, uniform, config, method), uniform)

    silent = configured(gaussian_weight=0, bilateral_weight=0, min_probability=1e-30)
    torch.testing.assert_close(dense_crf(image, probabilities, silent, method), probabilities)
    idle = configured(iterations=0, min_probability=1e-30)
    torch.testing.assert_close(dense_crf(image, probabilities, idle, method), probabilities)


def test_exact_crf_is_blind_to_mirroring_and_brightness():
    image, probabilities = random_case(3, 5, 6)
    image = image // 2
    refined = dense_crf(image, probabilities, WIDE, "exact")
    mirrored = dense_crf(image.flip(2), probabilities.flip(2), WIDE, "exact")
    torch.testing.assert_close(mirrored.flip(2), refined, rtol=1e-5, atol=1e-6)
    brighter = dense_crf(image + 100, probabilities, WIDE, "exact")
    torch.testing.assert_close(brighter, refined, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_one_pixel_and_one_label(method):
    image, probabilities = random_case(4, 1, 1)
    alone = configured(self_message=False)
    torch.testing.assert_close(dense_crf(image, probabilities, alone, "exact"), probabilities)
    refined = dense_crf(image, probabilities, WIDE, method)
    assert refined.argmax() == probabilities.argmax()
    image, certain = random_case(1, 6, 5)
    assert torch.equal(dense_crf(image, certain, WIDE, method), torch.ones_like(certain))


@pytest.mark.parametrize("config", [CRFConfig(), CRFConfig.release()])
@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_certain_probabilities_stay_finite(config, method):
    image, probabilities, _ = picture(24, 24)
    certain = torch.stack([probabilities[0] > 0.5, probabilities[0] <= 0.5]).float()
    refined = dense_crf(image, certain, config, method)
    assert refined.isfinite().all()
    torch.testing.assert_close(refined.sum(dim=0), torch.ones(24, 24))


def test_deterministic_and_leaves_its_input_alone():
    image, probabilities, _ = picture(70, 70)
    kept = image.clone(), probabilities.clone()
    first = dense_crf(image, probabilities)
    assert torch.equal(first, dense_crf(image, probabilities))
    assert torch.equal(image, kept[0])
    assert torch.equal(probabilities, kept[1])


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_autocast_does_not_touch_it(method):
    image, probabilities = random_case(3, 6, 5, dtype=torch.float32)
    refined = dense_crf(image, probabilities, WIDE, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dense_crf(image, probabilities, WIDE, method), refined)


def test_memory_layout_does_not_matter():
    image, probabilities = random_case(3, 6, 5)
    refined = dense_crf(image, probabilities, WIDE, "lattice")
    image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    strided = probabilities.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(dense_crf(image, strided, WIDE, "lattice"), refined)


# --- pieces ------------------------------------------------------------------------------------


def test_every_iteration_can_be_watched():
    image, probabilities = random_case(3, 4, 5)
    seen = []
    refined = dense_crf(image, probabilities, WIDE, on_iteration=lambda i, q: seen.append((i, q)))
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    torch.testing.assert_close(seen[0][1], probabilities)
    for i, beliefs in seen:
        expected = dense_crf(image, probabilities, configured(iterations=i))
        torch.testing.assert_close(beliefs, expected)
    assert torch.equal(seen[-1][1], refined)


def test_auto_is_exact_on_small_images_and_the_lattice_on_large_ones(monkeypatch):
    image, probabilities = random_case(2, 5, 5)
    exact = dense_crf(image, probabilities, WIDE, "exact")
    lattice = dense_crf(image, probabilities, WIDE, "lattice")
    assert not torch.allclose(exact, lattice)
    assert torch.equal(dense_crf(image, probabilities, WIDE), exact)
    monkeypatch.setattr("deconvnet.crf.MAX_EXACT_PIXELS", 24)
    assert torch.equal(dense_crf(image, probabilities, WIDE), lattice)


def test_kernels_without_weight_are_left_out():
    image, _ = random_case(2, 4, 4)
    assert len(pairwise_kernels(image)) == 2
    assert len(pairwise_kernels(image, CRFConfig(gaussian_weight=0))) == 1
    assert pairwise_kernels(image, CRFConfig(gaussian_weight=0, bilateral_weight=0)) == []


@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_gradient_flows_to_the_unary(method):
    image, probabilities = random_case(2, 2, 3)
    kernels = pairwise_kernels(image, WIDE, method, torch.float64)
    unary = unary_from_probabilities(probabilities).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: mean_field(u, kernels, 2), (unary,))


def test_unary_is_the_floored_negative_logarithm():
    unary = unary_from_probabilities(torch.tensor([[[1.0, 0.5]], [[0.0, 0.5]]]), 1e-3)
    expected = [[[0.0, math.log(2)]], [[3 * math.log(10), math.log(2)]]]
    torch.testing.assert_close(unary, torch.tensor(expected))


def test_release_settings():
    release = CRFConfig.release()
    assert release.normalization == "none"
    assert release.gaussian_weight < CRFConfig().gaussian_weight
    assert (
        unary_from_probabilities(torch.tensor([[[1.0]], [[0.0]]]), release.min_probability).max()
        > 87
    )


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gaussian_sigma": 0.0}, "gaussian_sigma must be positive"),
        ({"bilateral_sigma": -1.0}, "bilateral_sigma must be positive"),
        ({"bilateral_sigma_rgb": math.inf}, "bilateral_sigma_rgb must be positive and finite"),
        ({"gaussian_weight": math.nan}, "gaussian_weight must be finite"),
        ({"bilateral_weight": math.inf}, "bilateral_weight must be finite"),
        ({"iterations": -1}, "iterations must be 0 or more, got -1"),
        ({"min_probability": 0.0}, "min_probability must be in"),
        ({"prune_below": 1.0}, "prune_below must be in"),
        ({"normalization": "both"}, "one of none, before, after, symmetric, got 'both'"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CRFConfig(**changes)


HALF = torch.full((2, 4, 5), 0.5)
GREY = torch.full((3, 4, 5), 128, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("image", "probabilities", "error", "message"),
    [
        (GREY.float() / 255, HALF, TypeError, "image must be uint8 .* got torch.float32"),
        (GREY[:1], HALF, ValueError, r"image must be RGB \[3, H, W\], got shape \(1, 4, 5\)"),
        (GREY.permute(1, 2, 0), HALF, ValueError, r"got shape \(4, 5, 3\)"),
        (GREY[None], HALF, ValueError, "image must be RGB"),
        (GREY[:, :0], HALF[:, :0], ValueError, r"probabilities must be \[C, H, W\]"),
        (GREY[:, :, :4], HALF, ValueError, r"same height and width, got \(4, 4\) and \(4, 5\)"),
        (GREY, HALF.half(), TypeError, "float32 or float64, got torch.float16"),
        (GREY, HALF.round().long(), TypeError, "float32 or float64, got torch.int64"),
        (GREY, HALF[0], ValueError, r"\[C, H, W\], got shape \(4, 5\)"),
        (GREY, HALF * math.nan, ValueError, "finite"),
        (GREY, HALF * math.inf, ValueError, "finite"),
        (GREY, HALF * 1.01, ValueError, "sum to 1 .* off by 0.01; apply softmax"),
        (GREY, HALF + torch.tensor([1.0, -1.0])[:, None, None], ValueError, r"in \[0, 1\]"),
    ],
)
def test_bad_input_is_refused(image, probabilities, error, message):
    with pytest.raises(error, match=message):
        dense_crf(image, probabilities)


def test_bad_pieces_are_refused():
    with pytest.raises(
        ValueError, match="method must be one of auto, exact, lattice, original, got 'fast'"
    ):
        dense_crf(GREY, HALF, method="fast")
    with pytest.raises(ValueError, match="normalization must be one of"):
        PairwiseKernel(GridGaussian(1, 1, 1.0), 1.0, torch.ones(1, 1), "both")
    with pytest.raises(ValueError, match="unary must be finite"):
        mean_field(HALF * math.inf, [])
    with pytest.raises(TypeError, match="unary must be float32"):
        mean_field(HALF.bfloat16(), [])
    with pytest.raises(ValueError, match=r"labels \(4, 4\) and unary \(2, 4, 5\) differ"):
        gibbs_energy(torch.zeros(4, 4, dtype=torch.uint8), HALF, [])
    with pytest.raises(ValueError, match="labels must be below 2, got 255"):
        gibbs_energy(torch.full((4, 5), 255, dtype=torch.uint8), HALF, [])
    with pytest.raises(ValueError, match="larger standard deviations"):
        dense_crf(GREY * torch.arange(5, dtype=torch.uint8), HALF,
                  CRFConfig(bilateral_sigma=1e-4, bilateral_sigma_rgb=1e-4), "lattice")  # fmt: skip


# --- labels left out ---------------------------------------------------------------------------


def with_unlikely_labels(probabilities: torch.Tensor, peak: float) -> torch.Tensor:
    """Three more labels, none of which any pixel gives more than ``peak``."""
    generator = torch.Generator().manual_seed(3)
    more = peak * torch.rand(3, *probabilities.shape[1:], generator=generator)
    return torch.cat([probabilities * (1 - more.sum(dim=0)), more])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("method", ["exact", "lattice"])
def test_labels_that_nobody_believes_in_can_be_left_out(normalization, method):
    image, probabilities, _ = picture(30, 40)
    quiet = 0.1 if normalization == "none" else 1.0
    config = CRFConfig(
        gaussian_weight=3 * quiet, bilateral_weight=5 * quiet,
        bilateral_sigma_rgb=8.0, normalization=normalization,
    )  # fmt: skip
    probabilities = with_unlikely_labels(probabilities, 1e-3)
    kernels = pairwise_kernels(image, config, method)
    pruned = negligible_labels(probabilities, kernels, 1e-3)
    assert pruned.tolist() == [False, False, True, True, True]
    complete = dense_crf(image, probabilities, config, method)
    shorter = dense_crf(image, probabilities, replace(config, prune_below=1e-3), method)
    assert complete[2:].max() < math.e * 1e-3  # the bound
    assert (complete - shorter).abs().max() < 0.02
    assert torch.equal(shorter[2:], probabilities[2:])
    torch.testing.assert_close(shorter.sum(dim=0), torch.ones(30, 40))
    assert (complete.argmax(0) == shorter.argmax(0)).float().mean() > 0.999


def test_probabilities_with_pruned_labels_sum_to_one_where_the_given_ones_hardly_do():
    image, probabilities, _ = picture(12, 12)
    probabilities = with_unlikely_labels(probabilities, 1e-3) * (1 + 8e-4)
    refined = dense_crf(image, probabilities, CRFConfig(prune_below=0.01))
    assert torch.equal(refined[2:], probabilities[2:])
    torch.testing.assert_close(refined.sum(dim=0), torch.ones(12, 12), rtol=0, atol=1e-6)


def test_loud_kernels_and_negative_weights_keep_their_labels():
    image, probabilities, _ = picture(20, 20)
    probabilities = with_unlikely_labels(probabilities, 0.02)
    symmetric = pairwise_kernels(image, CRFConfig(bilateral_sigma_rgb=8.0))
    assert negligible_labels(probabilities, symmetric, 0.5).sum() == 3
    loud = pairwise_kernels(image, CRFConfig(bilateral_sigma_rgb=8.0, normalization="none"))
    assert not negligible_labels(probabilities, loud, 0.5).any()
    negative = pairwise_kernels(image, CRFConfig(gaussian_weight=-1.0))
    assert not negligible_labels(probabilities, negative, 0.5).any()


def test_pruned_iterations_can_be_watched():
    image, probabilities, _ = picture(12, 12)
    probabilities = with_unlikely_labels(probabilities, 1e-3)
    seen = []
    config = CRFConfig(iterations=2, prune_below=0.01)
    refined = dense_crf(image, probabilities, config, on_iteration=lambda i, q: seen.append(q))
    assert [len(q) for q in seen] == [5, 5, 5]
    assert torch.equal(seen[-1], refined)


# --- short rows, scales in the filter's weights ------------------------------------------------


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(
    "only",
    [
        {"gaussian_weight": 0, "bilateral_sigma_rgb": 8.0},
        {"gaussian_weight": 0, "bilateral_sigma": 2.0, "bilateral_sigma_rgb": 1.0},  # thinned
        {"bilateral_weight": 0},
        {"bilateral_weight": 0, "gaussian_sigma": 1.0},
    ],
)
def test_scales_in_the_filters_weights_change_nothing(normalization, only):
    image, probabilities, _ = picture(20, 24)
    config = CRFConfig(**{"normalization": normalization} | only)
    (kernel,) = pairwise_kernels(image, config, "lattice", torch.float64)
    values = probabilities.flatten(1).T.double()
    folded = kernel.message(values)
    torch.testing.assert_close(kernel.message(values.clone().requires_grad_()), folded)


def test_beliefs_near_the_end_of_float32s_range_are_not_sent():
    """A message that adds up such numbers takes many processors a hundred times as long."""
    unary = torch.linspace(0, 102, 21)[:, None, None].expand(-1, 9, 9)
    smallest = torch.finfo(torch.float32).tiny
    assert 0 < (-unary).softmax(dim=0).amin() < smallest
    sent = []

    class Listener:
        def message(self, beliefs):
            sent.append(beliefs[:, :21].clone())  # behind them, none or more that nobody asked for
            return torch.zeros_like(beliefs)

    for dtype in (torch.float32, torch.float64):
        answer = mean_field(unary.to(dtype), [Listener()], 1)
        assert (answer > 0).all()  # what is returned is the softmax
        torch.testing.assert_close(answer, (-unary.to(dtype)).softmax(dim=0))
    assert ((sent[0] == 0) | (sent[0] > smallest)).all()
    assert (sent[0] == 0).any()
    assert (sent[1] > 0).all()  # of float64's range they are in the middle


def test_short_rows_make_no_numbers_near_the_end_of_float32s_range(monkeypatch):
    monkeypatch.setattr("deconvnet.crf.LABELS_AT_ONCE", 1)  # or there are no short rows
    unary = torch.tensor([0.0, 40.0, 95.0])[:, None, None].expand(-1, 9, 9)
    beliefs = mean_field(unary, [], 0)
    assert beliefs.amin() > torch.finfo(torch.float32).tiny
    torch.testing.assert_close(beliefs, (-unary).softmax(dim=0))


def test_autocast_changes_nothing():
    image, probabilities, _ = picture(12, 12)
    unary, kernels = unary_from_probabilities(probabilities), pairwise_kernels(image, WIDE)
    expected = mean_field(unary, kernels, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mean_field(unary, kernels, 3), expected)


def test_exact_sums_leave_out_what_is_near_the_end_of_float32s_range():
    features = torch.tensor([[0.0], [1.0], [11.7], [13.3], [20.0]])  # exp(-88.4) is 13.3's weight
    (rows,) = ExactFilter(features)._kept_rows
    smallest = torch.finfo(torch.float32).tiny
    assert ((rows == 0) | (rows > smallest)).all()
    exact = (-0.5 * (features.double() - features.double().T).square()).exp()
    torch.testing.assert_close(rows.double(), exact, rtol=1e-4, atol=1e-29)


@pytest.mark.parametrize("at_once", [1, 8])
@pytest.mark.parametrize("labels", [2, 15, 16, 21])
def test_beliefs_of_any_number_of_labels_are_the_softmax(labels, at_once, monkeypatch):
    monkeypatch.setattr("deconvnet.crf.LABELS_AT_ONCE", at_once)
    unary = 30 * torch.rand(labels, 6, 7, generator=torch.Generator().manual_seed(0))
    for scale in (1, -1, 100, -100):  # exponentials of the last two leave float32
        expected = (-scale * unary).softmax(dim=0)
        torch.testing.assert_close(mean_field(scale * unary, [], 1), expected)
        torch.testing.assert_close(
            mean_field(scale * unary + 88, [], 1), expected, rtol=1e-4, atol=1e-5
        )
        learnt = (scale * unary).requires_grad_()
        torch.testing.assert_close(mean_field(learnt, [], 1), expected)


@pytest.mark.parametrize("labels", [1, 2, 8, 11])
def test_labels_beside_those_asked_for_change_nothing(labels, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 7, 9), dtype=torch.uint8, generator=generator)
    probabilities = torch.rand(labels, 7, 9, generator=generator).softmax(dim=0)
    answers = []
    for at_once in (1, 8):
        monkeypatch.setattr("deconvnet.crf.LABELS_AT_ONCE", at_once)
        unary = unary_from_probabilities(probabilities).requires_grad_()
        weights = torch.tensor([3.0, 5.0], requires_grad=True)
        seen = {}
        learnt = mean_field(unary, pairwise_kernels(image, WIDE, "lattice", weights=weights), 2)
        learnt.square().sum().backward()
        refined = dense_crf(image, probabilities, WIDE, "lattice", seen.__setitem__)
        answers.append(
            [refined, learnt.detach(), unary.grad, weights.grad, torch.stack([*seen.values()])]
        )
    for one, other in zip(*answers):
        torch.testing.assert_close(one, other)
