"""The decoder's, the proposals' and the CRF's explorables in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PageOpener
from test_explorables_browser import DATA, Explorable, pixels

from deconvnet.activations import decoder_activations
from deconvnet.data_uri import read_uri
from deconvnet.explorables_maps import PROPOSAL_SCENES, decoder_crops
from deconvnet.inference import Predictor, aggregate_proposals
from deconvnet.metrics import ConfusionMatrix
from deconvnet.plotting import overlay
from deconvnet.proposals import edge_boxes
from deconvnet.shapes import CLASS_NAMES, make_scene, scene_seed
from deconvnet.voc import palette
from deconvnet.weights import load_model, pretrained


@pytest.fixture
def explorable(browser, tmp_path: Path) -> Iterator[Explorable]:
    """``explorable("crf", width=360)`` opens one; an error on its page fails the test."""
    opener = PageOpener(browser, tmp_path)
    yield Explorable(opener, tmp_path)
    opener.close()
    assert opener.problems == []


def data(name: str) -> dict:
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def slider(seen: Explorable):
    return seen.figure.get_by_role("slider")


def alt(seen: Explorable, start: str) -> str:
    """The text of the picture whose text starts so."""
    texts = seen.figure.get_by_role("img").evaluate_all(
        "all => all.map(e => e.ariaLabel || e.getAttribute('aria-label'))"
    )
    return next(text for text in texts if text and text.startswith(start))


def labels_over(image: torch.Tensor, colours: np.ndarray) -> np.ndarray:
    """What the package draws for a label map in VOC's colours."""
    index = {tuple(colour): label for label, colour in enumerate(palette().tolist())}
    flat = [index[tuple(pixel)] for pixel in colours.reshape(-1, 3).tolist()]
    labels = torch.tensor(flat, dtype=torch.uint8).view(colours.shape[:2])
    return overlay(image, labels).permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------- decoder


def test_the_decoder_by_keyboard(explorable):
    seen = explorable("decoder")
    assert "Layer 8 of 16, deconv4" in seen.status()  # it opens with a shape
    slider(seen).focus()
    seen.page.keyboard.press("Home")
    assert "Layer 1 of 16" in seen.status()
    first = pixels(seen, 1)
    assert first.shape == (1, 1, 3)
    assert alt(seen, "fc7, 1 by 1, mean of 256 channels, with switches")
    for _ in range(5):
        seen.page.keyboard.press("ArrowRight")
    assert "Layer 6 of 16, unpool4: 8 × 8" in seen.status()
    assert "puts each value where the encoder found its maximum" in seen.status()
    assert alt(seen, "unpool4, 8 by 8, mean of")
    assert pixels(seen, 1).shape == (8, 8, 3)
    assert slider(seen).get_attribute("aria-valuetext") == "unpool4, 8 × 8"
    seen.page.keyboard.press("End")
    assert "Layer 16 of 16, score: 64 × 64, probability of “frame”" in seen.status()
    seen.page.keyboard.press("Home")
    assert np.array_equal(pixels(seen, 1), first)


def test_the_decoder_shows_what_the_network_computes(explorable):
    seen = explorable("decoder")
    model = load_model(pretrained("shapes-deconvnet"))
    for name, crop in decoder_crops().items():
        seen.page.get_by_label(name, exact=True).check(force=True)
        for way in (True, False):
            seen.page.get_by_role("switch", name="Switches").set_checked(way, force=True)
            maps = decoder_activations(model, crop[None], way)
            answer = maps["score"][0].argmax(0).byte()
            slider(seen).fill("12")
            seen.page.get_by_label("strongest", exact=True).check(force=True)
            seen.status()
            reference = decoder_activations(model, crop[None])["deconv2_1"][0]
            strongest = int(reference.sum((1, 2)).argmax())
            values = (maps["deconv2_1"][0, strongest] / reference[strongest].max()).clamp(0, 1)
            brightness = pixels(seen, 1).astype(float).sum(-1)
            assert np.corrcoef(brightness.flatten(), values.flatten())[0, 1] > 0.98
            assert f"channel {strongest + 1} of" in alt(seen, "deconv2_1")
            shown, expected = pixels(seen, 2), overlay(crop, answer).permute(1, 2, 0).numpy()
            close = (np.abs(shown.astype(int) - expected) <= 2).all(-1)
            assert close.mean() > 0.99
            share = round(100 * float((answer == CLASS_NAMES.index(name)).float().mean()))
            told = f"{name} {share} %" if share else "background only"
            assert told in seen.status().replace("\xa0", " ")


def test_a_class_is_chosen_at_the_last_layer_only(explorable):
    seen = explorable("decoder")
    classes = seen.page.get_by_label("Class at the last layer")
    assert not classes.is_visible()
    slider(seen).fill("15")
    assert classes.is_visible()
    assert not seen.page.get_by_label("strongest", exact=True).is_visible()
    seen.status()
    frame = pixels(seen, 1)
    classes.select_option(label="heart")
    assert "probability of “heart”" in seen.status()
    assert not np.array_equal(pixels(seen, 1), frame)
    assert pixels(seen, 1).astype(int).sum() < frame.astype(int).sum()


def test_a_click_on_the_film_moves_the_slider(explorable):
    seen = explorable("decoder", 360)
    seen.figure.locator(".decoder-strip > div").nth(9).click()
    assert slider(seen).input_value() == "9"
    thumb = seen.page.evaluate(
        """() => {
            const range = document.querySelector('input[type=range]').getBoundingClientRect();
            const chosen = document.querySelector('.decoder-strip > .is-chosen');
            const cell = chosen.getBoundingClientRect();
            const at = range.left + 12 + (range.width - 24) * 9 / 15;
            return Math.abs(at - (cell.left + cell.right) / 2);
        }"""
    )
    assert thumb < 2  # the thumb stands below its layer


