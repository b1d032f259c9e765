"""Pictures: what is drawn where, without looking at pixels that fonts decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import pyplot

from deconvnet import plotting
from deconvnet.inference import Prediction
from deconvnet.plotting import (
    name_places,
    overlay,
    show_boxes,
    show_labels,
    show_prediction,
    show_probabilities,
)
from deconvnet.proposals import Proposals
from deconvnet.voc import palette


@pytest.fixture
def scene():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 40, 60), generator=generator, dtype=torch.uint8)
    labels = torch.zeros(40, 60, dtype=torch.uint8)
    labels[5:25, 5:25] = 8
    labels[20:38, 35:58] = 12
    labels[0, :] = 255
    labels[30, 2] = 3
    return image, labels


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_overlay_blends_classes_and_leaves_the_background(scene):
    image, labels = scene
    assert torch.equal(overlay(image, labels, 0), image)
    painted = overlay(image, labels, 1)
    assert (painted[:, labels == 8] == palette()[8][:, None]).all()
    assert (painted[:, labels == 255] == 255).all()
    assert torch.equal(painted[:, labels == 0], image[:, labels == 0])
    half = overlay(image, labels, 0.5).int()
    expected = (image.int() + painted.int()) / 2
    assert (half - expected).abs().max() <= 0.5


def test_regions_carry_the_names_of_their_classes(scene):
    image, labels = scene
    figure = show_labels(image, labels)
    assert sorted(texts(figure)) == ["bird", "cat", "dog"]
    for text in figure.axes[0].texts:
        x, y = (round(v) for v in text.get_position())
        if text.get_text() == "bird":  # too small to write on, so it is named from above
            assert (x, y) == (2, 29)
        else:
            assert labels[y, x] == {"cat": 8, "dog": 12}[text.get_text()]
    own = show_labels(image, labels, ["none", *(f"shape {i}" for i in range(1, 10))])
    assert sorted(texts(own)) == ["class 12", "shape 3", "shape 8"]


def test_name_stands_inside_a_ring():
    ring = np.zeros((50, 50), bool)
    ring[5:45, 5:45] = True
    ring[12:38, 12:38] = False
    ((x, y, pixels),) = plotting._regions(ring, 1)
    assert ring[round(y), round(x)]
    assert pixels == ring.sum()
    two = np.zeros((30, 30), bool)
    two[2:5, 2:5] = two[10:28, 10:28] = True
    assert [pixels for _, _, pixels in plotting._regions(two, 1)] == [18 * 18, 9]
    everything = plotting._regions(np.ones((21, 31), bool), 1)
    assert everything[0][1] == 10


def test_boxes_are_drawn_in_place_best_on_top(scene):
    boxes = torch.tensor([[1.0, 2, 11, 22], [-5, 0, 70, 40], [0, 0, 5, 5]])
    patches = show_boxes(scene[0], boxes, count=2).axes[0].patches
    assert [p.get_bbox().bounds for p in patches] == [(-5.5, -0.5, 75, 40), (0.5, 1.5, 10, 20)]
    assert patches[-1].get_linewidth() > patches[0].get_linewidth()
    assert not show_boxes(scene[0], torch.zeros(0, 4)).axes[0].patches


def test_probabilities_show_the_strongest_classes():
    probabilities = torch.tensor([0.5, 0.1, 0.4]).view(3, 1, 1).expand(3, 8, 9)
    figure = show_probabilities(probabilities, ["none", "a", "b"], count=2)
    assert titles(figure)[:2] == ["none", "b"]
    assert (figure.axes[1].images[0].get_array() == np.float32(0.4)).all()


def prediction(scene, **stages):
    image, labels = scene
    probabilities = torch.nn.functional.one_hot(labels.long() % 255, 13).permute(2, 0, 1).float()
    stages = {f"{name}_probabilities": probabilities for name in stages if name != "boxes"}
    return Prediction(image, labels, probabilities, **stages)


def test_prediction_shows_the_stages_that_ran(scene):
    image, labels = scene
    full = prediction(scene, deconvnet=1, fcn=1, ensemble=1, crf=1)
    full = Prediction(
        **{
            **vars(full),
            "proposals": Proposals(torch.zeros(9, 4), torch.zeros(9)),
            "boxes": torch.tensor([[1.0, 1, 9, 9], [2, 2, 8, 8]]),
        }
    )
    figure = show_prediction(full)
    expected = ["image", "2 of 2 boxes", "DeconvNet", "FCN", "ensemble", "ensemble and CRF"]
    assert titles(figure) == expected
    assert len(figure.axes[1].patches) == 2
    assert texts(figure) == 4 * ["bird", "cat", "dog"]
    small = prediction(scene, deconvnet=1, crf=1)
    assert titles(show_prediction(small)) == ["image", "DeconvNet", "with CRF"]
    named = Prediction(**{**vars(small), "class_names": tuple("abcdefghijklm")})
    assert set(texts(show_prediction(named))) == {"d", "i", "m"}


def test_prediction_of_a_large_photograph(scene):
    """Its stages were computed at a smaller size."""
    large = prediction(scene, deconvnet=1, crf=1)
    image = large.image.repeat_interleave(2, 1).repeat_interleave(2, 2)
    figure = show_prediction(Prediction(**{**vars(large), "image": image}))
    assert texts(figure) == 2 * ["bird", "cat", "dog"]
    assert figure.axes[1].images[0].get_array().shape == (80, 120, 3)


def test_names_of_a_noisy_map_cost_little(monkeypatch):
    """A distance transform for each of its thousands of regions would take a minute."""
    calls, transform = [], plotting.cv2.distanceTransform
    monkeypatch.setattr(
        plotting.cv2, "distanceTransform", lambda *a, **k: calls.append(a) or transform(*a, **k)
    )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(21, (375, 500), generator=generator, dtype=torch.uint8)
    noise[100:200, 100:300] = 7
    places = name_places(noise)
    assert ("car", False) in {(name, above) for name, _, _, above in places}
    assert len(places) == 20
    assert 0 < len(calls) <= len(places)


def test_figures_save_show_themselves_and_stay_out_of_pyplot(scene, tmp_path):
    figure = show_labels(*scene)
    figure.savefig(tmp_path / "labels.svg")
    assert "<svg" in (tmp_path / "labels.svg").read_text()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []


def test_bad_input_is_named(scene):
    image, labels = scene
    with pytest.raises(ValueError, match=r"image's size \[40, 60\]"):
        show_labels(image, labels[:, :5])
    with pytest.raises(ValueError, match="alpha"):
        overlay(image, labels, 1.5)
    with pytest.raises(TypeError, match="uint8"):
        overlay(image.float(), labels)
    with pytest.raises(TypeError, match="uint8"):
        show_boxes(image.float(), torch.zeros(0, 4))


def test_an_activation_keeps_its_resolution_and_its_scale():
    crop = torch.zeros(3, 16, 16, dtype=torch.uint8)
    activation = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    figure = plotting.show_activation(crop, activation, torch.zeros(16, 16, dtype=torch.uint8), 8.0)
    middle = figure.axes[1]
    assert middle.get_title() == "2 × 2"
    (shown,) = middle.get_images()
    assert shown.get_array().tolist() == activation.tolist()
    assert shown.get_clim() == (0, 8)
    dark = plotting.show_activation(crop, 0 * activation, torch.zeros(16, 16, dtype=torch.uint8))
    assert dark.axes[1].get_images()[0].get_clim() == (0, 1)
