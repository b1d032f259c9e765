"""The live model of the book's playground, in a real browser, against PyTorch."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import PHONE

from deconvnet.activations import decoder_activations
from deconvnet.aggregation import cut_crops
from deconvnet.export import STAGES
from deconvnet.shapes import make_scene
from deconvnet.weights import load_model, pretrained

ROOT = Path(__file__).resolve().parents[1]
LIVE = ROOT / "book" / "live"
PAGE = "book/playground.html"
MODEL = "document.querySelector('.live-model .explorable-body').liveModel"
TO_TEXT = "(bytes) => btoa(Array.from(bytes, (b) => String.fromCharCode(b)).join(''))"


def from_text(text: str, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)


def load_network(page) -> None:
    page.get_by_role("button", name=re.compile("Load the network")).click()
    page.locator(".live-scores tbody tr").first.wait_for(timeout=90_000)


def settled(page) -> str:
    """What the page says once the network has seen what is there now."""
    page.wait_for_function(f"() => {MODEL}.result.crop === {MODEL}.crop", timeout=30_000)
    page.wait_for_timeout(300)  # the sentence follows when the hand rests
    return page.locator(".explorable-status").inner_text()


def run_in(page, crop: torch.Tensor, use_switches: bool) -> dict[str, torch.Tensor]:
    answer = page.evaluate(
        f"""async ([text, switches]) => {{
            const pixels = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            const {{ scores, stages }} = await {MODEL}.run(pixels, switches);
            const text_ = {TO_TEXT};
            return [scores, ...stages].map((m) => {{
                const bytes = new Uint8Array(m.data.slice().buffer);
                return [m.name, [m.channels, m.height, m.width], text_(bytes)];
            }});
        }}""",
        [base64.b64encode(crop.numpy().tobytes()).decode(), use_switches],
    )
    return {name: from_text(data, torch.float32).view(shape) for name, shape, data in answer}


def test_every_stage_in_the_browser_equals_pytorch(open_page) -> None:
    page = open_page(PAGE)
    load_network(page)
    network = load_model(pretrained("shapes-deconvnet"))
    image = make_scene(seed=3).image
    crop = cut_crops(image, [(0, 0, image.shape[2], image.shape[1])], 64)
    for use_switches in (True, False):
        maps = decoder_activations(network, crop, use_switches)
        last = {name.split("_")[0]: value for name, value in maps.items()}
        found = run_in(page, crop[0], use_switches)
        assert list(found) == ["scores", *STAGES]
        for name, value in found.items():
            expected = last["score" if name == "scores" else name][0]
            torch.testing.assert_close(value, expected, atol=1e-3, rtol=0)


def test_nothing_is_loaded_before_it_is_asked_for(open_page) -> None:
    page = open_page(PAGE)
    asked = []
    page.on("request", lambda request: asked.append(request.url.rsplit("/", 1)[-1]))
    before = page.evaluate("performance.getEntriesByType('resource').map((e) => e.name).join()")
    assert "onnx" not in before and "wasm" not in before
    assert page.evaluate("typeof ort") == "undefined"
    load_network(page)
    scripts = {"ort.wasm.min.js", "ort-wasm-simd.wasm.js", "shapes-deconvnet.onnx.js"}
    assert scripts <= set(asked)


def test_the_scene_is_cut_as_the_package_cuts_it(open_page) -> None:
    page = open_page(PAGE)
    page.get_by_label("Start from").select_option("sizes")
    for view in ("the whole scene", "the chosen shape's box × 1.2"):
        page.get_by_role("radio", name=view).check(force=True)
        pixels, box, crop = page.evaluate(
            f"() => [({TO_TEXT})({MODEL}.scene.pixels), {MODEL}.box, ({TO_TEXT})({MODEL}.crop)]"
        )
        image = from_text(pixels).view(192, 192, 3).permute(2, 0, 1).contiguous()
        expected = cut_crops(image, [tuple(box)], 64)[0].int()
        assert (from_text(crop).view(3, 64, 64).int() - expected).abs().max() <= 1


PAINT = """([data, each]) => {
    const scene = LiveScene(data), crops = [];
    for (let label = 1; label < data.classNames.length; label++) {
        for (let i = 0; i < each; i++) {
            const item = { label, x: 0.5, y: 0.5, size: 0.45, angle: (360 * i) / each };
            item.seed = 100 * label + i;
            const { pixels, covers } = scene.paint({ ground: i, items: [item] });
            const box = scene.expand(scene.boxOf(covers[0]), 1.2);
            crops.push(btoa(String.fromCharCode(...scene.crop(pixels, box, 64))));
        }
    }
    return crops;
}"""


def test_the_network_succeeds_as_often_as_the_page_says(open_page) -> None:
    page = (ROOT / "book" / "playground.md").read_text(encoding="utf-8")
    told = re.search(r"Over (\d+) scenes .* in (\d+) of 100", page, re.S)
    data = json.loads((LIVE / "scene.json").read_text(encoding="utf-8"))
    names = data["classNames"][1:]
    painted = open_page(PAGE).evaluate(PAINT, [data, int(told[1]) // len(names)])
    assert len(painted) == int(told[1])
    crops = torch.stack([from_text(crop) for crop in painted]).view(-1, 3, 64, 64)
    network = load_model(pretrained("shapes-deconvnet"))
    with torch.no_grad():
        labels = torch.cat([network(part).argmax(1) for part in crops.split(48)])
    pixels = torch.stack([(labels == k).sum((1, 2)) for k in range(1, len(names) + 1)], 1)
    shapes = torch.arange(len(names)).repeat_interleave(len(crops) // len(names))
    right = (pixels.argmax(1) == shapes) & (pixels.amax(1) > 0)
    assert abs(100 * right.double().mean() - int(told[2])) < 2  # browsers smooth edges differently
    share = dict(zip(names, right.view(len(names), -1).double().mean(1).tolist()))
    often = {"disc", "ring", "square", "frame", "triangle", "star", "cross"}
    assert min(share[name] for name in often) > 0.9
    assert max(share["arrow"], share["heart"]) < 0.8
    assert share["key"] == 0


def test_by_keyboard_alone(open_page) -> None:
    page = open_page(PAGE)
    page.get_by_role("button", name=re.compile("Load the network")).focus()
    page.keyboard.press("Enter")
    page.locator(".live-scores tbody tr").first.wait_for(timeout=90_000)
    assert "star" in settled(page)
    page.get_by_role("button", name="Add a disc").focus()
    page.keyboard.press("Enter")
    assert page.evaluate(f"{MODEL}.state.items.length") == 2
    page.locator(".live-stage").focus()
    before = page.evaluate(f"() => ({{ ...{MODEL}.state.items[1] }})")
    for key in ("ArrowRight", "ArrowUp", "+", "r"):
        page.keyboard.press(key)
    after = page.evaluate(f"() => ({{ ...{MODEL}.state.items[1] }})")
    assert after["x"] > before["x"] and after["y"] < before["y"]
    assert after["size"] > before["size"] and after["angle"] == before["angle"] + 15
    assert "your disc" in settled(page)
    page.keyboard.press("Delete")
    assert "disc" not in settled(page).split("On your")[-1]
    page.get_by_role("slider", name="Size").focus()
    page.keyboard.press("Home")
    assert page.evaluate(f"{MODEL}.state.items[0].size") == pytest.approx(0.08)
    page.get_by_role("switch", name="Switches").focus()
    page.keyboard.press("Space")
    page.get_by_text("The switches are off").wait_for()


def test_a_shape_is_dragged_with_the_mouse(open_page) -> None:
    page = open_page(PAGE)
    stage = page.locator(".live-stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + box["width"] / 4, y, steps=4)
    page.mouse.up()
    star = page.evaluate(f"() => ({{ ...{MODEL}.state.items[0] }})")
    assert star["x"] == pytest.approx(0.75, abs=0.02)
    assert star["y"] == pytest.approx(0.5, abs=0.02)


def test_a_tap_on_a_phone_adds_a_shape(open_page) -> None:
    page = open_page(PAGE, width=PHONE)
    page.get_by_role("button", name="Add a ring").tap()
    assert page.evaluate(f"{MODEL}.state.items.length") == 2
    room = page.evaluate("document.documentElement.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= room


def test_a_picture_of_ones_own(open_page, tmp_path: Path) -> None:
    from PIL import Image

    page = open_page(PAGE)
    Image.new("RGB", (300, 200), (250, 10, 10)).save(tmp_path / "red.png")
    (tmp_path / "no-picture.png").write_text("not a picture")
    page.locator(".live-file input").set_input_files(tmp_path / "red.png")
    page.wait_for_function(f"() => {MODEL}.state.items.some((item) => item.picture)")
    pixels = from_text(page.evaluate(f"() => ({TO_TEXT})({MODEL}.scene.pixels)")).view(192, 192, 3)
    assert (pixels[2, 2].int() - torch.tensor([250, 10, 10])).abs().max() <= 12
    page.locator(".live-file input").set_input_files(tmp_path / "no-picture.png")
    page.get_by_text("cannot read no-picture.png").wait_for()


def test_without_a_script_there_is_a_picture(open_page) -> None:
    page = open_page(PAGE, java_script_enabled=False)
    still = page.locator(".live-model img")
    assert still.is_visible()
    assert len(still.get_attribute("alt").split()) > 10


# Without a browser


def module_at(path: Path):
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def test_the_outlines_are_the_package_s() -> None:
    committed = json.loads((LIVE / "scene.json").read_text(encoding="utf-8"))
    assert committed == module_at(LIVE / "prepare.py").scene()


def test_what_is_committed_is_small_and_carries_its_licence() -> None:
    assert sum(p.stat().st_size for p in LIVE.rglob("*") if p.is_file()) < 8e6
    licence = (LIVE / "onnxruntime" / "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith("MIT License") and "Microsoft Corporation" in licence


def test_files_become_scripts_of_the_same_bytes(tmp_path: Path) -> None:
    import gzip

    as_script = module_at(ROOT / "book" / "_ext" / "live_model.py").as_script
    (tmp_path / "a.onnx").write_bytes(b"graph")
    (tmp_path / "b.wasm.gz").write_bytes(gzip.compress(b"code"))
    for file, name, content in (("a.onnx", "a.onnx", b"graph"), ("b.wasm.gz", "b.wasm", b"code")):
        script, text = as_script(tmp_path / file)
        assert script == f"{name}.js"
        packed = re.fullmatch(r'LiveNetwork\.files\["(.*)"\]="(.*)";\n', text)
        assert packed[1] == name
        assert gzip.decompress(base64.b64decode(packed[2])) == content
