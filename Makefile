# make install | demo | test | test-all | versions | lint | docs        VENV=.venv PYTHON=python3 by default
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

.PHONY: install demo test test-all versions lint docs

install: $(VENV)/installed

$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	python -m launch.demo

test: install
	pytest -m "not slow"

test-all: install
	pytest

# Needs nothing installed but interpreters; each row of docs/versions.md gets an environment of its own.
versions:
	$(PYTHON) tests/versions/matrix.py

lint: install
	ruff check .
	ruff format --check .
	mypy

docs: install
	python docs/configuration.py
