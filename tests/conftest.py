"""What test files share: random numbers, a small data set in VOC's layout, and a browser."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
import torch
from hypothesis import register_random, settings

from deconvnet.shapes import write_shapes

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

ROOT = Path(__file__).resolve().parents[1]
PHONE, DESKTOP = 375, 1280  # widths in CSS pixels
ON_THIS_MACHINE = ("file:", "data:", "blob:", "about:")
MAC_BROWSERS = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)

settings.register_profile("deconvnet", deadline=None)  # a busy machine is no defect
settings.load_profile("deconvnet")


class TorchRandom:
    """PyTorch's random numbers, for Hypothesis to seed before each example and to restore."""

    seed = torch.default_generator.manual_seed
    getstate = torch.default_generator.get_state
    setstate = torch.default_generator.set_state


TORCH_RANDOM = TorchRandom()  # Hypothesis keeps a weak reference only
register_random(TORCH_RANDOM)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Tests in the background of a script would inherit that Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training and six validation scenes; not to be changed by a test."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    return write_shapes(root, train=12, val=6, workers=1, progress=False)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """PyTorch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, so that two processes can be compared bit for bit."""
    with torch_threads(1):
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Also where the tests run on one each."""
    with torch_threads(2):
        yield


@pytest.fixture
def three_threads() -> Iterator[None]:
    """More than two, of which a loop may want only some."""
    with torch_threads(3):
        yield


def go_without(what: str) -> NoReturn:
    """Skip; but fail where ``DECONVNET_BROWSER=required`` says that nothing may be missing."""
    if os.environ.get("DECONVNET_BROWSER") == "required":
        pytest.fail(f"{what}, and DECONVNET_BROWSER=required", pytrace=False)
    pytest.skip(what)


def book_folder() -> Path:
    """Where the built book is, or would be; ``DECONVNET_BOOK`` names another copy."""
    return Path(os.environ.get("DECONVNET_BOOK") or ROOT / "_build" / "html").resolve()


@pytest.fixture(scope="session")
def built_book() -> Path:
    """The folder of the built HTML."""
    folder = book_folder()
    if not (folder / "book" / "index.html").is_file():
        go_without(f"there is no built book in {folder}: run `make book` first")
    return folder


# One browser a file, not one a session: Playwright keeps an event loop running while it is open,
# and nbval, which runs the chapters after these tests, needs one of its own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium, the system's own."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = filter(None, map(shutil.which, (*names, *MAC_BROWSERS)))
    executable = next(found, None)
    if executable is None:
        go_without("there is no Chromium on this machine")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        go_without("the package `playwright` is not installed")
    # a sandbox needs rights that a container lacks, and the pages are our own
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=flags)
        yield chromium
        chromium.close()


class PageOpener:
    """Opens pages of the built book from disk, and writes down what goes wrong in them.

    Attributes:
        problems: Errors in the console, errors in scripts and requests to other machines, so far.
    """

    def __init__(self, browser: Browser, book: Path) -> None:
        self.browser = browser
        self.book = book
        self.problems: list[str] = []
        self.contexts: list[BrowserContext] = []

    def __call__(
        self,
        path: str,
        width: int = DESKTOP,
        dark: bool = False,
        height: int = 900,
        **options: Any,
    ) -> Page:
        """Open a page and wait until it is loaded and its formulas are drawn.

        Args:
            path: The page within the book, as ``"book/02-unpooling.html"``; a ``?query`` or
                ``#anchor`` may follow.
            width: Of the window, in CSS pixels; a window as narrow as a phone has a touch screen.
            dark: Whether the reader prefers a dark page.
            height: Of the window, in CSS pixels.
            options: More of ``Browser.new_context``, as ``java_script_enabled=False``.
        """
        context = self.browser.new_context(
            **{
                "viewport": {"width": width, "height": height},
                "color_scheme": "dark" if dark else "light",
                "has_touch": width <= 480,
                "offline": True,
                **options,
            }
        )
        self.contexts.append(context)
        page = context.new_page()
        self.listen(page, path)
        page.goto(f"{self.book.as_uri()}/{path}", wait_until="load")
        page.evaluate("() => window.MathJax?.startup?.promise?.then(() => null)")
        return page

    def listen(self, page: Page, path: str) -> None:
        """Write down the page's errors and its requests to other machines."""

        def note(what: str) -> None:
            self.problems.append(f"{path}: {what}")

        def look_at_request(request: Any) -> None:
            if not request.url.startswith(ON_THIS_MACHINE):
                note(f"a request to {request.url}")

        def look_at_message(message: Any) -> None:
            if message.type == "error":
                note(f"an error in the console: {message.text} ({message.location.get('url')})")

        page.on("request", look_at_request)
        page.on("websocket", lambda socket: note(f"a socket to {socket.url}"))
        page.on("console", look_at_message)
        page.on("pageerror", lambda error: note(f"an error in a script: {error}"))

    def close(self) -> None:
        """Close the pages."""
        while self.contexts:
            self.contexts.pop().close()


@pytest.fixture
def open_page(browser: Browser, built_book: Path) -> Iterator[PageOpener]:
    """``open_page("book/02-unpooling.html", width=375, dark=True)`` gives a Playwright page.

    At the end of the test, a problem that any of its pages had is a failure.
    """
    opener = PageOpener(browser, built_book)
    yield opener
    opener.close()
    assert opener.problems == []
