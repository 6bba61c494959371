# `make demo`: train, plot, sample, save a state and take it up again.     `make test`: everything that CI checks.
# Both start from nothing: they make a virtual environment in .venv and install into it; a second call is quick.

PYTHON ?= python3
VENV ?= .venv
# Minutes of training in `make demo`, and processes for the tests.
MINUTES ?= 3
WORKERS ?= 2

# A path made absolute, so that VENV may lie outside the repository.
BIN := $(abspath $(VENV))/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := runs/demo

# For `time`, and so that a pipe fails when its first part does.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
export TIMEFORMAT := took %1R s
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test lint docs sanitize clean
.NOTPARALLEL:

# The state: a long file is read once and what the model remembers of it kept as a file. Asked from that file alone it
# answers as it does after reading everything again; `cmp` fails if a single character differs.
demo: $(VENV)/.installed-train
	rm -rf $(DEMO)
	$(BIN)/longstate train --model mamba2 --minutes $(MINUTES) --out $(DEMO)
	@printf '\n== A sample\n'
	$(BIN)/longstate generate $(DEMO) --prompt "def "
	@printf '\n== A long file, read once: the state is kept\n'
	cp "$$($(BIN)/python -c 'import argparse; print(argparse.__file__)')" $(DEMO)/long.txt
	time $(BIN)/longstate generate $(DEMO) --document $(DEMO)/long.txt --max-tokens 0 --state-out $(DEMO)/notes.safetensors
	@ls -l $(DEMO)/long.txt $(DEMO)/notes.safetensors
	@printf '\n== Asked from the state, without the file\n'
	time $(BIN)/longstate generate $(DEMO) --state-in $(DEMO)/notes.safetensors --prompt "class " | tee $(DEMO)/from-state.txt
	@printf '\n== Asked after reading the file again\n'
	time $(BIN)/longstate generate $(DEMO) --document $(DEMO)/long.txt --prompt "class " > $(DEMO)/from-scratch.txt
	cmp $(DEMO)/from-state.txt $(DEMO)/from-scratch.txt
	@printf 'The two answers are equal. Model, losses and plot (loss.png) are in $(DEMO).\n'

test: lint docs
	$(BIN)/python -m pytest -n $(WORKERS) -m "not compiled and not interpreted and not slow"
	$(BIN)/python -m pytest -n $(WORKERS) -m compiled
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) -m interpreted

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict --quiet

# The tests of the compiled kernels under the address and undefined-behaviour sanitizers, in an environment of their own.
SANITIZED := build/sanitized
sanitize:
	$(PYTHON) -m venv $(SANITIZED)
	$(SANITIZED)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -C cmake.define.LONGSTATE_SANITIZE=ON -C build-dir=$(SANITIZED)/kernels '.[dev]'
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(SANITIZED)/bin/python -m pytest tests/native $(wildcard tests/ops/test_cpu*.py) \
	    tests/ops/test_cauchy.py tests/ops/test_linear.py tests/ops/test_vandermonde.py

clean:
	rm -rf $(VENV) build site .mypy_cache .pytest_cache .ruff_cache

# The stamps: pip runs again only when what is to be installed has changed. The package itself is installed in place
# (-e), so a change of its code needs no new installation: Python is read where it stands, and the C++ is built again by
# the first import after a change, for which the tools that build it stay in the environment.
# Setuptools is for dependencies that come as source: they too are built without isolation.
IN_PLACE := $(INSTALL) --no-build-isolation -C editable.rebuild=true -C editable.verbose=false

$(VENV)/.installed-dev: pyproject.toml constraints.txt CMakeLists.txt | $(VENV)/.tools
	$(IN_PLACE) -e '.[dev]'
	touch $@ $(VENV)/.installed-train

$(VENV)/.installed-train: pyproject.toml constraints.txt CMakeLists.txt | $(VENV)/.tools
	$(IN_PLACE) -e '.[train]'
	touch $@

$(VENV)/.tools: | $(VENV)/.made
	$(INSTALL) 'scikit-build-core>=0.11' 'nanobind>=2.4' cmake ninja 'setuptools>=70.1'
	touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	touch $@
