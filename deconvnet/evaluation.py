"""Measuring methods on a data set, and writing down what was measured and how.

One pass over the images serves every rung of the paper's ladder: whatever
:class:`~deconvnet.inference.Predictor` computed on the way to its last map is judged too.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from deconvnet.files import atomic_write
from deconvnet.hardware import gathered, join_processes
from deconvnet.inference import Prediction, label_map
from deconvnet.instances import object_mask
from deconvnet.metrics import BinnedShare, BoundaryConfusionMatrix, ConfusionMatrix
from deconvnet.voc import VOID, Sample, VOCDataset

BOUNDARY_WIDTH = 3
"""Pixels on either side of a boundary that count as near it."""

DISTANCES = (2, 4, 8, 16, 32)
"""Ends of the ranges, in pixels from the nearest boundary, in which pixels are judged apart."""

SIZES = (32, 64, 96, 128, 192)
"""Ends of the ranges, in pixels of the root of the area, in which objects are judged apart."""

METHODS = {
    "fcn": "fcn_probabilities",
    "deconvnet": "deconvnet_probabilities",
    "ensemble": "ensemble_probabilities",
    "crf": "crf_probabilities",
}
"""Methods by name, each with its field of :class:`~deconvnet.inference.Prediction`."""


class Score:
    """What one method reached on a data set: everywhere, near boundaries, and by objects' sizes.

    Args:
        num_classes: Number of classes, the background included.
    """

    def __init__(self, num_classes: int) -> None:
        self.overall = ConfusionMatrix(num_classes)
        self.boundary = BoundaryConfusionMatrix(num_classes, BOUNDARY_WIDTH)
        self.by_distance = BinnedShare(DISTANCES)
        self.by_size = BinnedShare(SIZES)

    def update(self, prediction: Tensor, sample: Sample) -> None:
        """Adds one image's label map, ``uint8 [H, W]``, and what is annotated there."""
        target = sample.labels
        self.overall.update(prediction, target)
        self.boundary.update(prediction, target)
        right, counts = prediction == target, target != VOID
        self.by_distance.update(boundary_distance(target)[counts], right[counts])
        for k, annotation in enumerate(sample.annotations):
            mask = object_mask(sample, k)
            if mask.any():
                named = (prediction[mask] == annotation.label).double().mean()
                self.by_size.update(mask.sum()[None].sqrt(), named[None])

    def merge(self, other: Score) -> None:
        """Adds what another process counted."""
        self.overall.merge(other.overall)
        self.boundary.merge(other.boundary)
        self.by_distance.merge(other.by_distance)
        self.by_size.merge(other.by_size)

    def summary(self, class_names: Sequence[str]) -> dict[str, object]:
        """The figures as JSON-like values, in per cent; ``None`` where nothing counts.

        ``by_distance`` has the share of right pixels by their distance from the nearest
        boundary, ``by_size`` the mean share of an object's pixels that got its class, by the
        square root of its area. ``up_to`` is in pixels, ``None`` for all that is more.
        """
        return {
            "miou": _percent(self.overall.mean_iou()),
            "pixel_accuracy": _percent(self.overall.pixel_accuracy()),
            "boundary_accuracy": _percent(self.boundary.pixel_accuracy()),
            "boundary_miou": _percent(self.boundary.mean_iou()),
            "per_class_iou": dict(zip(class_names, map(_percent, self.overall.iou().tolist()))),
            "by_distance": _rows(self.by_distance),
            "by_size": _rows(self.by_size),
            "confusion": self.overall.matrix.tolist(),
        }


