"""How good is a segmentation? Mean intersection over union, and accuracy near boundaries.

VOC counts pixels over the whole data set before it divides: one confusion matrix, to which
every image adds at its original size, leaving out the pixels that the annotators left void.
Averaging the per-image values instead is a common mistake and gives another number.

Source: Everingham et al., *The PASCAL VOC Challenge*, IJCV 2010, section 4.2 (the measure);
Kohli, Ladicky, Torr, IJCV 2009, section 5 (the trimap around boundaries).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from deconvnet.voc import VOID


class ConfusionMatrix:
    """Counts, over a data set, how many pixels of each class were given each label.

    Args:
        num_classes: Number of classes, the background included.

    Attributes:
        matrix: ``int64 [C, C]``; row = class in the annotation, column = predicted class.

    Example:
        >>> confusion = ConfusionMatrix(num_classes=2)
        >>> confusion.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]]))
        >>> confusion.matrix.tolist()
        [[1, 1], [0, 0]]
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background, so at least 2; got {num_classes}")
        self.num_classes = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds the pixels of one label map, or of a batch of them.

        Args:
            prediction: Predicted labels, integer ``[H, W]`` or ``[N, H, W]``.
            target: Annotated labels of the same shape; 255 (void) is left out.

        Raises:
            TypeError: A label map is not of an integer type.
            ValueError: The shapes differ, or a label that counts is not a class.
        """
        _check_label_maps(prediction, target)
        valid = target != VOID
        target, prediction = target[valid].long(), prediction[valid].long()
        for name, labels in (("prediction", prediction), ("target", target)):
            outside = labels[(labels < 0) | (labels >= self.num_classes)]
            if len(outside):
                raise ValueError(
                    f"{name} has the label {outside[0].item()}, but the classes are 0 to "
                    f"{self.num_classes - 1}"
                )
        pairs = target * self.num_classes + prediction
        counts = torch.bincount(pairs, minlength=self.num_classes**2)
        self.matrix += counts.view(self.num_classes, self.num_classes).cpu()

    def merge(self, other: ConfusionMatrix) -> None:
        """Adds the counts of ``other``, such as another worker's share of the data set."""
        if other.num_classes != self.num_classes:
            raise ValueError(
                f"cannot merge counts of {other.num_classes} classes into {self.num_classes}"
            )
        self.matrix += other.matrix

    def iou(self) -> Tensor:
        """Intersection over union of each class.

        Returns:
            ``float64 [C]``, NaN for a class that neither annotation nor prediction has.
        """
        counts = self.matrix.double()
        intersection = counts.diag()
        return intersection / (counts.sum(0) + counts.sum(1) - intersection)

    def mean_iou(self) -> float:
        """Mean of :meth:`iou` over the classes that occur; the VOC figure of merit."""
        return self.iou().nanmean().item()

    def pixel_accuracy(self) -> float:
        """Share of the pixels that carry the right label; NaN before any pixel."""
        counts = self.matrix.double()
        return (counts.diag().sum() / counts.sum()).item()

    def mean_accuracy(self) -> float:
        """Share of the right pixels in each annotated class, averaged over the classes."""
        counts = self.matrix.double()
        return (counts.diag() / counts.sum(1)).nanmean().item()


class BoundaryConfusionMatrix(ConfusionMatrix):
    """A confusion matrix of the pixels near a boundary only.

    Pixels far from any boundary are many and easy; this band is where unpooling and the CRF
    earn their keep.

    Args:
        num_classes: Number of classes, the background included.
        width: Half width of the band in pixels; see :func:`boundary_band`.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(num_classes)
        self.width = _check_width(width)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds the pixels that lie in the band; see :meth:`ConfusionMatrix.update`."""
        _check_label_maps(prediction, target)
        super().update(prediction, target.masked_fill(~boundary_band(target, self.width), VOID))

    def merge(self, other: ConfusionMatrix) -> None:
        """Adds the counts of ``other``, from a band of the same width."""
        width = getattr(other, "width", None)
        if width != self.width:
            raise ValueError(f"cannot merge counts of width {width} into those of {self.width}")
        super().merge(other)


