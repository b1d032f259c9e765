"""The PASCAL VOC 2012 format: names, colours, files, and a data set that reads them.

One folder holds everything about one data set, under names fixed by the VOC development kit::

    JPEGImages/<name>.jpg              the photograph
    SegmentationClass/<name>.png       class of each pixel, palette PNG (255 = void)
    SegmentationObject/<name>.png      instance of each pixel, palette PNG (255 = void)
    SegmentationClassAug/<name>.png    class masks of VOC and SBD together
    Annotations/<name>.xml             bounding boxes and classes of the objects
    ImageSets/Segmentation/<split>.txt names of the images in a split
    classes.txt                        (ours, optional) class names, background first

The *k*-th ``<object>`` of an annotation file is the instance numbered *k* (from 1) in
``SegmentationObject``.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from defusedxml.ElementTree import parse as parse_xml
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from deconvnet.files import write_atomically

__all__ = [
    "CLASS_NAMES",
    "VOID",
    "Annotation",
    "Sample",
    "VOCDataset",
    "colourise",
    "convert_sbd",
    "download_sbd",
    "download_voc2012",
    "palette",
    "read_annotations",
    "read_image",
    "read_label_map",
    "read_split",
    "shrink",
    "shrink_sample",
    "write_annotations",
    "write_image",
    "write_label_map",
    "write_split",
]

CLASS_NAMES: tuple[str, ...] = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
"""The 21 classes of VOC 2012 in their official order; the index is the label."""

VOID = 255
"""Label of pixels that count neither in a loss nor in a metric."""

CLASS_LINE = re.compile(r"(.+?)(?:\s+#([0-9a-fA-F]{6}))?")  # name, and perhaps #rrggbb

MIN_SIDE = 4
"""Pixels: an object that is shrunk below is too small to learn from."""

GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Grey levels between neighbouring values of a greyscale image of 2 or 4 bits, once it is read."""

MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")

T = TypeVar("T")


# ---------------------------------------------------------------------------------- colours


def palette(n: int = 256) -> Tensor:
    """The official VOC colours of the first ``n`` labels.

    The bits of a label are dealt in turn to red, green and blue, highest colour bit first, so
    that neighbouring labels get clearly different colours (``VOClabelcolormap`` of the VOC
    development kit).

    Args:
        n: Number of colours, 1 to 256.

    Returns:
        ``uint8 [n, 3]`` RGB; label 0 is black, label 255 (void) is cream.

    Raises:
        ValueError: If ``n`` is not between 1 and 256.
    """
    if not 1 <= n <= 256:
        raise ValueError(f"n must be between 1 and 256 colours, got {n}")
    labels = torch.arange(n)
    colours = torch.zeros(n, 3, dtype=torch.int64)
    for bit in range(8):
        for channel in range(3):
            source_bit = 3 * bit + channel
            colours[:, channel] |= (labels >> source_bit & 1) << (7 - bit)
    return colours.to(torch.uint8)


def colourise(labels: Tensor, colours: Tensor | None = None) -> Tensor:
    """Paint a label map or object map.

    Args:
        labels: ``uint8 [H, W]``.
        colours: ``uint8 [n, 3]`` RGB of the first labels; the rest, or all, are VOC's.

    Returns:
        ``uint8 [3, H, W]`` RGB.

    Raises:
        ValueError: If ``labels`` is not a ``uint8 [H, W]`` tensor.
    """
    _check_label_map(labels)
    return _all_colours(colours)[labels.long()].permute(2, 0, 1).contiguous()


def _all_colours(first: Tensor | None) -> Tensor:
    colours = palette()
    if first is not None:
        colours[: len(first)] = first
    return colours


# ------------------------------------------------------------------------- images and masks


