# make demo   trains the quick preset on drawn faces and shows what came out, beside the packaged model's
# make test   runs the tests
# make test-isa     the operators' tests under every instruction set of this processor
# make test-lowest  the fast tests with the lowest versions that pyproject.toml declares, in an environment of their own
# make torture [SHARE=0.1] [SEED=0] [ONLY="cuts damage"]  the long campaigns behind docs/reliability.md
# make check  lint, format, types, docs
# make hashes         constraints-hashes.txt from constraints.txt; asks the package index
# make release-check  known advisories for what constraints-hashes.txt names, and its bill of materials; asks PyPI
# make bench [RESULTS=benchmarks/results]  timings on this machine's processor, into that folder (minutes)
# make bench-gpu [PART=1 to 11] [RESULTS=benchmarks/results] [PYTHON=python3]  timings on its GPU, all or a part of at most
#                     eight minutes, by a Python that has torch; needs no install
# make bench-gpu PART=4 ONLY="'sample sisma-xl, batch 8'"  one row of a part, beside those that its file has
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= runs/demo
RESULTS ?= benchmarks/results
SHARE ?= 1
SEED ?= 0
# Figures of a part of the campaigns do not replace those of all.
TORTURED ?= $(if $(ONLY),runs/torture.json,benchmarks/results/torture/cpu.json)
STAMP := .venv/installed
LOWEST := .venv-lowest
TOOLS := .venv-tools
LOWEST_TESTS := $(patsubst %,tests/test_%.py,registry plugins contracts ops ops_cpu ops_layers ops_orders ops_triton ops_local_triton ops_ssd ops_linear_attention ops_matrix_forms nn mixers region_attention conditions values dense_map token_sequence placed_sequence style_image models families likelihood objectives solvers sampling compose precomputed optimizers training late_reading pipeline pipeline_folder noise)
# A test file goes to one process as a whole, since its tests share what it trains.
PYTEST := -m pytest --numprocesses 2 --dist loadfile

HASHES_HEADER := constraints.txt with the hashes of its files, for Linux on x86_64 and Python 3.11 or newer. Made by `make hashes`.

# Of each part of the timings on a GPU, the module and the names of its rows.
GPU_1 := gpu_scan '*float32*'
GPU_2 := gpu_scan '*bfloat16*'
GPU_3 := tokens '*'
GPU_4 := models 'sample sisma-xl*'
GPU_5 := models 'sample sdm, batch 1'
GPU_6 := models 'sample sdm, batch 8'
GPU_7 := models 'sample sisma-attn-xl*' 'sample dit-xl*'
GPU_8 := models 'train sisma-xl'
GPU_9 := models 'train sisma-attn-xl' 'train dit-xl'
GPU_10 := models 'train sdm'
GPU_11 := gpu_layers '*'
GPU_PARTS := $(addprefix bench-gpu-,1 2 3 4 5 6 7 8 9 10 11)

.PHONY: install demo test test-isa test-lowest torture check hashes release-check docs bench bench-gpu $(GPU_PARTS) clean
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
	$(BIN)/python $(PYTEST)

test-isa: install
	$(BIN)/python tests/instruction_sets.py

test-lowest: install $(LOWEST)/installed
	PYTHONPATH=$(CURDIR) $(LOWEST)/bin/python $(PYTEST) $(LOWEST_TESTS)
	# In a process of their own: after other tests, the interpreter of Triton 3.6 once crashed here.
	PYTHONPATH=$(CURDIR) $(LOWEST)/bin/python -m pytest $(patsubst %,tests/test_%.py,ops_launch gpu_graphs compiled)

torture: install
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python -m torture $(ONLY) --share $(SHARE) --seed $(SEED) --json $(TORTURED)
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python -m torture.report

$(LOWEST)/installed: constraints-lowest.txt
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet --requirement constraints-lowest.txt
	touch $@

check: install
	$(BIN)/python -m pip check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet --site-dir .venv/site

$(TOOLS)/installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --upgrade pip
	$(TOOLS)/bin/python -m pip install --quiet uv pip-audit cyclonedx-bom
	touch $@

hashes: $(TOOLS)/installed
	printf '%s\n' '# $(HASHES_HEADER)' > $(TOOLS)/hashes
	$(TOOLS)/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --no-emit-index-url \
	  --no-emit-find-links --python-version 3.11.9 --python-platform x86_64-manylinux_2_28 constraints.txt >> $(TOOLS)/hashes
	mv $(TOOLS)/hashes constraints-hashes.txt

release-check: $(TOOLS)/installed
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py requirements --output-file dist/sbom.cdx.json constraints-hashes.txt
	$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes --requirement constraints-hashes.txt

docs: install
	$(BIN)/mkdocs serve

bench: install
	$(BIN)/python -m benchmarks.peers
	for part in scan blocks sampling tokens models; do \
	  $(BIN)/python -m benchmarks.$$part --json $(RESULTS)/$$part-cpu.json || exit 1; done
	$(if $(filter benchmarks/results,$(RESULTS)),$(BIN)/python -m benchmarks.report)

bench-gpu:
	$(MAKE) --no-print-directory --keep-going --jobs 1 $(if $(PART),bench-gpu-$(PART),$(GPU_PARTS))

# A part that takes too long is stopped; its file has the rows that were done.
$(GPU_PARTS): bench-gpu-%:
	timeout 480 $(PYTHON) -m benchmarks.$(firstword $(GPU_$*)) \
	  --json $(RESULTS)/$(firstword $(GPU_$*))-gpu.json --only $(or $(ONLY),$(wordlist 2,99,$(GPU_$*)))

clean:
	rm -rf build dist site *.egg-info
