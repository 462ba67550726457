# `make demo` and `make test` set everything up by themselves; they need Python 3.11 or 3.12 and a package registry.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test fault soak lint types setup bench lock

demo: $(READY)
	$(BIN)/vecmill demo

test: $(READY)
	$(BIN)/python -m pytest tests/unit tests/gpu -n 2 --dist loadfile
	$(BIN)/python -m pytest tests/flow tests/fault -m "not long"

fault: $(READY)
	$(BIN)/python -m pytest tests/fault

soak: $(READY)
	$(BIN)/python -m tests.fault.soak

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m tests.bench.embed
	$(BIN)/python -m tests.bench.index

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

lock:
	$(BIN)/uv pip compile --quiet --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--group dev pyproject.toml -o requirements.lock
