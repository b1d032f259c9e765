"""What runs on GitHub agrees with what the project says of itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text("utf-8"))
    for path in (ROOT / ".github" / "workflows").glob("*.yml")
}


def test_the_oldest_releases_are_the_lower_bounds():
    bounds = dict(
        re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in PROJECT["dependencies"]
    )
    lines = (ROOT / ".github" / "oldest.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {name: pin.removesuffix(".*") for name, pin in pins.items()} == bounds


def test_the_oldest_and_the_newest_python_run():
    jobs = WORKFLOWS["tests"]["jobs"]
    oldest, newest = jobs["newest"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={oldest}"
    assert f"Python {oldest} to {newest}," in (ROOT / "README.md").read_text("utf-8")
    (python,) = (step["with"] for step in jobs["oldest"]["steps"] if "with" in step)
    assert python["python-version"] == oldest
