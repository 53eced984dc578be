# Everything a fresh clone needs: `make demo` and `make test`. Both create .venv from constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-slow lint bench docs clean

PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# What the demo needs, and then what tests and linters need beside it.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "torch==$$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)"
	$(PIP) -e '.[demo,gguf]'
	touch $@

$(VENV)/.installed: $(VENV)/.demo
	$(PIP) -e '.[test,lint]'
	touch $@

demo: $(VENV)/.demo
	rm -rf demo
	$(BIN)/adapterkit demo demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow'

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m bench speed merge

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV) demo build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