def boundary_distance(target: Tensor) -> Tensor:
    """How far each pixel is from the nearest boundary.

    The rim are the pixels that have another label among their eight neighbours, and lie at 1; all
    others lie at 1 plus the distance from the nearest of these. Where the boundary runs along rows
    or columns that is the distance from the nearest pixel with another label, elsewhere up to 0.41
    pixels less (a diagonal step less a straight one).

    Args:
        target: ``uint8 [H, W]``; void counts as a label of its own.

    Returns:
        ``float32 [H, W]``, in pixels, at least 1; infinite where all labels are equal.
    """
    labels = target.numpy()
    window = np.ones((3, 3), np.uint8)
    rim = (cv2.dilate(labels, window) != labels) | (cv2.erode(labels, window) != labels)
    if not rim.any():
        return torch.full(target.shape, math.inf)
    inside = cv2.distanceTransform((~rim).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return torch.from_numpy(inside + 1)


def _rows(binned: BinnedShare) -> list[dict[str, float | None]]:
    return [
        {"up_to": limit, "count": int(count), "right": _percent(share)}
        for limit, count, share in zip(
            [*binned.limits.tolist(), None], binned.counts.tolist(), binned.share().tolist()
        )
    ]


def _percent(share: float) -> float | None:
    return None if math.isnan(share) else round(100 * share, 2)


def evaluate(
    predict: Callable[[int, Sample], Mapping[str, Tensor]],
    dataset: VOCDataset,
    limit: int | None = None,
    progress: bool = True,
) -> dict[str, Score]:
    """Judges one or more methods on a data set, at the images' own sizes.

    Under ``torchrun`` every process takes its share of the images, and all return the same.

    Args:
        predict: Takes an image's index and sample; returns label maps ``uint8 [H, W]`` by
            method, the same methods for every image.
        dataset: Images and their annotated label maps.
        limit: Only the first so many images.
        progress: Show a progress bar.

    Returns:
        One :class:`Score` a method.

    Raises:
        ValueError: The data set is empty, ``limit`` is below 1, or a label map has another size
            than its image.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, got {limit}")
    count = len(dataset) if limit is None else min(len(dataset), limit)
    if count == 0:
        raise ValueError(f"{dataset.root}: split {dataset.split!r} has no images to evaluate on")
    rank, processes = join_processes()
    share = range(rank, count, processes)
    scores: dict[str, Score] = {}
    for i in tqdm(share, unit="image", disable=not progress or rank > 0):
        sample = dataset[i]
        for method, labels in predict(i, sample).items():
            score = scores.setdefault(method, Score(dataset.num_classes))
            score.update(labels, sample)
    if processes == 1:
        return scores
    total: dict[str, Score] = {}
    for others in gathered(scores):
        for method, score in others.items():
            total.setdefault(method, Score(dataset.num_classes)).merge(score)
    return total


def stage_labels(prediction: Prediction) -> dict[str, Tensor]:
    """The label map that each stage of one prediction would have given, ``uint8 [H, W]``."""
    maps = {method: getattr(prediction, field) for method, field in METHODS.items()}
    size = tuple(prediction.labels.shape)
    return {m: label_map(p, size) for m, p in maps.items() if p is not None}


def record(path: str | Path, **facts: object) -> dict[str, object]:
    """Writes one run's results as JSON, with what is needed to repeat it.

    Args:
        path: The ``.json`` file.
        **facts: Results and settings; numbers that are not finite are written as ``null``.

    Returns:
        What was written: the facts, and the command, commit, machine, versions and time.
    """
    run = _finite({**facts, **provenance()})
    with atomic_write(path) as temporary:
        temporary.write_text(_compact(json.dumps(run, indent=2, allow_nan=False)) + "\n")
    return run


def _finite(value: object) -> object:
    """The same with None for numbers that JSON lacks: hours of results are worth more than one."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _compact(text: str) -> str:
    """Puts lists of plain numbers on one line."""
    rows = r"\[\s+([-\d.,eE+\s]+?)\s+\]"
    return re.sub(rows, lambda row: "[" + " ".join(row[1].split()) + "]", text)


def read_record(name: str) -> dict[str, object]:
    """Reads one of the project's recorded runs.

    Args:
        name: A file of the repository's folder ``results``, without ``.json``: ``"shapes-seed0"``.

    Returns:
        What :func:`record` wrote. Where the package was installed without its repository, the
        file is fetched from there.

    Raises:
        OSError: There is no such record, or no network to fetch it with.
    """
    path = Path(__file__).parents[1] / "results" / f"{name}.json"
    if path.parent.is_dir():
        return json.loads(path.read_text())
    urls = dict(u.split(", ") for u in metadata("deconvnet").get_all("Project-URL"))
    repository = urls["Repository"].replace("://github.com", "://raw.githubusercontent.com")
    with urllib.request.urlopen(f"{repository}/main/results/{name}.json", timeout=60) as response:
        return json.load(response)


def provenance() -> dict[str, object]:
    """Command, commit, machine, versions and time of this process, as JSON-like values."""
    return {
        "command": command(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def command() -> str:
    """The command line of this process, as one would type it in the current folder."""
    script = Path(sys.argv[0])
    if script.stem == "deconvnet" or script.parts[-2:] == ("deconvnet", "__main__.py"):
        program = ["deconvnet"]
    else:
        program = ["python", _without_folders(sys.argv[0])]
    return shlex.join([*program, *map(_without_folders, sys.argv[1:])])


def _without_folders(argument: str) -> str:
    """Shortens an absolute path, so that no record names a machine's folders."""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={_without_folders(value)}"
    path, here = Path(argument), Path.cwd()
    if not path.is_absolute():
        return argument
    return str(path.relative_to(here) if path.is_relative_to(here) else Path(*path.parts[-3:]))


def commit() -> str | None:
    """The git commit of the package's source, marked ``-dirty`` if the code was changed since.

    Code is the package and the benchmarks; what they record, and the book, may change.

    ``None`` where the package was installed without its repository.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # it may lie in another's repository
        changed = git("status", "--porcelain", "--", ".", "../benchmarks")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # installed from a wheel: the version says which code it was


def machine() -> dict[str, object]:
    """The hardware in words."""
    facts: dict[str, object] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # names of CPUs do not tell
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of those that it computes with, where installed."""
    found = {"python": platform.python_version()}
    for package in ("deconvnet", "torch", "torchvision", "opencv-contrib-python", "numpy", "numba"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_log(path: str | Path) -> list[dict[str, float | None]]:
    """Reads a training log (``log.csv``) as one dictionary a row; absent values are ``None``."""
    with open(path, newline="") as file:
        return [
            {key: float(value) if value else None for key, value in row.items()}
            for row in csv.DictReader(file)
        ]
