"""The explorables in a real browser: by mouse, by touch, by keyboard, on a phone and in the dark.

Each stands alone on a small page with the theme's colours, so that the book need not be built.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PageOpener
from PIL import Image

from deconvnet import shapes
from deconvnet.explorables import CHAPTER_SCENE, EXPLORABLES, boxes_to_cut, stage_crops
from deconvnet.instances import InstanceConfig, pixel_box
from deconvnet.unpooling import max_pool2d_with_switches
from deconvnet.voc import colourise

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "explorables"
STATIC = ROOT / "book" / "_static" / "explorables"
THEMES = {
    "light": "#fff #f3f4f5 #222832 #48566b #d1d5da",
    "dark": "#14181e #29313d #ced6dd #9ca4af #48566b",
}
COLOURS = ("background", "surface", "text-base", "text-muted", "border")


class Explorable:
    """One explorable on a page of its own.

    Attributes:
        page: The Playwright page.
        figure: The locator of the figure.
    """

    def __init__(self, opener: PageOpener, folder: Path) -> None:
        self.opener, self.folder = opener, folder

    def __call__(self, name: str, width: int = 720, dark: bool = False, **options) -> Explorable:
        """Open it; ``options`` are Playwright's, as ``has_touch=True``."""
        theme = "dark" if dark else "light"
        colours = zip(COLOURS, THEMES[theme].split())
        style = "".join(f"--pst-color-{role}: {colour};" for role, colour in colours)
        data = (DATA / f"{name}.json").read_text(encoding="utf-8").replace("<", "\\u003c")
        scripts = "".join(
            f'<script defer src="{(STATIC / f"{script}.js").as_uri()}"></script>'
            for script in ("core", name)
        )
        css = (STATIC / "explorable.css").read_text(encoding="utf-8")
        still = (DATA / f"{name}.png").as_uri()
        page = f"""<!doctype html><html lang="en" data-theme="{theme}"><head><title>{name}</title>
            <meta charset="utf-8"><meta name="viewport" content="width=device-width">
            {scripts}<style>{css}</style><style>:root {{ {style} }}
            *, ::after {{ box-sizing: border-box; }}
            body {{ margin: 16px; font: 16px sans-serif;
                color: var(--pst-color-text-base); background: var(--pst-color-background); }}
            figure.explorable {{ margin: 0; }} img {{ max-width: 100%; }}</style></head>
            <body><main class="bd-content"><h1>{name}</h1>
            <figure class="explorable" data-explorable="{name}">
            <script type="application/json">{data}</script>
            <img src="{still}" alt="a still picture"><figcaption>A caption.</figcaption></figure>
            </main></body></html>"""
        (self.folder / f"{name}.html").write_text(page, encoding="utf-8")
        self.page = self.opener(f"{name}.html", width, dark, **options)
        self.figure = self.page.locator("figure.explorable")
        return self

    def status(self) -> str:
        """What the live region says once the explorable rests."""
        self.page.wait_for_timeout(200)
        return self.figure.get_by_role("status").inner_text()


@pytest.fixture
def explorable(browser, tmp_path: Path) -> Iterator[Explorable]:
    """``explorable("switches", width=360)`` opens one; an error on its page fails the test."""
    opener = PageOpener(browser, tmp_path)
    yield Explorable(opener, tmp_path)
    opener.close()
    assert opener.problems == []


# ------------------------------------------------------------------------- what all have in common

VIEWS = {"desktop": (720, False), "phone": (360, True)}


@pytest.fixture(params=[(name, view) for name in EXPLORABLES for view in VIEWS], ids="-".join)
def seen(request, explorable) -> Explorable:
    name, view = request.param
    return explorable(name, *VIEWS[view])


def test_it_comes_to_life_and_fits(seen):
    assert seen.figure.locator(".explorable-body").is_visible()
    assert not seen.figure.locator("> img").is_visible()
    assert len(seen.status()) > 30
    assert seen.page.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )


def test_axe_finds_nothing(seen):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not here")
    seen.status()
    found = axe.Axe().run(seen.page, options={"resultTypes": ["violations"]}).response["violations"]
    serious = [
        f"{v['id']}: {node['html'][:120]} {node['failureSummary'][:200]}"
        for v in found
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"]
    ]
    assert serious == []


def test_targets_are_large_enough_for_a_thumb(seen):
    small = seen.page.evaluate(
        """() => [...document.querySelectorAll(
              '.explorable-body :is(button, select, input[type=range], label:has(input))')]
            .filter(e => e.offsetParent)
            .map(e => [e.outerHTML.slice(0, 80), e.getBoundingClientRect()])
            .filter(([, box]) => Math.min(box.width, box.height) < 40).map(([html]) => html)"""
    )
    assert small == []


