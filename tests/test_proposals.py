"""Proposals: edges of known geometry, boxes of known objects, the cache, bad input."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deconvnet import proposals as module
from deconvnet.proposals import (
    EdgeBoxesConfig,
    Proposals,
    compute_proposals,
    download_structured_edge_model,
    edge_boxes,
    edge_map,
    recall,
    thin,
)
from deconvnet.voc import VOCDataset


class FakeDataset:
    """What ``compute_proposals`` asks of a VOCDataset; it counts how often it is asked."""

    def __init__(self, images: list[Tensor]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        return self.images[index]


def scene(
    box: tuple[int, int, int, int] = (40, 30, 110, 90),
    size: tuple[int, int] = (130, 160),
    noise: int = 5,
) -> Tensor:
    """A light rectangle on a dark ground, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    image = 60 + torch.randint(0, noise + 1, (3, *size), generator=generator)
    x0, y0, x1, y1 = box
    image[:, y0:y1, x0:x1] += 120
    return image.to(torch.uint8)


def plain_iou(a: list[float], b: list[float]) -> float:
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return w * h / (area - w * h)


# ------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("degrees", [0, 30, 45, 90, 120, 150])
def test_orientation_is_the_angle_of_the_normal(degrees: int) -> None:
    normal = math.radians(degrees)
    y, x = torch.meshgrid(torch.arange(-40.0, 41), torch.arange(-40.0, 41), indexing="ij")
    side = x * math.cos(normal) + y * math.sin(normal)
    image = (torch.sigmoid(side) * 200).to(torch.uint8).expand(3, -1, -1).contiguous()
    edges, orientation = edge_map(image)
    strong = edges > 0.5
    strong[:5], strong[-5:], strong[:, :5], strong[:, -5:] = False, False, False, False
    assert strong.sum() > 40
    assert side[strong].abs().max() <= 1.0  # the edge is where it was drawn, and thin
    turn = (orientation[strong] - normal + math.pi / 2) % math.pi - math.pi / 2
    assert turn.abs().max() < 0.06


def test_edges_have_the_promised_type_and_range() -> None:
    edges, orientation = edge_map(scene())
    assert edges.dtype == orientation.dtype == torch.float32
    assert edges.shape == orientation.shape == (130, 160)
    assert edges.min() == 0 and edges.max() == 1
    assert orientation.min() >= 0 and orientation.max() < math.pi


def test_colour_alone_makes_an_edge() -> None:
    image = torch.zeros(3, 60, 60, dtype=torch.uint8)
    image[0, :, :30], image[1, :, 30:] = 150, 107  # red, green of about the same lightness
    edges, _ = edge_map(image)
    assert (edges[10:50].argmax(dim=1) - 29.5).abs().max() <= 1
    assert edges[10:50].amax(dim=1).min() > 0.9


def test_noise_in_an_empty_image_is_no_edge() -> None:
    image = (128 + torch.randint(-1, 2, (3, 80, 80))).to(torch.uint8)
    assert edge_map(image)[0].max() < 0.5


def test_thin_keeps_the_ridge_only() -> None:
    profile = np.float32([0, 0.2, 0.6, 0.9, 0.6, 0.2, 0])
    edges = np.tile(profile, (8, 1))
    thinned = thin(edges, np.zeros((8, 7), np.float32))
    assert (thinned == edges * (edges == np.float32(0.9))).all()
    turned = thin(np.ascontiguousarray(edges.T), np.full((7, 8), np.pi / 2, np.float32))
    assert np.array_equal(turned, thinned.T)


def test_thin_keeps_one_of_two_equal_neighbours() -> None:
    edges = np.tile(np.float32([0, 0.5, 0.8, 0.8, 0.5, 0]), (6, 1))
    thinned = thin(edges, np.zeros((6, 6), np.float32))
    assert ((thinned > 0).sum(axis=1) == 1).all() and thinned.max() == np.float32(0.8)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), radius=st.integers(1, 3))
