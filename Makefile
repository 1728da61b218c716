# Everything happens in a virtual environment of its own. Needed: Python, a C++ compiler and make; nvcc is optional.
#   make demo     train, export and serve a small model; leaves pictures and files in demo/
#   make test     style, C++ tests, Python tests
#   make bench    time the training step on this machine, draw table and chart
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?= -q -n $(JOBS)

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
# Without a sanitizer, pytest goes on in the same folder.
CMAKE_BUILD := build/emulator
CODE := normfuse tests examples benchmarks setup.py
SOURCES := $(shell find csrc -type f)
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

# Tools that pip installs (cmake, ninja, clang-format) come before the machine's own.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test lint cpp-test py-test bench format clean

demo: $(STAMPS)/built
	$(BIN)/python examples/demo.py

# One after another, also under `make -j`: pytest's summary is the last line.
test: $(STAMPS)/built
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory cpp-test
	$(MAKE) --no-print-directory py-test

lint: $(STAMPS)/requirements
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/clang-format --dry-run -Werror $(filter %.cpp %.h %.cu %.cuh,$(SOURCES))

format: $(STAMPS)/requirements
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)
	$(BIN)/clang-format -i $(filter %.cpp %.h %.cu %.cuh,$(SOURCES))

cpp-test: $(STAMPS)/requirements
	$(BIN)/cmake -S . -B $(CMAKE_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DNORMFUSE_CUDA=OFF
	$(BIN)/cmake --build $(CMAKE_BUILD) --parallel $(JOBS)
	$(BIN)/ctest --test-dir $(CMAKE_BUILD) --output-on-failure --parallel $(JOBS)

py-test: $(STAMPS)/built
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(STAMPS)/built
	$(BIN)/python benchmarks/training_step.py --threads 1
	$(BIN)/python benchmarks/training_step.py --threads 2
	$(BIN)/python benchmarks/report.py

# The environment, in the order that matters: torch, then what is built against it. A stamp is as new as the last
# installation, so that a change in a requirements file or a source installs again, and nothing else does.
$(STAMPS)/environment:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/torch: requirements/torch.txt $(STAMPS)/environment
	$(BIN)/python -m pip install -r $<
	touch $@

$(STAMPS)/requirements: requirements/dev.txt $(STAMPS)/torch
	$(BIN)/python -m pip install -r $<
	touch $@

$(STAMPS)/built: setup.py pyproject.toml $(NATIVE) $(STAMPS)/requirements
	$(BIN)/python -m pip install --no-build-isolation -e .
	touch $@

clean:
	rm -rf build demo normfuse/_C.abi3.so normfuse/_autograd.*.so normfuse/_build_info.json *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f $(STAMPS)/built
