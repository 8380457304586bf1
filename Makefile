# `make demo` and `make test` set everything up by themselves; PYTHON picks another interpreter.
PYTHON ?= python3.11
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SGLANG_VENV := .venv-sglang

.PHONY: setup demo test test-slow test-gpu test-sglang setup-sglang lint format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/slipstream demo

# One process a core, each with one thread: threads of several processes would wait for each other.
test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile \
		-m "not slow and not gpu and not sglang"

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu and not sglang"

# In an environment that has torch with CUDA and SGLang: pip install '.[sglang,dev]'. It fails where one of them is missing.
test-gpu:
	SLIPSTREAM_GPU=require $(GPU_PYTHON) -m pytest -m gpu -v tests

# A real SGLang server on the CPU, in an environment of its own: it pins other versions than the trainer.
setup-sglang: $(SGLANG_VENV)/.installed

$(SGLANG_VENV)/.installed: requirements-sglang-cpu.txt
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/pip install --quiet --no-compile --no-deps --requirement requirements-sglang-cpu.txt
	touch $@

test-sglang: setup setup-sglang
	$(BIN)/python -m pytest -m sglang tests/sglang

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(SGLANG_VENV) build *.egg-info
