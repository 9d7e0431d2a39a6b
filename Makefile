# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The interpreter's own version is part of the stamp's meaning: remove $(VENV) to change it.
RUNTIME := $(VENV)/.runtime-installed
DEVELOPMENT := $(VENV)/.development-installed
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/*)
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo demo-train test check format soak bench clean

demo: $(RUNTIME)  ## label 48 target scenes, evaluate, draw the report; no torch
	$(BIN)/cada-deploy demo --out demo-out

demo-train: $(DEVELOPMENT)  ## train, export, label, self-train and evaluate on scenes, in minutes
	$(BIN)/cada-train ablation --recipe scenes-demo --seeds 1 --tables 2 --out demo-train-out

test: check  ## set-up and every test

check: $(DEVELOPMENT)  ## format, types, import rules, tests: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

format: $(DEVELOPMENT)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

soak: $(DEVELOPMENT)  ## the long versions: more kills, more examples, every dusk frame, full networks
	CADA_SOAK=1 $(BIN)/python -m pytest tests/durability tests/test_laws.py tests/test_pipeline.py tests/training

bench: $(DEVELOPMENT)  ## measure against the targets; writes no row
	$(BIN)/python benchmarks/fused_kernel.py
	$(BIN)/python benchmarks/throughput.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(RUNTIME): $(BIN)/python $(SOURCES)
	$(PIP) "scikit-build-core>=1.0" cmake ninja
	$(PIP) --no-build-isolation --editable ".[cpu]"
	touch $@

# cityscapesScripts needs `typing`, which comes as source only and is built with these.
$(DEVELOPMENT): $(RUNTIME)
	$(PIP) "setuptools>=77" wheel
	$(PIP) --no-build-isolation --editable ".[cpu,train,dev]"
	touch $@

clean:
	rm -rf build demo-out $(VENV)