# ----------------------------------------------------------------------------------- proposals


def test_proposals_by_keyboard(explorable):
    seen = explorable("proposals")
    seen.status()
    first = pixels(seen, 0)
    slider(seen).focus()
    seen.page.keyboard.press("ArrowRight")
    status = seen.status()
    assert status.startswith("2 proposals, merged by maximum: mean IoU")
    assert alt(seen, "Label map of 2 proposals, merged by maximum")
    assert not np.array_equal(pixels(seen, 0), first)
    seen.page.keyboard.press("End")
    assert seen.status().startswith("50 proposals")
    entry = data("proposals")["scenes"][0]
    box = seen.figure.locator(".explorable-box").first
    x0, y0, x1, y1 = entry["boxes"][49]
    assert float(box.get_attribute("x")) == x0
    assert float(box.get_attribute("height")) == y1 - y0


def test_maximum_and_sum_have_the_mean_iou_that_the_package_computes(explorable):
    seen = explorable("proposals")
    predictor = Predictor.from_pretrained("shapes", device="cpu")
    sample = make_scene(seed=scene_seed(0, "val", PROPOSAL_SCENES[0]))
    boxes = edge_boxes(sample.image, predictor.edge_boxes).boxes
    slider(seen).fill("8")
    told = {}
    for combine, name in (("max", "maximum"), ("sum", "sum")):
        config = type(predictor.config)(num_proposals=8, combine=combine, precision="float32")
        scores = aggregate_proposals(predictor.deconvnet, sample.image, boxes, config)
        confusion = ConfusionMatrix(13)
        confusion.update(scores.argmax(0), sample.labels)
        seen.page.get_by_label(name, exact=True).check(force=True)
        status = seen.status().replace("\xa0", " ")
        assert f"8 proposals, merged by {name}" in status
        told[name] = float(status.partition("mean IoU ")[2].partition(" %")[0])
        assert told[name] == pytest.approx(100 * confusion.mean_iou(), abs=1.5)
        shown = pixels(seen, 0).astype(int)
        expected = overlay(sample.image, scores.argmax(0).byte()).permute(1, 2, 0).numpy()
        assert np.abs(shown - expected).mean() < 5  # the photograph is a JPEG
    assert told["maximum"] != told["sum"]


def test_another_scene_has_its_own_maps(explorable):
    seen = explorable("proposals", 360, dark=True)
    scenes = data("proposals")["scenes"]
    for scene in reversed(scenes):
        seen.page.get_by_label(scene["name"], exact=True).check(force=True)
        slider(seen).fill("50")
        assert f"mean IoU {scene['max']['miou'][49]:.1f}" in seen.status()
        photo = np.asarray(read_uri(scene["image"]).convert("RGB"))
        seen.page.wait_for_timeout(100)
        assert pixels(seen, 0).shape == photo.shape
        colours = np.asarray(read_uri(scene["max"]["strip"]).convert("RGB"))[-scene["height"] :]
        image = torch.from_numpy(photo.copy()).permute(2, 0, 1)
        difference = np.abs(pixels(seen, 0).astype(int) - labels_over(image, colours))
        assert difference.max() <= 3


def test_a_pointer_on_the_curves_moves_the_slider(explorable):
    seen = explorable("proposals")
    curve = seen.figure.locator(".explorable-curve svg").bounding_box()
    scale = curve["width"] / 320
    seen.page.mouse.click(curve["x"] + 286 * scale, curve["y"] + 60)
    assert slider(seen).input_value() == "50"
    seen.page.mouse.click(curve["x"] + 34 * scale, curve["y"] + 60)
    assert slider(seen).input_value() == "1"


# ----------------------------------------------------------------------------------------- CRF


def test_the_crf_by_keyboard(explorable):
    seen = explorable("crf")
    assert seen.status().startswith("Label map of the networks alone: mean IoU")
    before = pixels(seen, 0)
    slider(seen).focus()
    seen.page.keyboard.press("ArrowRight")
    assert "after 1 iteration: mean IoU" in seen.status()
    assert alt(seen, "Label map after 1 iteration:")
    assert (pixels(seen, 0) != before).any(-1).mean() > 0.01
    seen.page.keyboard.press("End")
    assert "after 10 iterations" in seen.status()
    assert slider(seen).get_attribute("aria-valuetext") == "10 of 10"


def test_each_setting_of_the_crf_shows_its_own_numbers(explorable):
    seen = explorable("crf")
    crf = data("crf")
    slider(seen).fill("10")
    weights = seen.figure.get_by_role("group", name="Gaussian kernel: weight")
    widths = seen.figure.get_by_role("group", name="Bilateral kernel: width in grey levels")
    settings = iter(crf["scenes"][0]["settings"])
    for i in range(len(crf["gaussian_weights"])):
        weights.get_by_role("radio").nth(i).check(force=True)
        for k in range(len(crf["sigmas_rgb"])):
            widths.get_by_role("radio").nth(k).check(force=True)
            assert f"mean IoU {next(settings)['miou'][10]:.1f}" in seen.status()


def test_without_kernels_the_crf_changes_nothing(explorable):
    seen = explorable("crf")
    seen.status()
    before = pixels(seen, 0)
    for name, value in (("Gaussian kernel: weight", "0, off"), ("Bilateral kernel", "off")):
        group = seen.figure.get_by_role("group", name=name)
        group.get_by_label(value, exact=True).check(force=True)
    slider(seen).fill("10")
    assert "as much as before" in seen.status()
    assert np.array_equal(pixels(seen, 0), before)
