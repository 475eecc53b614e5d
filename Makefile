# make demo   set everything up and run the main job on real digits
# make test   set everything up and run the tests
#
# The first call makes .venv, installs the versions of constraints.txt and builds the compiled core.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.h csrc/cuda/*.cuh csrc/cuda/*.cu)
FORMATTED := $(SOURCES) $(wildcard tests/core/*.h tests/core/*.cpp tests/cuda_on_cpu/*.h tests/cuda_on_cpu/*.cpp)
TESTS ?= tests sparsekern
JOBS ?= 2
BENCH ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint format sanitize portability cuda cubins peers bench readme docs clean

help:
	@sed -n '1,4s/^# \{0,1\}//p' Makefile
	@echo "make lint | format | sanitize | portability | cuda | cubins | peers | bench | readme | docs | clean"

$(VENV)/tools: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and the tools into $(VENV); the first time takes minutes"
	$(PIP) "setuptools>=77" "pybind11>=2.13" "cmake>=3.18" ninja torch
	touch $@

# In the source tree and without build isolation: a change of a source file rebuilds just that file.
$(VENV)/installed: $(VENV)/tools setup.py CMakeLists.txt $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --editable ".[demo,test,dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/sparsekern demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) $(TESTS)

# The CUDA sources: every kernel executed on the CPU under several schedules, and compiled for every architecture where
# there is nvcc. About ten minutes.
cuda: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --cuda-sources tests/test_cuda_kernels.py tests/test_cuda_compile.py tests/test_cuda_model.py

# The Triton kernels, every configuration compiled for every architecture: no spills, wide loads. About eight minutes.
cubins: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --cubins -m cubins tests/test_triton.py

# What the tests leave out where it is missing: files and trainings side by side with the libraries that made them.
peers: $(VENV)/installed
	$(PIP) "compressed-tensors==0.12.2" "transformers>=4.57,<5" "accelerate>=1"
	$(BIN)/python -m pytest -n $(JOBS) tests/test_convert.py tests/test_interop.py tests/test_pruning_hf.py

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/installed
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# The tests of the kernels on a core built with the address and undefined-behaviour sanitizers. The copy of the package
# in build/sanitize/site comes first on the path, which the conftest.py up here would put the source tree before; both
# runtimes are loaded before Python, which knows neither.
SANITIZE := build/sanitize
sanitize: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(SANITIZE) -G Ninja -DSPARSEKERN_SANITIZE=ON \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) > /dev/null
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZE)
	rm -rf $(SANITIZE)/site $(SANITIZE)/report.* && mkdir -p $(SANITIZE)/site && cp -r sparsekern $(SANITIZE)/site/
	rm -f $(SANITIZE)/site/sparsekern/_cpu*.so && cp $(SANITIZE)/_cpu*.so $(SANITIZE)/site/sparsekern/
	PYTHONPATH=$(CURDIR)/$(SANITIZE)/site \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:log_path=$(CURDIR)/$(SANITIZE)/report \
	  UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CURDIR)/$(SANITIZE)/report \
	  $(BIN)/pytest -n $(JOBS) --sanitized --confcutdir=tests -m "not triton" tests/test_formats_24.py tests/test_linear_24.py tests/test_linear_24_backward.py tests/test_zvc.py \
	  tests/test_fuzz.py tests/test_threads.py tests/test_reference.py || { cat $(SANITIZE)/report.* ; exit 1; }

# The core without Python, by every compiler here, on this CPU and on emulated ones; every buffer at a guard page.
portability: $(VENV)/tools
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/core/portability

# The compressors to compare with; one that cannot be installed is named as missing in the results.
$(VENV)/bench: $(VENV)/installed
	-for peer in lz4 zstandard blosc2; do $(PIP) $$peer; done
	touch $@

# About 25 minutes; BENCH="--section zvc --rounds 5" measures a part.
bench: $(VENV)/bench
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python -m benchmarks.cpu $(BENCH)

# The table of the README comes from the back ends' own declarations.
readme: $(VENV)/installed
	$(BIN)/python benchmarks/readme_table.py

$(VENV)/docs: $(VENV)/installed
	$(PIP) sphinx furo myst-parser
	touch $@

# The pages of docs, in build/docs; a warning is an error.
docs: $(VENV)/docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs

clean:
	rm -rf $(VENV) build dist demo *.egg-info sparsekern/*.so .pytest_cache .ruff_cache .hypothesis
