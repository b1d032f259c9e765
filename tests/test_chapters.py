"""The contract that every chapter keeps, so that a reader finds the same things in each.

``CONTRIBUTING.md`` tells it in words. Structure only: that cells still give their outputs is
nbval's business, and that the package is right is the other tests'.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest

from deconvnet import cli

BOOK = Path(__file__).resolve().parents[1] / "book"
CHAPTERS = sorted(BOOK.glob("*.ipynb"))

VERBS = {
    "Average", "Build", "Cut", "Follow", "Grow", "Label", "Make", "Measure", "Mirror", "Propose",
    "Read", "Run", "Segment", "Sharpen", "Speed", "Teach", "Train", "Unpool",
}  # fmt: skip
"""With which a chapter's title may begin."""

MAY_IGNORE_OUTPUT = {
    ("02-unpooling", "def when_determinism_is_demanded(function, *arguments):"),
    ("09-crf", "large = F.interpolate("),
    ("11-performance", "device = default_device()"),
    ("11-performance", "def milliseconds(rounds=3):"),
    ("11-performance", "seconds = {}"),
    ("11-performance", "seconds, answers = {}, {}"),
    ("12-own-data", "device = default_device()"),
    ("12-own-data", "predictions = {}"),  # so short a training ends differently on each machine
}
"""Cells whose output nbval doesn't compare: times, hardware, another library's messages.
A chapter, and the cell's first line of code."""

HARDWARE_MATTERS = {"06-training", "11-performance", "12-own-data"}
"""Chapters with a cell that says what hardware it found, and picks its settings by it."""

IMPORTABLE = {
    "IPython", "PIL", "cv2", "deconvnet", "ipywidgets", "matplotlib", "matplotlib_inline", "numpy",
    "torch", "torchvision", "tqdm",
}  # fmt: skip
"""Besides the standard library: what the package depends on, and what every notebook has."""

IGNORES = re.compile(r"#\s*(NBVAL_\w+|PYTEST_VALIDATE_IGNORE_OUTPUT)")
IGNORING_TAGS = {"nbval-ignore-output", "nbval-skip", "raises-exception", "nbval-raises-exception"}
EQUALITY = re.compile(r"equal|close|==")
OPENERS = {
    "open", "Path", "read_image", "read_label_map", "read_annotations", "read_split", "imread",
    "load", "load_model", "VOCDataset", "Predictor", "from_files", "loadtxt", "read_csv",
}  # fmt: skip
UNSAFE_COLOURS = re.compile(
    r"(tab:|dark|light|lime|forest|sea|indian|fire)?(red|green|r|g|lime|crimson)"
    r"|jet|hsv|rainbow|gist_rainbow|nipy_spectral|turbo|RdYlGn(_r)?|RdGn|#f00|#0f0|#ff0000|#00ff00",
    re.IGNORECASE,
)
COLOUR_ARGUMENTS = {
    "c", "color", "colors", "ec", "fc", "edgecolor", "facecolor", "markerfacecolor", "cmap",
}  # fmt: skip
GUARD = re.compile(
    r'import sys\n+if "google\.colab" in sys\.modules:\n'
    r' +[!%]pip install -q "?git\+https://github\.com/[\w./-]+"?\s*'
)