def test_thin_only_removes_and_more_with_a_larger_radius(seed: int, radius: int) -> None:
    random = np.random.default_rng(seed)
    edges = random.random((12, 15), dtype=np.float32)
    orientation = random.random((12, 15), dtype=np.float32) * 3
    thinned = thin(edges, orientation, radius)
    assert ((thinned == edges) | (thinned == 0)).all()
    assert ((thin(edges, orientation, radius + 1) == 0) | (thinned > 0)).all()


# ------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("box", [(40, 30, 110, 90), (5, 50, 60, 120), (80, 5, 155, 40)])
def test_the_best_box_is_the_object(box: tuple[int, int, int, int]) -> None:
    boxes, scores = edge_boxes(scene(box))
    assert plain_iou(boxes[0].tolist(), list(box)) > 0.8
    assert scores[0] > 0


@settings(max_examples=25)
@given(height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_any_image_gives_sorted_boxes_within_it(height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    boxes, scores = edge_boxes(image, EdgeBoxesConfig(min_box_area=20, max_boxes=50))
    assert boxes.dtype == scores.dtype == torch.float32
    assert boxes.shape == (len(scores), 4) and len(scores) <= 50
    assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (scores[1:] <= scores[:-1]).all()
    again = edge_boxes(image, EdgeBoxesConfig(min_box_area=20, max_boxes=50))
    assert torch.equal(boxes, again.boxes) and torch.equal(scores, again.scores)


def test_an_image_without_edges_has_no_proposals() -> None:
    boxes, scores = edge_boxes(torch.full((3, 50, 60), 90, dtype=torch.uint8))
    assert boxes.shape == (0, 4) and scores.shape == (0,)
    assert boxes.dtype == scores.dtype == torch.float32


@pytest.mark.parametrize("score_shape", [(-1, 1), (-1,)])
def test_scores_of_opencv_4_and_5(monkeypatch: pytest.MonkeyPatch, score_shape: tuple) -> None:
    class Finder:
        def getBoundingBoxes(self, edges: np.ndarray, orientation: np.ndarray):  # noqa: N802
            boxes = np.int32([[1, 2, 10, 20], [0, 0, 99, 99], [5, 5, 7, 8]])
            return boxes, np.float32([0.1, 0.3, 0.2]).reshape(score_shape)

    class Ximgproc:
        def createEdgeBoxes(self, **settings: float) -> Finder:  # noqa: N802
            assert settings["maxBoxes"] == 2000 and settings["edgeMergeThr"] == 0.5
            assert "maxSide" not in settings
            return Finder()

    monkeypatch.setattr(module, "_ximgproc", Ximgproc)
    boxes, scores = edge_boxes(torch.zeros(3, 40, 30, dtype=torch.uint8))
    assert boxes.tolist() == [[0, 0, 30, 40], [5, 5, 12, 13], [1, 2, 11, 22]]
    assert scores.tolist() == pytest.approx([0.3, 0.2, 0.1])


def test_large_images_are_searched_smaller() -> None:
    image = scene((400, 300, 1100, 900), (1300, 1600))
    boxes, _ = edge_boxes(image, EdgeBoxesConfig(max_side=160))
    assert plain_iou(boxes[0].tolist(), [400, 300, 1100, 900]) > 0.8
    assert boxes[:, 2].max() <= 1600 and boxes[:, 3].max() <= 1300


def test_settings_reach_opencv() -> None:
    few = edge_boxes(scene(), EdgeBoxesConfig(max_boxes=3))
    assert len(few.boxes) == 3
    areas = [
        (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).min()
        for boxes, _ in (edge_boxes(scene(), EdgeBoxesConfig(min_box_area=a)) for a in (100, 6000))
    ]
    assert areas[0] < 1000 < 2000 < areas[1]  # refining a box may shrink it below the limit
    assert EdgeBoxesConfig.tiny().min_box_area < EdgeBoxesConfig().min_box_area


@pytest.mark.parametrize(
    ("field", "value"), [("alpha", 1.0), ("beta", 0.0), ("eta", 1.5), ("max_boxes", 0),
                         ("max_side", 0), ("max_aspect_ratio", 0.5), ("min_score", -1.0),
                         ("gamma", float("nan")), ("min_box_area", float("inf"))]
)  # fmt: skip
def test_config_refuses_values_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        EdgeBoxesConfig(**{field: value})


@pytest.mark.parametrize("find", [edge_boxes, edge_map])
def test_images_of_a_wrong_kind(find) -> None:
    with pytest.raises(ValueError, match=r"\[3, H, W\], got \[50, 60\]"):
        find(torch.zeros(50, 60, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[3, 0, 5\]"):
        find(torch.zeros(3, 0, 5, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8, got torch.float32"):
        find(torch.zeros(3, 50, 60))


# ------------------------------------------------------------------------------------ recall


def test_recall_by_hand() -> None:
    proposals = [
        Proposals(torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), torch.tensor([2.0, 1])),
        Proposals(torch.zeros(0, 4), torch.zeros(0)),
        Proposals(torch.tensor([[0.0, 0, 4, 4]]), torch.ones(1)),
    ]
    objects = [
        torch.tensor([[0.0, 0, 10, 8], [20, 20, 30, 26], [50, 50, 60, 60]]),  # IoU .8, .6, 0
        torch.tensor([[0.0, 0, 5, 5]]),
        torch.zeros(0, 4),
    ]
    assert recall(proposals, objects) == 2 / 4
    assert recall(proposals, objects, iou=0.7) == 1 / 4
    assert recall(proposals, objects, max_boxes=1) == 1 / 4


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), iou=st.sampled_from([0.3, 0.5, 0.7]))
def test_recall_equals_the_plain_loop(seed: int, iou: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def boxes(n: int) -> Tensor:
        corners = torch.randint(0, 20, (n, 2), generator=generator).float()
        return torch.cat([corners, corners + torch.randint(1, 20, (n, 2), generator=generator)], 1)

    found, objects = [boxes(6) for _ in range(3)], [boxes(4) for _ in range(3)]
    covered = sum(
        max(plain_iou(o, p) for p in f.tolist()) >= iou - 1e-7
        for f, os_ in zip(found, objects)
        for o in os_.tolist()
    )
    assert recall([Proposals(f, torch.zeros(6)) for f in found], objects, iou) == covered / 12


def test_recall_errors() -> None:
    one = [Proposals(torch.zeros(1, 4), torch.zeros(1))]
    with pytest.raises(ValueError, match="one entry an image, got 1 and 2"):
        recall(one, [torch.zeros(1, 4)] * 2)
    with pytest.raises(ValueError, match="no box"):
        recall(one, [torch.zeros(0, 4)])


# --------------------------------------------------------------------------- data sets, cache


def equal(a: list[Proposals], b: list[Proposals]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.boxes, y.boxes) and torch.equal(x.scores, y.scores) for x, y in zip(a, b)
    )


def images() -> FakeDataset:
    blank = torch.full((3, 40, 40), 7, dtype=torch.uint8)
    return FakeDataset([scene(), blank, scene((5, 50, 60, 120)), scene((80, 5, 155, 40))])


def test_compute_proposals_equals_one_by_one_in_order(tmp_path: Path) -> None:
    expected = [edge_boxes(image) for image in images().images]
    assert equal(compute_proposals(images(), workers=1, progress=False), expected)
    parallel = compute_proposals(images(), tmp_path / "new" / "cache", workers=2, progress=False)
    assert equal(parallel, expected)
    assert len(list((tmp_path / "new" / "cache").iterdir())) == 4


def test_cache_is_used_and_depends_on_all_that_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments):
        calls.append(1)
        return edge_boxes(*arguments)

    monkeypatch.setattr(module, "edge_boxes", counted)

    def compute(data: FakeDataset, **changes) -> list[Proposals]:
        calls.clear()
        return compute_proposals(data, tmp_path, workers=1, progress=False, **changes)

    first = compute(images())
    assert len(calls) == 4
    assert equal(compute(images()), first) and not calls
    backwards = compute(FakeDataset(images().images[::-1]))
    assert equal(backwards[::-1], first) and not calls
    compute(images(), config=EdgeBoxesConfig(max_boxes=5))
    assert len(calls) == 4
    changed = images()
    changed.images[0] = changed.images[0].clone()
    changed.images[0][0, 0, 0] += 1
    compute(changed)
    assert len(calls) == 1
    # The same bytes in another shape are another image.
    compute(FakeDataset([changed.images[0].reshape(3, 160, 130)]))
    assert len(calls) == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "other arrays", "wrong shape"])