def read_image(path: str | Path | io.BytesIO) -> Tensor:
    """Read a photograph of any format that Pillow knows, upright by its EXIF orientation.

    Of colours of 16 bits Pillow gives the upper 8.

    Args:
        path: The image file, or its bytes in memory.

    Returns:
        ``uint8 [3, H, W]`` RGB.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not an image, is damaged, is grey of more than 8 bits, or has so
            many pixels that Pillow takes it for an attack (179 million).
    """
    with _open_image(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{path}: expected 8 bits a channel, got Pillow mode {image.mode!r}")
        rgb = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(np.array(rgb.transpose(2, 0, 1), order="C"))


def write_image(path: str | Path, image: Tensor, quality: int = 95) -> None:
    """Write an image in the format of the path's suffix, atomically.

    Args:
        path: Where to; ``.png``, ``.jpg``, ...
        image: ``uint8 [3, H, W]`` RGB.
        quality: Quality of lossy formats, 1 to 100.

    Raises:
        ValueError: If ``image`` has another shape or dtype, or the suffix names no image format.
    """
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
    image_format = Image.registered_extensions().get(Path(path).suffix.lower())
    if image_format is None:
        raise ValueError(f"{path}: expected an image suffix such as .png or .jpg")
    buffer = io.BytesIO()
    rgb = Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
    rgb.save(buffer, format=image_format, quality=quality)
    write_atomically(path, buffer.getvalue())


def read_label_map(path: str | Path, num_classes: int | None = None) -> Tensor:
    """Read a mask whose pixel values are labels: a palette PNG or a greyscale one.

    Greyscale images may have 2, 4 or 8 bits; the label is the value that is stored.

    Args:
        path: The mask file.
        num_classes: Largest label + 1; labels from there to 254 are an error. ``None`` allows all.

    Returns:
        ``uint8 [H, W]``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not such an image, or holds a label out of range.
    """
    with _open_image(path) as image:
        if image.format == "JPEG":
            raise ValueError(f"{path}: expected a PNG; JPEG changes values, and these are labels")
        if image.mode not in ("P", "L"):
            raise ValueError(
                f"{path}: expected a palette or 8-bit greyscale image whose values are labels, "
                f"got Pillow mode {image.mode!r}"
            )
        labels = np.array(image)
        if image.mode == "L":  # Pillow has spread fewer bits over 0 to 255, and says L of them too
            labels //= _grey_step(path)
    if num_classes is not None:
        outside = (labels >= num_classes) & (labels != VOID)
        if outside.any():
            raise ValueError(
                f"{path}: expected labels below {num_classes} or {VOID} (void), "
                f"got {int(labels[outside][0])}; label 0 is the background"
            )
    return torch.from_numpy(labels)


def write_label_map(path: str | Path, labels: Tensor, colours: Tensor | None = None) -> None:
    """Write a label map or object map as a palette PNG, atomically.

    Args:
        path: Where to, ending in ``.png``.
        labels: ``uint8 [H, W]``.
        colours: ``uint8 [n, 3]`` RGB of the first labels; the rest, or all, are VOC's.

    Raises:
        ValueError: If ``labels`` has another shape or dtype, or the path another suffix.
    """
    _check_label_map(labels)
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path}: a label map is lossless, expected the suffix .png")
    image = Image.fromarray(labels.cpu().contiguous().numpy())
    image.putpalette(_all_colours(colours).numpy().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


# ---------------------------------------------------------------------------- boxes, splits


@dataclass(frozen=True)
class Annotation:
    """One object of an image.

    Attributes:
        label: Its class, 1 to the number of classes − 1.
        box: ``(x0, y0, x1, y1)`` in pixels from 0, half open, around the visible part.
        difficult: Whether VOC's evaluation would leave it out (mostly hidden, too small).
    """

    label: int
    box: tuple[float, float, float, float]
    difficult: bool = False


def read_annotations(
    path: str | Path, class_names: Sequence[str] = CLASS_NAMES
) -> list[Annotation]:
    """Read the objects of a VOC annotation file.

    VOC counts pixels from 1 and includes the last one; the boxes returned here count from 0 and
    exclude it, so only the lower corner moves. Entities and external references in the XML are
    refused.

    Args:
        path: The XML file.
        class_names: Names by label.

    Returns:
        The objects in the file's order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not such XML, names an unknown class or has an empty box.
    """
    try:
        # Opened in bytes, so that the XML's own declaration decides the encoding.
        with open(path, "rb") as file:
            root = parse_xml(file).getroot()
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: expected VOC annotation XML, got {error!r}") from error
    return [_parse_object(path, node, class_names) for node in root.findall("object")]


def write_annotations(
    path: str | Path,
    annotations: Iterable[Annotation],
    size: tuple[int, int],
    class_names: Sequence[str] = CLASS_NAMES,
) -> None:
    """Write a VOC annotation file, atomically.

    Args:
        path: Where to; the image is taken to be ``<stem>.jpg``.
        annotations: The objects, in the order of their instance numbers.
        size: ``(height, width)`` of the image in pixels.
        class_names: Names by label.

    Raises:
        ValueError: If a label is not that of an object class.
    """
    path = Path(path)
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "folder").text = "VOC2012"
    ElementTree.SubElement(root, "filename").text = f"{path.stem}.jpg"
    size_node = ElementTree.SubElement(root, "size")
    for tag, value in (("width", size[1]), ("height", size[0]), ("depth", 3)):
        ElementTree.SubElement(size_node, tag).text = str(value)
    ElementTree.SubElement(root, "segmented").text = "1"
    for annotation in annotations:
        if not 1 <= annotation.label < len(class_names):
            raise ValueError(
                f"label must be between 1 and {len(class_names) - 1}, got {annotation.label}"
            )
        node = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(node, "name").text = class_names[annotation.label]
        ElementTree.SubElement(node, "difficult").text = str(int(annotation.difficult))
        box_node = ElementTree.SubElement(node, "bndbox")
        x0, y0, x1, y1 = annotation.box
        for tag, value in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
            # repr keeps every digit of a fractional coordinate; VOC writes whole ones bare.
            value = float(value)  # of a tensor or an array perhaps, whose repr is not a number
            text = str(int(value)) if value.is_integer() else repr(value)
            ElementTree.SubElement(box_node, tag).text = text
    ElementTree.indent(root)
    write_atomically(path, ElementTree.tostring(root, encoding="utf-8") + b"\n")