class Chapter:
    """A notebook, and the parts of it that the contract speaks of."""

    def __init__(self, path: Path) -> None:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        self.name = path.stem
        self.cells = [{**cell, "source": "".join(cell["source"])} for cell in notebook["cells"]]
        self.first = self.cells[0]["source"]
        self.markdown = "\n\n".join(c["source"] for c in self.of("markdown"))
        self.headings = re.findall(r"^(#+ .*)$", self.markdown, re.M)
        self.exercises_at = next(
            (i for i in self.indices("markdown") if re.search(r"^## Exercises", self[i], re.M)),
            len(self.cells),
        )

    def __getitem__(self, index: int) -> str:
        return self.cells[index]["source"]

    def of(self, kind: str) -> list[dict]:
        return [cell for cell in self.cells if cell["cell_type"] == kind]

    def indices(self, kind: str) -> list[int]:
        return [i for i, cell in enumerate(self.cells) if cell["cell_type"] == kind]

    def outputs(self, index: int) -> dict[str, str]:
        """What a cell shows, by kind."""
        shown = [o.get("data", {}) for o in self.cells[index].get("outputs", [])]
        return {kind: "".join(data) for d in shown for kind, data in d.items() if data}

    def pictures(self) -> list[int]:
        """Cells that draw."""
        kinds = {"image/png", "image/jpeg", "image/svg+xml"}
        return [i for i in self.indices("code") if kinds & self.outputs(i).keys()]

    def shown_source(self) -> list[int]:
        """Cells that show the package's own code."""
        shown = [
            i for i in self.indices("code")
            if re.search(r"```python\s+(@|def |class )", self.outputs(i).get("text/markdown", ""))
        ]  # fmt: skip
        return shown + [i for i in self.indices("markdown") if "{literalinclude}" in self[i]]

    def code(self, index: int) -> ast.Module:
        return ast.parse(plain_python(self[index]))

    def package_names(self) -> set[str]:
        """Names that the chapter imports from the package."""
        nodes = [n for i in self.indices("code") for n in ast.walk(self.code(i))]
        imports = [n for n in nodes if isinstance(n, ast.ImportFrom)]
        inside = [n for n in imports if (n.module or "").split(".")[0] == "deconvnet"]
        return {alias.asname or alias.name for n in inside for alias in n.names}


def plain_python(source: str) -> str:
    """The cell without IPython's own commands."""
    return re.sub(r"^( *)[!%].*$", r"\1pass", source, flags=re.M)


def first_line(source: str) -> str:
    lines = (line.strip() for line in source.splitlines())
    return next(line for line in lines if line and not line.startswith("#"))


def ignored(chapter: Chapter) -> set[tuple[str, str]]:
    return {
        (chapter.name, first_line(cell["source"]))
        for cell in chapter.of("code")
        if IGNORES.search(cell["source"]) or IGNORING_TAGS & set(cell["metadata"].get("tags", []))
    }


def title_fault(title: str) -> str | None:
    match = re.fullmatch(r"# (\w+)\b.+", title)
    if match is None:
        return f"expected one title, got {title!r}"
    return None if match[1] in VERBS else f"{match[1]!r} is none of {sorted(VERBS)}"


def from_scratch(chapter: Chapter) -> list[str]:
    """Short code of the reader's own that an assertion finds equal to the package's.

    Either a function of at most 15 lines (as Python itself would wrap it, without its docstring)
    that the same or the next code cell tests, or a cell as short with a result named ``by_hand``.
    The cell that tests must use something of the package.
    """
    package, found = chapter.package_names(), []
    cells = [chapter.code(i) for i in chapter.indices("code") if i < chapter.exercises_at]
    for cell, following in zip(cells, [*cells[1:], ast.Module([], [])]):
        functions = [n for n in cell.body if isinstance(n, ast.FunctionDef)]
        own = {f.name for f in functions if length(f) <= 15}
        for tester in (cell, following):
            by_hand = {"by_hand"} if tester is cell and length(cell) <= 15 else set()
            results = follow(tester, own | by_hand)
            if names(tester) & package:
                found += [
                    ast.unparse(node)
                    for node in ast.walk(tester)
                    if is_assertion(node) and names(node) & results
                ]
    return found


def follow(code: ast.Module, results: set[str]) -> set[str]:
    """The names, and those that are assigned from them."""
    for node in ast.walk(code):
        if isinstance(node, ast.Assign) and names(node.value) & results:
            results = results | {n for target in node.targets for n in names(target)}
    return results


def is_assertion(node: ast.AST) -> bool:
    text = ast.unparse(node) if isinstance(node, (ast.Assert, ast.Expr)) else ""
    called = isinstance(node, ast.Expr) and re.match(r"[\w.]*assert_\w+\(", text)
    return bool(called or (isinstance(node, ast.Assert) and EQUALITY.search(text)))


def names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def length(node: ast.Module | ast.FunctionDef) -> int:
    """Lines of code, however they were wrapped."""
    lines = ast.unparse(node).splitlines()
    docstring = ast.get_docstring(node)
    quoted = len(docstring.splitlines()) if docstring else 0
    return len([line for line in lines if line.strip()]) - quoted


@pytest.fixture(scope="module", params=CHAPTERS, ids=[path.stem for path in CHAPTERS])
def chapter(request: pytest.FixtureRequest) -> Chapter:
    return Chapter(request.param)


# What stands at the top


