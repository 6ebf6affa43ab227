# make train   set up and post-train the embedded model
# make test    set up and run the tests
# make check   set up, then lint, formatting and types
# Each target may be run again; set-up is skipped when nothing changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv reads its own variable for local wheels; pass pip's on where there is one.
INSTALL = UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints/cpu.txt

.PHONY: train test check clean

train: $(VENV)/.core
	$(BIN)/entroflow train $(RECIPE)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(PYTEST)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "entroflow needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet uv

$(VENV)/.core: $(VENV)/bin/uv pyproject.toml constraints/cpu.txt
	$(INSTALL) -e .
	@touch $@

$(VENV)/.test: $(VENV)/bin/uv pyproject.toml constraints/cpu.txt
	$(INSTALL) -e ".[test]"
	@touch $@ $(VENV)/.core

clean:
	rm -rf $(VENV)