def test_a_broken_cache_file_is_computed_again(tmp_path: Path, damage: str) -> None:
    data = FakeDataset([scene()])
    first = compute_proposals(data, tmp_path, workers=1, progress=False)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "other arrays":
        np.savez(path, something=np.zeros(3))
    elif damage == "wrong shape":
        np.savez(path, boxes=np.zeros((2, 4), np.float32), scores=np.zeros(3, np.float32))
    else:
        path.write_bytes({"empty": b"", "cut": whole[:200], "garbage": b"x" * 500}[damage])
    assert equal(compute_proposals(data, tmp_path, workers=1, progress=False), first)
    (path,) = tmp_path.iterdir()
    with np.load(path) as arrays:
        assert np.array_equal(arrays["boxes"], first[0].boxes)


def test_errors_of_workers_arrive(tmp_path: Path) -> None:
    data = FakeDataset([scene(), torch.zeros(3, 5, 5)])
    for workers in (1, 2):
        with pytest.raises(TypeError, match="image must be uint8"):
            compute_proposals(data, workers=workers, progress=False)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        compute_proposals(data, workers=0)
    with pytest.raises(FileNotFoundError, match=r"missing\.yml\.gz"):
        compute_proposals(data, workers=1, model_path=tmp_path / "missing.yml.gz")