def test_the_title_begins_with_a_verb(chapter: Chapter) -> None:
    titles = [h for h in chapter.headings if h.startswith("# ")]
    assert len(titles) == 1
    assert chapter.first.startswith(titles[0])
    assert title_fault(titles[0]) is None


def test_a_title_without_a_verb_is_found() -> None:
    assert title_fault("# Train in two stages") is None
    for bad in ("# The network", "# Two opinions", "# Training", "Train", "# Train"):
        assert title_fault(bad) is not None


def test_the_top_says_what_one_will_be_able_to_do(chapter: Chapter) -> None:
    part = re.search(
        r"^\*\*You will be able to\*\*\n\n((?:[*-] .*\n(?:  .*\n)*)+)", chapter.first, re.M
    )
    assert part
    assert 3 <= len(re.findall(r"^[*-] ", part[1], re.M)) <= 5


def test_the_top_says_why_it_matters_in_a_few_sentences(chapter: Chapter) -> None:
    part = re.search(r"^\*\*Why it matters\.\*\* (.*?)\n\n", chapter.first, re.M | re.S)
    assert part
    assert 2 <= len(re.findall(r"[.?!](?=\s|$)", part[1])) <= 6


def test_the_top_says_what_one_should_know(chapter: Chapter) -> None:
    part = re.search(
        r"^\| you should know \| how important \| where to get it \|\n\|[-|]+\|\n((?:\|.*\|\n)+)",
        chapter.first,
        re.M,
    )
    assert part
    rows = [row.strip("|").split("|") for row in part[1].splitlines()]
    assert len(rows) >= 2
    for row in rows:
        assert len(row) == 3
        assert row[1].strip() in ("must", "helpful", "not needed")


def test_the_top_says_how_long_it_takes_on_what(chapter: Chapter) -> None:
    part = re.search(r"^\*\*Time\.\*\* (.*?)\n\n", chapter.first, re.M | re.S)
    assert part
    assert re.search(r"\d+ minutes to read", part[1])
    assert "CPU" in part[1]
    assert "GPU" in part[1]


def test_the_chapter_asks_one_question(chapter: Chapter) -> None:
    questions = re.findall(r"\*\*The question of this chapter: [^*]+\?\*\*", chapter.markdown)
    assert len(questions) == 1
    assert questions[0] in chapter.first


def test_the_first_code_cell_installs_in_colab_and_nowhere_else(chapter: Chapter) -> None:
    assert GUARD.fullmatch(chapter.of("code")[0]["source"])


# What stands in the middle


def test_the_reader_predicts_before_a_cell_runs(chapter: Chapter) -> None:
    asks = [i for i in chapter.indices("markdown") if re.search(r"\*+Predict\b", chapter[i])]
    before_code = [i for i in asks if chapter.cells[i + 1]["cell_type"] == "code"]
    assert any(re.search(r"\?", chapter[i]) for i in before_code)


def test_a_picture_comes_before_the_formula_and_the_formula_before_the_code(
    chapter: Chapter,
) -> None:
    formulas = [i for i in chapter.indices("markdown") if re.search(r"^\s*\$\$", chapter[i], re.M)]
    assert chapter.pictures()
    assert formulas
    assert chapter.shown_source()
    assert chapter.pictures()[0] < formulas[0] < chapter.shown_source()[0]


def test_a_version_from_scratch_equals_the_package(chapter: Chapter) -> None:
    assert from_scratch(chapter)


def test_an_untested_or_long_version_is_found() -> None:
    def chapter_of(*cells: str) -> Chapter:
        made = object.__new__(Chapter)
        made.cells = [{"cell_type": "code", "source": cell} for cell in cells]
        made.exercises_at = len(cells)
        return made

    imports = "from deconvnet.voc import palette"
    short = "def mine(n):\n    return [n]"
    long = "def mine(n):\n" + "    n += 1\n" * 14 + "    return n"
    test = "by_mine = mine(3)\nassert torch.equal(by_mine, palette(3))"
    assert from_scratch(chapter_of(imports, short, test))
    assert from_scratch(chapter_of(imports, f"{short}\n{test}"))
    assert from_scratch(chapter_of(imports, "by_hand = 3\nassert by_hand == palette(3)"))
    for bad in (
        (imports, long, test),
        (imports, short, "print(mine(3))"),
        (imports, short, "assert mine(3) > palette(3)"),
        (imports, short, "assert mine(3) == 4"),
        (imports, short, "print(1)", test),
    ):
        assert not from_scratch(chapter_of(*bad))


