# Two commands on a fresh machine: `make demo` sets up and runs the main job, `make test` sets up and runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-slow proof lint clean

demo: $(VENV)/installed-demo
	$(BIN)/regard demo --out demo

test: $(VENV)/installed-dev
	$(PYTEST) -m "not slow and not proof"

test-slow: $(VENV)/installed-dev
	$(PYTEST) -m slow

proof: $(VENV)/installed-dev
	$(PYTEST) -m proof

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo runs

# torch goes first and alone: what depends on it then takes the build that is there.
$(BIN)/torch-installed:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Regard needs Python 3.11 or newer: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	touch $@

$(VENV)/installed-demo: $(BIN)/torch-installed pyproject.toml constraints.txt
	$(INSTALL) -e '.[demo]'
	touch $@

$(VENV)/installed-dev: $(BIN)/torch-installed pyproject.toml constraints.txt
	$(INSTALL) -e '.[demo,dev,fonts,tensorboard]'
	touch $@
