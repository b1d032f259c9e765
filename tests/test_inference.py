"""Aggregation against a plain stack of padded maps, geometry against training's crops."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deconvnet import inference
from deconvnet.aggregation import ScoreCanvas, cut_crops
from deconvnet.deployment import prepare_for_inference
from deconvnet.ensemble import mean_of_probabilities, product_of_scores
from deconvnet.fcn import FCN8s
from deconvnet.inference import (
    InferenceConfig,
    Predictor,
    TorchvisionFCN,
    aggregate_proposals,
    fcn_scores,
    label_map,
    select_boxes,
    shrink,
    whole_image_scores,
)
from deconvnet.instances import crop_and_resize
from deconvnet.model import DeconvNet, ModelConfig
from deconvnet.proposals import Proposals
from deconvnet.shapes import make_scene
from deconvnet.voc import write_image
from deconvnet.weights import pretrained

SIZE, CLASSES = 8, 3


class PixelNet(nn.Module):
    """Scores each pixel by its colour alone, so that every step can be redone by hand."""

    def __init__(self, classes: int = CLASSES, size: int = SIZE, seed: int = 0) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_classes=classes, input_size=size)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(classes, 3, generator=generator))
        self.batches: list[int] = []
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        pixels = (images.float() - 128) / 64
        return (self.weight[None, :, :, None, None] * pixels[:, None]).sum(2)


class PatternNet(PixelNet):
    """Answers every crop with the same map of scores."""

    def __init__(self, pattern: Tensor) -> None:
        super().__init__(len(pattern), pattern.shape[-1])
        self.register_buffer("pattern", pattern)

    def forward(self, images: Tensor) -> Tensor:
        return self.pattern.expand(len(images), *self.pattern.shape)


def random_image(height: int = 20, width: int = 26, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


def random_boxes(count: int, height: int = 20, width: int = 26, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    corner -= 5
    sides = 8 + 10 * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, corner + sides], 1)


def stacked_maps(model: nn.Module, image: Tensor, boxes: list[tuple[int, ...]]) -> Tensor:
    """Each box's score map on a canvas of zeros, all kept: ``[N, C, H, W]``."""
    _, height, width = image.shape
    size, far = model.config.input_size, 100
    maps = []
    for x0, y0, x1, y1 in boxes:
        crop, _ = crop_and_resize(image, None, (x0, y0, x1, y1), size)
        scores = model(crop[None])[0].numpy()
        canvas = np.zeros((len(scores), height + 2 * far, width + 2 * far), np.float32)
        for channel, score in zip(canvas, scores):
            channel[y0 + far : y1 + far, x0 + far : x1 + far] = cv2.resize(
                score, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR
            )
        maps.append(torch.from_numpy(canvas[:, far:-far, far:-far].copy()))
    return torch.stack(maps)


# ------------------------------------------------------------------------------------ boxes


def test_paper_boxes_are_enlarged_and_counted():
    boxes = torch.tensor([[10.0, 10, 20, 30], [0, 0, 10, 10], [5, 5, 6, 6]])
    selected = select_boxes(boxes, (40, 40), InferenceConfig(num_proposals=2))
    assert selected == [(9, 8, 21, 32), (-1, -1, 11, 11)]


def test_release_boxes_are_square_and_small_ones_do_not_count():
    boxes = torch.tensor([[10.0, 10, 20, 30], [0, 0, 10, 10], [0, 0, 30, 10]])
    config = InferenceConfig(convention="release", num_proposals=2, min_side=20)
    assert select_boxes(boxes, (40, 40), config) == [(3, 8, 27, 32), (-3, -13, 33, 23)]
    assert InferenceConfig.release().min_side == 112


def test_precision_is_checked_before_any_image():
    with pytest.raises(ValueError, match=r"precision must be one of \('auto', .*got 'fp16'"):
        InferenceConfig(precision="fp16")


def test_whole_image_is_one_more_box():
    config = InferenceConfig(num_proposals=1, include_whole_image=True)
    selected = select_boxes(random_boxes(3), (20, 26), config)
    assert len(selected) == 2
    assert selected[-1] == (0, 0, 26, 20)
    assert select_boxes(torch.zeros(0, 4), (20, 26), config) == [(0, 0, 26, 20)]


# ------------------------------------------------------------------------------------ crops


