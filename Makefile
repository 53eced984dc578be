# Everything a fresh clone needs: `make demo` and `make test`. Both create .venv from constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
WORKERS ?= 2

# What runs here starts hundreds of Pythons that import torch. Where none may keep its bytecode, each compiles it anew (7 s).
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-slow fuzz lint bench docs dist release-check bench-compare clean

# Python compiles what is imported; to compile all of torch and transformers at once takes longer than the demo.
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# PyTorch's index of builds without CUDA, which are some GB smaller; TORCH_INDEX= takes what the usual index has.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH = "torch==$$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)"

# What the demo needs, and then what tests and linters need beside it.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -z "$(TORCH_INDEX)" || $(PIP) --retries 1 --timeout 20 --index-url "$(TORCH_INDEX)" $(TORCH) 2>/dev/null || \
		echo "no torch from $(TORCH_INDEX): taking that of the usual index"
	$(PIP) $(TORCH) -e '.[demo,gguf]'
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

SECONDS_OF_FUZZING ?= 3600
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS_OF_FUZZING)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m bench speed merge

# What moved in the stored results since the last tag, or since REF.
bench-compare: $(VENV)/.installed
	$(BIN)/python tools/bench_compare.py $(REF)

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The same commit gives the same bytes: times come from it, and hatchling sorts what it packs.
dist: $(VENV)/.installed
	rm -rf dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m hatchling build
	cd dist && sha256sum * > SHA256SUMS && cat SHA256SUMS

# What has to be true of a release; RELEASE=1 asks for a dated changelog and a stored API too.
release-check: $(VENV)/.installed
	$(BIN)/python tools/release_check.py $(if $(RELEASE),--release)

clean:
	rm -rf $(VENV) demo build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
