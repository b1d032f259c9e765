"""The data of the explorables, what is committed of it, and the directive that shows it."""

from __future__ import annotations

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.ops import box_iou

from deconvnet import shapes
from deconvnet.activations import decoder_activations
from deconvnet.crf import dense_crf
from deconvnet.data_uri import jpeg_uri, png_uri, read_uri
from deconvnet.explorables import (
    EXPLORABLES,
    MAX_BYTES,
    boxes_to_cut,
    instances_data,
    switches_data,
    unpooled_in_three_ways,
    write_explorables,
)
from deconvnet.explorables_maps import crf_data, decoder_crops, decoder_data, proposals_data
from deconvnet.inference import InferenceConfig, Predictor, aggregate_proposals, select_boxes
from deconvnet.instances import InstanceConfig, crop_and_resize, expand_box, isolate_object
from deconvnet.metrics import ConfusionMatrix
from deconvnet.model import DeconvNet, deconvnet_tiny
from deconvnet.proposals import edge_boxes
from deconvnet.voc import Sample, colourise, palette
from deconvnet.weights import load_model, pretrained

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "book" / "explorables"
SCRIPTS = ROOT / "book" / "_static" / "explorables"


# ------------------------------------------------------------------------------------ data URIs


def pixels(uri: str) -> np.ndarray:
    return np.asarray(read_uri(uri).convert("RGB"))


@pytest.mark.parametrize("labels", [[0], [0, 255], [0, 1, 7, 255], list(range(17)), range(256)])
def test_a_label_map_keeps_its_colours_in_few_bits(labels):
    values = torch.tensor(list(labels), dtype=torch.uint8)
    picture = values[torch.randint(len(values), (24, 32))]
    found = pixels(png_uri(picture))
    assert np.array_equal(found, colourise(picture).permute(1, 2, 0).numpy())
    assert read_uri(png_uri(picture)).mode == "P"


def test_a_small_label_map_has_no_palette_of_256_colours():
    assert len(png_uri(torch.zeros(8, 8, dtype=torch.uint8))) < 200


def test_a_png_is_exact_and_a_jpeg_near():
    image = shapes.make_scene(seed=1).image
    expected = image.permute(1, 2, 0).numpy()
    assert np.array_equal(pixels(png_uri(image)), expected)
    assert np.abs(pixels(jpeg_uri(image)).astype(int) - expected).mean() < 4
    assert len(jpeg_uri(image)) < len(png_uri(image)) / 3


def test_only_pictures_become_uris():
    for uri in (png_uri, jpeg_uri):
        for bad in (torch.zeros(4, 4), torch.zeros(3, 4, 4).int()):
            with pytest.raises(TypeError, match="picture must be uint8, got torch"):
                uri(bad)
        with pytest.raises(ValueError, match=r"must be \[3, H, W\] or \[H, W\], got \[1, 4, 4\]"):
            uri(torch.zeros(1, 4, 4).byte())


def test_jpeg_refuses_labels_and_other_qualities():
    with pytest.raises(ValueError, match="label map"):
        jpeg_uri(torch.zeros(4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="quality must be from 1 to 95, got 100"):
        jpeg_uri(torch.zeros(3, 4, 4, dtype=torch.uint8), 100)


@pytest.mark.parametrize("bad", ["", "data:text/plain;base64,AAAA", "image.png"])
def test_only_data_uris_are_read(bad):
    with pytest.raises(ValueError, match="expected data:image"):
        read_uri(bad)


# ------------------------------------------------------------------------------------- switches


@pytest.mark.parametrize("name", switches_data()["cases"])
def test_switches_cases_are_what_pytorch_gives(name):
    case = {k: torch.tensor(v).float() for k, v in switches_data()["cases"][name].items()}
    x = case["values"][None]
    maxima, indices = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(case["maxima"], maxima[0])
    assert torch.equal(case["switches"], (indices[0] // 4 % 2 * 2 + indices[0] % 2).float())
    assert torch.equal(case["unpooled"], F.max_unpool2d(maxima, indices, 2)[0])
    corner = torch.zeros(4, 4)
    corner[::2, ::2] = maxima[0]
    assert torch.equal(case["corner"], corner)
    smooth = F.interpolate(maxima[None], scale_factor=2, mode="bilinear")[0, 0]
    assert torch.equal(case["bilinear"], smooth)


def test_the_cases_hold_ties_and_negative_maxima():
    cases = switches_data()["cases"]
    ties = torch.tensor(cases["ties"]["values"])
    assert any(len(w.unique()) < 4 for w in ties.unfold(0, 2, 2).unfold(1, 2, 2).reshape(4, 4))
    assert torch.tensor(cases["ties"]["maxima"]).min() < 0


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 2), torch.full((4, 4), 10), torch.full((4, 4), 0.5)]
)
def test_switches_refuse_other_values(bad):
    with pytest.raises(ValueError, match="values must be"):
        switches_data(bad)


