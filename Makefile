# Everything a developer runs.  `make setup` once; then the environment in .venv is used.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup build lint format test bench sanitize mutants docs

setup:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install 'setuptools>=77' 'pybind11>=3' ninja
	$(BIN)/pip install --no-build-isolation -e '.[cli,test,bench,dev]'

build:  # after a change in csrc/: compiles what changed
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*' 'tests/native/*' | grep -E '\.(cpp|h|inc|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run -Werror

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/native/*' | grep -E '\.(cpp|h|inc|cu|cuh)$$' | xargs $(BIN)/clang-format -i

test:
	$(BIN)/pytest

bench:
	$(BIN)/python benchmarks/run.py

sanitize:  # the CPU core and the CUDA kernels executed on the CPU: AddressSanitizer, UBSan, ThreadSanitizer, nvcc's PTX, a fuzz target
	$(BIN)/python tests/native/run.py plain asan tsan ptx

mutants:  # every planted bug must turn a run red
	$(BIN)/python tests/native/run.py mutants

docs:  # the figures of the README and the snippets of all pages
	$(BIN)/simplexfix demo --out demo && cp demo/matrices.png docs/figures/
	$(BIN)/pytest tests/test_docs.py
