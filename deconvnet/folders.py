"""Pictures of your own: a folder of images, a folder of masks and a list of classes.

::

    mydata/
      classes.txt     background, then a class a line, and its colour if you like: fish #e69f00
      images/         photographs in any format that Pillow reads
      masks/          one PNG an image, of the same name and size; a pixel's value is its label,
                      a line number of classes.txt counted from 0, or 255 for void
      objects/        optional: PNGs whose values tell objects of one class apart
      train.txt       optional: the names of the images to learn from, and so val.txt

Without ``objects`` each connected region of a class counts as one object, so two that touch are
taken for one. Without split files every fifth image is for validation; with only one of the two,
the other split is all the rest.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import cv2
import torch
from torch import Tensor

from deconvnet.voc import (
    VOID,
    Annotation,
    VOCDataset,
    read_classes,
    read_label_map,
)

MIN_OBJECT = 64  # pixels; smaller regions are slips of the brush, not objects to learn from
VALIDATION_SHARE = 5  # one image of so many
SYSTEM_FILES = ("Thumbs.db", "desktop.ini")  # which Windows leaves in folders of pictures


def open_dataset(root: str | Path, split: str = "train", **options) -> VOCDataset:
    """Opens a data set in VOC's layout or as plain folders, whichever is there.

    Args:
        root: The data set's folder.
        split: Which part.
        **options: Further arguments of the data set's class.

    Raises:
        FileNotFoundError: The folder holds neither.
    """
    root = Path(root)
    if (root / "JPEGImages").is_dir():
        return VOCDataset(root, split, **options)
    if (root / "images").is_dir():
        return FolderDataset(root, split, **options)
    raise FileNotFoundError(
        f"{root}: expected a data set, with a folder images and a folder masks, or VOC's JPEGImages"
    )


class FolderDataset(VOCDataset):
    """A data set of plain folders, as this module describes them.

    Args:
        root: The folder that holds ``images``, ``masks`` and ``classes.txt``.
        split: Name of a text file of image names, or ``"train"`` or ``"val"`` without such a file,
            or ``"all"``.
        decode_cache: Decode everything now, on all cores, and keep it in memory as ``uint8``.
        limit: Only the first so many images of the split.
        max_side: See :class:`~deconvnet.voc.VOCDataset`.

    Raises:
        FileNotFoundError: A folder, ``classes.txt``, the split or an image's mask is missing.
        ValueError: Two images have one name, or a file of the set is malformed.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        decode_cache: bool = False,
        limit: int | None = None,
        max_side: int | None = None,
    ) -> None:
        self.root, self.split, self.max_side = Path(root), split, max_side
        self.mask_folder = "masks"
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 image, got {limit}")
        if not (self.root / "classes.txt").is_file():
            raise FileNotFoundError(
                f"{self.root / 'classes.txt'}: expected the names of the classes there, one a "
                "line, background first"
            )
        self.class_names, self.colours = read_classes(self.root / "classes.txt")
        self._images = _files(self.root / "images")
        self.names = self._split_names(split)[:limit]
        for name in self.names:
            if not self._mask_file(name).is_file():
                raise FileNotFoundError(
                    f"{self._mask_file(name)}: expected the mask of {self._images[name]} there"
                    + _near_match(self._mask_file(name))
                )
        self._fill_cache(decode_cache)

    def _split_names(self, split: str) -> list[str]:
        path = self.root / f"{split}.txt"
        if path.is_file() and split != "classes":
            return self._listed(path)
        if split not in ("train", "val", "all"):
            raise FileNotFoundError(f"{path}: no such split; give train, val, all or such a file")
        other = self.root / {"train": "val.txt", "val": "train.txt"}.get(split, "all.txt")
        if other.is_file():
            rest = sorted(self._images.keys() - self._listed(other))
            if not rest:
                raise ValueError(f"{other}: expected it to leave images for {split}, it lists all")
            return rest
        # By a hash of the name, so that an image that is added moves hardly any other.
        names = sorted(self._images, key=lambda name: hashlib.sha1(name.encode()).digest())
        held_out = max(1, len(names) // VALIDATION_SHARE)
        parts = {"all": names, "val": names[:held_out], "train": names[held_out:]}
        if not parts[split]:
            raise ValueError(f"{self.root / 'images'}: expected at least 2 images, got {names}")
        return sorted(parts[split])

    def _listed(self, path: Path) -> list[str]:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        names = [n if n in self._images else Path(n).stem for n in lines if n]
        unknown = [name for name in names if name not in self._images]
        if unknown or not names:
            found = f"got {unknown[0]!r}" if unknown else "got an empty file"
            raise ValueError(f"{path}: expected names of images in images, {found}")
        name, times = Counter(names).most_common(1)[0]
        if times > 1:
            raise ValueError(f"{path}: expected each name once, got {name!r} {times} times")
        return names

    def _image_file(self, name: str) -> Path:
        return self._images[name]

    def _objects_file(self, name: str) -> Path:
        return self.root / "objects" / f"{name}.png"

    def _read_objects(self, name: str) -> Tensor:
        return self._read_instances(name, self._read_labels(name))[0]

    def _read_annotations(self, name: str) -> tuple[Annotation, ...]:
        return self._read_instances(name, self._read_labels(name))[1]

    def _read_instances(self, name: str, labels: Tensor) -> tuple[Tensor, tuple[Annotation, ...]]:
        path = self._objects_file(name)
        if not path.is_file():
            return find_objects(labels)
        drawn = read_label_map(path)
        if drawn.shape != labels.shape:
            raise ValueError(
                f"{path}: expected the size of {self._mask_file(name)}, {list(labels.shape)}, "
                f"got {list(drawn.shape)}"
            )
        return find_objects(labels, drawn)


def find_objects(
    labels: Tensor, drawn: Tensor | None = None
) -> tuple[Tensor, tuple[Annotation, ...]]:
    """Tells the objects of a label map apart, and draws their boxes.

    Args:
        labels: ``uint8 [H, W]``, 0 background, 255 void.
        drawn: ``uint8 [H, W]`` with a number for each object, where somebody has drawn them; by
            default a connected region of one class is an object (over edges and corners).

    Returns:
        An object map as in :class:`deconvnet.voc.Sample`, and the objects. Regions under
        ``MIN_OBJECT`` pixels belong to none; beyond 254 objects the largest stay.
    """
    regions = []  # (pixels, label, a map of numbers, the region's number there)
    for label in (c for c in labels.unique().tolist() if c not in (0, VOID)):
        of_class = labels == label
        if drawn is None:
            _, found = cv2.connectedComponents(of_class.byte().numpy(), connectivity=8)
            numbers = torch.from_numpy(found)
        else:
            numbers = torch.where(of_class & (drawn != VOID), drawn, 0).int()
        pixels = numbers.flatten().bincount()
        pixels[0] = 0  # all that is not of the class
        large = (pixels >= MIN_OBJECT).nonzero().flatten().tolist()
        regions += [(int(pixels[k]), label, numbers, k) for k in large]
    regions.sort(key=lambda region: -region[0])

    objects = torch.where(labels == VOID, labels, 0)
    annotations = []
    for number, (_, label, numbers, k) in enumerate(regions[: VOID - 1], start=1):
        mask = numbers == k
        objects[mask] = number
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        x0, y0, x1, y1 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        annotations.append(Annotation(label, tuple(float(edge) for edge in (x0, y0, x1, y1))))
    return objects, tuple(annotations)


def _near_match(missing: Path) -> str:
    """Another file that may be the missing one, as a part of a message."""
    others = missing.parent.iterdir() if missing.parent.is_dir() else ()
    wanted = missing.stem.casefold()
    found = sorted(path.name for path in others if path.stem.casefold().startswith(wanted))
    return f"; there is {found[0]}" if found else ""


def _files(folder: Path) -> dict[str, Path]:
    """The files of a folder by their names without suffix."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder of images")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name not in SYSTEM_FILES:
            if path.stem in files:
                raise ValueError(
                    f"{path}: expected one image of this name, but there is {files[path.stem]}"
                )
            files[path.stem] = path
    if not files:
        raise ValueError(f"{folder}: expected images, got an empty folder")
    return files
