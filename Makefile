# `make demo` and `make test` are all a newcomer needs: each makes .venv and installs what it uses.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check format lint types bench ui clean
.DEFAULT_GOAL := demo

# torch and torchvision first and as a pair, so that the installed two match; then the tested versions of the rest.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fishmask needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "torch>=2.9" "torchvision>=0.24"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/fishmask demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: format lint types test

format: $(STAMP)
	$(BIN)/ruff format --check

lint: $(STAMP)
	$(BIN)/ruff check

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks

ui: $(STAMP)
	$(BIN)/fishmask ui

clean:
	rm -rf .venv artifacts reports timings .resume mlflow.db* mlartifacts
