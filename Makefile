# `make demo` and `make test` need nothing done before: they make .venv and build the extension.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
CPP := $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' 2>/dev/null)

.PHONY: demo test bench cuda wheel lint format clean

demo: .venv/built
	$(BIN)/python examples/train_lm.py
	$(BIN)/python examples/train_retrieval.py --seeds 1 --epochs 3

test: .venv/built
	$(BIN)/python -m pytest -n 2

bench: .venv/built
	$(BIN)/python -m pytest benchmarks/bench_*.py --benchmark-json=benchmarks/results/latest.json
	$(BIN)/python benchmarks/report.py benchmarks/results/latest.json

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

.venv/installed: requirements-dev.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	# Without what it depends on: PyPI's torchvision does not load beside a CPU build of torch, and
	# where it is installed transformers does not either.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps open_clip_torch==3.3.0
	touch $@

.venv/built: .venv/installed setup.py pyproject.toml $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

cuda: .venv/installed
	TEMPNET_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace

# An sdist and, from it, a wheel for this Python in dist/, once the wheel works in an environment of its
# own. CUDA kernels are in it where nvcc is. torch and the CUDA runtime are where it is installed.
wheel: export TEMPNET_CUDA ?= $(if $(shell command -v nvcc),1,0)
wheel: .venv/installed
	rm -rf build/wheel
	$(BIN)/python -m build --no-isolation -C=--global-option=--quiet --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*.so' \
		--exclude 'libcudart.so.*' --wheel-dir build/wheel/repaired build/wheel/*.whl
	$(BIN)/python tests/package/smoke.py build/wheel/repaired/*.whl
	mkdir -p dist
	cp build/wheel/*.tar.gz build/wheel/repaired/*.whl dist

clean:
	rm -rf build dist *.egg-info tempnet_kernels/*.so tempnet_kernels/lib .venv/built