def test_every_control_has_a_name_and_shows_its_focus(seen):
    controls = seen.figure.locator("button:visible, select, input, [role=spinbutton]")
    assert controls.count() > 0
    seen.page.locator("h1").click()
    reached = set()
    for _ in range(controls.count() + 2):
        seen.page.keyboard.press("Tab")
        look = seen.page.evaluate(
            """() => {
                const e = document.activeElement;
                if (!e.closest('.explorable-body')) return null;
                const drawn = e.matches('input:not([type=range])') ? e.nextElementSibling : e;
                const name = e.getAttribute('aria-label') || e.labels?.[0]?.textContent
                    || e.textContent;
                return [name.trim(), getComputedStyle(drawn).outlineStyle,
                        parseFloat(getComputedStyle(drawn).outlineWidth)];
            }"""
        )
        if look is None:
            continue
        name, outline, width = look
        assert name
        assert outline != "none", name
        assert width >= 2, name
        reached.add(name)
    assert reached


@pytest.mark.parametrize("name", EXPLORABLES)
def test_without_a_script_the_still_picture_stands_there(explorable, name):
    seen = explorable(name, java_script_enabled=False)
    assert seen.figure.locator("> img").is_visible()
    assert seen.figure.locator(".explorable-body").count() == 0


def test_nobody_who_asked_for_less_motion_is_offered_a_play_button(explorable):
    assert explorable("switches").page.get_by_role("button", name="Walk").is_visible()
    still = explorable("switches", reduced_motion="reduce")
    assert not still.page.get_by_role("button", name="Walk").is_visible()


def pixels(seen: Explorable, canvas: int) -> np.ndarray:
    """The picture in the figure's n-th canvas, ``uint8 [H, W, 3]``."""
    uri = seen.figure.locator("canvas").nth(canvas).evaluate("c => c.toDataURL()")
    png = io.BytesIO(base64.b64decode(uri.partition(",")[2]))
    return np.asarray(Image.open(png).convert("RGB"))


# ------------------------------------------------------------------------------------ switches

MAPS = ("values", "maxima", "switches", "unpooled", "corner", "bilinear")


def maps(seen: Explorable) -> dict[str, list[list[float]]]:
    """All numbers that are shown, unrounded."""
    grids = seen.page.evaluate(
        """() => [...document.querySelectorAll('.switches-grid table')].map(t =>
            [...t.rows].map(r => [...r.cells].map(c => Number(c.dataset.value))))"""
    )
    return dict(zip(MAPS, grids))


def cell(seen: Explorable, row: int, column: int):
    return seen.page.get_by_role("spinbutton", name=f"row {row}, column {column}", exact=True)


@pytest.mark.parametrize("case", json.loads((DATA / "switches.json").read_text())["cases"])
def test_switches_compute_what_pytorch_computes(explorable, case):
    seen = explorable("switches")
    expected = json.loads((DATA / "switches.json").read_text(encoding="utf-8"))["cases"][case]
    for row, values in enumerate(expected["values"], start=1):
        for column, value in enumerate(values, start=1):
            here = cell(seen, row, column)
            here.press(str(int(abs(value))))
            if value < 0:
                here.press("-")
    assert maps(seen) == expected


def test_switches_by_keyboard(explorable):
    seen = explorable("switches")
    cell(seen, 2, 1).focus()
    for key in ("ArrowRight", "ArrowUp", "PageUp", "PageUp"):  # 4 becomes 5, 8 and 9, no more
        seen.page.keyboard.press(key)
    assert cell(seen, 2, 2).get_attribute("aria-valuenow") == "9"
    assert maps(seen)["switches"][0][0] == 3
    assert maps(seen)["maxima"][0][0] == 9
    assert "stands in row 2, column 2: place 3, the byte 00000011" in seen.status()
    seen.page.keyboard.press("Home")
    assert cell(seen, 2, 2).get_attribute("aria-valuenow") == "-9"
    assert maps(seen)["switches"][0][0] == 2


def test_switches_by_mouse_and_by_touch(explorable):
    seen = explorable("switches")
    box = cell(seen, 1, 1).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    seen.page.mouse.move(x, y)
    seen.page.mouse.down()
    seen.page.mouse.move(x + 48, y - 48, steps=4)  # 8 steps of 12 pixels
    seen.page.mouse.up()
    assert maps(seen)["values"][0][0] == 9
    assert maps(seen)["switches"][0][0] == 0

    phone = explorable("switches", 360, has_touch=True)
    cell(phone, 4, 4).tap()
    slider = phone.page.get_by_label("Number in row 4, column 4")
    slider.fill("-2")
    assert maps(phone)["values"][3][3] == -2
    assert maps(phone)["maxima"][1][1] == 6


