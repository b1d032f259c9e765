"""What holds the project together: its files, the book's pages, and the one repository address."""

from __future__ import annotations

import json
import re
import sys
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
PAGES = sorted(BOOK.rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = CONFIG["repository"]["url"]
SLUG = urlsplit(REPOSITORY).path.strip("/")

FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"^([`:]{3,})\{(?:figure|image)\}[^\n]*\n(.*?)^\1", re.MULTILINE | re.DOTALL)
MARKDOWN_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)[^)]*\)")
MARKDOWN_LINK = re.compile(r"(?<!!)\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\(([^)\s]+)\)")
HTML_IMAGE = re.compile(r"<img\b[^>]*>", re.IGNORECASE)
MACHINE_PATH = re.compile(r"(?<![\w/.:+=<~-])/[A-Za-z]{3,}/[\w.-]+[^\s\"']*|\b[A-Z]:\\+\w+")


def by_name(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=[p.name for p in paths])


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def markdown_of(path: Path) -> str:
    """The page's Markdown; of a notebook, that of its Markdown cells."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = (c for c in load(path)["cells"] if c["cell_type"] == "markdown")
    return "\n\n".join("".join(c["source"]) for c in cells)


def images_without_alt(markdown: str) -> list[str]:
    bare = [m[0] for m in MARKDOWN_IMAGE.finditer(markdown) if not m[1].strip()]
    bare += [m[0] for m in FIGURE.finditer(markdown) if not re.search(r":alt: *\S", m[2])]
    bare += [t for t in HTML_IMAGE.findall(markdown) if not re.search(r'\balt="[^"]+"', t)]
    return bare


# Files of the project


def test_environment_yml_installs_what_pyproject_lists() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, by_pip = environment["dependencies"]
    assert python.startswith("python>=3.10")
    assert pip == "pip"
    assert by_pip == {"pip": ["-e .[book,test]"]}
    assert set(PYPROJECT["project"]["optional-dependencies"]) >= {"book", "test"}


def test_every_dependency_is_a_range_with_its_reason_beside_it() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    for requirement in PYPROJECT["project"]["dependencies"] + [r for e in extras for r in e]:
        assert re.search(r">=[\d.]+", requirement), requirement
        assert "==" not in requirement, requirement
        lines = [line for line in text.splitlines() if f'"{requirement}"' in line]
        assert lines
        assert all(re.search(r"#\s*\S", line) for line in lines), requirement


@by_name([ROOT / "README.md", ROOT / "CONTRIBUTING.md", BOOK / "setup.md", ROOT / ".ci" / "run"])
def test_make_targets_that_a_page_names_exist(path: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    named = re.findall(r"(?:^|`)make ([a-z]+)", path.read_text(encoding="utf-8"), re.M)
    assert named
    assert set(named) <= set(targets)


@by_name([p for p in TEXTS if "```bash" in p.read_text(encoding="utf-8")])
def test_deconvnet_commands_that_a_page_names_parse(path: Path) -> None:
    from deconvnet import cli

    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^ *```bash\n(.*?)```", text, re.M | re.S)
    commands = re.findall(r"^ *(?:torchrun .*? -m )?deconvnet +(.*)$", "\n".join(blocks), re.M)
    for command in commands:
        cli.parser().parse_args(command.split("#")[0].split())


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PYPROJECT["project"]["version"]


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    assert (files("deconvnet") / "py.typed").is_file()


def test_random_numbers_do_not_depend_on_other_tests() -> None:
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


@given(st.integers())
def test_random_numbers_do_not_depend_on_other_examples(number: int) -> None:
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


# The one address


def test_metadata_points_to_the_repository() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["repository-code"] == REPOSITORY
    assert PYPROJECT["project"]["urls"]["Repository"] == REPOSITORY
    owner, name = SLUG.split("/")
    pages = f"https://{owner}.github.io/{name}/"
    assert CONFIG["html"]["baseurl"] == citation["url"] == pages
    assert PYPROJECT["project"]["urls"]["Book"] == pages


@by_name([*TEXTS, *NOTEBOOKS, ROOT / "_config.yml"])
def test_colab_and_install_addresses_use_the_repository(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for pattern in (
        r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)",
        r"git\+https://github\.com/([\w.-]+/[\w.-]*\w)",
        r"git clone https://github\.com/([\w.-]+/[\w.-]*\w)",
    ):
        assert set(re.findall(pattern, text)) <= {SLUG}


@by_name(NOTEBOOKS)
def test_the_badge_opens_this_very_notebook(path: Path) -> None:
    branch = CONFIG["repository"]["branch"]
    address = f"https://colab.research.google.com/github/{SLUG}/blob/{branch}/book/{path.name}"
    first = load(path)["cells"][0]
    assert first["cell_type"] == "markdown"
    assert f"]({address})" in "".join(first["source"])


# The book's pages


def test_the_toc_lists_every_page_once_and_no_other() -> None:
    chapters = [c for part in TOC["parts"] for c in part["chapters"]]
    sections = [s for chapter in chapters for s in chapter.get("sections", ())]
    listed = [TOC["root"], *(entry["file"] for entry in [*chapters, *sections])]
    assert len(set(listed)) == len(listed)
    files = [p.relative_to(ROOT).with_suffix("") for p in [*NOTEBOOKS, *PAGES]]
    assert set(listed) == {p.as_posix() for p in files}


def test_the_reference_documents_every_module() -> None:
    modules = {p.stem for p in (ROOT / "deconvnet").glob("*.py") if not p.stem.startswith("_")}
    text = "".join(p.read_text(encoding="utf-8") for p in (BOOK / "api").glob("*.md"))
    assert set(re.findall(r"automodule:: deconvnet\.(\w+)", text)) == modules


@by_name([*TEXTS, *NOTEBOOKS])
def test_pictures_have_alternative_text(path: Path) -> None:
    assert images_without_alt(markdown_of(path)) == []


def test_a_picture_without_alternative_text_is_found() -> None:
    figure = "```{figure} a.png\n:alt: A cat.\n\nCaption\n```\n"
    for good in (figure, "![A cat](a.png)", '<img src="a.png" alt="A cat">'):
        assert images_without_alt(good) == []
    for bad in (figure.replace(":alt: A cat.\n", ""), "![](a.png)", '<img src="a.png">'):
        assert len(images_without_alt(bad)) == 1


@by_name([*TEXTS, *NOTEBOOKS])
def test_internal_links_lead_somewhere(path: Path) -> None:
    markdown = FENCE.sub("", markdown_of(path))
    targets = MARKDOWN_LINK.findall(markdown) + [m[2] for m in MARKDOWN_IMAGE.finditer(markdown)]
    targets += re.findall(r"^[`:]{3,}\{(?:figure|image)\} *(\S+)", markdown_of(path), re.M)
    for target in targets:
        parts = urlsplit(target)
        if not parts.scheme and parts.path:
            assert (path.parent / unquote(parts.path)).is_file(), target


@by_name(NOTEBOOKS)
def test_a_notebook_is_small_and_was_run_without_error(path: Path) -> None:
    assert path.stat().st_size < 1_000_000
    cells = [c for c in load(path)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c["outputs"]]
    assert outputs
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]


@by_name(NOTEBOOKS)
def test_a_notebook_describes_the_pictures_it_draws(path: Path) -> None:
    for number, cell in enumerate(load(path)["cells"]):
        kinds = {k for o in cell.get("outputs", []) for k in o.get("data", {})}
        if kinds & {"image/png", "image/jpeg", "image/svg+xml"}:
            alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt.split()) >= 3, f"cell {number} draws a picture without an alt text"


@by_name([*TEXTS, *NOTEBOOKS])
def test_no_path_of_a_machine_is_left(path: Path) -> None:
    assert MACHINE_PATH.findall(path.read_text(encoding="utf-8")) == []


def test_a_path_of_a_machine_is_found() -> None:
    for text in ("saved to /some/where/weights", '"/some/where"', r"C:\\some\\where"):
        assert MACHINE_PATH.search(text), text
    for text in ("https://some.org/where/it/is", "and/or", "runs/stage1/log.csv", "</some>"):
        assert not MACHINE_PATH.search(text), text


@by_name(NOTEBOOKS)
def test_a_notebook_installs_the_package_only_in_colab(path: Path) -> None:
    code = "\n".join("".join(c["source"]) for c in load(path)["cells"] if c["cell_type"] == "code")
    assert 'if "google.colab" in sys.modules:' in code
    for line in re.findall(r"^.*pip install.*$", code, re.M):
        assert line.startswith(" "), line
        assert not re.search(r"\btorch(vision)?\b", line), line
