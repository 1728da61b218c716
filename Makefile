# Everything happens in a virtual environment of its own. Needed: Python, a C++ compiler and make; nvcc is optional.
#   make demo     train, export and serve a small model; leaves pictures and files in demo/
#   make test     style, C++ tests, Python tests
#   make bench    time the training step on this machine, draw table and chart
#   make docs     the documentation, in build/site; its blocks of code run first
#   make wheel    the source distribution and the wheel that is built from it, in dist/
# For developers:
#   make test-quick      style, and the Python tests that take under two minutes
#   make sanitize        operations and emulated kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
#   make test-wheel      install that wheel into a fresh environment and test it there, outside of the checkout
#   make test-ecosystem  timm, transformers, accelerate, Lightning; installs them
#   make lock            the hashes in requirements/, after a change in a .in file there
#   make compat          the oldest dependencies that are allowed, and other Pythons: PYTHONS="python3.12 python3.13"
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
# Each process takes a row of tests, so that what the tests of a file share is made once; then they help each other.
PYTEST_ARGS ?= -q -n $(JOBS) --dist worksteal

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PYTHONS ?= $(PYTHON)
# Quick ones that touch every part of the package: the library, the operations, folding, the command.
WHEEL_TESTS ?= tests/test_package.py tests/test_native.py tests/golden tests/ops/test_operations.py tests/folding/test_placements.py tests/onnx/test_quantize.py tests/test_cli.py
SANITIZE_TESTS ?= $(addprefix tests/,ops/test_fuzz.py ops/test_native_bounds.py ops/test_operations.py ops/test_row_norm.py \
  ops/test_gradients.py ops/test_autograd.py kernels/test_bindings.py kernels/test_host_kernels.py)
# Without a sanitizer, pytest goes on in the same folder.
CMAKE_BUILD := build/emulator
CODE := normfuse tests examples benchmarks tools setup.py docs $(wildcard *.md)
SOURCES := $(shell find csrc -type f)
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

# Tools that pip installs (cmake, ninja, clang-format) come before the machine's own.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo lock test test-quick sanitize sanitize-operations sanitize-kernels test-wheel test-ecosystem compat wheel lint cpp-test py-test docs docs-test bench format clean

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
	$(BIN)/python -m mypy
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

test-quick: $(STAMPS)/built
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow and not gpu"

# A broken link, a page outside of the navigation and a docstring that cannot be read are errors.
docs: docs-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-test: $(STAMPS)/docs
	$(BIN)/python -m pytest -q tests/docs/blocks.py tests/docs/docstrings.py

sanitize: sanitize-operations sanitize-kernels

# A build of its own, loaded into a Python that knows nothing of sanitizers: their library comes first, then that of C++,
# whose exceptions it watches. Python's leaks are its own, and an allocation that fails is an error of the operation.
# No kernel runs in more than one process, and compiled programs would have to be sanitized as well. The checkout, where
# the usual library lies, is no place to import from.
sanitize-operations: $(STAMPS)/requirements
	NORMFUSE_CUDA=0 NORMFUSE_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	env LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1 \
	  UBSAN_OPTIONS=print_stacktrace=1 PYTHONSAFEPATH=1 PYTHONPATH="$(abspath build/sanitize/lib)" OMP_NUM_THREADS=2 \
	  sh -c '$(BIN)/python -c "import normfuse; assert \"sanitize\" in normfuse.__file__, normfuse.__file__" && \
	    $(BIN)/python -m pytest $(PYTEST_ARGS) $(SANITIZE_TESTS)'

sanitize-kernels: $(STAMPS)/requirements
	NORMFUSE_SANITIZE=1 $(BIN)/python -m pytest -q tests/kernels/test_sanitizers.py

# libtorch and libc10 are those of the torch that is installed; nothing of them may go into the wheel.
wheel: $(STAMPS)/requirements
	rm -rf build/dist
	$(BIN)/python -m build --no-isolation --outdir build/dist .
	mkdir -p dist
	$(BIN)/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/dist/*.whl
	cp build/dist/*.tar.gz dist

# An environment and a folder that know nothing of this checkout, so that what is tested is what was installed.
test-wheel: wheel
	rm -rf build/wheel-test
	$(PYTHON) -m venv build/wheel-test/env
	build/wheel-test/env/bin/python -m pip install -q -r requirements/torch.txt
	build/wheel-test/env/bin/python -m pip install -q -r requirements/dev.txt
	build/wheel-test/env/bin/python -m pip install -q --no-deps $$(ls -t dist/*.whl | head -n 1)
	cp -r tests examples pyproject.toml build/wheel-test
	cd build/wheel-test && env/bin/python -m pytest -q $(WHEEL_TESTS)

test-ecosystem: $(STAMPS)/built
	$(BIN)/python -m pip install --no-deps -r requirements/ecosystem.txt
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/ecosystem tests/zoo

# Each with the oldest allowed dependencies, then with the newest. torch comes first: the extension is built against it.
compat:
	for python in $(PYTHONS); do for age in oldest newest; do \
	  tools/compat.sh $$python $$age $(WHEEL_TESTS) || exit 1; \
	done; done

# Every file of each release that is pinned, so that any machine can check what it downloads. pip does so by itself where a
# file has hashes. torch.txt has none: which torch is installed, and from where, is up to the machine.
lock: $(STAMPS)/environment
	$(BIN)/python -m pip install -q uv==0.13.9
	for name in dev docs ecosystem; do \
	  $(BIN)/uv pip compile -q --no-deps --generate-hashes --no-annotate --universal --python-version 3.11.7 \
	    --custom-compile-command "make lock" requirements/$$name.in -o requirements/$$name.txt || exit 1; \
	done

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

$(STAMPS)/docs: requirements/docs.txt $(STAMPS)/built
	$(BIN)/python -m pip install -r $<
	touch $@

$(STAMPS)/built: setup.py pyproject.toml $(NATIVE) $(STAMPS)/requirements
	$(BIN)/python -m pip install --no-build-isolation -e .
	touch $@

clean:
	rm -rf build demo normfuse/_C.abi3.so normfuse/_autograd.*.so normfuse/_build_info.json *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f $(STAMPS)/built
