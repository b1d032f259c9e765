"""Object proposals: Edge Boxes on structured-forest or gradient edges.

At inference nobody says where the objects are, so DeconvNet asks Edge Boxes (Zitnick and Dollár,
ECCV 2014) for about 2,000 boxes and segments the best 50. A box scores high if it wholly encloses
many contours: edge pixels are grouped into segments, and segments that reach across the box's
border count nothing. OpenCV has that part; what it needs is a *thinned* edge map with the
orientation of each edge.

Two edge maps are on offer. The paper's, structured forests, needs a trained model
(:func:`download_structured_edge_model`). The gradient map needs nothing, and finds fewer objects
with the same number of boxes.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from deconvnet.files import file_digest, write_atomically
from deconvnet.hardware import gathered, join_processes
from deconvnet.voc import VOCDataset

STRUCTURED_EDGE_MODEL_URL = (
    "https://github.com/opencv/opencv_extra/raw/3.1.0/testdata/cv/ximgproc/model.yml.gz"
)
"""OpenCV's copy of the structured forest (Dollár and Zitnick, ICCV 2013)."""

# Part of every cache key: to be raised when the boxes for the same input change.
_VERSION = 1


@dataclass(frozen=True)
class EdgeBoxesConfig:
    """Settings of Edge Boxes. The defaults are its authors', with the number of boxes of DeconvNet.

    Raises:
        ValueError: If a field is out of range.
    """

    alpha: float = 0.65  # IoU of neighbouring boxes in the search (Edge Boxes, search strategy)
    beta: float = 0.75  # IoU above which the lower of two boxes is dropped (search strategy)
    eta: float = 1.0  # factor on beta after each kept box; 1 keeps it fixed (authors' code)
    min_score: float = 0.01  # lowest score kept (authors' code)
    max_boxes: int = 2000  # boxes an image (DeconvNet paper, inference)
    edge_min_mag: float = 0.1  # in [0, 1], magnitude below which a pixel is no edge (edge groups)
    edge_merge_thr: float = 0.5  # sum of turns in a segment, in units of pi (edge groups)
    cluster_min_mag: float = 0.5  # sum of magnitudes below which a segment joins another
    max_aspect_ratio: float = 3.0  # of boxes (search strategy)
    min_box_area: float = 1000.0  # px^2, smallest box (search strategy)
    gamma: float = 2.0  # how fast affinity falls with a change in direction (edge groups)
    kappa: float = 1.5  # how fast the weight of contours falls with box size (box scoring)
    max_side: int = 640  # px, larger images are searched at this size; VOC's have at most 500

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta must be in (0, 1], got {self.eta}")
        for name in ("max_boxes", "max_side", "max_aspect_ratio"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("min_score", "edge_min_mag", "edge_merge_thr", "cluster_min_mag",
                     "min_box_area", "gamma", "kappa"):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")

    @classmethod
    def tiny(cls) -> EdgeBoxesConfig:
        """For images of about 200 px, whose objects are smaller than VOC's."""
        return cls(min_box_area=200.0)


class Proposals(NamedTuple):
    """Boxes that may hold an object, best first.

    Attributes:
        boxes: ``float32 [N, 4]``, xyxy pixels, half open, within the image.
        scores: ``float32 [N]``, descending.
    """

    boxes: Tensor
    scores: Tensor


# ------------------------------------------------------------------------------------- edges


def edge_map(image: Tensor, model_path: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Finds thin edges and the direction across them.

    Args:
        image: ``uint8 [3, H, W]`` RGB.
        model_path: OpenCV's structured forest; None for gradient edges.

    Returns:
        ``float32 [H, W]`` edge magnitude in [0, 1], thinned to its ridges, and
        ``float32 [H, W]`` angle of the edge's normal in [0, pi), clockwise from the x axis.

    Raises:
        FileNotFoundError: If the model file does not exist.
        ValueError: If it is not such a model, or the image has a wrong shape.
        TypeError: If the image is not ``uint8``.
    """
    pixels = _pixels(image)
    if model_path is None:
        edges, orientation = gradient_edges(pixels)
    else:
        edges, orientation = _structured_edges(pixels, model_path)
    return torch.from_numpy(thin(edges, orientation)), torch.from_numpy(orientation)


def gradient_edges(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges as large colour gradients in Lab, where distance is roughly what the eye sees.

    The structure tensor (Di Zenzo, 1986) adds up the gradients of the three channels regardless
    of their signs; its larger eigenvalue is the squared edge strength, its eigenvector the
    normal. Smoothed, it drops texture and keeps contours.

    Args:
        pixels: ``uint8 [H, W, 3]`` RGB.

    Returns:
        ``float32 [H, W]`` magnitude in [0, 1], not thinned, and ``float32 [H, W]`` angle of the
        edge's normal in [0, pi).
    """
    lab = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)
    lab = cv2.GaussianBlur(lab, (0, 0), 1.5)
    dx = cv2.Sobel(lab, cv2.CV_32F, 1, 0, scale=1 / 8)
    dy = cv2.Sobel(lab, cv2.CV_32F, 0, 1, scale=1 / 8)
    xx, xy, yy = (
        cv2.GaussianBlur((a * b).sum(axis=2), (0, 0), 2.0)
        for a, b in ((dx, dx), (dx, dy), (dy, dy))
    )
    magnitude = np.sqrt((xx + yy + np.hypot(xx - yy, 2 * xy)) / 2)
    # A quantile, since one glint must not dim all other edges; the floor, in Lab units a pixel,
    # keeps the noise of an empty image from passing as edges.
    scale = max(float(np.quantile(magnitude, 0.99)), 1.0)
    return np.minimum(magnitude / scale, 1), _half_turn(np.arctan2(2 * xy, xx - yy) / 2)


def thin(edges: np.ndarray, orientation: np.ndarray, radius: int = 1) -> np.ndarray:
    """Non-maximum suppression: keeps an edge pixel if no neighbour across the edge is stronger.

    Without it Edge Boxes takes many times as long: every pixel of a broad edge is an edge.

    Args:
        edges: ``float32 [H, W]``.
        orientation: ``float32 [H, W]``, angle of the edge's normal.
        radius: How far to look on either side, in pixels.

    Returns:
        ``float32 [H, W]``, ``edges`` with all but its ridges set to 0.
    """
    height, width = edges.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    cos, sin = np.cos(orientation), np.sin(orientation)
    ridge = edges > 0
    for step in range(1, radius + 1):
        ahead, behind = (
            cv2.remap(
                edges, x + s * cos, y + s * sin, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
            for s in (step, -step)
        )
        # Strict on one side only: of two equal pixels side by side exactly one survives.
        ridge &= (edges >= ahead) & (edges > behind)
    return np.where(ridge, edges, np.float32(0))


def _structured_edges(pixels: np.ndarray, path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    detector = _detector(str(path), _model_digest(path))
    edges = np.clip(detector.detectEdges(pixels.astype(np.float32) / 255), 0, 1)
    return edges, _half_turn(detector.computeOrientation(edges))


# With the digest among the arguments, a replaced file is loaded anew.
@lru_cache(maxsize=1)
def _detector(path: str, digest: str) -> cv2.ximgproc.StructuredEdgeDetection:
    parts = ("childs", "featureIds", "thresholds", "edgeBoundaries", "edgeBins")
    try:
        # OpenCV ends the whole process on a file that lacks a part, so look first.
        file = cv2.FileStorage(path, cv2.FILE_STORAGE_READ)
        complete = all(file.getNode(part).size() > 0 for part in parts)
        if complete and file.getNode("options").getNode("numberOfTrees").real() > 0:
            return _ximgproc().createStructuredEdgeDetection(path)
        reason = "a file without a forest in it"
    except (cv2.error, SystemError) as error:
        reason = str(error)
    raise ValueError(f"{path}: expected OpenCV's structured edge model, got {reason}")


def _ximgproc() -> ModuleType:
    if not hasattr(cv2, "ximgproc"):
        raise ImportError(
            "cv2.ximgproc is missing: it is in opencv-contrib-python, not in opencv-python; "
            "uninstall the one, install the other"
        )
    return cv2.ximgproc


def check_image(image: Tensor) -> None:
    """Raises an error that says what is wrong if ``image`` is not ``uint8 [3, H, W]``."""
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must have shape [3, H, W], got {list(image.shape)}")
    if image.dtype != torch.uint8:
        raise TypeError(f"image must be uint8, got {image.dtype}")


def _pixels(image: Tensor) -> np.ndarray:
    check_image(image)
    return np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy())


def _half_turn(angle: np.ndarray) -> np.ndarray:
    """Angles modulo pi; rounding may return pi itself, which Edge Boxes must not see."""
    angle = np.mod(angle, np.float32(math.pi))
    return np.where(angle < np.float32(math.pi), angle, np.float32(0)).astype(np.float32)


# ------------------------------------------------------------------------------------- boxes


def edge_boxes(
    image: Tensor,
    config: EdgeBoxesConfig | None = None,
    model_path: str | Path | None = None,
) -> Proposals:
    """Finds boxes that may hold an object.

    Args:
        image: ``uint8 [3, H, W]`` RGB.
        config: Settings; the authors' by default.
        model_path: OpenCV's structured forest; None for gradient edges.

    Returns:
        At most ``config.max_boxes`` boxes, best first; none for an image without edges.

    Raises:
        FileNotFoundError: If the model file does not exist.
        ValueError: If it is not such a model, or the image has a wrong shape.
        TypeError: If the image is not ``uint8``.
    """
    config = config or EdgeBoxesConfig()
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    shrink = min(1.0, config.max_side / max(height, width))
    if shrink < 1:
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        image = torch.from_numpy(pixels).permute(2, 0, 1)
    edges, orientation = (t.numpy() for t in edge_map(image, model_path))

    settings = {_camel_case(k): v for k, v in asdict(config).items() if k != "max_side"}
    finder = _ximgproc().createEdgeBoxes(**settings)
    found, scores = finder.getBoundingBoxes(edges, orientation)
    if not len(found):  # then OpenCV returns () and None
        return Proposals(torch.zeros(0, 4), torch.zeros(0))

    boxes = np.asarray(found, np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    # The two axes apart: their sizes were rounded to whole pixels.
    boxes *= np.float32([width / edges.shape[1], height / edges.shape[0]] * 2)
    boxes = np.clip(boxes, 0, np.float32([width, height] * 2))
    scores = np.asarray(scores, np.float32).reshape(-1)  # (N, 1) in OpenCV 4, (N,) in 5
    kept = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(axis=1).nonzero()[0]
    order = kept[np.argsort(-scores[kept], kind="stable")]
    return Proposals(torch.from_numpy(boxes[order]), torch.from_numpy(scores[order]))


def _camel_case(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """:func:`torchvision.ops.box_iou`, loaded when first called.

    Loading it takes two seconds, and segmenting a photograph has no use for it.
    """
    from torchvision.ops import box_iou

    return box_iou(boxes, others)


def recall(
    proposals: Sequence[Proposals],
    ground_truth_boxes: Sequence[Tensor],
    iou: float = 0.5,
    max_boxes: int | None = None,
) -> float:
    """The share of objects that some proposal covers, over all images together.

    Args:
        proposals: One entry an image.
        ground_truth_boxes: ``float32 [M, 4]`` an image, xyxy pixels; M may be 0.
        iou: Overlap that counts as covered.
        max_boxes: Look only at each image's best so many proposals.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: If the two lists differ in length, or hold no object at all.
    """
    if len(proposals) != len(ground_truth_boxes):
        raise ValueError(
            "proposals and ground_truth_boxes must hold one entry an image, got "
            f"{len(proposals)} and {len(ground_truth_boxes)}"
        )
    covered = total = 0
    for (boxes, _), objects in zip(proposals, ground_truth_boxes, strict=True):
        total += len(objects)
        if len(objects) and len(boxes):
            covered += int((box_iou(objects, boxes[:max_boxes]).amax(dim=1) >= iou).sum())
    if not total:
        raise ValueError("ground_truth_boxes holds no box; recall of nothing is undefined")
    return covered / total


# -------------------------------------------------------------------------- whole data sets


def compute_proposals(
    dataset: VOCDataset,
    cache_dir: str | Path | None = None,
    config: EdgeBoxesConfig | None = None,
    workers: int | None = None,
    progress: bool = True,
    model_path: str | Path | None = None,
) -> list[Proposals]:
    """Finds the boxes of every image of a data set, in parallel, and remembers them.

    A cache file is named by everything that its boxes depend on: the image's pixels, the
    settings and the edge model. It can hence be shared by data sets and never goes stale; one
    that cannot be read is computed again. Under ``torchrun`` every process takes its share of the
    images, and all return the boxes of all of them.

    Args:
        dataset: Anything with a length and ``image(i)``, which returns ``uint8 [3, H, W]``.
        cache_dir: Folder of the cache, made where needed; None keeps nothing.
        config: Settings; Edge Boxes' defaults if None.
        workers: Threads; None takes one a core.
        progress: Show a progress bar.
        model_path: OpenCV's structured forest; None for gradient edges.

    Returns:
        One entry an image, in order.

    Raises:
        FileNotFoundError: If the model file does not exist.
        ValueError: If it is not such a model, or ``workers`` is below 1.
    """
    config = config or EdgeBoxesConfig()
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    model = None
    if model_path is not None:
        model = _model_digest(model_path)
        _detector(str(model_path), model)  # once, and not once a thread
    settings = repr((_VERSION, cv2.__version__, sorted(asdict(config).items()), model))
    if cache_dir is not None:
        cache_dir = Path(cache_dir)
        cache_dir.mkdir(parents=True, exist_ok=True)

    def find(index: int) -> Proposals:
        image = dataset.image(index)
        if cache_dir is None:
            return edge_boxes(image, config, model_path)
        path = cache_dir / f"{_cache_key(settings, image)}.npz"
        proposals = _read_cache(path)
        if proposals is None:
            proposals = edge_boxes(image, config, model_path)
            _write_cache(path, proposals)
        return proposals

    # Threads suffice, since OpenCV and NumPy compute outside Python's lock; and the images need
    # not be sent to other processes.
    rank, processes = join_processes()
    share = range(rank, len(dataset), processes)
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(find, share)
        quiet = not progress or rank > 0
        own = list(tqdm(found, "Edge Boxes", len(share), unit="image", disable=quiet))
    shares = gathered(own)
    return [shares[i % processes][i // processes] for i in range(len(dataset))]


def _cache_key(settings: str, image: Tensor) -> str:
    key = hashlib.sha256(f"{settings}{list(image.shape)}".encode())
    key.update(image.contiguous().numpy())
    return key.hexdigest()[:32]


def _read_cache(path: Path) -> Proposals | None:
    try:
        # From memory: NumPy leaves a damaged file open.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            boxes, scores = arrays["boxes"], arrays["scores"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
    if boxes.shape != (len(scores), 4) or scores.ndim != 1 or boxes.dtype != np.float32:
        return None
    return Proposals(torch.from_numpy(boxes), torch.from_numpy(scores))


def _write_cache(path: Path, proposals: Proposals) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, boxes=proposals.boxes.numpy(), scores=proposals.scores.numpy())
    write_atomically(path, buffer.getvalue())


# --------------------------------------------------------------------------- the edge model


@lru_cache(maxsize=8)
def _digest_of(path: Path, modified_ns: int, size: int) -> str:
    return file_digest(path)


def _model_digest(path: str | Path) -> str:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such edge model file")
    stat = path.stat()
    return _digest_of(path.resolve(), stat.st_mtime_ns, stat.st_size)


def download_structured_edge_model(
    path: str | Path, sha256: str, url: str = STRUCTURED_EDGE_MODEL_URL
) -> Path:
    """Downloads OpenCV's structured-forest edge model, unless it is already there.

    OpenCV publishes no checksum of this file, so the expected one is an argument: take it from
    a copy that you trust. Nothing is kept of a download that differs.

    Args:
        path: Where to put it; ends in ``.yml.gz``. Its folder is made where needed.
        sha256: The file's SHA-256, 64 hexadecimal digits.
        url: Where to get it.

    Returns:
        The path.

    Raises:
        ValueError: If the checksum is malformed, or the file, downloaded or already there, has
            another.
        OSError: If the download fails.
    """
    path, expected = Path(path), sha256.lower()
    if len(expected) != 64 or not set(expected) <= set("0123456789abcdef"):
        raise ValueError(f"sha256 must have 64 hexadecimal digits, got {sha256!r}")
    if path.is_file():
        _check_digest(path, path.read_bytes(), expected)
        return path
    with urllib.request.urlopen(url, timeout=60) as response:
        data = response.read()
    _check_digest(url, data, expected)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    return path


def _check_digest(source: str | Path, data: bytes, expected: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if got != expected:
        raise ValueError(f"{source}: expected SHA-256 {expected}, got {got}")