def test_the_three_ways_agree_on_a_flat_map():
    ways = unpooled_in_three_ways(torch.full((4, 4), 3))
    assert ways["unpooled"] == ways["corner"]
    assert ways["bilinear"] == [[3.0] * 4] * 4


# ------------------------------------------------------------------------------------ instances


@pytest.fixture(scope="module")
def scene() -> Sample:
    return shapes.make_scene(seed=shapes.scene_seed(0, "train", 21))


def test_boxes_are_objects_and_the_proposals_that_fit_and_miss(scene):
    objects = torch.tensor([a.box for a in scene.annotations])
    near = objects + torch.tensor([1.0, 0, 2, 1])
    proposals = torch.cat([torch.tensor([[0.0, 0, 9, 9], [100, 100, 120, 110]]), near, near + 500])
    found = boxes_to_cut(scene, proposals, per_object=1, first=5)
    assert [rank for *_, rank in found] == [None, None, None, 1, 3, 4, 5]
    for box, k, iou, rank in found:
        expected = box if rank is None else proposals[rank - 1]
        assert torch.equal(box, expected)
        overlaps = box_iou(box[None], objects)[0]
        assert iou == pytest.approx(float(overlaps.max()))
        assert overlaps[k] == overlaps.max()


def test_a_scene_without_proposals_still_has_its_objects(scene):
    assert [rank for *_, rank in boxes_to_cut(scene, torch.zeros(0, 4))] == [None] * 3


def test_instances_hold_what_either_stage_cuts(scene):
    config = InstanceConfig(resize=40, crop=32)
    data = instances_data(scene, torch.tensor([[30.0, 20, 110, 90]]), config)
    assert (data["width"], data["height"], data["resize"]) == (152, 181, 40)
    assert [b["object"] for b in data["boxes"]] == ["heart", "star", "key", "heart"]
    assert [b["rank"] for b in data["boxes"]] == [None, None, None, 1]
    for entry, k in zip(data["boxes"], (0, 1, 2, 0)):
        cut = entry["cuts"]["warped"]
        source = torch.tensor(entry["box"], dtype=torch.float32)
        box = expand_box(source, 1.2)
        assert np.abs(np.array(cut["box"]) - box.numpy()).max() <= 0.5
        crop, stage2 = crop_and_resize(scene.image, scene.labels, box, 40)
        _, stage1 = crop_and_resize(scene.image, isolate_object(scene, k), box, 40)
        assert np.abs(pixels(cut["crop"]).astype(int) - crop.permute(1, 2, 0).numpy()).mean() < 5
        for shown, labels in zip(cut["stages"], (stage1, stage2)):
            assert np.array_equal(
                pixels(shown["labels"]), colourise(labels).permute(1, 2, 0).numpy()
            )
            classes = [shapes.CLASS_NAMES[c] for c in labels.unique().tolist() if 0 < c < 255]
            assert shown["classes"] == classes
            assert {name["text"] for name in shown["names"]} == set(classes)
        square = entry["cuts"]["square"]["box"]
        assert abs((square[2] - square[0]) - (square[3] - square[1])) <= 1