@settings(max_examples=60, deadline=None)
@given(
    x0=st.floats(-40, 60),
    y0=st.floats(-40, 50),
    width=st.floats(1, 90),
    height=st.floats(1, 90),
    size=st.sampled_from([8, 16, 33]),
)
def test_crops_equal_those_of_training(x0, y0, width, height, size):
    image = random_image(50, 60)
    box = inference.pixel_box((x0, y0, x0 + width, y0 + height))
    expected, _ = crop_and_resize(image, None, box, size)
    crop = cut_crops(image, [box], size)[0]
    assert crop.dtype == torch.uint8
    sides = (box[2] - box[0], box[3] - box[1])
    if max(sides) > 2 * size and min(sides) < size:
        return  # OpenCV has no area interpolation where only one side shrinks
    assert (crop.int() - expected.int()).abs().max() <= 1


def test_shrinking_averages_all_pixels():
    checkerboard = (255 * ((torch.arange(60)[:, None] + torch.arange(60)) % 2)).byte()
    crop = cut_crops(checkerboard.expand(3, 60, 60), [(0, 0, 60, 60)], 10)
    assert ((crop.int() - 127).abs() <= 1).all()


def test_crop_beside_the_image_is_black():
    image = torch.full((3, 20, 26), 200, dtype=torch.uint8)
    crops = cut_crops(image, [(-30, 0, -10, 20), (26, 5, 30, 9), (-8, 0, 8, 16)], 16)
    assert (crops[:2] == 0).all()
    assert (crops[2, :, :, :8] == 0).all()
    assert (crops[2, :, :, 8:] == 200).all()


# ------------------------------------------------------------------------------ aggregation


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 7),
    convention=st.sampled_from(["paper", "release"]),
    combine=st.sampled_from(["max", "sum"]),
    batch_size=st.integers(1, 4),
)
def test_running_aggregate_equals_stacking_everything(seed, count, convention, combine, batch_size):
    model, image = PixelNet(seed=seed), random_image(seed=seed)
    boxes = random_boxes(count, seed=seed)
    config = InferenceConfig(convention=convention, combine=combine, batch_size=batch_size)
    scores = aggregate_proposals(model, image, boxes, config)

    maps = stacked_maps(model, image, select_boxes(boxes, (20, 26), config))
    if combine == "sum":
        expected = maps.sum(0)
    elif convention == "paper":
        expected = maps.amax(0)
    else:
        expected = maps.amax(0).clamp(min=0)
    # Crops may differ by one grey level of training's, which is 1/64 before the weights.
    tolerance = 0.02 * model.weight.abs().sum(1).max().item() * (count if combine == "sum" else 1)
    torch.testing.assert_close(scores, expected, atol=tolerance, rtol=0)


def test_negative_maximum_survives_in_the_paper_where_all_boxes_overlap():
    model = PatternNet(torch.full((2, SIZE, SIZE), -3.0))
    boxes = torch.tensor([[0.0, 0, 12, 20], [6, 0, 26, 20]])
    paper = aggregate_proposals(model, random_image(), boxes, InferenceConfig(context=1))
    assert (paper[:, :, 6:12] == -3).all()
    assert (paper[:, :, :6] == 0).all()
    assert (paper[:, :, 12:] == 0).all()
    release = InferenceConfig(context=1, convention="release")
    assert (aggregate_proposals(model, random_image(), boxes, release) == 0).all()


def test_pattern_is_pasted_where_its_box_is():
    pattern = torch.arange(2 * SIZE * SIZE).view(2, SIZE, SIZE).float() + 1
    box = torch.tensor([[5.0, 3, 5 + SIZE, 3 + SIZE]])
    config = InferenceConfig(context=1)
    scores = aggregate_proposals(PatternNet(pattern), random_image(), box, config)
    assert torch.equal(scores[:, 3 : 3 + SIZE, 5 : 5 + SIZE], pattern)
    scores[:, 3 : 3 + SIZE, 5 : 5 + SIZE] = 0
    assert (scores == 0).all()


def test_box_over_the_border_keeps_its_inner_part():
    pattern = torch.arange(2 * SIZE * SIZE).view(2, SIZE, SIZE).float() + 1
    box = torch.tensor([[-3.0, -2, SIZE - 3, SIZE - 2]])
    config = InferenceConfig(context=1)
    scores = aggregate_proposals(PatternNet(pattern), random_image(), box, config)
    assert torch.equal(scores[:, : SIZE - 2, : SIZE - 3], pattern[:, 2:, 3:])


