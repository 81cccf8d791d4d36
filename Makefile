# Each target makes .venv first where it is missing. It takes Python 3.11 or newer:
#   make test PYTHON=/path/to/python3.12
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
IN_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: help quickstart test check all

help:
	@echo "make quickstart   train, calibrate and measure a classifier, from nothing"
	@echo "make test         all tests"
	@echo "make check        lint, types and the tests that are not slow"
	@echo "make all          what the continuous integration runs"

quickstart: .venv/for-use
	$(IN_VENV) ejax quickstart --workdir quickstart

test: .venv/for-development
	$(IN_VENV) python -m pytest -n 2 --dist loadfile

check: .venv/for-development
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy
	$(IN_VENV) lint-imports --no-cache
	$(IN_VENV) python -m pytest -n 2 --dist loadfile -m 'not slow'

all:
	bash .ci/run

.venv/for-use: WHAT = .
.venv/for-development: WHAT = .[dev]
.venv/for-use .venv/for-development: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11 or newer: make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '$(WHAT)'
	touch $@
