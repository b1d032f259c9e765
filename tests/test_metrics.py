"""The VOC measure against independent libraries, and the boundary band against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_jaccard_index,
)

from deconvnet.metrics import (
    BinnedShare,
    BoundaryConfusionMatrix,
    ConfusionMatrix,
    boundary_accuracy,
    boundary_band,
)

CLASSES = 5


def label_maps(seed: int, shape: tuple[int, ...], void_share: float = 0.1):
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(CLASSES, shape, generator=generator, dtype=torch.uint8)
    target = torch.randint(CLASSES, shape, generator=generator, dtype=torch.uint8)
    target[torch.rand(shape, generator=generator) < void_share] = 255
    return prediction, target


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), images=st.integers(1, 4), void=st.floats(0, 0.8))
def test_matches_torchmetrics_over_a_data_set(seed, images, void):
    confusion = ConfusionMatrix(CLASSES)
    pairs = [label_maps(seed + i, (7 + i, 9), void) for i in range(images)]
    for prediction, target in pairs:
        confusion.update(prediction, target)
    predictions = torch.cat([p.flatten() for p, _ in pairs]).long()
    targets = torch.cat([t.flatten() for _, t in pairs]).long()

    options = {"num_classes": CLASSES, "ignore_index": 255}
    reference = multiclass_confusion_matrix(predictions, targets, **options)
    assert torch.equal(confusion.matrix, reference)

    occurs = (reference.sum(0) + reference.sum(1)) > 0
    assert torch.equal(confusion.iou().isnan(), ~occurs)
    per_class = multiclass_jaccard_index(predictions, targets, average="none", **options)
    torch.testing.assert_close(confusion.iou()[occurs].float(), per_class[occurs])
    mean = multiclass_jaccard_index(predictions, targets, average="macro", **options)
    assert confusion.mean_iou() == pytest.approx(mean.item(), abs=1e-6)
    accuracy = multiclass_accuracy(predictions, targets, average="micro", **options)
    assert confusion.pixel_accuracy() == pytest.approx(accuracy.item(), abs=1e-6)


def test_hand_counted_case():
    confusion = ConfusionMatrix(3)
    target = torch.tensor([[0, 0, 1, 255], [0, 1, 1, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1, 2], [0, 1, 0, 0]], dtype=torch.uint8)
    confusion.update(prediction, target)
    assert confusion.matrix.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert confusion.iou()[:2].tolist() == [0.5, 0.5]
    assert confusion.iou()[2].isnan()
    assert confusion.mean_iou() == 0.5
    assert confusion.pixel_accuracy() == pytest.approx(4 / 6)
    assert confusion.mean_accuracy() == pytest.approx(2 / 3)


def test_counts_before_dividing_instead_of_averaging_images():
    confusion = ConfusionMatrix(2)
    confusion.update(torch.zeros(1, 9).byte(), torch.tensor([[0] * 8 + [1]]).byte())
    confusion.update(torch.ones(1, 9).byte(), torch.ones(1, 9).byte())
    assert confusion.iou().tolist() == pytest.approx([8 / 9, 9 / 10])


def test_batched_update_and_merge_agree():
    prediction, target = label_maps(0, (4, 6, 5))
    batched = ConfusionMatrix(CLASSES)
    batched.update(prediction, target)
    workers = [ConfusionMatrix(CLASSES), ConfusionMatrix(CLASSES)]
    for i in range(4):
        workers[i % 2].update(prediction[i], target[i])
    assert not torch.equal(workers[0].matrix, batched.matrix)
    workers[0].merge(workers[1])
    assert torch.equal(workers[0].matrix, batched.matrix)


def test_void_in_the_annotation_forgives_any_prediction():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.full((2, 2), 255).byte(), torch.full((2, 2), 255).byte())
    assert confusion.matrix.sum() == 0
    assert math.isnan(confusion.mean_iou())
    assert math.isnan(confusion.pixel_accuracy())


@pytest.mark.parametrize(
    ("prediction", "target", "error", "message"),
    [
        (torch.zeros(2, 2), torch.zeros(2, 2).byte(), TypeError, "prediction must hold integer"),
        (torch.zeros(2, 2).byte(), torch.zeros(2, 2).bool(), TypeError, "target must hold integer"),
        (torch.zeros(2, 3).byte(), torch.zeros(2, 2).byte(), ValueError, "same shape"),
        (torch.zeros(4).byte(), torch.zeros(4).byte(), ValueError, r"\[H, W\]"),
        (torch.full((2, 2), 3).byte(), torch.zeros(2, 2).byte(), ValueError, "prediction.* 3"),
        (torch.full((2, 2), 255).byte(), torch.zeros(2, 2).byte(), ValueError, "label 255"),
        (torch.zeros(2, 2).byte(), torch.full((2, 2), 7).byte(), ValueError, "target.* 7"),
        (torch.zeros(2, 2).long(), torch.full((2, 2), -1), ValueError, "target.* -1"),
    ],
)
def test_bad_label_maps_are_named(prediction, target, error, message):
    confusion = ConfusionMatrix(3)
    with pytest.raises(error, match=message):
        confusion.update(prediction, target)
    assert confusion.matrix.sum() == 0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_classes"):
        ConfusionMatrix(1)
    with pytest.raises(ValueError, match="merge"):
        ConfusionMatrix(2).merge(ConfusionMatrix(3))
    with pytest.raises(ValueError, match="width"):
        BoundaryConfusionMatrix(2, 0)
    for other in (BoundaryConfusionMatrix(2, 3), ConfusionMatrix(2)):
        with pytest.raises(ValueError, match="cannot merge counts of width"):
            BoundaryConfusionMatrix(2, 1).merge(other)
    with pytest.raises(ValueError, match="same shape"):
        boundary_accuracy(torch.zeros(2, 3).byte(), torch.zeros(2, 2).byte(), 1)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 4))
def test_band_equals_a_plain_loop(seed, width):
    generator = np.random.default_rng(seed)
    target = np.kron(generator.integers(0, 3, (3, 4)), np.ones((4, 5))).astype(np.uint8)
    target[target == 2] = 255
    band = boundary_band(torch.from_numpy(target), width)
    height, breadth = target.shape
    for y in range(height):
        for x in range(breadth):
            window = target[max(y - width, 0) : y + width + 1, max(x - width, 0) : x + width + 1]
            assert band[y, x].item() == bool((window != target[y, x]).any())


def test_boundary_matrix_counts_the_band_only():
    target = torch.zeros(9, 9, dtype=torch.uint8)
    target[:, 4:] = 1
    wrong_far = target.clone()
    wrong_far[:, 0] = 1
    wrong_near = target.clone()
    wrong_near[:, 3] = 1
    assert boundary_accuracy(wrong_far, target, 1) == 1.0
    assert boundary_accuracy(wrong_near, target, 1) == 0.5
    confusion = BoundaryConfusionMatrix(2, 1)
    confusion.update(wrong_near, target)
    assert confusion.matrix.tolist() == [[0, 9], [0, 9]]
    assert confusion.pixel_accuracy() == 0.5
    assert math.isnan(boundary_accuracy(target, torch.zeros_like(target), 2))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 3))
def test_single_map_accuracy_equals_the_matrix(seed, width):
    prediction, target = label_maps(seed, (12, 10), 0.3)
    target = target.repeat_interleave(4, 0).repeat_interleave(4, 1)
    prediction = prediction.repeat_interleave(4, 0).repeat_interleave(4, 1)
    confusion = BoundaryConfusionMatrix(CLASSES, width)
    confusion.update(prediction, target)
    expected = confusion.pixel_accuracy()
    assert boundary_accuracy(prediction, target, width) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), n=st.integers(0, 40))
def test_shares_by_range_match_a_loop(seed, n):
    random = np.random.default_rng(seed)
    values, shares = random.integers(0, 12, n), random.random(n)
    binned, other = BinnedShare([2, 5, 9]), BinnedShare([2, 5, 9])
    binned.update(torch.from_numpy(values[: n // 2]), torch.from_numpy(shares[: n // 2]))
    other.update(torch.from_numpy(values[n // 2 :]), torch.from_numpy(shares[n // 2 :]))
    binned.merge(other)
    ranges = [(-1, 2), (2, 5), (5, 9), (9, math.inf)]
    for i, (low, high) in enumerate(ranges):
        inside = [s for v, s in zip(values, shares) if low < v <= high]
        assert binned.counts[i] == len(inside)
        share = binned.share()[i].item()
        assert math.isnan(share) if not inside else share == pytest.approx(np.mean(inside))


def test_shares_take_booleans_and_infinite_values():
    binned = BinnedShare([1.0])
    binned.update(torch.tensor([1.0, math.inf, 2.0]), torch.tensor([True, False, True]))
    assert binned.share().tolist() == [1.0, 0.5]


def test_bad_shares():
    with pytest.raises(ValueError, match="limits must be ascending"):
        BinnedShare([3, 3])
    with pytest.raises(ValueError, match="at least one"):
        BinnedShare([])
    with pytest.raises(ValueError, match=r"must both be \[N\], got \[2\] and \[3\]"):
        BinnedShare([1]).update(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="cannot merge"):
        BinnedShare([1]).merge(BinnedShare([2]))
