# `make book` builds the book, `make test` proves it. Each sets up its own virtual environment
# first, once; another Python: `make book PYTHON=python3.12`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.made-from-pyproject
INDEX  := _build/html/index.html
# Files run side by side, with one thread each: two threads that share a core wait for each other.
PYTEST_ARGS ?=
PARALLEL    ?= -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup book test colab lint clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## make .venv and install the package with all its tools

# Redone when pyproject.toml changes; the stamp is the last thing written, so that an installation
# which was interrupted is done again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit( \
	  "deconvnet needs Python 3.10 or newer, and $(PYTHON) is %d.%d; try: make PYTHON=python3.12" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[book,test]'
	@touch $@

book: $(STAMP)  ## build the book as HTML; any warning is an error
	$(BIN)/jupyter-book build . --all -W -n --keep-going
	@echo "The book is built. Open it in a browser:"
	@$(BIN)/python -c 'import pathlib; print("  " + pathlib.Path("$(INDEX)").resolve().as_uri())'

test: $(STAMP)  ## run the unit tests and every chapter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval $(PARALLEL) --cov=deconvnet --cov-report=term $(PYTEST_ARGS)

colab: $(STAMP)  ## run every chapter as Colab would, in a clean environment (downloads PyTorch)
	$(BIN)/python tests/colab_like.py $(CHAPTERS)

lint: $(STAMP)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check deconvnet tests

clean:  ## remove what was built; the virtual environment stays
	rm -rf _build build dist *.egg-info .pytest_cache .hypothesis .coverage
