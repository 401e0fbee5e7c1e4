# make train | make test | make check | make mutate | make bench | make gpu-check
# Each target sets up .venv by itself; PYTHON picks the interpreter (3.10 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Tests run on every core; the kernels' stand-in and BLAS keep to one thread a process.
JOBS ?= auto

.PHONY: train test check mutate bench gpu-check format clean

train: $(VENV)/.train
	$(BIN)/gpuconv train digits $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Breaks the kernels one small change at a time; ARGS="--sample 40" looks at some of them.
mutate: $(VENV)/.test
	$(BIN)/python -m tests.mutation $(ARGS)

bench: $(VENV)/.bench
	env -u OPENBLAS_CORETYPE $(BIN)/gpuconv bench $(ARGS)
	env -u OPENBLAS_CORETYPE $(BIN)/gpuconv bench --layers --out benchmarks/results
	env -u OPENBLAS_CORETYPE $(BIN)/gpuconv bench --layers --compiled --out benchmarks/results

# Needs an NVIDIA GPU and an environment with CuPy (GPU_PYTHON); exits non-zero without one.
GPU_PYTHON ?= $(PYTHON)
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

format: $(VENV)/.check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train $(VENV)/.test $(VENV)/.check $(VENV)/.bench: $(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	@echo "== installing gpuconv[$*] into $(VENV)"
	$(PIP) install --quiet --editable ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
