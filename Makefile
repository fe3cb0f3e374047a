# On a fresh clone: `make demo` or `make test`, with nothing but Python (3.10 or newer) and make.
PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
CODE := $(wildcard src tests examples benchmarks docs)
# Two workers of one thread each are faster than two workers that fight for the same cores.
TEST_ENV := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
DEMO_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check format clean

help:
	@echo "make demo     compress a small model on a generated corpus; results in build/demo"
	@echo "make test     run the tests (ARGS='-k name' is passed on to pytest)"
	@echo "make check    ruff, ruff format and mypy"
	@echo "make format   repair what ruff can repair"
	@echo "make clean    remove build products and caches (the virtual environment stays)"

# The virtual environment with one extra of setup.cfg. torch first, so that its pinned build is settled before anything
# else asks for it.
$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "hf_costeff needs Python 3.10 or newer; choose one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "No virtual environment could be made; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV), which takes minutes and about 2 GB (more where pip's torch brings CUDA)"
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	@touch $@

demo: $(VENV)/.installed-charts
	$(DEMO_ENV) $(BIN)/python examples/demo.py --output_dir build/demo

test: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