@pytest.mark.parametrize("convention", ["paper", "release"])
@pytest.mark.parametrize("boxes", [torch.zeros(0, 4), torch.tensor([[-90.0, -90, -50, -50]])])
def test_nothing_to_see_is_background(convention, boxes):
    config = InferenceConfig(convention=convention)
    scores = aggregate_proposals(PixelNet(), random_image(), boxes, config)
    assert scores.shape == (CLASSES, 20, 26)
    assert (scores == 0).all()
    assert (scores.argmax(0) == 0).all()


def test_batches_change_nothing():
    image, boxes = random_image(), random_boxes(9)
    single = aggregate_proposals(PixelNet(), image, boxes, InferenceConfig(batch_size=1))
    for batch_size in (2, 4, 9, 100):
        model = PixelNet()
        config = InferenceConfig(batch_size=batch_size)
        assert torch.equal(aggregate_proposals(model, image, boxes, config), single)
        assert max(model.batches) == min(batch_size, 9)
        assert sum(model.batches) == 9


def test_order_of_boxes_changes_nothing():
    image, boxes = random_image(), random_boxes(8)
    for config in (InferenceConfig(), InferenceConfig(convention="release")):
        forward = aggregate_proposals(PixelNet(), image, boxes, config)
        backward = aggregate_proposals(PixelNet(), image, boxes.flip(0), config)
        assert torch.equal(forward, backward)


def test_aggregate_can_be_watched_and_is_finished_after_every_box():
    image, boxes = random_image(), random_boxes(6)
    seen = []
    aggregate_proposals(
        PixelNet(),
        image,
        boxes,
        InferenceConfig(batch_size=4),
        lambda i, box, scores: seen.append((i, box, scores.clone())),
    )
    selected = select_boxes(boxes, (20, 26))
    for count in range(1, 7):
        index, box, scores = seen[count - 1]
        assert (index, box) == (count - 1, selected[count - 1])
        fewer = aggregate_proposals(PixelNet(), image, boxes[:count])
        assert torch.equal(scores, fewer)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def test_memory_does_not_grow_with_the_number_of_boxes():
    largest = {}
    for count in (8, 200):
        places = set()
        config = InferenceConfig(num_proposals=count, batch_size=8)
        boxes = torch.tensor([[2.0, 2, 14, 14]]).repeat(count, 1)
        with LargestTensor() as mode:
            aggregate_proposals(
                PixelNet(),
                random_image(),
                boxes,
                config,
                lambda i, box, scores, places=places: places.add(scores.data_ptr()),
            )
        assert len(places) == 1
        largest[count] = mode.numel
    # Only the list of boxes itself is longer, and it is smaller than a batch of crops.
    assert largest[8] == largest[200]


def test_canvas_does_not_touch_the_crop_scores():
    scores = torch.randn(CLASSES, SIZE, SIZE)
    before = scores.clone()
    canvas = ScoreCanvas(CLASSES, (20, 26))
    canvas.paste((0, 0, SIZE, SIZE), scores)
    canvas.paste((2, 2, SIZE + 2, SIZE + 2), -scores)
    assert torch.equal(scores, before)


# ------------------------------------------------------------------- whole images and FCNs


def test_whole_image_is_warped_there_and_back():
    model, image = PixelNet(), random_image(31, 17)
    expected = stacked_maps(model, image, [(0, 0, 17, 31)])[0]
    scores = whole_image_scores(model, image)
    assert scores.shape == (CLASSES, 31, 17)
    torch.testing.assert_close(scores, expected, atol=0.1, rtol=0)
    config = InferenceConfig(num_proposals=0, include_whole_image=True)
    assert torch.equal(scores, aggregate_proposals(model, image, torch.zeros(0, 4), config))


def test_fcn_sees_the_image_at_its_own_size():
    image = random_image(13, 29)
    model = PixelNet()
    assert torch.equal(fcn_scores(model, image), model(image[None])[0])


def test_fcn_must_score_every_pixel():
    with pytest.raises(ValueError, match=r"every pixel of the image \[20, 26\]"):
        fcn_scores(PatternNet(torch.zeros(2, 4, 4)), random_image())