def test_instances_need_an_object():
    blank = torch.zeros(3, 20, 20, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bare has no annotated object"):
        instances_data(Sample("bare", blank, blank[0], None, ()))


# -------------------------------------------------------------------------------------- decoder


def frame(uri: str, index: int, height: int) -> np.ndarray:
    return pixels(uri)[index * height : (index + 1) * height]


@pytest.fixture(scope="module")
def tiny() -> DeconvNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return deconvnet_tiny().eval()


@torch.no_grad()
def test_decoder_strips_are_the_networks_own_maps(tiny):
    crop = torch.randint(256, (3, 64, 64)).byte()
    data = decoder_data(tiny, {"noise": crop})
    (entry,) = data["crops"]
    sizes = [layer["size"] for layer in data["layers"]]
    assert sizes == [1, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 64, 64, 64]
    assert np.array_equal(pixels(entry["image"]), crop.permute(1, 2, 0).numpy())
    for way, use_switches in (("on", True), ("off", False)):
        maps = decoder_activations(tiny, crop[None], use_switches)
        expected = tiny(crop[None]) if use_switches else maps["score"]
        labels = expected[0].argmax(0).byte()
        shown = pixels(entry[way]["labels"])
        assert np.array_equal(shown, colourise(labels).permute(1, 2, 0).numpy())
        shares = [100 * float((labels == c).float().mean()) for c in range(13)]
        assert entry[way]["found"] == pytest.approx(shares, abs=0.5)
        for layer, strip, channels in zip(data["layers"], entry[way]["strips"], entry["channels"]):
            values, size = maps[layer["name"]][0], layer["size"]
            count = 13 if layer["name"] == "score" else 1 + len(channels)
            assert pixels(strip).shape == (count * size, size, 3)
            if layer["name"] == "score":
                brightness = frame(strip, 3, size).astype(float).sum(-1)
                order = values.softmax(0)[3]
            else:
                brightness = frame(strip, 1, size).astype(float).sum(-1)
                order = values[channels[0]]
            # Brighter means more, as far as the shades can tell.
            rising = np.diff(brightness.flatten()[order.flatten().argsort().numpy()])
            assert (rising >= 0).all()


def test_the_strongest_channels_are_shown(tiny):
    crop = torch.randint(256, (3, 64, 64)).byte()
    (entry,) = decoder_data(tiny, {"noise": crop})["crops"]
    maps = list(decoder_activations(tiny, crop[None]).values())
    for channels, values in zip(entry["channels"][:-1], maps):
        totals = values[0].sum((1, 2))
        assert torch.equal(totals[channels], totals.sort(descending=True).values[:4])
    assert entry["channels"][-1] == []


def test_decoder_crops_are_the_objects_that_they_are_named_after():
    assert list(decoder_crops()) == ["frame", "cross", "ring"]
    model = load_model(pretrained("shapes-deconvnet"))
    for entry in decoder_data(model)["crops"]:
        found = dict(zip(shapes.CLASS_NAMES, entry["on"]["found"]))
        assert max(list(found)[1:], key=found.get) == entry["name"]


def test_decoder_refuses_what_it_cannot_show(tiny):
    with pytest.raises(ValueError, match="at least one crop"):
        decoder_data(tiny, {})
    with pytest.raises(ValueError, match="got 2 class_names for 13 classes"):
        decoder_data(tiny, class_names=("a", "b"))
    with pytest.raises(ValueError, match=r"crops must be \[N, 3, 64, 64\]"):
        decoder_data(tiny, {"small": torch.zeros(3, 32, 32).byte()})


# --------------------------------------------------------------------------- proposals and CRF


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.from_pretrained(
        "shapes", device="cpu", config=InferenceConfig(num_proposals=4)
    )


@pytest.fixture(scope="module")
def small_scene() -> Sample:
    config = shapes.ShapesConfig(min_side=64, max_side=72)
    return shapes.make_scene(config, seed=4)


def over(labels: torch.Tensor, target: torch.Tensor) -> float:
    confusion = ConfusionMatrix(13)
    confusion.update(labels, target)
    return 100 * confusion.mean_iou()


def test_proposals_hold_the_aggregate_of_each_number(predictor, small_scene):
    (entry,) = proposals_data(predictor, [small_scene])["scenes"]
    boxes = edge_boxes(small_scene.image, predictor.edge_boxes).boxes
    assert entry["boxes"] == [list(b) for b in select_boxes(boxes, (1, 1), predictor.config)]
    height = entry["height"]
    for combine in ("max", "sum"):
        strip = entry[combine]
        assert pixels(strip["strip"]).shape == (4 * height, entry["width"], 3)
        for n in (1, 3, 4):
            config = replace(predictor.config, combine=combine, num_proposals=n)
            scores = aggregate_proposals(predictor.deconvnet, small_scene.image, boxes, config)
            labels = scores.argmax(0).byte()
            shown = frame(strip["strip"], n - 1, height)
            expected = colourise(labels).permute(1, 2, 0).numpy()
            assert (shown == expected).all(-1).mean() > 0.99
            assert strip["miou"][n - 1] == pytest.approx(over(labels, small_scene.labels), abs=0.3)
    reached = torch.zeros_like(small_scene.labels)
    for (x0, y0, x1, y1), share in zip(entry["boxes"], entry["reached"]):
        reached[max(y0, 0) : y1, max(x0, 0) : x1] = 1
        assert share == round(100 * float(reached.float().mean()))


def test_the_crf_holds_each_iteration_of_each_setting(predictor, small_scene):
    data = crf_data(predictor, [small_scene], (0.0, 4.0), (None, 10.0))
    (entry,) = data["scenes"]
    networks = predictor.deconvnet, predictor.fcn, predictor.config, predictor.edge_boxes
    before = Predictor(*networks, crf=None, device="cpu")(small_scene.image).probabilities
    grid = [(g, s) for g in data["gaussian_weights"] for s in data["sigmas_rgb"]]
    assert len(entry["settings"]) == len(grid) == 4
    for (weight, sigma), setting in zip(grid, entry["settings"]):
        maps = []
        config = replace(
            predictor.crf,
            gaussian_weight=weight,
            bilateral_weight=predictor.crf.bilateral_weight if sigma else 0.0,
            bilateral_sigma_rgb=sigma or 1.0,
        )
        dense_crf(small_scene.image, before, config,
                  on_iteration=lambda _, q, maps=maps: maps.append(q.argmax(0).byte()))  # fmt: skip
        assert len(setting["miou"]) == len(maps) == data["iterations"] + 1
        for n in (0, 1, len(maps) - 1):
            shown = frame(setting["strip"], n, entry["height"])
            expected = colourise(maps[n]).permute(1, 2, 0).numpy()
            assert (shown == expected).all(-1).mean() > 0.99
            assert setting["miou"][n] == pytest.approx(over(maps[n], small_scene.labels), abs=0.3)
        moved = 100 * float((maps[1] != maps[0]).float().mean())
        assert setting["changed"][:2] == pytest.approx([0, moved], abs=0.1)


def test_names_lie_in_their_regions(predictor, small_scene):
    (entry,) = proposals_data(predictor, [small_scene])["scenes"]
    colours = palette(13).numpy()
    for i, names in enumerate(entry["max"]["names"]):
        shown = frame(entry["max"]["strip"], i, entry["height"])
        for label, x, y in names:
            assert np.array_equal(shown[y, x], colours[label])


def test_scenes_are_needed(predictor, small_scene):
    for make in (proposals_data, crf_data):
        with pytest.raises(ValueError, match="at least one scene"):
            make(predictor, [])
    alone = Predictor(None, predictor.fcn, class_names=shapes.CLASS_NAMES)
    with pytest.raises(ValueError, match="must have a deconvnet"):
        proposals_data(alone, [small_scene])
    nameless = Predictor(predictor.deconvnet, class_names=shapes.CLASS_NAMES)
    nameless.class_names = None
    with pytest.raises(ValueError, match="class_names"):
        crf_data(nameless, [small_scene])
    blank = Sample("blank", torch.zeros(3, 64, 64).byte(), torch.zeros(64, 64).byte(), None, ())
    with pytest.raises(ValueError, match="no proposal was found in blank"):
        proposals_data(predictor, [blank])


# -------------------------------------------------------------------------- what is committed


# What is told of label maps moves with a pixel more or less; the maps themselves are compared.
TOLERANCES = {"miou": 1.5, "changed": 0.5, "bright": 2}
TOLD_OF_MAPS = ("names", "found")


def same(found, expected, where=""):
    """Equal, but for what another processor rounds otherwise."""
    name = where.rpartition(".")[2].partition("[")[0]
    if isinstance(expected, str) and expected.startswith("data:image/"):
        a, b = pixels(found), pixels(expected)
        assert a.shape == b.shape, where
        if expected.startswith("data:image/png"):
            assert (a == b).all(axis=-1).mean() >= 0.995, where
        else:
            assert np.abs(a.astype(int) - b).mean() < 3, where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected.keys() - TOLD_OF_MAPS:
            same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected)):
            same(a, b, f"{where}[{i}]")
    elif isinstance(expected, float) or name in TOLERANCES:
        assert found == pytest.approx(expected, abs=TOLERANCES.get(name, 0.011)), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", EXPLORABLES)