def test_an_empty_data_set() -> None:
    assert compute_proposals(FakeDataset([]), progress=False) == []


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    compute_proposals(FakeDataset([scene()]), workers=1)
    assert "Edge Boxes: 100%" in capsys.readouterr().err


@pytest.mark.skipif("DECONVNET_VOC" not in os.environ, reason="DECONVNET_VOC is not set")
def test_recall_on_voc() -> None:
    data = VOCDataset(os.environ["DECONVNET_VOC"], "val")
    chosen = range(0, len(data), len(data) // 15)
    found = compute_proposals(FakeDataset([data.image(i) for i in chosen]), progress=False)
    boxes = [torch.tensor([a.box for a in data.annotations(i)]).reshape(-1, 4) for i in chosen]
    assert recall(found, boxes) > 0.8
    assert recall(found, boxes, max_boxes=500) > 0.55


# --------------------------------------------------------------------------- the edge model


def write_forest(path: Path) -> Path:
    """A forest of one stump: where the gradient is large, an edge in the patch's middle."""
    text = f"""%YAML:1.0
---
options:
   stride: 2
   shrinkNumber: 2
   patchSize: 32
   patchInnerSize: 16
   numberOfGradientOrientations: 4
   gradientSmoothingRadius: 0
   regFeatureSmoothingRadius: 2
   ssFeatureSmoothingRadius: 8
   gradientNormalizationRadius: 4
   selfsimilarityGridSize: 5
   numberOfTrees: 1
   numberOfTreesToEvaluate: 1
childs:
   - [ 2, 0, 0 ]
featureIds:
   - [ {3 * 16 * 16 + 8 * 16 + 8}, 0, 0 ]
thresholds:
   - [ 0.1, 0., 0. ]
edgeBoundaries:
   - [ 0, 0, 0, 100 ]
edgeBins:
   - [ {", ".join(["120"] * 100)} ]
"""
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["forest.yml.gz", "forest.yml"])
def test_structured_edges(tmp_path: Path, name: str) -> None:
    path = write_forest(tmp_path / name)
    image = scene(noise=0)  # the stump sees normalised gradients, in which any noise is large
    edges, orientation = edge_map(image, path)
    assert edges.shape == (130, 160) and 0.3 < edges.max() <= 1
    assert orientation.min() >= 0 and orientation.max() < math.pi
    y, x = (edges > 0.1).nonzero().T
    assert 25 <= y.min() <= 35 and 85 <= y.max() <= 95  # the rectangle's 30 to 90
    assert 35 <= x.min() <= 45 and 105 <= x.max() <= 115
    found = edge_boxes(image, model_path=path)
    assert recall([found], [torch.tensor([[40.0, 30, 110, 90]])], iou=0.7) == 1
    assert not equal([edge_boxes(scene())], [edge_boxes(scene(), model_path=path)])


