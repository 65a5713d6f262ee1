# The few commands of this project; `make help` lists them. Everything is set up in .venv on first use.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
# Build options pass through: make CMAKE_ARGS="-DGGML_CUDA=ON" build
export CMAKE_ARGS
# What of pyproject.toml's extras is installed, and where the build is.
EXTRA     := test
BUILD_DIR := build/{wheel_tag}
# What gpu-check builds for.
BACKEND   := CUDA
# What test-asan runs.
ASAN_TESTS := $(addprefix tests/unit/test_,batch.py context.py memory.py state.py sampler.py grammars.py constraints.py \
              tokenize.py token.py bad_input.py) \
              $(addprefix tests/laws/test_law_0,1_scope.py 2_identity.py 3_truth.py 4_rollback.py 7_neighbours.py) \
              tests/laws/test_random_schedules.py
TOOLS     := 'scikit-build-core>=0.11' 'cython>=3.1' 'cython-cmake>=0.2' 'cmake>=3.21' ninja

# A folder of wheels to install from, where there is no network; `make gpu-wheelhouse` fills one.
WHEELHOUSE :=
ifneq ($(WHEELHOUSE),)
export PIP_NO_INDEX := 1
export PIP_FIND_LINKS := $(abspath $(WHEELHOUSE))
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-native test-asan fuzz soak schema-suite docs bench gpu-check vulkan-check gpu-wheelhouse build lint clean

help:           ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

demo: build     ## set everything up and show what the library is for (MODEL=path.gguf for your own model)
	$(PY) -m llamacancel demo $(if $(MODEL),--model '$(MODEL)')

test: build test-native  ## set everything up and run all tests
	$(PY) -m pytest $(PYTEST_ARGS)

test-native:    ## test the cancel core alone: plain, under ASan and UBSan, under TSan
	tests/native/run.sh

test-asan:      ## with llama.cpp and all of ours under ASan and UBSan: the core's laws and bad input (an hour; ASAN_TESTS='...')
	$(MAKE) build VENV=.venv-asan BUILD_DIR=build/asan CMAKE_ARGS="-DLLAMACANCEL_SANITIZE=ON $(CMAKE_ARGS)"
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so):$$($(CC) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
		.venv-asan/bin/python -m pytest -p no:cacheprovider $(ASAN_TESTS)

fuzz: build     ## random schemas, grammars, bodies, files, states: SECONDS=600 long; what fails is kept as a case (FUZZ_ARGS='--only chat')
	$(PY) -m tests.fuzz $(if $(SECONDS),--seconds $(SECONDS)) $(FUZZ_ARGS)

soak: build     ## random schedules with cancels against a twin, to the bit: SECONDS=600 long, or CANCELS=100000 a memory kind
	$(PY) -m tests.laws.schedules $(if $(SECONDS),--seconds $(SECONDS)) $(if $(CANCELS),--cancels $(CANCELS)) $(SOAK_ARGS)

schema-suite: build ## the official JSON-Schema-Test-Suite: what is taken, refused in words, judged rightly
	$(PY) -m tests.unit.schema_suite

bench: build    ## measure; the report and the plot go to benchmarks/results
	$(PY) -m benchmarks $(BENCH_ARGS)

gpu-check:      ## with a GPU: build for it, run the laws on it, measure; again to go on (docs/gpu.md)
	$(MAKE) build VENV=.venv-gpu-$(BACKEND) BUILD_DIR=build/gpu-$(BACKEND) EXTRA=gpu \
		CMAKE_ARGS="-DGGML_$(BACKEND)=ON $(CMAKE_ARGS)"
	.venv-gpu-$(BACKEND)/bin/python -m benchmarks.gpu $(GPU_ARGS)

vulkan-check:   ## without a GPU: the same, in small, on the first device that Vulkan has, be it software (docs/gpu.md)
	GGML_VK_VISIBLE_DEVICES=0 $(MAKE) gpu-check BACKEND=VULKAN GPU_ARGS="--quick $(GPU_ARGS)"

gpu-wheelhouse: $(VENV)/.tools ## gather in build/wheelhouse what gpu-check needs where there is no network
	$(PY) -m benchmarks.gpu.wheelhouse $(WHEELHOUSE_ARGS) -- $(TOOLS)

build: $(VENV)/.built ## build the extension (about two minutes the first time) and install it for development

# Rebuilt when a native source changed; Python sources are used in place.
NATIVE := $(wildcard $(foreach name,*.pyx *.pxd *.pyi,src/llamacancel/*/$(name)) src/llamacancel/_native/*.pxd \
            src/llamacancel/_native/*/*) \
          CMakeLists.txt cmake/llama.cmake pyproject.toml vendor/llama.cpp.lock.json $(wildcard vendor/patches/*)

$(VENV)/.built: $(VENV)/.tools $(NATIVE)
	@echo "llamacancel: building the extension; llama.cpp takes a few minutes the first time"
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		--config-settings=build-dir='$(BUILD_DIR)' --editable '.[$(EXTRA)]'
	@touch $@

$(VENV)/.tools: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("llamacancel needs Python 3.10 or later, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "llamacancel needs a C++ compiler (g++ or clang++): install one first" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(TOOLS)
	@touch $@

lint: build     ## what a reviewer's tools would say
	$(PY) -m pip install --quiet ruff cython-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	PATH="$(VENV)/bin:$$PATH" cython-lint --max-line-length 120 src/llamacancel
	$(PY) -m mypy

docs: build     ## these pages and the API as a site, in build/site; every link is checked
	$(PY) -m pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.27'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

clean:          ## remove everything that was built, and the environment
	rm -rf build $(VENV) .venv-gpu-* .venv-asan dist
