"""Live figures without a browser: set a control's value, and look at what is shown."""

from __future__ import annotations

import base64
import re
from html import unescape
from types import SimpleNamespace

import ipywidgets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deconvnet import shapes, widgets
from deconvnet.activations import decoder_activations
from deconvnet.crf import CRFConfig, dense_crf
from deconvnet.inference import InferenceConfig, aggregate_proposals
from deconvnet.instances import InstanceConfig, crop_and_resize, expand_box, square_box
from deconvnet.metrics import ConfusionMatrix
from deconvnet.model import deconvnet_tiny
from deconvnet.plotting import Figure
from deconvnet.voc import Sample

NAMES = ("background", "red", "green")


class ColourNet(nn.Module):
    """Scores each pixel by its own colour; half of every crop's class is in doubt."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_classes=3, input_size=8)
        self.crops = 0
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self.crops += len(images)
        pixels = (images.float() - 128) / 64
        return torch.stack([-pixels.sum(1), 2 * pixels[:, 0], 2 * pixels[:, 1]], 1)


@pytest.fixture
def scene():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 20, 26), generator=generator, dtype=torch.uint8)
    labels = torch.randint(3, (20, 26), generator=generator).byte()
    labels[0] = 255
    return image, labels


@pytest.fixture
def boxes():
    return torch.tensor([[1.0, 2, 12, 12], [8, 4, 22, 18], [-3, 0, 9, 25], [14, 9, 26, 20]])


@pytest.fixture
def shown(monkeypatch):
    """The label maps that would be drawn, the latest one last; drawing noise takes long."""
    maps: list[Tensor] = []

    def blank(image, labels, class_names=None):
        maps.append(labels)
        figure = Figure(figsize=(0.1, 0.1))
        figure.add_axes((0, 0, 1, 1))
        return figure

    monkeypatch.setattr(widgets, "show_labels", blank)
    return maps


def control(widget, description):
    return next(c for c in widget.children if getattr(c, "description", None) == description)


def html(widget):
    return widget.children[-1].value


def tables(widget):
    """Every table of the widget by its title, as a tensor."""
    found = re.findall(r"<table><caption>(.*?)</caption>(.*?)</table>", html(widget))
    return {
        unescape(title): torch.tensor(
            [
                [float(cell) for cell in re.findall(r">([^<>]+)</td>", row)]
                for row in re.findall(r"<tr>(.*?)</tr>", body)
            ]
        )
        for title, body in found
    }


def test_switches_show_what_pytorch_pools_and_unpools():
    values = torch.tensor([[1.0, 3, 2, 0], [8, 4, 1, 5], [0, 2, 6, 3], [7, 1, 2, 9]])
    widget = widgets.explore_switches(values)
    fields = widget.children[0].children
    assert [field.value for field in fields] == values.flatten().tolist()
    assert [field.tooltip for field in fields][:5:4] == ["row 1, column 1", "row 2, column 1"]
    for place, number in ((5, -2.0), (0, 12.5), (15, 4.0)):
        fields[place].value = values.view(-1)[place] = number
        pooled, indices = F.max_pool2d(values[None], 2, return_indices=True)
        seen = tables(widget)
        assert torch.equal(seen["input"], values)
        assert torch.equal(seen["maxima"], pooled[0])
        assert torch.equal(seen["switches"], (indices[0] // 4 % 2 * 2 + indices[0] % 2).float())
        assert torch.equal(seen["unpooled with switches"], F.max_unpool2d(pooled, indices, 2)[0])
        corner = torch.zeros(4, 4)
        corner[::2, ::2] = pooled[0]
        assert torch.equal(seen["without switches"], corner)
        smooth = F.interpolate(pooled[None], scale_factor=2, mode="bilinear")[0, 0]
        assert torch.allclose(seen["bilinear"], smooth, atol=1e-4)


def test_each_pooling_window_has_its_own_tint():
    value = html(widgets.explore_switches())
    rows = re.findall(r"<tr>(.*?)</tr>", value)[:4]
    tints = [re.findall(r"background: (#\w+)", row) for row in rows]
    assert tints[0] == tints[1] != tints[2] == tints[3]
    assert tints[0][0] == tints[0][1] != tints[0][2]
    assert len({tint for row in tints for tint in row}) == 4


@pytest.fixture
def stages(monkeypatch):
    """The crops and labels that would be drawn, the latest ones last."""
    seen = []

    def blank(sample, box, k, config, class_names):
        seen.append(widgets.stage_crops(sample, box, k, config))
        figure = Figure(figsize=(0.1, 0.1))
        figure.add_axes((0, 0, 1, 1))
        return figure

    monkeypatch.setattr(widgets, "show_stages", blank)
    return seen


def test_instances_are_cut_and_labelled_as_either_stage_would(stages):
    sample = shapes.make_scene(seed=shapes.scene_seed(0, "train", 21))  # a star over a heart
    proposals = torch.tensor([[49.0, 9, 120, 88], [0, 0, 20, 20]])
    config = InstanceConfig.tiny()
    widget = widgets.explore_instances(sample, proposals, config, shapes.CLASS_NAMES)
    chosen, square = control(widget, "cut out"), control(widget, "shape of the box")
    assert list(chosen.options) == [
        "object 1: heart",
        "object 2: star",
        "object 3: key",
        "proposal 1: heart, IoU 0.77",
        "proposal 2: heart, IoU 0.00",
    ]
    boxes = [torch.tensor(a.box) for a in sample.annotations] + list(proposals)
    for number in (0, 2, 3):
        chosen.value = number
        for value in (False, True):
            square.value = value
            box = expand_box(boxes[number], 1.2)
            box = square_box(box) if value else box
            crop, labels = crop_and_resize(sample.image, sample.labels, box, 72)
            cut, shown_crop, stage1, stage2 = stages[-1]
            assert torch.equal(cut, box)
            assert torch.equal(shown_crop, crop)
            assert torch.equal(stage2, labels)
            asked = sample.annotations[number % 3].label
            others = (labels != asked) & (labels != 255)
            assert torch.equal(stage1, torch.where(others, 0, labels))
    assert "warped to 72 × 72; labelled in stage 1: heart; in stage 2: star, heart" in html(widget)


def test_instances_need_an_object():
    blank = torch.zeros(3, 40, 40, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bare has no annotated object"):
        widgets.explore_instances(Sample("bare", blank, blank[0], None, ()))


@pytest.mark.parametrize("values", [torch.zeros(2, 2), torch.full((4, 4), torch.nan)])
def test_switches_refuse_other_maps(values):
    with pytest.raises(ValueError, match="values must be"):
        widgets.explore_switches(values)


@pytest.fixture
def activations(monkeypatch):
    """The map, the answer and the brightest value that would be drawn, the latest ones last."""
    seen = []

    def blank(crop, activation, labels, brightest):
        seen.append((activation, labels, brightest))
        figure = Figure(figsize=(0.1, 0.1))
        figure.add_axes((0, 0, 1, 1))
        return figure

    monkeypatch.setattr(widgets, "show_activation", blank)
    return seen


@torch.no_grad()
def test_the_decoder_shows_the_networks_own_maps(activations):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = deconvnet_tiny().eval()
    crop = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    widget = widgets.explore_decoder(model, crop, shapes.CLASS_NAMES)
    layer, channel, label, switches = (
        control(widget, d) for d in ("layer", "channel", "class at the end", "switches")
    )
    ways = {way: decoder_activations(model, crop[None], way) for way in (True, False)}
    assert (layer.min, layer.max) == (1, len(ways[True]) == 16 and 16)
    for number in (1, 7, 16):
        layer.value = number
        name = list(ways[True])[number - 1]
        for way in (True, False):
            switches.value = way
            shown, answer, brightest = activations[-1]
            maps = ways[way][name][0]
            assert torch.equal(answer, ways[way]["score"][0].argmax(0).byte())
            assert f"{name}, {maps.shape[1]} × {maps.shape[2]}" in html(widget)
            assert f"{'with' if way else 'without'} switches" in html(widget)
            if name == "score":
                assert torch.equal(shown, maps.softmax(0)[label.value])
                assert brightest == 1
            else:
                assert torch.equal(shown, maps.mean(0))
                assert brightest == ways[True][name][0].mean(0).max()
    assert channel.disabled
    assert not label.disabled
    label.value = 5
    assert torch.equal(activations[-1][0], ways[False]["score"][0].softmax(0)[5])
    assert "probability of frame" in html(widget)
    layer.value, switches.value, channel.value = 8, True, 2
    maps = ways[True]["deconv4_2"][0]
    second = int(maps.sum((1, 2)).argsort(descending=True)[1])
    assert torch.equal(activations[-1][0], maps[second])
    assert f"channel {second + 1} of 64" in html(widget)


def test_the_decoder_refuses_other_crops():
    model = deconvnet_tiny()
    with pytest.raises(ValueError, match="training mode"):
        widgets.explore_decoder(model, torch.zeros(3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"crops must be \[N, 3, 64, 64\]"):
        widgets.explore_decoder(model.eval(), torch.zeros(3, 32, 32, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8"):
        widgets.explore_decoder(model, torch.zeros(3, 64, 64))


def test_the_slider_shows_the_aggregate_of_so_many_proposals(scene, boxes, shown):
    (image, target), model = scene, ColourNet()
    widget = widgets.explore_proposals(model, image, boxes, class_names=NAMES, target=target)
    number, combine = control(widget, "proposals"), control(widget, "combined by")
    assert (number.min, number.max, number.value) == (1, 4, 4)
    for rule in ("max", "sum"):
        combine.value = rule
        for count in (4, 1, 3):
            number.value = count
            config = InferenceConfig(num_proposals=count, combine=rule)
            expected = aggregate_proposals(model, image, boxes, config).argmax(0).byte()
            assert torch.equal(shown[-1], expected)
            confusion = ConfusionMatrix(3)
            confusion.update(expected, target)
            assert f"{count} of 4 proposals" in html(widget)
            assert f"mean IoU {confusion.mean_iou():.3f}" in html(widget)


def test_moving_the_slider_does_not_run_the_network_again(scene, boxes, shown):
    model = ColourNet()
    widget = widgets.explore_proposals(model, scene[0], boxes, class_names=NAMES)
    assert model.crops == 4
    for count in (1, 2, 3):
        control(widget, "proposals").value = count
    assert model.crops == 4


@pytest.mark.parametrize(
    ("boxes", "min_side"), [(torch.zeros(0, 4), 0), (torch.tensor([[0.0, 0, 5, 5]]), 100)]
)
def test_proposals_need_a_proposal(scene, boxes, min_side):
    with pytest.raises(ValueError, match="boxes holds no proposal"):
        widgets.explore_proposals(ColourNet(), scene[0], boxes, InferenceConfig(min_side=min_side))


def test_the_crf_follows_its_knobs(scene, shown):
    image, target = scene
    generator = torch.Generator().manual_seed(1)
    probabilities = (2 * torch.randn(3, 20, 26, generator=generator)).softmax(0)
    widget = widgets.explore_crf(image, probabilities, CRFConfig(iterations=3), NAMES, target)

    def expected(**settings):
        return dense_crf(image, probabilities, CRFConfig(**settings)).argmax(0).byte()

    assert torch.equal(shown[-1], expected(iterations=3))
    control(widget, "iterations").value = 0
    assert torch.equal(shown[-1], probabilities.argmax(0).byte())
    control(widget, "gaussian weight").value = 9
    control(widget, "bilateral sigma rgb").value = 25
    control(widget, "normalization").value = "none"
    control(widget, "iterations").value = 5
    settings = {"gaussian_weight": 9.0, "bilateral_sigma_rgb": 25.0, "normalization": "none"}
    assert torch.equal(shown[-1], expected(iterations=5, **settings))
    assert not torch.equal(shown[-1], probabilities.argmax(0).byte())
    assert "after 5 iterations; mean IoU" in html(widget)


def test_a_crf_setting_beyond_the_slider_is_kept(scene, shown):
    image, _ = scene
    probabilities = torch.full((3, 20, 26), 1 / 3)
    widget = widgets.explore_crf(image, probabilities, CRFConfig(bilateral_sigma=160.0), NAMES)
    assert control(widget, "bilateral sigma").value == 160


def test_the_crf_refuses_scores(scene):
    with pytest.raises(ValueError, match="probabilities must be in"):
        widgets.explore_crf(scene[0], torch.full((3, 20, 26), 7.0))


def test_pictures_are_drawn_and_say_what_they_show(boxes):
    image = torch.zeros(3, 20, 26, dtype=torch.uint8)
    image[0, :, :13] = image[1, :, 13:] = 255
    names = ("background", "red <x>", 'green "y"')
    value = html(widgets.explore_proposals(ColourNet(), image, boxes, class_names=names))
    ((png, alt),) = re.findall(r'src="data:image/png;base64,([^"]*)" alt="([^"]*)"', value)
    assert base64.b64decode(png).startswith(b"\x89PNG")
    assert "4 of 4 proposals" in alt
    assert "red &lt;x&gt;" in alt
    assert "green &quot;y&quot;" in alt


def test_classes_have_the_names_that_the_picture_shows():
    """VOC's without ``class_names``, in the text for screen readers too."""
    probabilities = torch.full((21, 4, 4), 1e-3)
    probabilities[15] = 1 - 20e-3
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    assert "In it: person." in html(widgets.explore_crf(image, probabilities))


def test_every_live_figure_is_a_widget(scene, boxes, shown):
    live = (
        widgets.explore_switches(),
        widgets.explore_proposals(ColourNet(), scene[0], boxes),
        widgets.explore_crf(scene[0], torch.full((3, 20, 26), 1 / 3)),
        widgets.explore_instances(shapes.make_scene()),
    )
    assert all(isinstance(widget, ipywidgets.Widget) for widget in live)


def test_is_live_only_where_somebody_sits(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.delitem(widgets.sys.modules, "google.colab", raising=False)
    assert not widgets.is_live()
    monkeypatch.setenv("JPY_SESSION_NAME", "book/01-introduction.ipynb")
    assert widgets.is_live()
    monkeypatch.delenv("JPY_SESSION_NAME")
    monkeypatch.setitem(widgets.sys.modules, "google.colab", SimpleNamespace())
    assert widgets.is_live()
