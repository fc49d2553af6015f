# make demo   trains the quick preset on drawn faces and shows what came out
# make test   runs the tests
# make check  lint, format, types, docs
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= runs/demo
STAMP := .venv/installed

.PHONY: install demo test check docs clean
install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard ssmgen/ops/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: install
	$(BIN)/python -m recipes.sisma.train quick run=$(DEMO) resume=auto

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet --site-dir .venv/site

docs: install
	$(BIN)/mkdocs serve

clean:
	rm -rf build dist site *.egg-info