def read_classes(path: str | Path) -> tuple[tuple[str, ...], Tensor]:
    """Read a list of classes: a name a line, background first, and its colour if you like.

    A colour is the last word of its line, as in ``road sign #0072b2``.

    Args:
        path: The text file.

    Returns:
        The names by label, and their colours ``uint8 [n, 3]`` RGB; VOC's where none is given.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not text in UTF-8, or does not list 2 to 255 different names.
    """
    try:  # Windows Notepad may put a byte order mark before the first name
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8 ({error})") from error
    found = [CLASS_LINE.fullmatch(line.strip()).groups() for line in lines if line.strip()]
    names = tuple(name for name, _ in found)
    for name in names:
        if any(word.startswith("#") for word in name.split()):
            raise ValueError(
                f"{path}: expected a name, and perhaps its colour as #rrggbb, on each line, "
                f"got {name!r}"
            )
    if not 2 <= len(names) <= VOID or len(set(names)) != len(names):
        raise ValueError(
            f"{path}: expected 2 to {VOID} different class names, background first, got {names}"
        )
    colours = palette(len(names))
    for label, (_, colour) in enumerate(found):
        if colour is not None:
            colours[label] = torch.tensor(list(bytes.fromhex(colour)))
    return names, colours


def read_split(root: str | Path, name: str) -> list[str]:
    """Names of the images in a split.

    Args:
        root: The data set's folder.
        name: The split, as in ``ImageSets/Segmentation/<name>.txt``.

    Returns:
        Image names without suffix, in the file's order.

    Raises:
        FileNotFoundError: If the data set has no such split; the message names those it has.
        ValueError: If the file is empty, or a line is not a plain file name.
    """
    path = Path(root) / "ImageSets" / "Segmentation" / f"{name}.txt"
    if not path.is_file():
        splits = sorted(other.stem for other in path.parent.glob("*.txt"))
        raise FileNotFoundError(f"{path}: no such split; there are {splits or 'none'}")
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    names = [line for line in names if line]
    if not names:
        raise ValueError(f"{path}: expected image names, got an empty file")
    for image_name in names:
        if "/" in image_name or "\\" in image_name or image_name.startswith("."):
            raise ValueError(f"{path}: expected plain image names, got {image_name!r}")
    return names


