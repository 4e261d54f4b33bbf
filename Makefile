# The main targets are make demo and make test; make help lists all targets.

PYTHON ?= python3
VENV ?= .venv
# Pinned, so that the environment is the same everywhere. make test TORCH=torch selects the newest.
TORCH ?= torch==2.13.0
REPORT ?= report
DEMO_ARGS ?= --data digits
TEST_ARGS ?=
DEVICE ?= cpu
# Add --seconds 0.1 for a short run.
BENCH_ARGS ?= -rs --benchmark-columns=median,iqr,rounds
# The tests of each operator, and the tests of all operators.
OPERATORS = $(shell sed -nE 's/^QATFAST_(OPERATOR|MAP).(\w+).*/\2/p' csrc/operator_list.h)
SANITIZE_TESTS ?= $(wildcard $(OPERATORS:%=tests/test_%.py) tests/test_int8_windows.py tests/test_operators.py tests/test_errors.py)
SANITIZE_ARGS ?= -n 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' qatfast/__init__.py)
CPP_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# The prerequisites of a target that uses an extra of pyproject.toml: its packages and the kernels.
ready = $(VENV)/.extra-$(1) $(VENV)/.built

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # the recipes share one environment
.PHONY: help demo test bench docs lint format sanitize mutants clean FORCE

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON, VENV, TORCH, REPORT, DEMO_ARGS, TEST_ARGS, DEVICE, BENCH_ARGS (PYTHON is used when $(VENV) is created)"

demo: $(call ready,study)  ## train FP32, PTQ and QAT on handwritten digits; write report/index.html
	$(PY) -m qatfast compare --out $(REPORT) $(DEMO_ARGS)

test: $(call ready,test)  ## run all tests (TEST_ARGS="-x -k linear")
	$(PY) -m pytest $(TEST_ARGS)

bench: $(call ready,bench)  ## measure against other implementations; rewrite benchmarks/RESULTS.md (DEVICE=cuda)
	@mkdir -p .benchmarks
	$(PY) -m pytest benchmarks --device $(DEVICE) --benchmark-json .benchmarks/$(DEVICE).json $(BENCH_ARGS)
	$(PY) benchmarks/results.py .benchmarks/$(DEVICE).json

docs: $(call ready,docs)  ## build the documentation into docs/_build
	$(PY) -m sphinx -W --keep-going --quiet docs docs/_build

lint: $(call ready,lint)  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)
	$(PY) -m mypy

format: $(call ready,lint)  ## format all files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

mutants: $(call ready,test)  ## seed bugs in the CUDA kernels; a test must fail for each (TORCH="torch==2.14.*")
	$(PY) tests/mutants.py

sanitize: $(call ready,test) sanitize-address,undefined  ## run the operator tests under ASan and UBSan

clean:  ## remove all build products and the environment
	rm -rf $(VENV) build dist *.egg-info qatfast/*.so qatfast/_build.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# These files are rewritten only if their text changes; their dependents are then rebuilt.
remember = @mkdir -p $(VENV); echo '$(1)' | cmp -s - $@ || echo '$(1)' > $@
given = $(if $(filter environment command,$(origin $(1))),$(1)=$($(1)))
$(VENV)/.asked: FORCE
	$(call remember,$(TORCH))
$(VENV)/.version: FORCE
	$(call remember,$(VERSION))
$(VENV)/.switches: FORCE
	$(call remember,$(foreach v,CXX FORCE_CUDA TORCH_CUDA_ARCH_LIST CUDA_HOME QATFAST_NO_EXT QATFAST_NATIVE QATFAST_DEBUG QATFAST_SANITIZE,$(call given,$(v))))

# This file contains the version of the installed torch. It is a constraint for pip, so that other
# packages do not replace torch.
$(VENV)/.torch: $(VENV)/.asked
	@$(PIP) --version > /dev/null 2>&1 || { echo "==> creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> installing $(TORCH) into $(VENV)"
	@$(PIP) install --upgrade '$(TORCH)' 'setuptools>=77' ninja
	@$(PY) -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $@.new && mv $@.new $@

# pip builds in a temporary folder, so it installs without kernels; .built compiles changed files.
$(VENV)/.extra-%: pyproject.toml $(VENV)/.version $(VENV)/.torch
	@echo "==> installing qatfast[$*] into $(VENV)"
	@rm -f $(VENV)/.built
	@QATFAST_NO_EXT=1 FORCE_CUDA= $(PIP) install --quiet --no-build-isolation -c $(VENV)/.torch -e '.[$*]'
	@touch $@

# find lists the folders too: their modification time changes if a file is removed.
$(VENV)/.built: setup.py $(VENV)/.torch $(VENV)/.switches $(shell find csrc)
	@echo "==> building the kernels"
	@rm -f $@
	@$(PY) setup.py --quiet build_ext --inplace
	@touch $@

# Each sanitizer has its own copy of the tree: the normal build is not changed, and unchanged files
# (cp -p) are not compiled again.
sanitize-%: FORCE
	@echo "==> $* sanitizer"
	@mkdir -p build/$@ && cd build/$@ && rm -rf csrc qatfast tests
	@cp -pr setup.py pyproject.toml README.md LICENSE csrc qatfast tests build/$@/
	@cd build/$@ && QATFAST_SANITIZE=$* $(abspath $(PY)) setup.py --quiet build_ext --inplace
	@cd build/$@ && $(if $(findstring address,$*),$(with_asan)) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(abspath $(PY)) -m pytest -q --capture=sys $(SANITIZE_ARGS) \
	    -k "not compile and not opcheck and not [reference and not -reference" $(SANITIZE_TESTS)
# --capture=sys: sanitizers write their report to file descriptor 2 and then end the process.
# -k: what runs the reference, the compiler or the fake kernels does not run other compiled code than the other tests.
# Python is not built with ASan, so the ASan runtime must be preloaded, with libstdc++, whose throw it wraps.
lib = $$($(CXX) -print-file-name=$(1))
with_asan = LD_PRELOAD="$(call lib,libasan.so) $(call lib,libstdc++.so)" PYTHONMALLOC=malloc