def test_torchvision_network_takes_the_place_of_fcn():
    from torchvision.models.segmentation import fcn_resnet50

    network = fcn_resnet50(weights=None, weights_backbone=None, num_classes=4)
    adapter = TorchvisionFCN(network, num_classes=4).eval()
    image = random_image(40, 33)
    scores = fcn_scores(adapter, image)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = network(((image / 255 - mean) / std)[None])["out"][0]
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)


# -------------------------------------------------------------------------------- predictor


def proposals(count: int = 5) -> Proposals:
    return Proposals(random_boxes(count), torch.linspace(1, 0.5, count))


def test_predictor_runs_the_papers_steps_in_order():
    deconvnet, fcn, image = PixelNet(seed=1), PixelNet(seed=2), random_image()
    result = Predictor(deconvnet, fcn, crf=None, device="cpu")(image, proposals())
    ours = aggregate_proposals(deconvnet, image, proposals().boxes)
    theirs = fcn_scores(fcn, image)
    assert torch.equal(result.deconvnet_scores, ours)
    assert torch.equal(result.deconvnet_probabilities, ours.softmax(0))
    assert torch.equal(result.fcn_probabilities, theirs.softmax(0))
    mean = mean_of_probabilities(ours.softmax(0), theirs.softmax(0))
    assert torch.equal(result.ensemble_probabilities, mean)
    assert result.probabilities is result.ensemble_probabilities
    assert torch.equal(result.labels, mean.argmax(0).byte())
    assert result.labels.dtype == torch.uint8
    assert result.crf_probabilities is None
    assert torch.equal(result.proposals.boxes, proposals().boxes)
    assert result.boxes.tolist() == [list(b) for b in select_boxes(proposals().boxes, (20, 26))]
    assert torch.equal(result.image, image)


def test_release_multiplies_scores():
    config = replace(InferenceConfig.release(), min_side=10)
    predictor = Predictor(PixelNet(seed=1), PixelNet(seed=2), config, crf=None, device="cpu")
    result = predictor(random_image(), proposals())
    assert (result.deconvnet_scores >= 0).all()
    expected = product_of_scores(result.deconvnet_scores, result.fcn_scores)
    assert torch.equal(result.ensemble_probabilities, expected)


def test_crf_comes_last(monkeypatch):
    seen = {}

    def fake_crf(image, probabilities, config):
        seen.update(image=image, probabilities=probabilities, config=config)
        return probabilities.flip(0)

    monkeypatch.setattr(inference, "dense_crf", fake_crf)
    predictor = Predictor(PixelNet(seed=1), PixelNet(seed=2), device="cpu")
    result = predictor(random_image(), proposals())
    assert seen["probabilities"] is result.ensemble_probabilities
    assert torch.equal(seen["image"], result.image)
    assert seen["config"] == predictor.crf
    assert result.probabilities is result.crf_probabilities
    assert torch.equal(result.labels, result.ensemble_probabilities.flip(0).argmax(0).byte())


def test_every_stage_can_be_left_out():
    image = random_image()
    alone = Predictor(PixelNet(), edge_boxes=None, crf=None, device="cpu")(image)
    assert torch.equal(alone.deconvnet_scores, whole_image_scores(PixelNet(), image))
    assert alone.proposals is None
    assert alone.boxes is None
    assert alone.fcn_scores is None
    assert alone.ensemble_probabilities is None

    partner = Predictor(None, PixelNet(), crf=None, device="cpu")(image)
    assert torch.equal(partner.probabilities, fcn_scores(PixelNet(), image).softmax(0))
    assert partner.deconvnet_scores is None

    boxes_only = Predictor(PixelNet(), crf=None, device="cpu")(image, proposals().boxes)
    with_scores = Predictor(PixelNet(), crf=None, device="cpu")(image, proposals())
    assert torch.equal(boxes_only.labels, with_scores.labels)


def test_whole_method_on_a_file_with_real_proposals_and_crf(tmp_path):
    image = torch.full((3, 60, 80), 40, dtype=torch.uint8)
    image[:, 15:45, 20:60] = 220
    write_image(tmp_path / "square.png", image)
    white = nn.Module()
    white.config = SimpleNamespace(num_classes=2, input_size=16)
    white.forward = lambda x: torch.stack([0 * x[:, 0].float(), x[:, 0].float() / 20 - 6], 1)
    white.eval()
    result = Predictor(white, white, device="cpu")(tmp_path / "square.png")
    assert torch.equal(result.image, image)
    assert len(result.proposals.boxes) > 0
    square = torch.zeros(60, 80, dtype=torch.bool)
    square[15:45, 20:60] = True
    agreement = ((result.labels == 1) == square).float().mean()
    assert agreement > 0.97
    again = Predictor(white, white, device="cpu")(str(tmp_path / "square.png"))
    assert torch.equal(again.labels, result.labels)


