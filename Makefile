# make demo   trains the quick preset on drawn faces and shows what came out, beside the packaged model's
# make test   runs the tests
# make check  lint, format, types, docs
# make bench  timings on this machine's processor, into benchmarks/results/ (minutes)
# make bench-gpu [PYTHON=python3]  timings on its GPU, by a Python that has torch; needs no install
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= runs/demo
STAMP := .venv/installed

.PHONY: install demo test check docs bench bench-gpu clean
install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard ssmgen/ops/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: install
	$(BIN)/python -m recipes.sisma.train quick run=$(DEMO) resume=auto
	$(BIN)/python -m recipes.sisma.compare run=$(DEMO)

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet --site-dir .venv/site

docs: install
	$(BIN)/mkdocs serve

bench: install
	$(BIN)/python -m benchmarks.peers
	for part in scan blocks sampling tokens models; do \
	  $(BIN)/python -m benchmarks.$$part --json benchmarks/results/$$part-cpu.json || exit 1; done
	$(BIN)/python -m benchmarks.report

bench-gpu:
	for part in gpu_scan tokens models; do \
	  $(PYTHON) -m benchmarks.$$part --json benchmarks/results/$$part-gpu.json || exit 1; done

clean:
	rm -rf build dist site *.egg-info
