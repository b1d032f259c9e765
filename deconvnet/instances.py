"""Instance-wise training examples: crops around objects and proposals instead of whole images.

A network with a fixed field of view mislabels what is much larger or smaller than that field.
DeconvNet therefore looks at one object at a time: a box, enlarged to
let in some context, is warped to a fixed square. Stage 1 teaches it single, centred objects
(:class:`Stage1Dataset`); stage 2 the boxes that it will meet at inference
(:class:`Stage2Dataset`). :class:`WholeImageDataset` and :class:`WindowDataset` cut the same
images without that idea, for the comparisons.

All of them are map-style datasets whose augmentation depends on nothing but the seed, the
example and the *draw*, the position in the stream that :class:`StreamSampler` deals out. The
examples a run sees are hence the same for any number of workers, and after a restart.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from deconvnet.proposals import Proposals, box_iou, check_image
from deconvnet.voc import VOID, Sample, VOCDataset


@dataclass(frozen=True)
class InstanceConfig:
    """How a box becomes a training crop. The defaults are the paper's settings.

    Raises:
        ValueError: If a field is out of range.
    """

    context: float = 1.2  # box side after / before enlarging (paper, two-stage training)
    resize: int = 250  # px, side that an enlarged box is warped to (paper, implementation details)
    crop: int = 224  # px, side of the random crop of it, the network's input (same place)
    square: bool = False  # box to square before warping: True in the release's stage-2 lists
    flip: bool = True  # mirror every second training crop (same place)
    min_overlap: float = 0.5  # IoU with an object that makes a proposal a stage-2 example (paper)
    seed: int = 0  # of all augmentation

    def __post_init__(self) -> None:
        if not (math.isfinite(self.context) and self.context > 0):
            raise ValueError(f"context must be a positive factor, got {self.context}")
        if not 1 <= self.crop <= self.resize:
            raise ValueError(
                f"crop and resize must satisfy 1 <= crop <= resize, got {self.crop}, {self.resize}"
            )
        if not 0 < self.min_overlap <= 1:
            raise ValueError(f"min_overlap must be in (0, 1], got {self.min_overlap}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @classmethod
    def paper(cls) -> InstanceConfig:
        """The paper's convention: boxes keep their aspect and are warped to the input."""
        return cls()

    @classmethod
    def release(cls) -> InstanceConfig:
        """The authors' release: boxes become squares first, so that nothing is distorted."""
        return cls(square=True)

    @classmethod
    def tiny(cls) -> InstanceConfig:
        """64 px crops for the CPU model, with the paper's proportion of crop to resize."""
        return cls(resize=72, crop=64)


def expand_box(boxes: Tensor | Sequence[float], factor: float) -> Tensor:
    """Enlarges boxes about their centres.

    Args:
        boxes: ``[..., 4]``, xyxy pixels, half open.
        factor: New side over old side.

    Returns:
        ``float32 [..., 4]``; boxes may run outside the image.
    """
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    low, high = boxes[..., :2], boxes[..., 2:]
    centre, half = (low + high) / 2, (high - low) * (factor / 2)
    return torch.cat([centre - half, centre + half], dim=-1)


