"""The drop-in for pydensecrf: the same lines, run with either import."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import deconvnet.densecrf as ours
from deconvnet.crf import NORMALIZATIONS, CRFConfig, dense_crf
from deconvnet.shapes import ShapesConfig, make_scene

CONSTANTS = {
    "none": "NO_NORMALIZATION",
    "before": "NORMALIZE_BEFORE",
    "after": "NORMALIZE_AFTER",
    "symmetric": "NORMALIZE_SYMMETRIC",
}


def case(side: int):
    """A scene as a pydensecrf user holds it, and probabilities of four labels."""
    image = make_scene(ShapesConfig(min_side=side, max_side=side), seed=(4, 0)).image
    scores = torch.randn(4, *image.shape[1:], generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        scores = torch.nn.functional.avg_pool2d(scores, 9, 1, 4)
    return image.permute(1, 2, 0).contiguous().numpy(), (60 * scores).softmax(0).numpy()


def five_lines(dcrf, unary_from_softmax, image, probabilities, **options):
    labels, height, width = probabilities.shape
    field = dcrf.DenseCRF2D(width, height, labels)
    field.setUnaryEnergy(unary_from_softmax(probabilities))
    field.addPairwiseGaussian(sxy=3, compat=2, **options)
    field.addPairwiseBilateral(sxy=40, srgb=13, rgbim=image, compat=6, **options)
    return np.array(field.inference(5)).reshape(probabilities.shape)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("side", [40, 80])  # exact sums, the lattice
def test_it_is_dense_crf(normalization, side):
    image, probabilities = case(side)
    kind = getattr(ours, CONSTANTS[normalization])
    found = five_lines(
        ours, ours.unary_from_softmax, image, probabilities, normalization=kind,
        kernel=ours.FULL_KERNEL,
    )  # fmt: skip
    config = CRFConfig(
        gaussian_weight=2, bilateral_sigma=40, bilateral_sigma_rgb=13, bilateral_weight=6,
        iterations=5, normalization=normalization,
    )  # fmt: skip
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    method = "original" if normalization == "none" else "auto"
    expected = dense_crf(pixels, torch.from_numpy(probabilities), config, method)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-3)


def test_widths_may_be_pairs_of_equals():
    image, probabilities = case(40)
    fields = []
    for sxy, srgb in ((8, 13), ((8, 8), (13, 13, 13))):
        field = ours.DenseCRF2D(40, 40, len(probabilities))
        field.setUnaryEnergy(ours.unary_from_softmax(probabilities))
        field.addPairwiseGaussian(sxy, compat=3)
        field.addPairwiseBilateral(sxy, srgb, image, compat=5)
        fields.append(field.inference(2))
    np.testing.assert_array_equal(*fields)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("side", [40, 80])
def test_the_same_lines_give_pydensecrfs_labels(side, normalization):
    theirs = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf is not installed")
    from pydensecrf.utils import unary_from_softmax

    image, probabilities = case(side)
    kinds = [getattr(module, CONSTANTS[normalization]) for module in (theirs, ours)]
    expected = five_lines(theirs, unary_from_softmax, image, probabilities, normalization=kinds[0])
    found = five_lines(ours, ours.unary_from_softmax, image, probabilities, normalization=kinds[1])
    assert (found.argmax(0) == expected.argmax(0)).mean() > 0.99
    assert (found.argmax(0) != probabilities.argmax(0)).mean() > 0.03


def test_unaries_are_those_of_pydensecrfs_helpers():
    utils = pytest.importorskip("pydensecrf.utils", reason="pydensecrf is not installed")
    _, probabilities = case(40)
    labels = probabilities.argmax(0)
    for options in ({}, {"scale": 0.7}, {"clip": 0.1}, {"clip": None}):
        expected = utils.unary_from_softmax(probabilities, **options)
        np.testing.assert_allclose(
            ours.unary_from_softmax(probabilities, **options), expected, rtol=1e-6
        )
    for zero_unsure, shift in ((False, 0), (True, 0), (True, 1)):
        arguments = labels + shift, 4, 0.8, zero_unsure
        expected = utils.unary_from_labels(*arguments)
        np.testing.assert_allclose(ours.unary_from_labels(*arguments), expected, rtol=1e-6)


def test_unaries_by_hand():
    energy = ours.unary_from_labels(np.array([[0, 1], [2, 3]]), 3, 0.5)
    assert np.exp(-energy).T.tolist() == [
        pytest.approx(row)
        for row in ([1 / 3] * 3, [0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5])
    ]
    energy = ours.unary_from_softmax(np.array([[1.0, 0.5], [0.0, 0.5]]), scale=0.5)
    assert np.exp(-energy).tolist() == [pytest.approx([0.75, 0.5]), pytest.approx([0.25, 0.5])]


def test_without_kernels_it_is_the_softmax():
    field = ours.DenseCRF2D(2, 1, 2)
    probabilities = np.array([[0.25, 0.5], [0.75, 0.5]])
    field.setUnaryEnergy(-np.log(probabilities))
    field.addPairwiseGaussian(sxy=3, compat=0)
    np.testing.assert_allclose(field.inference(3), probabilities, rtol=1e-6)


@pytest.mark.parametrize("compat", [(3, 3), [3.0], np.full(2, 3), np.eye(2)])
def test_compatibilities_other_than_potts_are_refused(compat):
    """Also equal ones: pydensecrf takes (3, 3) for a diagonal, the Potts model's other sign."""
    field = ours.DenseCRF2D(5, 4, 2)
    with pytest.raises(TypeError, match="compat must be one number here, the weight of a Potts"):
        field.addPairwiseGaussian(3, compat)
    with pytest.raises(TypeError, match="compat must be one number here, the weight of a Potts"):
        field.addPairwiseBilateral(20, 3, np.zeros((4, 5, 3), np.uint8), compat)
    field.addPairwiseGaussian(3, np.float32(3))


def test_wrong_use_is_refused():
    field = ours.DenseCRF2D(5, 4, 2)
    with pytest.raises(RuntimeError, match="setUnaryEnergy before inference"):
        field.inference(1)
    with pytest.raises(ValueError, match=r"unary must be \[2, 20\], got \[2, 4, 5\]"):
        field.setUnaryEnergy(np.zeros((2, 4, 5)))
    with pytest.raises(ValueError, match=r"rgbim must be \[4, 5, 3\], got \[5, 4, 3\]"):
        field.addPairwiseBilateral(20, 3, np.zeros((5, 4, 3), np.uint8), 5)
    with pytest.raises(TypeError, match="image must be uint8"):
        field.addPairwiseBilateral(20, 3, np.zeros((4, 5, 3)), 5)
    with pytest.raises(TypeError, match=r"sxy must be one number here, or equal ones, got"):
        field.addPairwiseGaussian((3, 4), 3)
    with pytest.raises(ValueError, match="normalization must be one of"):
        field.addPairwiseGaussian(3, 3, normalization="both")
    with pytest.raises(ValueError, match="scale must be"):
        ours.unary_from_softmax(np.ones((1, 2)), scale=0)
    with pytest.raises(ValueError, match="gt_prob must be"):
        ours.unary_from_labels(np.zeros((1, 2), int), 2, 1.0)
