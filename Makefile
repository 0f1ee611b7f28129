# make install | demo | test | test-all | versions | lint | docs        VENV=.venv PYTHON=python3 by default
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

# Four workers for two cores, as the tests of SLURM mostly wait; torch with one thread in each. See tests/conftest.py.
TESTS := OMP_NUM_THREADS=1 pytest --durations 10 --numprocesses 4 --dist loadscope --no-loadscope-reorder

.PHONY: install demo test test-all versions lint docs

install: $(VENV)/installed

$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	python -m launch.demo

test: install
	$(TESTS) -m "not slow"

test-all: install
	$(TESTS)

# Needs nothing installed but interpreters; each row of docs/versions.md gets an environment of its own.
versions:
	$(PYTHON) tests/versions/matrix.py

lint: install
	ruff check .
	ruff format --check .
	mypy

docs: install
	python docs/configuration.py