def test_class_names_come_with_the_weights_or_by_hand():
    model = PixelNet()
    assert Predictor(model, device="cpu").class_names is None
    model.metadata = {"class_names": ["background", "cat", "dog"]}
    assert Predictor(model, device="cpu").class_names == ("background", "cat", "dog")
    named = Predictor(model, device="cpu", class_names=("none", "a", "b"))
    assert named.class_names == ("none", "a", "b")
    with pytest.raises(ValueError, match="2 class_names for 3 classes"):
        Predictor(model, device="cpu", class_names=("a", "b"))
    silent = Predictor(PixelNet(), model, device="cpu")
    assert silent.class_names == ("background", "cat", "dog")
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="proposals are for a deconvnet"):
        Predictor(None, model, device="cpu")(image, torch.zeros(1, 4))


@pytest.mark.parametrize("settings", [{"config": {"hue": 3}}, {"smoothing": {"sigma": 1}}])
def test_weights_with_unknown_settings_are_named(tmp_path, settings):
    from deconvnet.model import DeconvNet, ModelConfig
    from deconvnet.weights import save_model

    path = tmp_path / "newer.safetensors"
    save_model(DeconvNet(ModelConfig.tiny(3)), path, {"settings": settings})
    with pytest.raises(ValueError, match=r"newer\.safetensors: its settings are not those"):
        Predictor.from_files(path)


def test_from_pretrained_builds_both_networks(monkeypatch):
    loaded = {"shapes-deconvnet": PixelNet(seed=1), "shapes-fcn": PixelNet(seed=2)}
    settings = {"config": {"num_proposals": 7}, "edge_boxes": {"max_boxes": 9}, "crf": {}}
    loaded["shapes-deconvnet"].metadata = {"settings": settings}
    monkeypatch.setattr(inference, "pretrained", lambda name: name)
    monkeypatch.setattr(inference, "load_model", loaded.__getitem__)
    predictor = Predictor.from_pretrained("shapes", device="cpu", crf=None)
    assert predictor.deconvnet is loaded["shapes-deconvnet"]
    assert predictor.fcn is loaded["shapes-fcn"]
    assert predictor.config.num_proposals == 7  # as the weights say
    assert predictor.edge_boxes.max_boxes == 9
    assert predictor.crf is None  # the option overrules them


# ---------------------------------------------------------------------------- large images


def test_shrink_averages_and_keeps_the_proportions():
    image = torch.randint(0, 256, (3, 60, 120), dtype=torch.uint8)
    assert shrink(image, None) is image
    assert shrink(image, 120) is image
    small = shrink(image, 40)
    assert small.shape == (3, 20, 40)
    expected = image.float().view(3, 20, 3, 40, 3).mean((2, 4))
    assert (small.float() - expected).abs().max() <= 0.501
    assert shrink(torch.zeros(3, 1, 500, dtype=torch.uint8), 50).shape == (3, 1, 50)


@pytest.mark.parametrize("size", [(40, 30), (37, 600), (700, 41), (10, 7)])
def test_label_map_is_the_argmax_of_interpolated_probabilities(size):
    probabilities = torch.randn(4, 20, 15).softmax(0)
    whole = F.interpolate(probabilities[None], size, mode="bilinear", align_corners=False)[0]
    two = whole.topk(2, dim=0).values
    clear = two[0] - two[1] > 1e-5
    labels = label_map(probabilities, size)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels[clear], whole.argmax(0).to(torch.uint8)[clear])
    assert clear.float().mean() > 0.99
    same = label_map(probabilities, (20, 15))
    assert torch.equal(same, probabilities.argmax(0).to(torch.uint8))