def write_split(root: str | Path, name: str, image_names: Iterable[str]) -> None:
    """Write the image names of a split, atomically.

    Args:
        root: The data set's folder.
        name: The split, as in ``ImageSets/Segmentation/<name>.txt``.
        image_names: Image names without suffix.
    """
    path = Path(root) / "ImageSets" / "Segmentation" / f"{name}.txt"
    write_atomically(path, "".join(f"{line}\n" for line in image_names).encode())


# --------------------------------------------------------------------------------- data set


@dataclass(frozen=True, eq=False)
class Sample:
    """One image of a data set with all that is known about it.

    Attributes:
        name: The image's name without suffix.
        image: ``uint8 [3, H, W]`` RGB.
        labels: ``uint8 [H, W]``, 0 background, 255 void.
        objects: ``uint8 [H, W]``, 0 background, *k* for the pixels of ``annotations[k - 1]``,
            255 void; ``None`` where the data set has no instance masks.
        annotations: The objects.
    """

    name: str
    image: Tensor
    labels: Tensor
    objects: Tensor | None
    annotations: tuple[Annotation, ...]


def shrink(image: Tensor, max_side: int | None) -> Tensor:
    """Reduces an image until neither side exceeds a limit, averaging over what is left out.

    Args:
        image: ``uint8 [3, H, W]``.
        max_side: In pixels; None leaves every image as it is.

    Returns:
        ``uint8 [3, h, w]``, the image itself where it is small enough.
    """
    height, width = image.shape[1:]
    longer = max(height, width)
    if max_side is None or longer <= max_side:
        return image
    size = [max(1, round(side * max_side / longer)) for side in (height, width)]
    return F.interpolate(image[None].float(), size, mode="area")[0].round().to(torch.uint8)


def shrink_sample(sample: Sample, max_side: int | None) -> Sample:
    """Reduces an image as :func:`shrink` does, and with it its masks and boxes.

    Args:
        sample: The image, and what is known about it.
        max_side: In pixels; None leaves every image as it is.

    Returns:
        The sample in the smaller size. Objects of which less than ``MIN_SIDE`` pixels are left, in
        height or width, are marked *difficult*, which keeps them out of training.
    """
    image = shrink(sample.image, max_side)
    if image is sample.image:
        return sample
    size = tuple(image.shape[1:])

    def smaller(mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        return F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].byte()

    x, y = size[1] / sample.image.shape[2], size[0] / sample.image.shape[1]
    annotations = []
    for annotation in sample.annotations:
        x0, y0, x1, y1 = annotation.box
        box = (x0 * x, y0 * y, x1 * x, y1 * y)
        tiny = min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE
        annotations.append(Annotation(annotation.label, box, annotation.difficult or tiny))
    return Sample(
        sample.name, image, smaller(sample.labels), smaller(sample.objects), tuple(annotations)
    )