def test_committed_data_is_what_the_package_writes_today(name):
    make, _ = EXPLORABLES[name]
    fresh = json.loads(json.dumps(make()))
    same(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")), fresh, name)


@pytest.mark.parametrize("name", EXPLORABLES)
def test_a_still_is_drawn_from_the_committed_data(name):
    _, draw = EXPLORABLES[name]
    figure = draw(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))
    figure.savefig(drawn := io.BytesIO(), dpi=110)
    with Image.open(drawn) as fresh, Image.open(FOLDER / f"{name}.png") as still:
        assert fresh.size == still.size
        difference = np.asarray(fresh.convert("L")) - np.asarray(still.convert("L"), np.float32)
    assert np.abs(difference).mean() < 2  # of 255; fonts differ


@pytest.mark.parametrize("name", EXPLORABLES)
def test_an_explorable_is_small(name):
    files = (FOLDER / f"{name}.json", SCRIPTS / f"{name}.js")
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    with Image.open(FOLDER / f"{name}.png") as still:
        assert still.width >= 600
    assert (FOLDER / f"{name}.png").stat().st_size < MAX_BYTES


def test_nothing_is_committed_that_nothing_writes():
    written = {f"{name}.{kind}" for name in EXPLORABLES for kind in ("json", "png")}
    assert {path.name for path in FOLDER.iterdir()} == written
    scripts = {f"{name}.js" for name in EXPLORABLES} | {"core.js", "explorable.css"}
    assert {path.name for path in SCRIPTS.iterdir()} == scripts


