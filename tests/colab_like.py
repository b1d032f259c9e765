"""Runs chapters as Colab would: their own set-up cell installs the package, in a clean environment.

Not collected by pytest, since it downloads; ``make colab`` and the weekly run call it::

    python tests/colab_like.py                     # every chapter, from an empty environment
    python tests/colab_like.py --borrow 05 12      # two, beside this environment's PyTorch

What is real: pip clones and installs what the set-up cell names, from a copy of this working tree
to which the repository's addresses are redirected, git's and that of its raw files; the working
directory is an empty folder elsewhere, and has to stay empty. What is not: ``google.colab`` has
nothing in it but that redirection, and the packages that Colab brings are the newest instead of
Colab's own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]["url"]
PREINSTALLED = (
    "torch", "torchvision", "numpy", "matplotlib", "opencv-contrib-python", "pillow", "scipy",
    "scikit-image", "tqdm", "ipykernel", "ipywidgets", "numba",
)  # fmt: skip
"""Of what Colab brings, the packages that chapters use or that are costly to install."""

COLOURS = re.compile("\x1b\\[[0-9;]*m")  # of a traceback in a terminal

GOOGLE_COLAB = """
import urllib.request, urllib.response

class FromTheTree(urllib.request.BaseHandler):
    handler_order = 100  # before the handler that asks the network

    def https_open(self, request):
        if not request.full_url.startswith({raw!r}):
            return None
        file = open({tree!r} + request.full_url.removeprefix({raw!r}), "rb")
        response = urllib.response.addinfourl(file, {{}}, request.full_url, 200)
        response.msg = "OK"
        return response

urllib.request.install_opener(urllib.request.build_opener(FromTheTree))
"""

LAST_CELL = """
import deconvnet, sys, torch
assert deconvnet.__file__.startswith(sys.prefix), deconvnet.__file__
assert torch.__version__ == {torch!r}, "the set-up cell replaced Colab's PyTorch"
"""


def main() -> int:
    """Runs the chapters that the command line names, and says how each went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", help="how their names begin, such as 05 (all)")
    parser.add_argument(
        "--borrow", action="store_true", help="use this environment's packages: no large downloads"
    )
    options = parser.parse_args()
    chapters = [
        path
        for path in sorted((ROOT / "book").glob("*.ipynb"))
        if not options.chapters or path.name.startswith(tuple(options.chapters))
    ]
    if not chapters:
        parser.error(f"no chapter begins with {options.chapters}")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        colab = Colab(Path(folder), options.borrow)
        for path in chapters:
            start = time.perf_counter()
            try:
                colab.run(path)
            except Exception as error:  # whatever a cell raised
                failed.append(path.name)
                print(f"{path.name}: {COLOURS.sub('', str(error))}", file=sys.stderr, flush=True)
            else:
                print(f"{path.name}: ran in {time.perf_counter() - start:.0f} s", flush=True)
    return 1 if failed else 0


class Colab:
    """A virtual environment that looks like Colab to a set-up cell."""

    def __init__(self, folder: Path, borrow: bool) -> None:
        self.folder = folder
        venv.create(folder / "env", with_pip=True)
        self.python = str(folder / "env" / "bin" / "python")
        self.packages = Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))"))
        if borrow:
            # A path in a .pth file: found by import and by pip, but its own .pth files, such as
            # that of an editable installation, are not read.
            (self.packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        else:
            self.pip("install", *PREINSTALLED)
        self.torch = self.ask("import torch; print(torch.__version__)")
        repository = self.copy_of_the_tree()
        self.write_google_colab(repository)
        self.write_kernel(repository)

    def ask(self, code: str) -> str:
        command = [self.python, "-c", code]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def pip(self, *arguments: str) -> None:
        command = [self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
        subprocess.run(command, check=True)

    def copy_of_the_tree(self) -> Path:
        """A repository with one commit: the files here that git does not ignore."""
        copy = self.folder / "repository"
        listing = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True).stdout
        for name in filter(None, names.decode().split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        who = ("-c", "user.name=colab", "-c", "user.email=colab@localhost")
        for command in (("init", "--quiet"), ("add", "."), (*who, "commit", "-qm", "the tree")):
            subprocess.run(("git", *command), cwd=copy, check=True)
        return copy

    def write_google_colab(self, repository: Path) -> None:
        """The module that a set-up cell looks for, imported before the first cell, as in Colab."""
        place = self.packages / "google" / "colab"
        place.mkdir(parents=True)
        raw = REPOSITORY.replace("://github.com", "://raw.githubusercontent.com") + "/main"
        code = GOOGLE_COLAB.format(raw=raw, tree=str(repository))
        (place / "__init__.py").write_text(code)
        (self.packages / "colab.pth").write_text("import google.colab\n")

    def write_kernel(self, repository: Path) -> None:
        environment = {
            "PATH": f"{Path(self.python).parent}{os.pathsep}{os.environ['PATH']}",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
            "GIT_CONFIG_VALUE_0": REPOSITORY,
        }
        arguments = [self.python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        kernel = {"argv": arguments, "display_name": "Colab", "language": "python"}
        place = self.folder / "jupyter" / "kernels" / "colab"
        place.mkdir(parents=True)
        (place / "kernel.json").write_text(json.dumps({**kernel, "env": environment}))
        os.environ["JUPYTER_PATH"] = str(self.folder / "jupyter")

    def run(self, path: Path) -> None:
        """Runs one chapter from top to bottom, with the package not yet installed."""
        if (self.packages / "deconvnet").exists():
            self.pip("uninstall", "--yes", "deconvnet")
        notebook = nbformat.read(path, as_version=4)
        last = LAST_CELL.format(torch=self.torch)
        notebook.cells.append(nbformat.v4.new_code_cell(last))
        elsewhere = self.folder / f"content-{path.stem}"
        elsewhere.mkdir()
        resources = {"metadata": {"path": str(elsewhere)}}
        NotebookClient(notebook, timeout=900, kernel_name="colab", resources=resources).execute()
        left = sorted(p.name for p in elsewhere.iterdir())
        if left:
            raise RuntimeError(f"left files in the working directory: {left}")


if __name__ == "__main__":
    sys.exit(main())
