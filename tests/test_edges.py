"""The network that draws outlines: its labels, its training, its edges in Edge Boxes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deconvnet import recipes
from deconvnet.edges import EdgeConfig, EdgeNet
from deconvnet.fcn import FCN8s, FCNConfig
from deconvnet.model import DeconvNet
from deconvnet.pretraining import BoundaryCrops, boundaries
from deconvnet.proposals import EdgeBoxesConfig, _ridge_orientation, edge_boxes, edge_map
from deconvnet.shapes import make_scene
from deconvnet.voc import VOCDataset
from deconvnet.weights import load_model, pretrained, save_model


def small() -> EdgeNet:
    torch.manual_seed(0)
    return EdgeNet(EdgeConfig(widths=(4, 6), input_size=32))


def test_scores_are_as_large_as_the_image() -> None:
    network = small().eval()
    for size in ((32, 32), (37, 51), (1, 1)):
        images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        assert network(images).shape == (2, 2, *size)
    with pytest.raises(ValueError, match="images must be"):
        network(torch.zeros(3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("fields", [{"widths": ()}, {"widths": (0, 4)}, {"num_classes": 3}])
def test_sizes_out_of_range(fields: dict) -> None:
    with pytest.raises(ValueError, match="at least 1|knows 2 classes"):
        EdgeConfig(**fields)


def test_boundaries_lie_on_both_sides_of_a_change() -> None:
    labels = torch.zeros(5, 8, dtype=torch.uint8)
    labels[:, 4:] = 7
    assert boundaries(labels).tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]] * 5
    assert boundaries(labels.clamp(max=0)).sum() == 0


def test_boundaries_run_through_the_middle_of_void() -> None:
    labels = torch.zeros(5, 12, dtype=torch.uint8)
    labels[:, 4:8], labels[:, 8:] = 255, 3
    assert boundaries(labels).tolist() == [[0] * 5 + [1, 1] + [0] * 5] * 5
    assert boundaries(torch.full((4, 4), 255, dtype=torch.uint8)).sum() == 0


def test_void_between_equal_labels_is_no_boundary() -> None:
    labels = torch.full((6, 9), 5, dtype=torch.uint8)
    labels[2:4, 3:6] = 255
    assert boundaries(labels).sum() == 0


def test_crops_for_the_edge_network(shapes_root: Path) -> None:
    recipe = replace(recipes.tiny(), edge_net=EdgeConfig(widths=(4, 6), input_size=48))
    dataset = VOCDataset(shapes_root, "val")
    crops = recipes.stage_crops(recipe, "edges", dataset)
    assert isinstance(crops, BoundaryCrops)
    assert len(crops) == len(dataset)
    image, outlines = crops[2, 5]
    plain, labels = crops.crops[2, 5]
    assert torch.equal(image, plain)
    assert torch.equal(outlines, boundaries(labels))
    assert outlines.unique().tolist() == [0, 1]


def test_it_learns_where_a_square_ends(tmp_path: Path) -> None:
    """A bright square on a striped ground: the stripes are edges too, but no outlines."""

    class Squares:
        example_labels = torch.zeros(64, dtype=torch.int64)

        def __len__(self) -> int:
            return 64

        def __getitem__(self, key):
            index = key[0] if isinstance(key, tuple) else key
            random = np.random.default_rng(index)
            image = torch.full((3, 32, 32), 60, dtype=torch.uint8)
            image[:, ::4] = 160
            y, x = random.integers(4, 14, 2)
            labels = torch.zeros(32, 32, dtype=torch.uint8)
            labels[y : y + 14, x : x + 14] = 1
            image[:, labels == 1] = 230
            return image, boundaries(labels)

    recipe = recipes.tiny()
    settings = replace(
        recipe.edges, iterations=60, learning_rate=1e-2, warmup=5, precision="float32"
    )
    network = recipes.train_stage(
        recipe, "edges", small(), Squares(), tmp_path, settings=settings, progress=False
    )
    image, outlines = Squares()[1000]
    with torch.no_grad():
        found = network.eval()(image[None]).softmax(1)[0, 1]
    assert found[outlines == 1].mean() > 0.6
    assert found[outlines == 0].mean() < 0.1

    path = tmp_path / "edges.safetensors"
    save_model(network, path)
    edges, _ = edge_map(image, path)
    inner = edges[2:-2, 2:-2] > 0.5
    assert inner.any()
    near = torch.nn.functional.max_pool2d(outlines[None].float(), 3, 1, 1)[0, 2:-2, 2:-2]
    assert (near[inner] == 1).all()


@pytest.mark.parametrize("degrees", [0, 20, 45, 90, 135, 170])
def test_orientation_of_a_ridge_is_that_of_its_normal(degrees: int) -> None:
    normal = math.radians(degrees)
    y, x = np.mgrid[-30:31, -30:31].astype(np.float32)
    ridge = np.exp(-((x * math.cos(normal) + y * math.sin(normal)) ** 2) / 8).astype(np.float32)
    found = _ridge_orientation(ridge)[10:-10, 10:-10][ridge[10:-10, 10:-10] > 0.9]
    turn = (found - normal + math.pi / 2) % math.pi - math.pi / 2
    assert np.abs(turn).max() < 0.06


def test_the_network_that_comes_with_the_package() -> None:
    path = pretrained("edges")
    assert path.stat().st_size < 1e6
    assert isinstance(load_model(path), EdgeNet)
    image = make_scene(seed=1).image
    found, chosen = edge_map(image), edge_map(image, path)
    assert all(torch.equal(a, b) for a, b in zip(found, chosen))
    magnitude, orientation = found
    assert magnitude.dtype == orientation.dtype == torch.float32
    assert magnitude.shape == orientation.shape == image.shape[1:]
    assert magnitude.min() >= 0 and 0.5 < magnitude.max() <= 1
    assert orientation.min() >= 0 and orientation.max() < math.pi


def test_edges_are_chosen_by_the_settings_or_the_argument(tmp_path: Path) -> None:
    image = make_scene(seed=1).image
    learned, gradient = (
        edge_boxes(image, EdgeBoxesConfig(edges=e)) for e in ("learned", "gradient")
    )
    assert not torch.equal(learned.boxes, gradient.boxes)
    again = edge_boxes(image, EdgeBoxesConfig(edges="gradient"), pretrained("edges"))
    assert torch.equal(again.boxes, learned.boxes)
    assert edge_boxes(image).boxes.equal(learned.boxes)
    path = tmp_path / "fcn.safetensors"
    save_model(FCN8s(FCNConfig.tiny()), path)
    with pytest.raises(ValueError, match="fcn.safetensors: expected an EdgeNet, got a FCN8s"):
        edge_boxes(image, model_path=path)
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        edge_map(image, tmp_path / "none.safetensors")


def test_an_edge_network_segments_nothing() -> None:
    assert not isinstance(small(), DeconvNet | FCN8s)