class VOCDataset(Dataset[Sample]):
    """A split of a data set in the VOC 2012 format.

    Args:
        root: The folder that holds ``JPEGImages`` and its neighbours.
        split: Name of a file in ``ImageSets/Segmentation``.
        masks: Folder of the class masks; ``"auto"`` takes ``SegmentationClassAug`` where it
            exists (it also has the images that only SBD annotated), else ``SegmentationClass``,
            which may be missing as long as no labels are read (VOC's test set has none).
        decode_cache: Decode everything now, on all cores, and keep it in memory as ``uint8``.
            DataLoader workers that are forked share it; others read the files.
        limit: Only the first so many images of the split.
        max_side: Shrink larger images, with their masks and boxes, until neither side has more
            pixels: for a network that segments them at this size.

    Attributes:
        root: The folder.
        names: Image names, one an item.
        class_names: Names by label: ``classes.txt`` where the data set has one, else VOC's.
        colours: Theirs, ``uint8 [n, 3]`` RGB.

    Raises:
        FileNotFoundError: If the folder, the split or the mask folder that ``masks`` names is
            missing.
        ValueError: If ``masks`` is not one of those above, or a file of the set is malformed.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        masks: str = "auto",
        decode_cache: bool = False,
        limit: int | None = None,
        max_side: int | None = None,
    ) -> None:
        self.root = Path(root)
        self.split, self.max_side = split, max_side
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 image, got {limit}")
        if not (self.root / "JPEGImages").is_dir():
            raise FileNotFoundError(
                f"{self.root}: expected a folder in VOC's layout, with JPEGImages in it"
            )
        self.names = read_split(self.root, split)[:limit]
        self.class_names, self.colours = CLASS_NAMES, palette(len(CLASS_NAMES))
        if (self.root / "classes.txt").is_file():
            self.class_names, self.colours = read_classes(self.root / "classes.txt")
        self.mask_folder = self._find_masks(masks)
        self._fill_cache(decode_cache)

    def _fill_cache(self, decode: bool) -> None:
        self._cache: list[Sample] | None = None
        if decode:
            with ThreadPoolExecutor() as pool:
                self._cache = list(pool.map(self._read, range(len(self))))

    def __getstate__(self) -> dict[str, object]:
        # A process that is not forked reads the files: sent to it, each tensor holds a file open.
        return self.__dict__ | {"_cache": None}

    @property
    def num_classes(self) -> int:
        """Number of classes with the background."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return self._cache[index] if self._cache is not None else self._read(index)

    def image(self, index: int) -> Tensor:
        """The photograph, ``uint8 [3, H, W]``."""
        if self._cache is not None:
            return self._cache[index].image
        return shrink(self._read_image(self.names[index]), self.max_side)  # needs no masks

    def labels(self, index: int) -> Tensor:
        """The label map, ``uint8 [H, W]``."""
        return self._part(index, "labels", self._read_labels)

    def objects(self, index: int) -> Tensor | None:
        """The object map, ``uint8 [H, W]``, or ``None`` where the image has none."""
        return self._part(index, "objects", self._read_objects)

    def annotations(self, index: int) -> tuple[Annotation, ...]:
        """The objects' classes and boxes; empty where the image has no annotation file."""
        return self._part(index, "annotations", self._read_annotations)

    def check_classes(self) -> None:
        """Refuses to be learned from if no mask of the split shows any class.

        Raises:
            ValueError: All pixels are background or void.
        """
        masks = (self.labels(i) for i in range(len(self)))
        if not any(((labels > 0) & (labels < VOID)).any() for labels in masks):
            raise ValueError(
                f"{self.root / self.mask_folder}: expected pixels of some class in split "
                f"{self.split!r}; a pixel's value is its class's line in classes.txt, counted from "
                "0, and 255 is void"
            )

    def _part(self, index: int, part: str, read: Callable[[str], T]) -> T:
        name = self.names[index]
        if self._cache is None and not self._is_shrunk(name):
            return read(name)
        return getattr(self[index], part)

    def _is_shrunk(self, name: str) -> bool:
        if self.max_side is None:
            return False
        try:
            with Image.open(self._image_file(name)) as file:  # reads the header only
                return max(file.size) > self.max_side
        except (OSError, Image.DecompressionBombError):
            return True  # reading the whole file will say what is wrong with it

    def _read(self, index: int) -> Sample:
        name = self.names[index]
        image, labels = self._read_image(name), self._read_labels(name)
        sample = Sample(name, image, labels, *self._read_instances(name, labels))
        for mask, path in (
            (sample.labels, self._mask_file(name)),
            (sample.objects, self._objects_file(name)),
        ):
            if mask is not None and mask.shape != sample.image.shape[1:]:
                raise ValueError(
                    f"{path}: expected the size of {self._image_file(name)}, "
                    f"{list(sample.image.shape[1:])}, got {list(mask.shape)}"
                )
        return shrink_sample(sample, self.max_side)

    def _image_file(self, name: str) -> Path:
        return self.root / "JPEGImages" / f"{name}.jpg"

    def _mask_file(self, name: str) -> Path:
        return self.root / self.mask_folder / f"{name}.png"

    def _objects_file(self, name: str) -> Path:
        return self.root / "SegmentationObject" / f"{name}.png"

    def _read_image(self, name: str) -> Tensor:
        return read_image(self._image_file(name))

    def _read_labels(self, name: str) -> Tensor:
        return read_label_map(self._mask_file(name), self.num_classes)

    def _read_instances(
        self, name: str, labels: Tensor
    ) -> tuple[Tensor | None, tuple[Annotation, ...]]:
        return self._read_objects(name), self._read_annotations(name)

    def _read_objects(self, name: str) -> Tensor | None:
        path = self._objects_file(name)
        return read_label_map(path) if path.is_file() else None

    def _read_annotations(self, name: str) -> tuple[Annotation, ...]:
        path = self.root / "Annotations" / f"{name}.xml"
        return tuple(read_annotations(path, self.class_names)) if path.is_file() else ()

    def _find_masks(self, masks: str) -> str:
        if masks == "auto":
            has_augmented = (self.root / "SegmentationClassAug").is_dir()
            return "SegmentationClassAug" if has_augmented else "SegmentationClass"
        if masks not in MASK_FOLDERS:
            raise ValueError(f"masks must be 'auto' or one of {MASK_FOLDERS}, got {masks!r}")
        if not (self.root / masks).is_dir():
            raise FileNotFoundError(f"{self.root / masks}: there is no such folder of class masks")
        return masks


