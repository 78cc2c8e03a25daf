# Two commands: `make warmup` (the main job) and `make test`. Each sets up .venv first if there is none.
#
#   make warmup [MODEL=qwen3-next-80b-a3b] [TP=1] [ARGS="--tier full"]
#   make test   [ARGS="-k varlen"]
#   make test-engines   the GPU languages on CPU engines (not part of `make test` yet)
#   make lint   ruff, and strict mypy on an installed wheel

PYTHON ?= python3
TORCH  ?= torch==2.13.0
MODEL  ?= qwen3-next-80b-a3b
TP     ?= 1
ARGS   ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: warmup test test-engines lint clean

warmup: .venv/ready-run
	$(BIN)/isokern warmup --model $(MODEL) --tp $(TP) $(ARGS)

test: .venv/ready-test
	$(BIN)/python -m pytest $(ARGS)

test-engines: .venv/ready-engines
	$(BIN)/python -m pytest tests/engines $(ARGS)

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/mypy_wheel.py

# A torch that is already installed is seen through, so nobody downloads a second one.
.venv/bin/python:
	@if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m venv --system-site-packages .venv; \
	else $(PYTHON) -m venv .venv; fi

.venv/ready-%: .venv/bin/python pyproject.toml
	@$(BIN)/python -c "import torch" 2>/dev/null || { echo "installing $(TORCH)"; $(PIP) "$(TORCH)"; }
	$(PIP) --editable ".[$(if $(filter run,$*),numba,$*)]"
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