class BinnedShare:
    """How much is right where, by ranges of some quantity: objects by size, pixels by distance.

    Args:
        limits: Ascending upper ends of the ranges, each included; beyond the last is one more.

    Attributes:
        counts: ``float64 [len(limits) + 1]``, how many values fell into each range.
        right: ``float64 [len(limits) + 1]``, the sum of their shares.

    Example:
        >>> by_size = BinnedShare([32, 96])
        >>> by_size.update(torch.tensor([20, 40, 300]), torch.tensor([0.5, 1.0, 0.0]))
        >>> by_size.share().tolist()
        [0.5, 1.0, 0.0]
    """

    def __init__(self, limits: Sequence[float]) -> None:
        self.limits = torch.tensor(limits, dtype=torch.float64)
        if not len(self.limits) or (self.limits.diff() <= 0).any():
            raise ValueError(f"limits must be ascending, at least one; got {list(limits)}")
        self.counts = torch.zeros(len(limits) + 1, dtype=torch.float64)
        self.right = torch.zeros_like(self.counts)

    def update(self, values: Tensor, shares: Tensor) -> None:
        """Adds values and how much of each is right.

        Args:
            values: ``[N]``, such as sides of objects in pixels.
            shares: ``[N]``, numbers from 0 to 1, or booleans.

        Raises:
            ValueError: The two differ in shape.
        """
        if values.shape != shares.shape or values.ndim != 1:
            raise ValueError(
                f"values and shares must both be [N], got {list(values.shape)} and "
                f"{list(shares.shape)}"
            )
        bins = torch.bucketize(values.double(), self.limits)
        self.counts += torch.bincount(bins, minlength=len(self.counts))
        self.right += torch.bincount(bins, shares.double(), minlength=len(self.counts))

    def merge(self, other: BinnedShare) -> None:
        """Adds the counts of ``other``, of the same limits."""
        if not torch.equal(other.limits, self.limits):
            raise ValueError(
                f"cannot merge limits {other.limits.tolist()} into {self.limits.tolist()}"
            )
        self.counts += other.counts
        self.right += other.right

    def share(self) -> Tensor:
        """The mean share in each range, ``float64 [len(limits) + 1]``; NaN for an empty one."""
        return self.right / self.counts


def boundary_band(target: Tensor, width: int) -> Tensor:
    """Marks the pixels within ``width`` pixels of a pixel with another label.

    Void counts as a label of its own here, because VOC draws its boundaries as void rims.

    Args:
        target: Integer labels ``[H, W]`` or ``[N, H, W]``.
        width: Reach of the band in pixels, along rows, columns and diagonals alike.

    Returns:
        ``bool`` of the same shape.
    """
    _check_width(width)
    labels = target.float().view(-1, 1, *target.shape[-2:])
    highest, lowest = _window_maximum(labels, width), -_window_maximum(-labels, width)
    return (highest != lowest).view(target.shape)


def boundary_accuracy(prediction: Tensor, target: Tensor, width: int) -> float:
    """Share of the pixels near a boundary that carry the right label, for one label map.

    Over a data set use :class:`BoundaryConfusionMatrix`, which counts before it divides.

    Args:
        prediction: Predicted labels, integer ``[H, W]`` or ``[N, H, W]``.
        target: Annotated labels of the same shape; 255 (void) is left out.
        width: Half width of the band in pixels.

    Returns:
        A share from 0 to 1; NaN if no pixel that counts is near a boundary.
    """
    _check_label_maps(prediction, target)
    near = boundary_band(target, width) & (target != VOID)
    return (prediction == target)[near].double().mean().item()


def _window_maximum(labels: Tensor, width: int) -> Tensor:
    # A square window's maximum is the maximum along rows, then along columns.
    rows = F.max_pool2d(labels, (1, 2 * width + 1), stride=1, padding=(0, width))
    return F.max_pool2d(rows, (2 * width + 1, 1), stride=1, padding=(width, 0))


def _check_width(width: int) -> int:
    if width < 1:
        raise ValueError(f"width must be at least 1 pixel, got {width}")
    return width


def _check_label_maps(prediction: Tensor, target: Tensor) -> None:
    for name, labels in (("prediction", prediction), ("target", target)):
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"{name} must hold integer labels, got {labels.dtype}")
        if labels.ndim not in (2, 3):
            raise ValueError(f"{name} must be [H, W] or [N, H, W], got {tuple(labels.shape)}")
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have "
            "the same shape; compare at the image's original size"
        )