def test_write_explorables_writes_whole_files(tmp_path):
    written = write_explorables(tmp_path / "new", ["switches"])
    assert [path.name for path in written] == ["switches.json", "switches.png"]
    assert json.loads(written[0].read_text(encoding="utf-8")) == switches_data()
    assert Image.open(io.BytesIO(written[1].read_bytes())).format == "PNG"
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"switches.json", "switches.png"}


def test_an_unknown_explorable_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"names must be among .* got \['swiches'\]"):
        write_explorables(tmp_path, ["swiches"])
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- the directive

sphinx = pytest.importorskip("sphinx", reason="the book's tools are not installed")
PAGE = """
Title
=====

.. _here:

.. explorable:: toy
   :name: fig-toy
   :alt: a picture of toys

   The caption, *in short*.

See :numref:`fig-toy`.
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory):
    """Builds a book of two pages, one with an explorable, and returns its folder and warnings."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    def build(builder: str = "html", page: str = PAGE, data: str | None = '{"a": "</script>"}'):
        root = tmp_path_factory.mktemp("book")
        for folder in ("data", "_static/explorables"):
            (root / folder).mkdir(parents=True)
        for script in ("core.js", "explorable.css"):
            (root / "_static/explorables" / script).write_text("", encoding="utf-8")
        (root / "_static/explorables/toy.js").write_text("", encoding="utf-8")
        Image.new("RGB", (4, 4)).save(root / "data/toy.png")
        if data is not None:
            (root / "data/toy.json").write_text(data, encoding="utf-8")
        (root / "index.rst").write_text(page + "\n.. toctree::\n\n   other\n", encoding="utf-8")
        (root / "other.rst").write_text("Other\n=====\n", encoding="utf-8")
        (root / "conf.py").write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT / 'book' / '_ext')!r})\n"
            "extensions = ['explorable']\nexplorables_path = 'data'\nnumfig = True\n"
            "html_static_path = ['_static']\n",
            encoding="utf-8",
        )
        warnings = io.StringIO()
        out = root / "out"
        with docutils_namespace():  # nodes are registered anew in each build
            app = Sphinx(root, root, out, root / "trees", builder, status=None, warning=warnings)
            app.build()
        return out, warnings.getvalue()

    return build


def test_the_directive_makes_a_figure_with_data_picture_and_number(build):
    out, warnings = build()
    assert warnings == ""
    html = (out / "index.html").read_text(encoding="utf-8")
    assert '<figure class="explorable" data-explorable="toy" id="fig-toy">' in html
    assert 'alt="a picture of toys"' in html
    assert "Fig. 1" in html
    assert "<em>in short</em>" in html
    _, _, rest = html.partition('<script type="application/json">')
    text, _, after = rest.partition("</script>")
    assert json.loads(text) == {"a": "</script>"}
    assert after.count("<figcaption>") == after.count("</figcaption>") == 1
    assert after.count("</figure>") == 1


def test_scripts_are_loaded_where_they_are_needed_only(build):
    out, _ = build()
    page, other = ((out / f"{name}.html").read_text("utf-8") for name in ("index", "other"))
    assert 0 < page.index("explorables/core.js") < page.index("explorables/toy.js")
    assert "explorables/explorable.css" in page
    assert "explorables" not in other


def test_elsewhere_the_picture_stands_in(build):
    out, warnings = build("latex")
    assert warnings == ""
    (text,) = (path.read_text(encoding="utf-8") for path in out.glob("*.tex"))
    assert r"\sphinxincludegraphics{{toy}.png}" in text
    assert "application/json" not in text


@pytest.mark.parametrize(
    ("page", "data", "message"),
    [
        (PAGE, None, "explorable 'toy' has no"),
        (PAGE, "{", "toy.json is not JSON"),
        (PAGE.replace("   :alt: a picture of toys\n", ""), "{}", "needs an :alt: text"),
    ],
)
def test_what_is_missing_is_named(build, page, data, message):
    assert message in build(page=page, data=data)[1]


def test_the_extension_is_the_books():
    assert importlib.util.spec_from_file_location("explorable", ROOT / "book/_ext/explorable.py")
    assert "explorable: book/_ext" in (ROOT / "_config.yml").read_text(encoding="utf-8")