def test_scrubbing_the_peak_changes_what_has_switches_and_nothing_else(explorable):
    seen = explorable("switches")
    before = maps(seen)
    slider = seen.page.get_by_label("Its window’s maximum is at")
    for place in (0, 1, 3, 2):
        slider.fill(str(place))
        now = maps(seen)
        assert now["switches"][0][0] == place
        for name in ("maxima", "corner", "bilinear"):
            assert now[name] == before[name]
        assert now["unpooled"][place // 2][place % 2] == 8
        _, switches = max_pool2d_with_switches(torch.tensor(now["values"])[None])
        assert switches[0].tolist() == now["switches"]


def test_the_same_window_lights_up_in_all_maps(explorable):
    seen = explorable("switches")
    seen.figure.locator(".switches-map").nth(2).locator("td").nth(3).hover()
    where = seen.page.evaluate(
        """() => [...document.querySelectorAll('.switches-window')].map(w =>
            w.style.getPropertyValue('--row') + w.style.getPropertyValue('--column'))"""
    )
    assert where == ["11"] * 6
    assert "lower right window" in seen.status()


def test_switches_walk_by_themselves_until_somebody_takes_over(explorable):
    seen = explorable("switches")
    seen.page.get_by_label("Its window’s maximum is at").fill("0")
    seen.page.get_by_role("button", name="Walk").click()
    seen.page.wait_for_function("document.querySelectorAll('td')[16 + 4].dataset.value === '1'")
    cell(seen, 3, 3).click()
    assert seen.page.get_by_role("button", name="Walk").is_visible()
    seen.page.get_by_role("button", name="Reset").click()
    data = json.loads((DATA / "switches.json").read_text(encoding="utf-8"))
    assert maps(seen)["values"] == data["values"]
    seen.page.get_by_role("button", name="Shuffle").click()
    assert maps(seen)["values"] != data["values"]


# ----------------------------------------------------------------------------------- instances


def test_instances_show_what_the_package_cuts(explorable):
    seen = explorable("instances")
    sample = shapes.make_scene(seed=CHAPTER_SCENE)
    for square in (False, True):
        shape = "made square first (release)" if square else "kept, then warped (paper)"
        seen.page.get_by_label(shape).check(force=True)
        for box, k, iou, rank in boxes_to_cut(sample)[::3]:
            name = shapes.CLASS_NAMES[sample.annotations[k].label]
            title = name if rank is None else f"proposal {rank}"
            seen.page.get_by_label(title, exact=True).check(force=True)
            status = seen.status()  # waits until the pictures are decoded, too
            config = InstanceConfig(resize=72, crop=64, square=square)
            cut, crop, *stages = stage_crops(sample, box, k, config)
            x0, y0, x1, y1 = pixel_box(cut)
            assert f"grows to {x1 - x0} × {y1 - y0} and becomes 72 × 72" in status
            expected = crop.permute(1, 2, 0).numpy()
            assert np.abs(pixels(seen, 1).astype(int) - expected).mean() < 6
            for canvas, labels in enumerate(stages, start=2):
                found, colours = pixels(seen, canvas), colourise(labels).permute(1, 2, 0).numpy()
                assert (found == colours).all(axis=-1).mean() >= 0.995
            if rank is not None:
                verdict = "trains on it" if iou >= 0.5 else "leaves it out"
                assert f"stage 2 {verdict}: IoU {iou:.2f}" in seen.figure.inner_text()


def test_instances_by_keyboard_and_by_mouse(explorable):
    seen = explorable("instances")
    seen.page.get_by_label("heart", exact=True).focus()
    seen.page.keyboard.press("ArrowRight")
    assert seen.status().startswith("The star.")
    assert "star, heart and key" in seen.status()
    scene = seen.figure.locator(".instances-scene").bounding_box()
    # the key lies about here; the smallest box around it is its own
    margin = seen.page.evaluate("document.querySelector('canvas').width - 152") / 2
    scale = scene["width"] / (152 + 2 * margin)
    seen.page.mouse.click(scene["x"] + (83 + margin) * scale, scene["y"] + (113 + margin) * scale)
    assert seen.page.get_by_label("key", exact=True).is_checked()
    assert seen.status().startswith("The key.")
    seen.page.mouse.click(scene["x"] + (83 + margin) * scale, scene["y"] + (113 + margin) * scale)
    assert seen.status().startswith("The star.")


def test_names_on_a_label_map_do_not_hide_each_other(explorable):
    seen = explorable("instances", 360)
    seen.page.get_by_label("star", exact=True).check(force=True)
    seen.status()
    boxes = seen.page.evaluate(
        """() => [...document.querySelectorAll('.explorable-names')].map(n =>
            [...n.children].map(c => c.getBoundingClientRect()).map(r =>
                [r.left, r.top, r.right, r.bottom]))"""
    )
    assert max(map(len, boxes)) == 3
    for names in boxes:
        for i, a in enumerate(names):
            for b in names[:i]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
