"""The live figures in JupyterLab, in a real browser: move a control, and the picture changes.

Skipped where JupyterLab is not installed, since no other test needs it: ``pip install jupyterlab``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ElementHandle, Locator, Page

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")

PATIENCE = 120  # seconds for what takes a few on an idle machine
CELLS = (
    "import torch\n"
    "from deconvnet import shapes, widgets\n"
    "from deconvnet.crf import CRFConfig\n"
    "from deconvnet.inference import InferenceConfig\n"
    "from deconvnet.weights import load_model, pretrained\n"
    "assert widgets.is_live()\n"
    'model = load_model(pretrained("shapes-deconvnet"))\n'
    "sample, names = shapes.make_scene(), shapes.CLASS_NAMES\n"
    "image = sample.image\n"
    "boxes = torch.tensor([[8.0, 8, 90, 90], [40, 30, 120, 110], [0, 20, 60, 100]])\n"
    "belief = torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0)).softmax(0)",
    "widgets.explore_switches()",
    "widgets.explore_decoder(model, image[:, :64, :64], names)",
    "widgets.explore_instances(sample)",
    "widgets.explore_proposals(model, image, boxes, class_names=names)",
    "widgets.explore_crf(image[:, :48, :48], belief, CRFConfig(bilateral_weight=1))",
)
SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {
        "autoStartDefaultKernel": True,  # no question which kernel is meant
        "windowingMode": "none",  # cells out of sight are there too
    },
    "@jupyterlab/apputils-extension:notification": {
        "checkForUpdates": False,
        "fetchNews": "false",
    },
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a JupyterLab whose folder holds ``live.ipynb``."""
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    (tmp_path / "files").mkdir()
    nbformat.write(notebook, tmp_path / "files" / "live.ipynb")
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "overrides.json").write_text(json.dumps(SETTINGS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = (
        f"--ServerApp.root_dir={tmp_path / 'files'}",
        f"--LabApp.app_settings_dir={tmp_path / 'settings'}",
        f"--LabApp.user_settings_dir={tmp_path / 'user'}",
        f"--LabApp.workspaces_dir={tmp_path / 'workspaces'}",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        "--no-browser",
        "--allow-root",
    )
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime"}
    environment = os.environ | {name: str(tmp_path / place) for name, place in folders.items()}
    log = tmp_path / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for_server(address, process, log)
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE)


def wait_for_server(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api", timeout=PATIENCE).close()
        except urllib.error.URLError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")


@pytest.fixture
def notebook(browser: Browser, server: str) -> Iterator[Page]:
    """The notebook, run from top to bottom."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(1000 * PATIENCE)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{server}/lab/tree/live.ipynb?reset")
    page.get_by_text("(ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('[data-command="runmenu:run-all"]').click()
    ran = page.locator(".jp-CodeCell .jp-InputPrompt").last
    page.wait_for_function(r"e => /\d/.test(e.innerText)", arg=ran.element_handle())
    yield page
    complaints = page.locator('[data-mime-type$=".stderr"], [data-mime-type$=".error"]')
    assert complaints.all_inner_texts() == []
    assert errors == []
    page.close()


def change(picture: ElementHandle, page: Page, move: Callable[[], object]) -> None:
    """Move a control, and wait until the picture is another one."""
    before = picture.inner_html()
    move()
    changed = "([picture, before]) => picture.innerHTML !== before"
    page.wait_for_function(changed, arg=[picture, before])


def drag(page: Page, handle: Locator) -> None:
    """Take a slider by its handle to the middle of the longer way."""
    handle.scroll_into_view_if_needed()
    place = handle.bounding_box()
    track = handle.locator("xpath=ancestor::*[contains(@class, 'noUi-base')]").bounding_box()
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    ends = track["x"], track["x"] + track["width"]
    target = (x + max(ends, key=lambda end: abs(end - x))) / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(target, y, steps=5)
    page.mouse.up()


def test_every_control_changes_the_picture(notebook: Page) -> None:
    moved = []
    for cell in notebook.locator(".jp-CodeCell").filter(has=notebook.locator(".widget-vbox")).all():
        picture = cell.locator(".widget-html-content").element_handle()
        for number in cell.locator("input[type=number]").all():
            change(picture, notebook, lambda n=number: (n.fill("-7"), n.press("Tab")))
            moved.append("number")
        for choice in cell.locator("select:enabled").all():
            other = choice.locator("option:not(:checked)").first.get_attribute("value")
            change(picture, notebook, lambda c=choice, o=other: c.select_option(o))
            moved.append("choice")
        for box in cell.locator("input[type=checkbox]").all():
            change(picture, notebook, box.click)
            moved.append("box")
        for handle in cell.locator(".noUi-handle").all():
            change(picture, notebook, lambda h=handle: drag(notebook, h))
            # one step further may well leave a label map as it is, but not the slider's own number
            slider = handle.locator("xpath=ancestor::*[contains(@class, 'widget-slider')]")
            readout = slider.locator(".widget-readout").element_handle()
            change(readout, notebook, lambda h=handle: h.press("ArrowLeft"))
            moved.append("slider")
    counts = {kind: moved.count(kind) for kind in moved}
    assert counts == {"number": 16, "choice": 5, "box": 1, "slider": 8}