# -------------------------------------------------------------------------------- downloads


def download_voc2012(root: str | Path) -> Path:
    """Download VOC 2012 (2 GB) through torchvision, unless it is already there.

    Args:
        root: Folder to put ``VOCdevkit/VOC2012`` into; made where needed.

    Returns:
        The folder to give to :class:`VOCDataset`.
    """
    from torchvision.datasets import VOCSegmentation

    target = Path(root) / "VOCdevkit" / "VOC2012"
    num_images = 17_125  # in the official archive; fewer means an interrupted extraction
    if len(list((target / "JPEGImages").glob("*.jpg"))) < num_images:
        VOCSegmentation(str(root), year="2012", image_set="trainval", download=True)
    return target


def download_sbd(root: str | Path) -> Path:
    """Download SBD (1.4 GB) through torchvision and add its masks to VOC 2012's.

    Call :func:`download_voc2012` with the same ``root`` first. Makes ``SegmentationClassAug`` and
    the split ``train_aug`` (10,582 images). Reading SBD's files takes SciPy.

    Args:
        root: The folder that holds ``VOCdevkit/VOC2012``.

    Returns:
        The folder to give to :class:`VOCDataset`.

    Raises:
        FileNotFoundError: If VOC 2012 is not there.
    """
    from torchvision.datasets import SBDataset

    voc, sbd = Path(root) / "VOCdevkit" / "VOC2012", Path(root) / "sbd"
    if not (voc / "SegmentationClass").is_dir():
        raise FileNotFoundError(f"{voc}: expected VOC 2012 there; download_voc2012 puts it there")
    # torchvision cannot repeat a finished download: it moves files onto themselves.
    if not (sbd / "val.txt").is_file():
        SBDataset(str(sbd), image_set="train", mode="segmentation", download=True)
    convert_sbd(sbd, voc)
    return voc


