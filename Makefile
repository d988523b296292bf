# make pretrain    train and check a small model on this machine
# make ui          Prefect's and MLflow's user interfaces, and a worker, until Ctrl-C
# make test        run the tests
# make docs        build the site of docs/ in build/site/
# make reference   update the tables of docs/reference/ from the code
PYTHON ?= python3
VENV := .venv
DONE := $(VENV)/.installed

.PHONY: pretrain ui test lint docs reference venv

pretrain: venv
	$(VENV)/bin/python flows/pretrain.py --size tiny

ui: venv
	$(VENV)/bin/zeroflow ui

test: venv
	$(VENV)/bin/python -m pytest

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: venv
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(VENV)/bin/zensical build --strict --clean

reference: venv
	$(VENV)/bin/python docs/reference_tables.py

venv: $(DONE)

$(DONE): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("zeroflow needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(DONE)
