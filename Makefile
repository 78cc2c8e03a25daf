# Two commands: `make warmup` (the main job) and `make test`. Each sets up .venv first if there is none.
#
#   make warmup [MODEL=qwen3-next-80b-a3b] [TP=1] [ARGS="--tier full"]
#   make test   [ARGS="-k varlen"] [JOBS=2]     the GPU backends included, on CPU engines
#   make lint   ruff, and strict mypy on an installed wheel
#   make docs   the documentation site, in site/ (to search in it: python -m http.server -d site)

PYTHON ?= python3
TORCH  ?= torch==2.13.0
# Without what it depends on: nothing of it is needed here, and torch decides about the rest.
TRITON ?= triton==3.8.0
MODEL  ?= qwen3-next-80b-a3b
TP     ?= 1
# Test processes.
JOBS   ?= 2
ARGS   ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: warmup test lint docs clean

warmup: .venv/ready-run
	$(BIN)/isokern warmup --model $(MODEL) --tp $(TP) $(ARGS)

test: .venv/ready-test
	$(BIN)/python -m pytest --numprocesses $(JOBS) $(ARGS)

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/mypy_wheel.py

# The variable silences a notice about the theme's successor.
docs: .venv/ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# A torch that is already installed is seen through, so nobody downloads a second one.
.venv/bin/python:
	@if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m venv --system-site-packages .venv; \
	else $(PYTHON) -m venv .venv; fi

.venv/ready-run: .venv/torch
	$(PIP) --editable ".[numba]"
	@touch $@

.venv/ready-docs: .venv/torch
	$(PIP) --editable ".[docs]"
	@touch $@

.venv/ready-%: .venv/torch
	@$(BIN)/python -c "import triton" 2>/dev/null || { echo "installing $(TRITON)"; $(PIP) --no-deps "$(TRITON)"; }
	$(PIP) --editable ".[$*]"
	@touch $@

.venv/torch: .venv/bin/python pyproject.toml
	@$(BIN)/python -c "import torch" 2>/dev/null || { echo "installing $(TORCH)"; $(PIP) "$(TORCH)"; }
	@touch $@

clean:
	rm -rf .venv build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