def test_every_figure_says_what_it_shows(chapter: Chapter) -> None:
    figures = {}
    for i in chapter.pictures():
        about = chapter.cells[i]["metadata"].get("mystnb", {})
        image, figure = about.get("image", {}), about.get("figure", {})
        assert len(image.get("alt", "").split()) >= 8, f"cell {i}: alternative text"
        assert image.get("classes") == "dark-light", f"cell {i}: masks in dark mode"
        assert len(figure.get("caption", "").split()) >= 4, f"cell {i}: caption"
        figures[figure.get("name")] = i
    assert None not in figures
    assert len(figures) == len(chapter.pictures())


# What stands at the end


@pytest.mark.parametrize(
    "heading",
    [
        r"## Pitfalls",
        r"## What the paper and its release did differently",
        r"## Summary",
        r"## Exercises",
        r"## (Read on|Further reading)",
    ],
)
def test_the_chapter_has_its_last_sections(chapter: Chapter, heading: str) -> None:
    assert len([h for h in chapter.headings if re.match(heading, h)]) == 1


def test_the_summary_is_a_list(chapter: Chapter) -> None:
    part = re.search(r"^## Summary\n(.*?)(?=^## )", chapter.markdown, re.M | re.S)
    assert part
    assert 3 <= len(re.findall(r"^[*-] ", part[1], re.M)) <= 7


def test_the_paper_and_its_release_are_compared_in_a_table(chapter: Chapter) -> None:
    part = re.search(r"^## What the paper and.*?(?=^## )", chapter.markdown, re.M | re.S)
    assert part
    assert re.search(r"^\|.*paper.*\|.*release.*\|", part[0], re.M)


def test_further_reading_cites(chapter: Chapter) -> None:
    part = re.search(r"^## (Read on|Further reading)\n(.*)", chapter.markdown, re.M | re.S)
    assert part
    cited = {
        key for keys in re.findall(r"\{cite(?::\w)?\}`([^`]+)`", part[2]) for key in keys.split(",")
    }
    known = set(re.findall(r"^@\w+\{([^,]+),", (BOOK / "references.bib").read_text("utf-8"), re.M))
    assert cited
    assert cited <= known


def test_exercises_have_a_stub_a_checker_and_a_solution_that_runs(chapter: Chapter) -> None:
    starts = {}
    for i in chapter.indices("markdown"):
        for match in re.finditer(r"```\{exercise(?:-start)?\}.*?:label: (\S+)", chapter[i], re.S):
            starts[match[1]] = i
    assert len(starts) >= 3
    checkers = set()
    for label, i in starts.items():
        told = chapter[i].split(f":label: {label}")[1]
        assert re.search(r"[★☆]+ · \d+ minutes", told), f"{label}: difficulty and minutes"
        solution = next(
            j for j in chapter.indices("markdown")
            if re.search(rf"\{{solution-start\}} {re.escape(label)}\n:class: dropdown", chapter[j])
        )  # fmt: skip
        between = [j for j in chapter.indices("code") if i < j < solution]
        assert between, f"{label}: a cell to write in"
        solved = next(j for j in chapter.indices("code") if j > solution)
        calls = set(re.findall(r"^(check\w*)\(", chapter[solved], re.M))
        assert calls, f"{label}: the solution runs through the checker"
        checkers |= calls
        assert chapter.cells[solved]["outputs"], f"{label}: the checker says that it is right"
    code = "\n".join(plain_python(c["source"]) for c in chapter.of("code"))
    for checker in checkers:
        defined = re.search(rf"^def {checker}\((\w+)", code, re.M)
        assert defined, f"{checker}: takes the reader's function"


# What must not be there


def test_only_listed_cells_ignore_their_output() -> None:
    found = {cell for path in CHAPTERS for cell in ignored(Chapter(path))}
    here = {path.stem for path in CHAPTERS}
    assert found == {cell for cell in MAY_IGNORE_OUTPUT if cell[0] in here}