def convert_sbd(sbd: str | Path, voc: str | Path) -> None:
    """Write SBD's masks beside VOC's, in VOC's format.

    Where VOC has a mask of its own it is taken, since it is drawn finer and has the void rim.
    The split ``train_aug`` names all images with a mask except those of VOC's ``val``.

    Args:
        sbd: Folder with SBD's ``cls/<name>.mat``.
        voc: Folder in VOC's layout; ``SegmentationClassAug`` is made in it.

    Raises:
        FileNotFoundError: If SBD's folder has no ``cls``.
    """
    from scipy.io import loadmat

    sbd, voc = Path(sbd), Path(voc)
    if not (sbd / "cls").is_dir():
        raise FileNotFoundError(f"{sbd / 'cls'}: expected SBD's class masks there")
    target = voc / "SegmentationClassAug"
    own = {path.stem: path for path in (voc / "SegmentationClass").glob("*.png")}
    for name, path in own.items():
        write_atomically(target / f"{name}.png", path.read_bytes())
    added = {path.stem: path for path in (sbd / "cls").glob("*.mat")}
    for name in added.keys() - own.keys():
        labels = loadmat(added[name])["GTcls"][0, 0]["Segmentation"]
        write_label_map(target / f"{name}.png", torch.from_numpy(labels.astype(np.uint8)))
    held_out = set(read_split(voc, "val"))
    write_split(voc, "train_aug", sorted((own.keys() | added.keys()) - held_out))


# ---------------------------------------------------------------------------------- helpers


def _open_image(path: str | Path | io.BytesIO) -> Image.Image:
    """Open and decode, so that damage shows up here and not later."""
    try:
        image = Image.open(path)
        try:
            image.load()
        except BaseException:
            image.close()
            raise
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such image file") from None
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,
        ValueError,
    ) as error:
        raise ValueError(f"{path}: expected an image file, got {error}") from error
    return image


def _grey_step(path: str | Path) -> int:
    with Image.open(path) as image:  # not loaded: `load()` drops the bit depth
        raw = image.tile[0][3] if image.tile else ""
    raw = raw[0] if isinstance(raw, tuple) and raw else raw  # the raw mode is the first argument
    return GREY_STEPS.get(str(raw), 1)


def _check_label_map(labels: Tensor) -> None:
    if labels.dtype != torch.uint8 or labels.dim() != 2:
        raise ValueError(f"labels must be uint8 [H, W], got {labels.dtype} {list(labels.shape)}")


def _parse_object(
    path: str | Path, node: ElementTree.Element, class_names: Sequence[str]
) -> Annotation:
    name = (node.findtext("name") or "").strip()
    if name not in class_names[1:]:
        raise ValueError(f"{path}: expected an object of {tuple(class_names[1:])}, got {name!r}")
    try:
        x0, y0, x1, y1 = (
            float(node.findtext(f"bndbox/{tag}", "missing"))
            for tag in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError as error:
        raise ValueError(f"{path}: expected four numbers as the box of {name!r}, {error}") from None
    box = (x0 - 1, y0 - 1, x1, y1)
    if not (box[0] < box[2] and box[1] < box[3]):  # also refuses NaN
        raise ValueError(f"{path}: expected a box with xmin ≤ xmax and ymin ≤ ymax, got {box}")
    difficult = node.findtext("difficult", "0").strip() == "1"
    return Annotation(tuple(class_names).index(name), box, difficult)
