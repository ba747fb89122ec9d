# Two commands: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SITE_STAMP := .venv/.site-installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check format lint types imports docs site publish clean bench-peers rivals gpu

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP) ## make .venv with all that can be used without a GPU

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt "pip>=25.1"
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt --editable ".[cpu,openvino,tensorrt-rtx,reference,keras,parquet,ray]" --group dev
	@# on all cores; pip compiles on one. PyTorch has files for later versions of Python, which fail.
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
	touch $@

demo: install    ## train on real digits, export, lower, verify, print the table
	$(BIN)/python -m benchmarks.demo

# Bytecode is written, or each of some hundred processes would compile this package anew.
test: install $(SITE_STAMP) ## the whole suite
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist worksteal --durations 10

check: format lint types imports test ## format, lint, types, import rules, tests

format: install
	$(BIN)/ruff format --check .

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

bench-peers: install ## comparison with other tools, on this machine (an hour)
	$(BIN)/python -m benchmarks.peers -o build/peers/results

rivals: install  ## ConvNeXt compared with ResNet-50, Swin and ViT, on this machine (two hours)
	$(BIN)/python -m benchmarks.rivals -o build/rivals/results

gpu: install     ## all that needs an NVIDIA GPU, in under 8 minutes
	$(BIN)/python -m benchmarks.gpu -o build/gpu

docs: install    ## write the generated parts of the docs
	$(BIN)/python -m benchmarks.docs

# not --quiet: mkdocs then counts no warnings, and strict mode passes
site: install $(SITE_STAMP) ## build the docs as a site with search, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "build/site/index.html; with search: $(BIN)/python -m http.server -d build/site"

publish: install $(SITE_STAMP) ## commit the site of this version to the branch gh-pages, beside those of other versions
	NO_MKDOCS_2_WARNING=1 PATH=$(CURDIR)/$(BIN):$$PATH mike deploy --update-aliases \
	  $$($(BIN)/python -c "import exporter; print(exporter.__version__)") latest

$(SITE_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt --group docs
	touch $@

clean:           ## remove what was built (not .venv)
	rm -rf build dist