def test_large_images_are_segmented_at_a_smaller_size():
    net, fcn = PixelNet(seed=1), PixelNet(seed=2)
    image = torch.randint(0, 256, (3, 90, 160), dtype=torch.uint8)
    boxes = torch.tensor([[20.0, 10, 100, 70], [40, 20, 150, 90]])
    config = InferenceConfig(max_side=80, include_whole_image=True)
    found = Predictor(net, fcn, config, crf=None, device="cpu")(image, boxes)
    small = shrink(image, 80)
    expected = Predictor(net, fcn, replace(config, max_side=None), crf=None, device="cpu")(
        small, boxes / 2
    )
    assert torch.equal(found.image, image)
    assert torch.equal(found.proposals.boxes, boxes)
    assert torch.equal(found.boxes, 2 * expected.boxes)
    assert torch.equal(found.probabilities, expected.probabilities)
    assert torch.equal(found.labels, label_map(expected.probabilities, (90, 160)))
    assert found.labels.shape == (90, 160)


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.rand(3, 8, 8), TypeError, "image must be uint8.*float32"),
        (np.zeros((8, 8, 3), np.uint8), TypeError, "path or a uint8 tensor.*ndarray"),
        (torch.zeros(8, 9, 3).byte(), ValueError, r"permute\(2, 0, 1\)"),
        (torch.zeros(1, 8, 8).byte(), ValueError, r"\[3, H, W\].*\[1, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8).byte(), ValueError, r"\[3, H, W\]"),
        (torch.zeros(3, 0, 8).byte(), ValueError, r"\[3, H, W\]"),
    ],
)
def test_bad_images_are_named(image, error, message):
    for call in (
        lambda: aggregate_proposals(PixelNet(), image, torch.zeros(0, 4)),
        lambda: whole_image_scores(PixelNet(), image),
        lambda: fcn_scores(PixelNet(), image),
        lambda: Predictor(PixelNet(), crf=None, device="cpu")(image),
    ):
        with pytest.raises(error, match=message):
            call()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        Predictor(PixelNet(), device="cpu")(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.zeros(4), r"\[N, 4\].*\[4\]"),
        (torch.zeros(2, 5), r"\[N, 4\].*\[2, 5\]"),
        (torch.tensor([[0.0, 0, float("nan"), 4]]), "finite"),
        (torch.tensor([[5.0, 0, 5, 4]]), "x0 < x1"),
    ],
)
def test_bad_boxes_are_named(boxes, message):
    with pytest.raises(ValueError, match=message):
        aggregate_proposals(PixelNet(), random_image(), boxes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_stop_everything(value):
    pattern = torch.zeros(2, SIZE, SIZE)
    pattern[1, 3, 4] = value
    with pytest.raises(ValueError, match="not finite"):
        aggregate_proposals(PatternNet(pattern), random_image(), random_boxes(1))


def test_training_mode_and_wrong_channels_are_refused():
    with pytest.raises(ValueError, match=r"model\.eval"):
        whole_image_scores(PixelNet().train(), random_image())
    model = PixelNet()
    model.config.num_classes = 7
    with pytest.raises(ValueError, match=r"\[N, 7, h, w\]"):
        whole_image_scores(model, random_image())


def test_predictor_checks_its_networks():
    with pytest.raises(ValueError, match="neither"):
        Predictor(None)
    with pytest.raises(ValueError, match="same classes, got 3 and 4"):
        Predictor(PixelNet(3), PixelNet(4))
    with pytest.raises(ValueError, match="255 classes"):
        Predictor(PixelNet(256))


@pytest.mark.parametrize(
    "field",
    [
        {"convention": "Paper"},
        {"combine": "mean"},
        {"context": 0.0},
        {"context": float("nan")},
        {"num_proposals": -1},
        {"min_side": -1},
        {"batch_size": 0},
    ],
)
def test_bad_configuration_is_named(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        InferenceConfig(**field)


# --- the prepared copies ----------------------------------------------------------------------


def test_predictor_computes_with_prepared_copies():
    scene = make_scene(seed=5).image[:, :120, :150]
    fast, plain = (
        Predictor.from_pretrained("shapes", crf=None, device="cpu", prepare=flag)
        for flag in (True, False)
    )
    boxes = proposals().boxes
    actual, expected = fast(scene, boxes), plain(scene, boxes)
    assert [type(n) for n in fast._prepared] == [DeconvNet, FCN8s]
    assert not plain._prepared
    for field in ("deconvnet_scores", "fcn_scores"):
        scores = getattr(expected, field)
        tolerance = 1e-4 * float(scores.std())
        torch.testing.assert_close(getattr(actual, field), scores, rtol=1e-4, atol=tolerance)
    assert (actual.labels == expected.labels).float().mean() > 0.999


def test_a_network_prepared_for_another_device_is_refused():
    network = prepare_for_inference(DeconvNet(ModelConfig.tiny(3)))
    assert Predictor(network, device="cpu").deconvnet is network
    with pytest.raises(ValueError, match="prepared for a cpu.*on the meta"):
        Predictor(network, device="meta")


def test_prepared_copies_follow_the_weights():
    model = DeconvNet(ModelConfig.tiny(3))
    predictor = Predictor(model, edge_boxes=None, crf=None, device="cpu")
    image = make_scene(seed=5).image
    before = predictor(image).deconvnet_scores
    copied = predictor._prepared[model][1]
    predictor(image)
    assert predictor._prepared[model][1] is copied
    with torch.no_grad():
        model.score.bias += 1
    torch.testing.assert_close(predictor(image).deconvnet_scores, before + 1)
    assert predictor._prepared[model][1] is not copied


def test_prepared_copies_follow_a_fused_optimiser():
    """PyTorch does not count what it changes."""
    model = DeconvNet(ModelConfig.tiny(3))
    predictor = Predictor(model, edge_boxes=None, crf=None, device="cpu")
    image = make_scene(seed=5).image
    predictor(image)
    copied = predictor._prepared[model][1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model(image[None, :, :64, :64]).square().sum().backward()
    versions = [p._version for p in model.parameters()]
    optimizer.step()
    assert [p._version for p in model.parameters()] == versions
    found = predictor(image).deconvnet_scores
    assert predictor._prepared[model][1] is not copied
    fresh = Predictor(model, edge_boxes=None, crf=None, device="cpu")
    assert torch.equal(found, fresh(image).deconvnet_scores)


def test_prepared_copies_follow_the_precision(monkeypatch):
    """Where a CPU has bfloat16, ``auto`` takes it throughout, ``bfloat16`` not for the encoder."""
    monkeypatch.setattr("deconvnet.hardware.cpu_has_bfloat16", lambda: True)
    predictor = Predictor(DeconvNet(ModelConfig.tiny(3)), edge_boxes=None, crf=None, device="cpu")
    image = make_scene(seed=5).image
    for precision, dtype in (("auto", torch.bfloat16), ("bfloat16", torch.float32)):
        predictor.config = replace(predictor.config, precision=precision)
        assert predictor(image).deconvnet_scores.dtype == torch.float32
        (_, prepared), *_ = predictor._prepared.values()
        assert next(prepared.encoder.parameters()).dtype == dtype


def test_prepared_networks_and_others_are_taken_as_they_are():
    image = make_scene(seed=5).image
    for network in (prepare_for_inference(DeconvNet(ModelConfig.tiny(3))), PixelNet()):
        predictor = Predictor(network, edge_boxes=None, crf=None, device="cpu")
        predictor(image)
        assert not predictor._prepared


def test_sixteen_bits_on_a_cpu_leave_switches_and_scores_alone():
    """Wide enough for every rule; autocast must not touch what has its precision already."""
    torch.manual_seed(0)
    sizes = {"widths": (64, 64, 128, 256, 256), "fc_width": 64, "input_size": 64}
    model = DeconvNet(ModelConfig(3, **sizes)).eval()
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            torch.nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
    image = make_scene(seed=5).image
    scores = {}
    for precision in ("float32", "bfloat16"):
        config = InferenceConfig(num_proposals=3, precision=precision)
        predictor = Predictor(model, config=config, crf=None, device="cpu")
        scores[precision] = predictor(image).deconvnet_scores
        assert scores[precision].dtype == torch.float32
    exact, short = scores.values()
    error = (exact - short).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.03


def test_files_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes-fcn.safetensors: expected a DeconvNet, but"):
        Predictor.from_files(pretrained("shapes-fcn"))
    with pytest.raises(ValueError, match="shapes-deconvnet.safetensors: expected an FCN-8s, but"):
        Predictor.from_files(None, pretrained("shapes-deconvnet"))
    with pytest.raises(ValueError, match="must know the same classes .* aeroplane"):
        Predictor.from_files(pretrained("shapes-deconvnet"), pretrained("voc-fcn"))