def test_no_file_is_taken_from_beside_the_notebook(chapter: Chapter) -> None:
    for i in chapter.indices("code"):
        for line in re.findall(r"^ *[!%].*$", chapter[i], re.M):
            assert "pip install" in line, f"cell {i}: {line}"
        for path in relative_files(chapter.code(i)):
            raise AssertionError(f"cell {i} opens {path!r}")


def relative_files(code: ast.Module) -> list[str]:
    """Names of files that calls open, written into the code."""
    found = []
    for call in (n for n in ast.walk(code) if isinstance(n, ast.Call)):
        name = (
            call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        )
        first = call.args[0] if call.args else None
        if name in OPENERS and isinstance(first, ast.Constant) and isinstance(first.value, str):
            found.append(first.value)
    return found


def test_a_relative_file_is_found() -> None:
    assert relative_files(ast.parse('read_image("photo.jpg")')) == ["photo.jpg"]
    assert relative_files(ast.parse('open("../data/a.txt")')) == ["../data/a.txt"]
    assert relative_files(ast.parse('open(folder / "a.txt"); f("photo.jpg")')) == []


def test_only_what_colab_has_or_the_package_brings_is_imported(chapter: Chapter) -> None:
    """Imports behind ``try`` may be of anything: there the chapter knows what to do without."""
    for i in chapter.indices("code"):
        for module in bare_imports(chapter.code(i)):
            assert module in IMPORTABLE or module in sys.stdlib_module_names, f"cell {i}: {module}"


def bare_imports(code: ast.Module) -> set[str]:
    guarded = {n for t in ast.walk(code) if isinstance(t, ast.Try) for n in ast.walk(t)}
    nodes = [n for n in ast.walk(code) if n not in guarded]
    modules = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    modules += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    return {module.split(".")[0] for module in modules}


def test_an_import_that_colab_lacks_is_found() -> None:
    code = (
        "import torch.nn as nn\nfrom skimage import data\ntry:\n    import a\nexcept E:\n    pass"
    )
    assert bare_imports(ast.parse(code)) == {"torch", "skimage"}


def test_commands_that_a_chapter_names_parse(chapter: Chapter) -> None:
    blocks = re.findall(r"^ *```bash\n(.*?)```", chapter.markdown, re.M | re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    for command in re.findall(r"^ *(?:torchrun .*? -m )?deconvnet +(.*)$", text, re.M):
        cli.parser().parse_args(command.split("#")[0].split())


def test_colours_are_told_apart_by_everybody(chapter: Chapter) -> None:
    for i in chapter.indices("code"):
        assert unsafe_colours(chapter.code(i)) == [], f"cell {i}"


def unsafe_colours(code: ast.Module) -> list[str]:
    """Colours and colour maps, given as arguments, that set red against green."""
    keywords = [k for n in ast.walk(code) if isinstance(n, ast.Call) for k in n.keywords]
    values = [k.value for k in keywords if k.arg in COLOUR_ARGUMENTS]
    for node in (n for n in ast.walk(code) if isinstance(n, ast.Dict)):
        pairs = zip(node.keys, node.values)
        values += [v for k, v in pairs if getattr(k, "value", None) in COLOUR_ARGUMENTS]
    constants = [n for v in values for n in ast.walk(v) if isinstance(n, ast.Constant)]
    return [c.value for c in constants if UNSAFE_COLOURS.fullmatch(str(c.value))]


def test_unsafe_colours_are_found() -> None:
    code = 'plot(x, color="red"); imshow(y, cmap="jet"); text({"fc": "tab:green"}); f(c=["g", "k"])'
    assert unsafe_colours(ast.parse(code)) == ["red", "jet", "g", "tab:green"]
    assert unsafe_colours(ast.parse('plot(x, color="#0072B2", label="red"); f("green")')) == []


@pytest.mark.parametrize("name", sorted(HARDWARE_MATTERS & {p.stem for p in CHAPTERS}))
def test_hardware_is_told_where_it_matters(name: str) -> None:
    cells = [c["source"] for c in Chapter(BOOK / f"{name}.ipynb").of("code")]
    assert any("default_device(" in cell and "print(" in cell for cell in cells)


def test_a_gpu_is_asked_for_only_where_one_is_wanted(chapter: Chapter) -> None:
    notebook = json.loads((BOOK / f"{chapter.name}.ipynb").read_text(encoding="utf-8"))
    if notebook["metadata"].get("accelerator") is not None:
        assert chapter.name in HARDWARE_MATTERS
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