def square_box(boxes: Tensor | Sequence[float]) -> Tensor:
    """Grows the shorter side of boxes to the longer, about their centres.

    Args:
        boxes: ``[..., 4]``, xyxy pixels, half open.

    Returns:
        ``float32 [..., 4]``; boxes may run outside the image.
    """
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    low, high = boxes[..., :2], boxes[..., 2:]
    centre, half = (low + high) / 2, (high - low).amax(dim=-1, keepdim=True) / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def pixel_box(box: Tensor | Sequence[float]) -> tuple[int, int, int, int]:
    """Rounds a box to whole pixels, at least one on each side.

    Args:
        box: Four numbers, xyxy pixels, half open.

    Returns:
        ``(x0, y0, x1, y1)``, the pixels that :func:`crop_and_resize` reads, and the place where
        a score map computed from its crop belongs.

    Raises:
        ValueError: If the box is not four finite numbers with ``x0 < x1`` and ``y0 < y1``.
    """
    corners = [float(v) for v in box]
    if len(corners) != 4 or not all(map(math.isfinite, corners)):
        raise ValueError(f"box must be four finite numbers (x0, y0, x1, y1), got {corners}")
    if corners[0] >= corners[2] or corners[1] >= corners[3]:
        raise ValueError(f"box must have x0 < x1 and y0 < y1, got {corners}")
    x0, y0, x1, y1 = (math.floor(v + 0.5) for v in corners)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def crop_and_resize(
    image: Tensor, labels: Tensor | None, box: Tensor | Sequence[float], size: int
) -> tuple[Tensor, Tensor | None]:
    """Cuts a box out of an image and its label map and warps it to a square.

    Pixels are interpolated, labels take the nearest pixel's. Outside the image pixels are 0 and
    labels void, as in the release.

    Args:
        image: ``uint8 [3, H, W]``.
        labels: ``uint8 [H, W]``, or None.
        box: xyxy pixels, half open; may run outside the image.
        size: Side of the result in pixels.

    Returns:
        ``uint8 [3, size, size]`` and ``uint8 [size, size]`` (None without labels).

    Raises:
        ValueError: If the box is empty or not finite, if ``size`` is not positive, or if image
            and labels do not fit in shape.
        TypeError: If image or labels are not ``uint8``.
    """
    _check_image(image, labels)
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    box = pixel_box(box)
    pixels = _cut(image, box, outside=0)
    height, width = pixels.shape[:2]
    # Two taps see every pixel down to half size; an axis that shrinks more is averaged first.
    averaged = tuple(size if side > 2 * size else side for side in (width, height))
    pixels = cv2.resize(pixels, averaged, interpolation=cv2.INTER_AREA)
    pixels = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)
    pixels = torch.from_numpy(np.stack(cv2.split(pixels)))
    if labels is None:
        return pixels, None
    target = _cut(labels[None], box, outside=VOID)[..., 0]
    centres = 2 * np.arange(size) + 1  # of the result's pixels, in half pixels
    target = target[centres * height // (2 * size)][:, centres * width // (2 * size)]
    return pixels, torch.from_numpy(target)


def _cut(planes: Tensor, box: tuple[int, int, int, int], outside: int) -> np.ndarray:
    """The box's pixels with channels last, ``outside`` where it leaves the image."""
    x0, y0, x1, y1 = box
    height, width = planes.shape[1:]
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    patch = np.full((y1 - y0, x1 - x0, len(planes)), outside, np.uint8)
    if left < right and top < bottom:
        # merge interleaves several times faster than a transposed copy.
        inside = cv2.merge(list(planes[:, top:bottom, left:right].numpy()))
        inside = inside.reshape(bottom - top, right - left, len(planes))
        patch[top - y0 : bottom - y0, left - x0 : right - x0] = inside
    return patch


def _check_image(image: Tensor, labels: Tensor | None) -> None:
    check_image(image)
    if labels is None:
        return
    if labels.shape != image.shape[1:]:
        raise ValueError(
            f"labels must have the image's size {list(image.shape[1:])}, got {list(labels.shape)}"
        )
    if labels.dtype != torch.uint8:
        raise TypeError(f"labels must be uint8, got {labels.dtype}")


def object_mask(sample: Sample, k: int) -> Tensor:
    """The pixels of one annotated object.

    In VOC's object map the k-th annotated object has index k + 1. Where no object map is at
    hand, or it does not know the object, the mask is the object's class within its box.

    Args:
        sample: A sample with annotations.
        k: Position in ``sample.annotations``, from 0.

    Returns:
        ``bool [H, W]``.

    Raises:
        IndexError: If there is no such annotation.
    """
    if not 0 <= k < len(sample.annotations):
        raise IndexError(
            f"{sample.name} has {len(sample.annotations)} annotated objects, there is no object {k}"
        )
    annotation = sample.annotations[k]
    # NumPy compares bytes ten times as fast as PyTorch does on a CPU.
    mask = sample.labels.numpy() == annotation.label
    x0, y0, x1, y1 = (max(v, 0) for v in pixel_box(annotation.box))
    if sample.objects is not None:
        instance = mask & (sample.objects.numpy() == k + 1)
        if instance[y0:y1, x0:x1].any():
            return torch.from_numpy(instance)
    in_box = np.zeros_like(mask)
    in_box[y0:y1, x0:x1] = mask[y0:y1, x0:x1]
    return torch.from_numpy(in_box)


def isolate_object(sample: Sample, k: int) -> Tensor:
    """Stage 1's label map: one object keeps its class, everything else is background.

    Args:
        sample: A sample with annotations.
        k: Position in ``sample.annotations``, from 0.

    Returns:
        ``uint8 [H, W]``; void stays void.
    """
    labels = sample.labels.numpy()
    keep = object_mask(sample, k).numpy() | (labels == VOID)
    return torch.from_numpy(labels * keep)


class NoExamples(ValueError):
    """Nothing in a data set is an example for a stage."""


class CropDataset(Dataset, ABC):
    """What the four datasets share: augmentation that only the seed, example and draw decide.

    ``dataset[index]`` and ``dataset[index, draw]`` return ``(image, labels)``, ``uint8 [3, c, c]``
    and ``uint8 [c, c]`` with ``c = config.crop``.

    Args:
        dataset: Where images, label maps and annotations come from.
        config: How boxes become crops.
        train: Random crops and flips; otherwise the centre, never mirrored.

    Attributes:
        example_labels: ``int64 [len]``, the class of each example, for balancing.
    """

    example_labels: Tensor

    def __init__(
        self, dataset: VOCDataset, config: InstanceConfig | None = None, train: bool = True
    ) -> None:
        self.dataset = dataset
        self.config = config or InstanceConfig()
        self.train = train

    def __len__(self) -> int:
        return len(self.example_labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, draw = key if isinstance(key, tuple) else (key, 0)
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} is outside 0..{len(self) - 1}")
        random = np.random.default_rng((self.config.seed, index, draw))
        image, labels = self._crop(index, random)
        if self.train and self.config.flip and random.random() < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        return image, labels

    def _crop(self, index: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        image, labels, box = self._boxed(index)
        image, labels = crop_and_resize(image, labels, box, self.config.resize)
        size, spare = self.config.crop, self.config.resize - self.config.crop
        y, x = random.integers(0, spare + 1, 2) if self.train else (spare // 2, spare // 2)
        return image[:, y : y + size, x : x + size], labels[y : y + size, x : x + size]

    @abstractmethod
    def _boxed(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image, label map and the box to cut for one example."""

    def _enlarged(self, box: Tensor | Sequence[float]) -> Tensor:
        box = expand_box(box, self.config.context)
        return square_box(box) if self.config.square else box


class Stage1Dataset(CropDataset):
    """Stage 1: each annotated object, centred, against everything else as background.

    Objects marked difficult are left out. Arguments and items are those of
    :class:`CropDataset`.

    Source: the paper's two-stage training.

    Raises:
        NoExamples: If the data set has no annotated object.
    """

    def __init__(
        self, dataset: VOCDataset, config: InstanceConfig | None = None, train: bool = True
    ) -> None:
        super().__init__(dataset, config, train)
        found = [
            (i, k, annotation.label)
            for i in range(len(dataset))
            for k, annotation in enumerate(dataset.annotations(i))
            if not annotation.difficult
        ]
        if not found:
            raise NoExamples(
                f"{dataset.root}: expected annotated objects in split {dataset.split!r}, its "
                f"{len(dataset)} images have none"
            )
        examples = torch.tensor(found, dtype=torch.int64)
        self.examples = examples[:, :2]  # image, object
        self.example_labels = examples[:, 2].clone()

    def _boxed(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        i, k = self.examples[index].tolist()
        sample = self.dataset[i]
        return sample.image, isolate_object(sample, k), self._enlarged(sample.annotations[k].box)


class Stage2Dataset(CropDataset):
    """Stage 2: proposals that overlap an object, with all classes in them labelled.

    A proposal is an example if its IoU with an object that is not marked difficult reaches
    ``config.min_overlap``; its class, for balancing, is that of the best such object.

    Source: the paper's two-stage training.

    Args:
        dataset: Where images, label maps and annotations come from.
        proposals: One :class:`~deconvnet.proposals.Proposals` an image.
        config: How boxes become crops.
        train: Random crops and flips; otherwise the centre, never mirrored.

    Raises:
        ValueError: If there are not as many proposals as images.
        NoExamples: If none of them overlaps an object.
    """

    def __init__(
        self,
        dataset: VOCDataset,
        proposals: Sequence[Proposals],
        config: InstanceConfig | None = None,
        train: bool = True,
    ) -> None:
        super().__init__(dataset, config, train)
        if len(proposals) != len(dataset):
            raise ValueError(
                f"proposals must hold one entry an image ({len(dataset)}), got {len(proposals)}"
            )
        images, boxes, labels = [], [], []
        for i, (candidates, _) in enumerate(proposals):
            objects = [a for a in dataset.annotations(i) if not a.difficult]
            if not objects or not len(candidates):
                continue
            overlap, best = box_iou(candidates, torch.tensor([a.box for a in objects])).max(dim=1)
            chosen = (overlap >= self.config.min_overlap).nonzero().flatten()
            images.append(torch.full_like(chosen, i))
            boxes.append(candidates[chosen])
            labels.append(torch.tensor([a.label for a in objects])[best[chosen]])
        if not sum(map(len, images)):
            raise NoExamples(
                f"{dataset.root}: no proposal reaches an IoU of {self.config.min_overlap} with an "
                f"annotated object in split {dataset.split!r}, of {len(dataset)} images"
            )
        self.images = torch.cat(images)
        self.boxes = torch.cat(boxes)
        self.example_labels = torch.cat(labels)

    def _boxed(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        i = int(self.images[index])
        return self.dataset.image(i), self.dataset.labels(i), self._enlarged(self.boxes[index])


class WholeImageDataset(CropDataset):
    """Each image as one box, without added context: training as without the paper's idea.

    An image's class, for balancing, is the one of its annotated classes that is annotated in
    the fewest images; 0 where nothing is. Arguments and items are those of
    :class:`CropDataset`.
    """

    def __init__(
        self, dataset: VOCDataset, config: InstanceConfig | None = None, train: bool = True
    ) -> None:
        super().__init__(dataset, config, train)
        if not len(dataset):
            raise ValueError("the data set has no images")
        self.example_labels = _rarest_labels(dataset)

    def _boxed(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image, labels = self.dataset.image(index), self.dataset.labels(index)
        height, width = labels.shape
        box = torch.tensor([0.0, 0.0, width, height])
        return image, labels, square_box(box) if self.config.square else box


class WindowDataset(WholeImageDataset):
    """Windows of ``config.crop`` pixels cut from each image at its own scale, for the FCN.

    A window lies inside the image where that is large enough; where it is smaller, the rest of
    the window is 0, and void. Arguments, items and classes are those of
    :class:`WholeImageDataset`.
    """

    def _crop(self, index: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        image, labels = self.dataset.image(index), self.dataset.labels(index)
        size = self.config.crop
        y, x = (
            int(random.integers(min(spare, 0), max(spare, 0) + 1)) if self.train else spare // 2
            for spare in (side - size for side in labels.shape)
        )
        return crop_and_resize(image, labels, (x, y, x + size, y + size), size)


def _rarest_labels(dataset: VOCDataset) -> Tensor:
    present = [{a.label for a in dataset.annotations(i)} for i in range(len(dataset))]
    images_with: dict[int, int] = {}
    for labels in present:
        for label in labels:
            images_with[label] = images_with.get(label, 0) + 1
    rarest = [min(labels, key=lambda c: (images_with[c], c), default=0) for labels in present]
    return torch.tensor(rarest, dtype=torch.int64)


def balanced_indices(example_labels: Tensor, seed: int = 0, power: float = 1.0) -> Tensor:
    """Repeats the examples of rare classes, as the paper does for stage 2.

    Args:
        example_labels: ``int64 [N]``.
        seed: Decides which examples are repeated once more where the counts do not divide.
        power: 1 brings every class to the size of the largest, 0 changes nothing; between them
            a class of n examples is brought to ``n ** (1 - power) * largest ** power``.

    Returns:
        ``int64 [M]``, indices of examples, grouped by class; every example occurs.

    Raises:
        ValueError: If there are no examples, or ``power`` is not in [0, 1].
    """
    if not 0 <= power <= 1:
        raise ValueError(f"power must be in [0, 1], got {power}")
    classes, counts = _class_counts(example_labels)
    largest = int(counts.max())
    random = np.random.default_rng(seed)
    indices = []
    for c, count in enumerate(counts.tolist()):
        wanted = round(count ** (1 - power) * largest**power)
        members = (classes == c).nonzero().flatten()
        extra = torch.from_numpy(random.permutation(count)[: wanted % count])
        indices.append(torch.cat([members.repeat(wanted // count), members[extra]]))
    return torch.cat(indices)


def _class_counts(example_labels: Tensor) -> tuple[Tensor, Tensor]:
    if example_labels.ndim != 1 or not len(example_labels):
        raise ValueError(
            f"example_labels must have shape [N] with N >= 1, got {list(example_labels.shape)}"
        )
    _, classes, counts = example_labels.unique(return_inverse=True, return_counts=True)
    return classes, counts


class StreamSampler(Sampler[tuple[int, int]]):
    """An endless stream of shuffled epochs that can be entered anywhere.

    Position ``p`` of the stream is the key ``(index, p)``. Rank ``r`` of ``W`` takes positions
    ``start + r``, ``start + r + W``, ...: together the ranks see exactly what one process would.

    Args:
        num_examples: Length of the dataset.
        seed: Of the shuffling.
        rank: This process among ``world_size``.
        world_size: Number of processes.
        start: Global position to go on from.
        length: Number of keys that this rank yields; None for an endless stream.
        indices: ``int64 [M]``, examples that make an epoch, such as :func:`balanced_indices`;
            by default each example once.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        num_examples: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        length: int | None = None,
        indices: Tensor | None = None,
    ) -> None:
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {num_examples}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1} (world_size - 1), got {rank}")
        if seed < 0 or start < 0 or (length is not None and length < 0):
            raise ValueError(f"seed, start, length must be >= 0, got {seed}, {start}, {length}")
        order = np.arange(num_examples) if indices is None else np.asarray(indices)
        if not order.size or order.min() < 0 or order.max() >= num_examples:
            raise ValueError(
                f"indices must be a non-empty list of examples 0..{num_examples - 1}, got "
                f"{order.size} of them"
                + (f" in {order.min()}..{order.max()}" if order.size else "")
            )
        self.order = order
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.start, self.length = start, length

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("an endless StreamSampler has no length")
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position, epoch, yielded = self.start + self.rank, -1, 0
        while self.length is None or yielded < self.length:
            if position // len(self.order) != epoch:
                epoch = position // len(self.order)
                shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.order)
            yield int(shuffled[position % len(self.order)]), position
            position, yielded = position + self.world_size, yielded + 1
