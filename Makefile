# Every command installs what it needs first, into $(VENV).
#   make demo                        compile a real DSPy program, against a replayed LM
#   make demo ARGS="--sampler tpe"   the same with another sampler
#   make test                        all tests; ARGS="-k surrogate" for some
#   make lint types                  ruff, mypy
#   make docs                        the README, the mathematics and a reference of all names, as HTML
#   make check                       all of the above
#   make matrix                      all tests with other versions, and every Python there is: hours
#   make bench                       all benchmarks: hours, and finished cells are kept
#   make notebooks                   the notebooks, executed in place
#   make report                      tables and pictures of the results

PYTHON ?= python3
VENV ?= .venv
SITE ?= site
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs check matrix bench notebooks report clean

help:
	@sed -n 's/^# *//p' Makefile

demo: $(VENV)/.installed
	$(BIN)/mpromptune demo $(ARGS)

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(INSTALL) --editable '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going docs $(SITE)
	@echo "Open $(SITE)/index.html"

check:
	$(MAKE) lint
	$(MAKE) types
	$(MAKE) docs
	$(MAKE) test ARGS=
	$(MAKE) demo ARGS=

matrix: $(VENV)/.installed-dev
	$(BIN)/python -m nox -- $(ARGS)

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.pipelines
	$(BIN)/python -m benchmarks.proposal
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.enumeration
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.wallclock
	$(BIN)/python -m benchmarks.executors
	$(MAKE) report ARGS=

notebooks: $(VENV)/.installed
	$(BIN)/python notebooks/execute.py $(ARGS)

report: $(VENV)/.installed
	$(INSTALL) --editable '.[bench]'
	$(BIN)/python -m benchmarks.report $(ARGS)

clean:
	rm -rf build dist site .nox .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mpromptune tests benchmarks notebooks docs -name __pycache__ -type d -prune -exec rm -rf {} +
ifeq ($(VENV),.venv)
	rm -rf .venv
endif

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first, so that no other package's requirements choose its build.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes a few minutes."
	$(INSTALL) torch
	$(INSTALL) --editable '.[offline,test]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) --editable '.[integrations]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable '.[dev]'
	touch $@