def test_the_cache_knows_the_model(tmp_path: Path) -> None:
    path, data = write_forest(tmp_path / "forest.yml"), FakeDataset([scene()])

    def compute(model: Path | None) -> list[Proposals]:
        return compute_proposals(
            data, tmp_path / "cache", workers=1, progress=False, model_path=model
        )

    assert not equal(compute(None), compute(path))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    path.write_text(path.read_text().replace("- [ 0.1,", "- [ 0.2,"))
    compute(path)
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.yml.gz", b"not gzip"), ("b.yml", b"garbage"), ("c.yml", b""),
     ("d.yml", b"%YAML:1.0\n---\noptions:\n   a: 1\n"),
     ("e.yml", b"numberOfTrees: 1"),
     ("f.yml.gz", gzip.compress(b"%YAML:1.0\nnumberOfTrees: 1" * 999, mtime=0)[:60])],
)  # fmt: skip
def test_files_that_are_no_edge_model(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: expected OpenCV's structured edge model"):
        edge_boxes(scene(), model_path=tmp_path / name)


def test_a_missing_edge_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yml\.gz"):
        edge_map(scene(), tmp_path / "none.yml.gz")


def test_an_opencv_that_cannot_be_loaded_is_explained() -> None:
    code = "import sys; sys.modules['cv2'] = None; import deconvnet.shapes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "apt-get install libgl1 libglib2.0-0" in done.stderr
    assert "import cv2 " in done.stderr and "deconvnet/__init__.py" in done.stderr


def test_opencv_without_contrib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module.cv2, "ximgproc")
    with pytest.raises(ImportError, match="opencv-contrib-python"):
        edge_boxes(scene())


def test_download_checks_the_hash(tmp_path: Path) -> None:
    source = write_forest(tmp_path / "source.yml.gz")
    digest, url = hashlib.sha256(source.read_bytes()).hexdigest(), source.as_uri()
    target = tmp_path / "models" / "model.yml.gz"
    with pytest.raises(ValueError, match="expected SHA-256 0000"):
        download_structured_edge_model(target, "0" * 64, url)
    assert not target.exists()
    assert download_structured_edge_model(target, digest.upper(), url) == target
    assert target.read_bytes() == source.read_bytes()
    source.unlink()  # what is there is not fetched again
    assert download_structured_edge_model(target, digest, url) == target
    with pytest.raises(ValueError, match=r"model\.yml\.gz: expected SHA-256 0000"):
        download_structured_edge_model(target, "0" * 64, url)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        download_structured_edge_model(target, "abc")
    with pytest.raises(OSError, match="source"):
        download_structured_edge_model(tmp_path / "other.yml.gz", digest, url)
    assert not (tmp_path / "other.yml.gz").exists()
